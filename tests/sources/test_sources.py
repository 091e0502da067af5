from pathlib import Path

import pytest

from ggufkit.errors import CheckpointError, IntegrityError, SourceError, UsageError
from ggufkit.sources import resolve, sources
from ggufkit.sources._request import model_name
from ggufkit.values import Checkpoint
from tests.factory import break_pickle_only, make_checkpoint


def test_every_source_has_the_same_shape() -> None:
    found = sources()
    assert {"local", "hf", "huggingface", "ms", "modelscope", "demo"} <= set(found)
    for prefix, module in found.items():
        assert prefix in module.PREFIXES
        assert callable(module.fetch)
        assert module.__doc__


def test_local_directory(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "My Model", hidden=64)
    found = resolve(str(path), models_dir=tmp_path / "models")
    assert isinstance(found, Checkpoint)
    assert found.path == path
    assert found.name == "My-Model"
    assert found.origin == str(path)
    assert len(found.digest) == 64
    assert resolve(f"local:{path}", models_dir=tmp_path / "models") == found
    (path / "README.md").write_text("changed")
    assert resolve(str(path), models_dir=tmp_path / "models").digest != found.digest


def test_a_directory_wins_over_a_repository_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "ORG/Tiny", hidden=64)
    found = resolve("ORG/Tiny", models_dir=tmp_path / "models")
    assert isinstance(found, Checkpoint)
    assert found.path == Path("ORG/Tiny")


def test_local_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    assert resolve(str(path), models_dir=tmp_path / "models") == path


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"<html>")
    with pytest.raises(IntegrityError, match="not a GGUF") as caught:
        resolve(str(path), models_dir=tmp_path / "models")
    assert caught.value.exit_code == 3


def test_some_other_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(IntegrityError, match="not a GGUF") as caught:
        resolve(str(path), models_dir=tmp_path / "models")
    assert "checkpoint" in caught.value.hint


@pytest.mark.parametrize("model", ["nothing", "./ORG/NAME", "/no/where", "a/b/c"])
def test_nothing_there(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises((SourceError, CheckpointError)) as caught:
        resolve(model, models_dir=tmp_path / "models")
    assert caught.value.hint


def test_unknown_hub_and_empty_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'somehub' is not a hub") as caught:
        resolve("ORG/NAME", hub="somehub", models_dir=tmp_path)
    assert "huggingface, modelscope" in caught.value.hint
    with pytest.raises(UsageError, match="empty"):
        resolve("", models_dir=tmp_path)


def test_unknown_prefix(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'gh:', which is no source") as caught:
        resolve("gh:ORG/NAME", models_dir=tmp_path)
    assert "hf:" in caught.value.hint


def test_demo_takes_no_name_and_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no name or revision"):
        resolve("demo:x", models_dir=tmp_path)
    with pytest.raises(UsageError, match="takes no name or revision"):
        resolve("demo", revision="main", models_dir=tmp_path)


def test_options_reach_the_check(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny", hidden=64)
    break_pickle_only(path)
    with pytest.raises(CheckpointError, match="pickled weights only"):
        resolve(str(path), models_dir=tmp_path / "models")
    assert resolve(str(path), allow_pickle=True, models_dir=tmp_path / "models")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/a/b/Model-1.5B", "Model-1.5B"),
        ("ORG/NAME", "NAME"),
        ("/a/b c: d/", "b-c-d"),
        ("/", "model"),
        (".hidden", "hidden"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert model_name(text) == name
