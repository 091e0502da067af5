import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from ggufkit.errors import DiskSpaceError, IntegrityError, UsageError
from ggufkit.progress import Silent
from ggufkit.store import MANIFEST, Store, canonical_json, read_manifest, require_space, stage_key
from ggufkit.values import Artifact, Json


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def make(
    store: Store, text: str = "result", *, option: int = 1, resume: bool = False, **more: object
) -> Artifact:
    def work(directory: Path) -> dict[str, Json]:
        (directory / "out.txt").write_text(text)
        (directory / ".scratch").write_text("not published")
        return {"length": len(text)}

    return store.run(
        "stage",
        version=1,
        model="model",
        inputs={"in": "abc"},
        options={"option": option},
        tool={"tool": "1"},
        work=more.get("work", work),  # type: ignore[arg-type]
        resume=resume,
        progress=more.get("progress", Silent()),  # type: ignore[arg-type]
    )


def test_publishes_outputs_with_their_digests(tmp_path: Path) -> None:
    artifact = make(Store(tmp_path))
    assert not artifact.reused
    assert artifact.file(".txt").read_text() == "result"
    assert sorted(p.name for p in artifact.path.iterdir()) == [MANIFEST, "out.txt"]
    manifest = read_manifest(artifact.path / MANIFEST)
    assert manifest == artifact.manifest
    assert manifest.facts == {"length": 6}
    assert manifest.outputs["out.txt"].nbytes == 6
    assert [p.name for p in (tmp_path / "model").iterdir()] == [artifact.path.name]


def test_the_same_key_is_reused_and_another_is_not(tmp_path: Path) -> None:
    first = make(Store(tmp_path))
    again = make(Store(tmp_path), "never written")
    assert again.reused
    assert again.path == first.path
    assert again.file().read_text() == "result"
    assert make(Store(tmp_path), option=2).path != first.path


def test_a_changed_output_is_kept_aside_and_made_again(tmp_path: Path) -> None:
    first = make(Store(tmp_path))
    first.file().write_text("edited")
    listener = Listener()
    again = make(Store(tmp_path), progress=listener)
    assert not again.reused
    assert again.file().read_text() == "result"
    assert (first.path.parent / f"{first.path.name}.changed" / "out.txt").read_text() == "edited"
    assert "has changed" in listener.warnings[0]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stage": 1}'])
def test_a_broken_manifest_counts_as_nothing(tmp_path: Path, damage: str) -> None:
    first = make(Store(tmp_path))
    (first.path / MANIFEST).write_text(damage)
    with pytest.raises(IntegrityError):
        read_manifest(first.path / MANIFEST)
    assert not make(Store(tmp_path)).reused


@pytest.mark.parametrize("resume", [False, True])
def test_failed_work_publishes_nothing(tmp_path: Path, resume: bool) -> None:
    def work(directory: Path) -> dict[str, Json]:
        (directory / "out.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(Store(tmp_path), work=work, resume=resume)
    left = [p.name for p in (tmp_path / "model").iterdir()]
    assert len(left) == resume
    assert all(name.endswith(".partial") for name in left)
    assert not list(Store(tmp_path).artifacts())
    assert make(Store(tmp_path)).file().read_text() == "result"


def test_resumed_work_finds_what_was_left(tmp_path: Path) -> None:
    def killed(directory: Path) -> dict[str, Json]:
        (directory / "first.txt").write_text("first")
        raise KeyboardInterrupt

    def goes_on(directory: Path) -> dict[str, Json]:
        assert (directory / "first.txt").read_text() == "first"
        (directory / "second.txt").write_text("second")
        return {}

    with pytest.raises(KeyboardInterrupt):
        make(Store(tmp_path), work=killed, resume=True)
    assert set(make(Store(tmp_path), work=goes_on, resume=True).manifest.outputs) == {
        "first.txt",
        "second.txt",
    }


@pytest.mark.parametrize("step", ["manifest", "publish"])
def test_a_failure_at_each_step_of_publishing_converges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    whole = make(Store(tmp_path / "whole"))

    real = os.replace

    def broken(source: Path, target: Path) -> None:
        name = Path(target).name
        if (name == MANIFEST) == (step == "manifest") and not name.startswith(".digests"):
            raise OSError(errno.EIO, "injected")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("ggufkit.store.os.replace", broken)
        with pytest.raises(OSError, match="injected"):
            make(Store(tmp_path / "broken"))
    assert not list(Store(tmp_path / "broken").artifacts())
    again = make(Store(tmp_path / "broken"))
    assert again.manifest.outputs == whole.manifest.outputs
    assert again.manifest.key == whole.manifest.key


def test_a_disk_that_fills_up_is_told(tmp_path: Path) -> None:
    def work(directory: Path) -> dict[str, Json]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskSpaceError, match="filled up"):
        make(Store(tmp_path), work=work)
    assert not list((tmp_path / "model").iterdir())


def test_space_is_forecast(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "a crumb")
    with pytest.raises(DiskSpaceError, match=r"a mountain needs 1048576\.00 GiB .* GiB are free"):
        require_space(tmp_path, 1 << 50, "a mountain")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_a_model_name_is_one_component(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Store(tmp_path).run(
            "s", version=1, model=name, inputs={}, options={}, tool={}, work=lambda _: {}
        )


def test_links_and_exports_show_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    artifact = make(store)
    link = store.link(artifact.file())
    assert link == tmp_path / "models" / "model" / "out.txt"
    assert link.is_symlink()
    assert not Path(os.readlink(link)).is_absolute()
    shutil.move(tmp_path / "models", tmp_path / "moved")
    moved = tmp_path / "moved" / "model"
    assert (moved / "out.txt").read_text() == "result"

    store = Store(tmp_path / "moved")
    exported = store.export(artifact, moved / artifact.path.name / "out.txt", tmp_path / "out")
    assert exported.read_text() == "result"
    assert not exported.is_symlink()
    manifest = read_manifest(tmp_path / "out" / f"out.txt.{MANIFEST}")
    assert manifest.outputs == artifact.manifest.outputs


def test_a_link_never_replaces_a_users_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = make(store)
    (tmp_path / "model" / "out.txt").write_text("mine")
    assert store.link(artifact.file()) == artifact.file()
    assert (tmp_path / "model" / "out.txt").read_text() == "mine"


def test_digests_follow_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    store = Store(tmp_path)
    first = store.digest(file)
    assert Store(tmp_path).digest(file) == first
    file.write_text("two")
    assert Store(tmp_path).digest(file) != first
    (tmp_path / ".digests.json").write_text("not json")
    assert Store(tmp_path).digest(file) == store.digest(file)


def test_keys_do_not_hang_on_order() -> None:
    assert stage_key("s", 1, {}, {"a": 1, "b": 2}, {}) == stage_key(
        "s", 1, {}, {"b": 2, "a": 1}, {}
    )
    assert stage_key("s", 1, {}, {"a": 1}, {}) != stage_key("s", 2, {}, {"a": 1}, {})
    assert canonical_json({"b": (1, 2), "a": Path("x")}) == '{"a":"x","b":[1,2]}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))
    json.loads(canonical_json(["ä"]))
