"""What of a library's failure is told, and what is not hidden."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ggufkit
from ggufkit.errors import (
    CheckpointError,
    DiskSpaceError,
    IntegrityError,
    SourceError,
    UsageError,
)
from ggufkit.foreign import foreign, reason_of

OURS = """
import importlib
import json
from ggufkit.foreign import foreign

class Ours(Exception):
    pass

def inside(work):
    with foreign("it fails", "do this"):
        return work()

def mistake():
    return None.attribute

def library():
    return json.loads("{")

def compiled():
    return memoryview(b"abc").cast("i")

def wrong_call():
    return json.loads()

def called_back():
    return json.loads("{}", object_hook=lambda _: [][0])

def called_back_in_vain():
    def hook(_):
        raise Ours("end")
    return json.loads("{}", object_hook=hook)
"""
"""A module that lies, as far as Python can tell, in the package."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("ours") / "written.py"
    path.write_text(OURS)
    made = ModuleType("ggufkit.written")
    code = compile(OURS, str(Path(ggufkit.__file__).parent / "written.py"), "exec")
    exec(code, made.__dict__)
    return made


def test_a_librarys_failure_is_told_with_the_next_step(ours: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        ours.inside(ours.library)
    assert caught.value.message.startswith("it fails: Expecting property name")
    assert caught.value.hint == "do this"
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def test_a_compiled_library_has_no_lines(ours: Any) -> None:
    def raising() -> None:
        raise RuntimeError("no room")

    with pytest.raises(CheckpointError, match="it fails: no room"):
        ours.inside(raising)
    with pytest.raises(TypeError):  # of this kind, it may as well be our call
        ours.inside(ours.compiled)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mistake", AttributeError), ("wrong_call", TypeError), ("called_back", IndexError)],
)
def test_our_mistakes_keep_their_traceback(ours: Any, name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        ours.inside(getattr(ours, name))


def test_our_exceptions_pass(ours: Any) -> None:
    with pytest.raises(ours.Ours):
        ours.inside(ours.called_back_in_vain)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, UsageError])
def test_interruptions_and_errors_of_ours_pass(kind: type[BaseException]) -> None:
    with pytest.raises(kind), foreign("it fails", ""):
        raise kind("x")


def test_a_panic_of_rust_is_told() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with (
        pytest.raises(IntegrityError, match="it fails: index out of bounds"),
        foreign("it fails", "", error=IntegrityError),
    ):
        raise panic("index out of bounds")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("\n one\ntwo"), "one"),
        (ValueError("Validation error for field 'x':\n    TypeError: y"), "Validation error for "),
        (ValueError("for field 'x':\n    TypeError: y"), "for field 'x': TypeError: y"),
        (KeyError("model"), "KeyError: 'model'"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("x" * 1000), "x" * 300 + "..."),
    ],
)
def test_a_reason_is_one_line(error: Exception, reason: str) -> None:
    assert reason_of(error).startswith(reason)
    assert "\n" not in reason_of(error)


def test_a_file_that_a_library_cannot_write(tmp_path: Path) -> None:
    import torch

    from ggufkit.scaling.fold import write_scales

    with pytest.raises(DiskSpaceError, match=r"nowhere/scales\.safetensors cannot be") as told:
        write_scales(tmp_path / "nowhere" / "scales.safetensors", {"a": torch.ones(2)})
    assert "disk is full" in told.value.hint


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_a_hub_may_fail_in_a_way_of_its_own(hub: str) -> None:
    """Hugging Face's transfers end with a RuntimeError of their own library, for instance."""
    from ggufkit.sources import _request

    source = importlib.import_module(f"ggufkit.sources.{hub}")
    request = _request.Request.__new__(_request.Request)
    with (
        pytest.raises(SourceError, match="org/name cannot be fetched: Data processing error"),
        source._translated("org/name", "main", request),
    ):
        raise RuntimeError("Data processing error")
    with pytest.raises(KeyboardInterrupt), source._translated("org/name", "main", request):
        raise KeyboardInterrupt
