from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from ggufkit.errors import CheckpointError, SourceError, UsageError
from ggufkit.sources import resolve
from ggufkit.values import Checkpoint
from tests import factory
from tests.factory import make_checkpoint
from tests.sources.hubs import COMMIT, Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving("huggingface") as hub:
        # What setting HF_ENDPOINT before the import of huggingface_hub does.
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        hub.repositories["ORG/Tiny"] = make_checkpoint(tmp_path / "served", hidden=64, shards=2)
        yield hub


def fetch(tmp_path: Path, model: str = "hf:ORG/Tiny", **options: object) -> Checkpoint:
    result = resolve(model, models_dir=tmp_path / "models", **options)  # type: ignore[arg-type]
    assert isinstance(result, Checkpoint)
    return result


def refused(tmp_path: Path, model: str = "hf:ORG/Tiny", **options: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        fetch(tmp_path, model, **options)
    assert not list((tmp_path / "models").glob("*/*/manifest.json"))
    return caught.value


def test_fetches_what_conversion_needs_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    served = hub.repositories["ORG/Tiny"]
    for name in ("onnx/model.onnx", "consolidated.safetensors", "code.py", "photo.png"):
        (served / name).parent.mkdir(exist_ok=True)
        (served / name).write_bytes(b"x")
    checkpoint = fetch(tmp_path)
    assert checkpoint.name == "Tiny"
    assert checkpoint.origin == f"hf:ORG/Tiny@{COMMIT}"
    assert checkpoint.path.parent == tmp_path / "models/Tiny"
    got = {p.name for p in checkpoint.path.iterdir()} - {"manifest.json"}
    assert got == {p.name for p in served.iterdir() if p.is_file()} - {
        "consolidated.safetensors", "code.py", "photo.png",
    }  # fmt: skip
    for name in got:
        assert (checkpoint.path / name).read_bytes() == (served / name).read_bytes()


def test_the_second_time_nothing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    first = fetch(tmp_path)
    hub.asked.clear()
    assert fetch(tmp_path) == first
    assert hub.fetched() == []


def test_a_commit_that_is_here_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    first = fetch(tmp_path)
    hub.asked.clear()
    assert fetch(tmp_path, f"hf:ORG/Tiny@{COMMIT}") == first
    assert fetch(tmp_path, revision=COMMIT) == first
    assert hub.asked == []


def test_bare_name_goes_to_hugging_face(hub: Hub, tmp_path: Path) -> None:
    assert fetch(tmp_path, "ORG/Tiny").origin == f"hf:ORG/Tiny@{COMMIT}"


def test_unfinished_fetch_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.broken = {"model-00002-of-00002.safetensors"}
    refused(tmp_path)
    assert "model-00001-of-00002.safetensors" in hub.fetched()
    hub.broken.clear()
    hub.asked.clear()
    fetch(tmp_path)
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]


def test_a_broken_transfer_goes_on_where_it_stopped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    name = "model-00001-of-00002.safetensors"
    served = (hub.repositories["ORG/Tiny"] / name).read_bytes()
    hub.cut.add(name)
    checkpoint = fetch(tmp_path)
    assert (checkpoint.path / name).read_bytes() == served
    (again,) = hub.ranges
    assert 0 < int(again.removeprefix("bytes=").removesuffix("-")) <= len(served) // 2


def test_code_stops_the_fetch_before_the_weights(hub: Hub, tmp_path: Path) -> None:
    factory.break_auto_map(hub.repositories["ORG/Tiny"])
    with pytest.raises(CheckpointError, match=r"would run modeling_evil\.py"):
        fetch(tmp_path)
    assert not [name for name in hub.fetched() if name.endswith((".safetensors", ".py"))]
    checkpoint = fetch(tmp_path, trust_remote_code=True)
    assert (checkpoint.path / "modeling_evil.py").is_file()


def test_pickles_are_not_even_fetched(hub: Hub, tmp_path: Path) -> None:
    served = make_checkpoint(tmp_path / "pickled", hidden=64)
    factory.break_pickle_only(served)
    hub.repositories["ORG/Tiny"] = served
    with pytest.raises(CheckpointError, match="can run any code") as caught:
        fetch(tmp_path)
    assert "--allow-pickle" in caught.value.hint
    assert hub.fetched() == []
    checkpoint = fetch(tmp_path, allow_pickle=True)
    assert (checkpoint.path / "pytorch_model.bin").is_file()


def test_repository_of_ggufs(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs/a.gguf").write_bytes(b"GGUF")
    hub.repositories["ORG/Tiny"] = tmp_path / "ggufs"
    with pytest.raises(CheckpointError, match=r"holds GGUF files \(a\.gguf\)"):
        fetch(tmp_path)


def test_unknown_repository(hub: Hub, tmp_path: Path) -> None:
    error = refused(tmp_path, "hf:ORG/Ghost")
    assert "hf:ORG/Ghost does not exist" in error.message
    assert "ms:ORG/Ghost" in error.hint


def test_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    error = refused(tmp_path, "hf:ORG/Tiny@v9")
    assert "no revision 'v9'" in error.message
    assert "@REVISION" in error.hint


def test_gated_repository(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("ORG/Tiny")
    error = refused(tmp_path)
    assert "gated" in error.message
    assert "hf auth login" in error.hint


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused(tmp_path)
    assert "Hugging Face cannot be reached" in error.message
    assert "Check the network" in error.hint


def test_no_network_names_an_earlier_fetch(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError) as caught:
        fetch(tmp_path)
    assert f"hf:ORG/Tiny@{COMMIT}" in caught.value.hint


@pytest.mark.parametrize("model", ["hf:Tiny", "hf:", "hf:a/b/c", "hf:ORG/../x"])
def test_malformed_names(model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not of the form ORG/NAME"):
        fetch(tmp_path, model)


def test_two_revisions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Two revisions"):
        fetch(tmp_path, "hf:ORG/Tiny@a", revision="b")
