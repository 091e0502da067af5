"""The binding and the libraries it runs on, and what the context takes."""

import os
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp import host, runtime
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.pin import read_pin
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Silent


class Warnings(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, message: str) -> None:
        self.told.append(message)


# The library.


def test_the_library_is_that_of_the_native_build(native: NativeBuild) -> None:
    runtime.load_llama_cpp(native)
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux tells what is loaded
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if ".so" in line}
        ours = [p for p in loaded if "/libllama" in p]
        assert ours
        assert {Path(p).parent for p in ours} == {native.bin.resolve()}
    assert os.environ["LLAMA_CPP_LIB_PATH"] == str(native.bin)


def test_another_version_of_the_binding_is_refused(
    native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.packages, "version", lambda name: "0.2.1")
    with pytest.raises(ToolError, match=f"is 0.2.1, but {read_pin().version} is needed") as caught:
        runtime.load_llama_cpp(native)
    assert caught.value.hint == "Run: ggufkit build"


def test_a_missing_binding_is_said(native: NativeBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runtime.packages, "version", missing)
    with pytest.raises(ToolError, match="llama-cpp-python is not installed") as caught:
        runtime.load_llama_cpp(native)
    assert caught.value.hint == "Run: ggufkit build"


def test_another_commit_of_llama_cpp_is_refused(native: NativeBuild) -> None:
    with pytest.raises(ToolError, match=f"fits llama.cpp {read_pin().commit} alone") as caught:
        runtime.load_llama_cpp(replace(native, commit="deadbeef0"))
    assert "deadbeef0" in caught.value.message
    assert "ggufkit build" in caught.value.hint


def test_a_binding_that_runs_on_other_libraries_is_refused(
    native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.load_llama_cpp(native)
    assert "llama_cpp" in sys.modules
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/elsewhere")
    with pytest.raises(ToolError, match="imported before, with other libraries"):
        runtime.load_llama_cpp(native)


# The context.


def test_the_context_is_the_trained_one_within_reason(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, warnings = Metadata(read_gguf(demo_gguf)), Warnings()
    assert runtime.context_size(model, None, warnings) == 8192
    assert runtime.context_size(model, 16384 // 2, warnings) == 8192
    monkeypatch.setattr(runtime, "DEFAULT_CONTEXT", 256)
    assert runtime.context_size(model, None, warnings) == 256
    assert warnings.told == []
    assert runtime.context_size(model, 8200, warnings) == 8200
    assert "8200 tokens is more than the 8192" in warnings.told[0]


def test_a_context_without_room_is_refused_before_it_is_tried(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Metadata(read_gguf(demo_gguf))
    cache = runtime.cache_nbytes_per_token(model)
    assert cache == 30 * 3 * (64 + 64) * 2  # layers, heads, keys and values, F16
    monkeypatch.setattr(host, "total_memory_nbytes", lambda: 4096 * (cache + 48))
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 1024 * (cache + 48))
    warnings = Warnings()
    with pytest.raises(ToolError, match=r"a context of 4097 tokens takes 0\.1 GiB") as caught:
        runtime.check_room(model, 4097, cache_nbytes=cache, progress=warnings)
    assert caught.value.hint.endswith("-c 2048")
    runtime.check_room(model, 1025, cache_nbytes=cache, progress=warnings)
    assert "only 0.0 GiB are free" in warnings.told.pop()
    runtime.check_room(model, 1024, cache_nbytes=cache, progress=warnings)
    assert warnings.told == []


# Grammars.


def test_a_schema_becomes_a_grammar(native: NativeBuild) -> None:
    grammar = runtime.schema_grammar({"type": "object", "properties": {"a": {"const": 1}}}, native)
    assert "root ::=" in grammar


@pytest.mark.parametrize("schema", [{"type": "thing"}, {"$ref": "#/nowhere"}, [1], 3])
def test_what_is_no_schema_is_refused(native: NativeBuild, schema: object) -> None:
    with pytest.raises(UsageError, match="cannot become a grammar"):
        runtime.schema_grammar(schema, native)
