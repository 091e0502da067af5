"""Fixtures that need the native tools or the demo model.

They are made once per session, and never skipped: a test that needs a build
fails without one.
"""

import os

# Threads that wait by spinning make everything many times slower as soon as
# something else runs on the same cores; read when torch or llama.cpp loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit import cli
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.store import Store

# A shell starts background jobs with Ctrl-C ignored, and what they start inherits
# that; tests that send it need it to be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def native() -> NativeBuild:
    """The native build; `make test` makes it."""
    return toolchain.find_build()


@pytest.fixture(scope="session")
def shared_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory that tests of the whole way share, to save time."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def demo_gguf(shared_models: Path) -> Path:
    """The demo model's own GGUF (Q4_1), as published."""
    from ggufkit.sources.demo import demo_gguf

    return demo_gguf(Store(shared_models))


@pytest.fixture(scope="session")
def tiny_gguf(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with weights drawn by chance (Q4_0)."""
    from ggufkit import pipeline
    from tests.factory import make_checkpoint

    place = tmp_path_factory.mktemp("tiny")
    checkpoint = make_checkpoint(place / "tiny")
    (made,) = pipeline.convert(str(checkpoint), types=["q4_0"], models_dir=place / "models")
    return made.path


@pytest.fixture(scope="session")
def seeing(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model that sees images, and its projector (F32)."""
    from tests.factory import make_seeing_checkpoint

    place = tmp_path_factory.mktemp("seeing")
    checkpoint = make_seeing_checkpoint(place / "seeing", intermediate=128)
    model, mmproj = place / "seeing.gguf", place / "mmproj-seeing.gguf"
    for out in (model, mmproj):
        toolchain.convert_checkpoint(
            native,
            checkpoint,
            out,
            outtype="f32",
            name="seeing",
            mmproj=out is mmproj,
            log=place / "log",
        )
    return model, mmproj


@pytest.fixture(scope="session")
def tiny_types(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One such Llama as F32, Q8_0 and Q4_0."""
    from ggufkit import pipeline
    from tests.factory import make_checkpoint

    place = tmp_path_factory.mktemp("types")
    checkpoint = make_checkpoint(place / "tiny")
    types = ["f32", "q8_0", "q4_0"]
    made = pipeline.convert(str(checkpoint), types=types, models_dir=place / "models")
    return {m.type: m.path for m in made}


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.execute([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GGUFKIT_MODELS", "GGUFKIT_HUB", "GGUFKIT_TEXT_DIR"):
        if name in os.environ:
            monkeypatch.delenv(name)
