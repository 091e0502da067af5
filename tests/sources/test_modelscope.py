import time
from collections.abc import Iterator
from pathlib import Path

import modelscope_hub
import pytest

from ggufkit.errors import SourceError
from ggufkit.sources import resolve
from ggufkit.values import Checkpoint
from tests.factory import make_checkpoint
from tests.sources.hubs import Hub, serving


def use(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Point modelscope, which remembers its settings, to a hub, and let it retry at once."""
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms-cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    modelscope_hub.set_default_config(None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving("modelscope") as hub:
        use(hub.url, monkeypatch, tmp_path)
        hub.repositories["ORG/Tiny"] = make_checkpoint(tmp_path / "served", hidden=64, shards=2)
        yield hub


def fetch(tmp_path: Path, model: str = "ms:ORG/Tiny", **options: object) -> Checkpoint:
    result = resolve(model, models_dir=tmp_path / "models", **options)  # type: ignore[arg-type]
    assert isinstance(result, Checkpoint)
    return result


def test_fetches_what_conversion_needs(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    served = hub.repositories["ORG/Tiny"]
    (served / "photo.png").write_bytes(b"x")
    checkpoint = fetch(tmp_path)
    assert checkpoint.name == "Tiny"
    assert checkpoint.origin.startswith("ms:ORG/Tiny@master+")
    got = {p.name for p in checkpoint.path.iterdir()} - {"manifest.json"}
    assert got == {p.name for p in served.iterdir()} - {"photo.png"}
    assert "%|" not in capfd.readouterr().err, "bars are the command line's business"
    for name in got:
        assert (checkpoint.path / name).read_bytes() == (served / name).read_bytes()


def test_the_origin_names_this_very_state(hub: Hub, tmp_path: Path) -> None:
    first = fetch(tmp_path)
    assert fetch(tmp_path, first.origin) == first
    (hub.repositories["ORG/Tiny"] / "LICENSE").write_text("another licence\n")
    with pytest.raises(SourceError, match="is now at"):
        fetch(tmp_path, first.origin)
    assert fetch(tmp_path).digest != first.digest


def test_bare_name_with_the_hub_chosen(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert fetch(tmp_path, "ORG/Tiny", hub="modelscope").origin.startswith("ms:")
    monkeypatch.setenv("GGUFKIT_HUB", "modelscope")
    assert fetch(tmp_path, "ORG/Tiny").origin.startswith("ms:")


@pytest.mark.parametrize("model", ["ms:ORG/Ghost", "ms:ORG/Tiny@v9"])
def test_unknown_repository_or_revision(hub: Hub, tmp_path: Path, model: str) -> None:
    with pytest.raises(SourceError, match="or does not exist") as caught:
        fetch(tmp_path, model)
    assert "hf:ORG/" in caught.value.hint


def test_closed_repository(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("ORG/Tiny")
    with pytest.raises(SourceError, match="not open to everybody") as caught:
        fetch(tmp_path)
    assert "modelscope login" in caught.value.hint


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use("http://127.0.0.1:9", monkeypatch, tmp_path)
    with pytest.raises(SourceError, match="ModelScope cannot be reached") as caught:
        fetch(tmp_path)
    assert "Check the network" in caught.value.hint
