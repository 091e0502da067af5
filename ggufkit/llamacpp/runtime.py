"""llama-cpp-python on the libraries that ggufkit built. The only importer of it.

Its C interface is used, not its ``Llama`` class: that one falls back to a
Llama-2 chat format in silence, replaces templates it believes to recognise,
and cuts tokens that are longer than 32 bytes.
"""

import ctypes
import json
import math
import os
import re
import sys
from collections import deque
from importlib import metadata as packages
from types import ModuleType
from typing import Any

from ggufkit.errors import GgufkitError, ToolError, UsageError
from ggufkit.llamacpp import host, toolchain
from ggufkit.llamacpp.metadata import Metadata, split_count, split_parts
from ggufkit.llamacpp.pin import COMMIT_LENGTH, read_pin
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT, Progress

DEFAULT_CONTEXT = 8192
"""Context if none is asked for: a trained context of 128k would take many
gigabytes of memory that a chat does not need."""
ALL_LAYERS = -1
_CELL_NBYTES = 48
"""What llama.cpp writes down about each token of context (``llama-kv-cells.h``)."""
_GIB = 1 << 30
_ERROR_LEVEL = 4
"""``GGML_LOG_LEVEL_ERROR`` of ggml.h; the binding's own table is an older one."""
_BUILD_HINT = "Run: ggufkit build"
_LIBMTMD = ("libmtmd.so", "libmtmd.dylib", "mtmd.dll", "libmtmd.dll")
_LIBGGML = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")

_errors: deque[str] = deque(maxlen=8)
_kept: list[Any] = []
"""C callbacks: ctypes would free them while the library still calls them."""


class ContextError(GgufkitError):
    """The conversation does not fit into the context."""


def load_llama_cpp(build: NativeBuild | None = None) -> ModuleType:
    """Import llama-cpp-python so that it runs on the native build.

    Its structures mirror one commit of llama.cpp by hand; on any other, calls
    would corrupt memory. So both must be exactly the pin's.

    Raises:
        ToolError: if the binding or the build is missing or another than the pin's.
    """
    build = build or toolchain.find_build()
    pin = read_pin()
    try:
        version = packages.version(pin.package)
    except packages.PackageNotFoundError as error:
        raise ToolError(f"{pin.package} is not installed", _BUILD_HINT) from error
    if version != pin.version:
        raise ToolError(f"{pin.package} is {version}, but {pin.version} is needed", _BUILD_HINT)
    if build.commit[:COMMIT_LENGTH] != pin.commit:
        raise ToolError(
            f"{pin.package} {version} fits llama.cpp {pin.commit} alone, "
            f"but the native build is of {build.commit}",
            "Chat with the pinned build: unset GGUFKIT_NATIVE, then run: ggufkit build",
        )
    wanted = str(build.bin)
    if "llama_cpp" in sys.modules and os.environ.get("LLAMA_CPP_LIB_PATH") != wanted:
        raise ToolError(
            "llama_cpp was imported before, with other libraries than those of the native build",
            f"Import it through ggufkit, or set LLAMA_CPP_LIB_PATH={wanted} first",
        )
    os.environ["LLAMA_CPP_LIB_PATH"] = wanted
    import llama_cpp
    from llama_cpp import llama_cpp as library

    if not _kept:
        callback = library.llama_log_callback(_log)
        _kept.append(callback)
        library.llama_log_set(callback, ctypes.c_void_p(0))
        library.llama_backend_init()
        _explain_aborts(build)
    assert llama_cpp.__version__ == version
    module: ModuleType = library
    return module


def load_mtmd(build: NativeBuild | None = None) -> ModuleType:
    """Import the binding's part for images on the native build's libmtmd.

    Raises:
        ToolError: if the build has none, or as :func:`load_llama_cpp`.
    """
    build = build or toolchain.find_build()
    require_mtmd(build)
    library = load_llama_cpp(build)
    os.environ["MTMD_CPP_LIB"] = str(build.bin)
    from llama_cpp import mtmd_cpp

    module: ModuleType = mtmd_cpp
    module.mtmd_helper_log_set(_kept[0], ctypes.c_void_p(0))
    assert library is module.llama_cpp
    return module


def require_mtmd(build: NativeBuild) -> None:
    """See that a build has llama.cpp's library for images.

    Raises:
        ToolError: if it has none.
    """
    if not any((build.bin / name).exists() for name in _LIBMTMD):
        raise ToolError(
            "this build of llama.cpp has no library for images (libmtmd)",
            "Run: ggufkit build --force",
        )


def _log(level: int, text: bytes, _: Any) -> None:
    """Keep errors; llama.cpp prints a hundred lines for a model otherwise."""
    if level == _ERROR_LEVEL and text.strip():
        _errors.append(text.decode("utf-8", "replace").strip())


def _explain_aborts(build: NativeBuild) -> None:
    """Say why, where llama.cpp ends the process; it would start a debugger instead."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    callback = kind(_abort)
    _kept.append(callback)
    path = next(p for name in _LIBGGML if (p := build.bin / name).exists())
    setter = ctypes.CDLL(str(path)).ggml_set_abort_callback
    setter.restype, setter.argtypes = ctypes.c_void_p, [kind]
    setter(callback)


def _abort(message: bytes) -> None:
    """Called on any thread, and when it returns, the process is ended."""
    told = message.decode("utf-8", "replace")
    if "ggml-rpc" not in told:
        os.write(2, f"llama.cpp gave up: {told}\n".encode())
        return
    # No bug, and nothing can go on: the layers that lay there are gone.
    os.write(2, f"\nerror: {_LOST_SERVER}\nhint: {_LOST_SERVER_HINT}\n".encode())
    _restore_terminal()
    os._exit(1)


_LOST_SERVER = "an RPC server went away, or answered nonsense; its layers of the model are lost"
_LOST_SERVER_HINT = "Look at the machines named by --rpc, start ggufkit rpc there, and begin again"


def _restore_terminal() -> None:
    """Let keys be echoed and the cursor be seen again; nobody else will now."""
    if os.name != "posix" or not os.isatty(0):
        return
    import termios

    state = termios.tcgetattr(0)
    state[3] |= termios.ECHO | termios.ICANON
    termios.tcsetattr(0, termios.TCSANOW, state)
    os.write(2, b"\x1b[?25h")


def drain_errors() -> str:
    """What llama.cpp told as errors since it was last asked."""
    told = "; ".join(dict.fromkeys(_errors))
    _errors.clear()
    return told


def schema_grammar(schema: object, build: NativeBuild | None = None) -> str:
    """The grammar (GBNF) of what a JSON schema allows.

    Args:
        schema: the schema, parsed.
        build: the native build.

    Raises:
        UsageError: if it is not a schema, or says what a grammar cannot.
    """
    load_llama_cpp(build)
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    _check_schema(schema)
    try:
        grammar: str = json_schema_to_gbnf(json.dumps(schema))
    except Exception as error:  # it raises whatever comes its way
        raise UsageError(f"the JSON schema cannot become a grammar: {error!r}") from error
    # It lets strings have line breaks, which JSON does not.
    grammar = grammar.replace(r'char ::= [^"\\] |', r'char ::= [^"\\\x7F\x00-\x1F] |')
    return _NESTED_OPTIONS.sub(lambda m: f"{m[1]}{{0,{m[0].count('(')}}}", grammar)


_NESTED_OPTIONS = re.compile(r"\(([a-z][\w-]*) (?:\(\1 )*\(\1\)\?(?: ?\)\?)+")
"""How the converter spells ``item{0,n}``: ``(item (item (item)?)?)?``, which
nests too deep for llama.cpp where n is large."""
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_MOST_REPEATED = 2000
"""``MAX_REPETITION_THRESHOLD`` of llama-grammar.cpp."""
_LARGEST_SCHEMA = 20_000


def _check_schema(schema: object) -> None:
    """A small schema can ask for a grammar of gigabytes."""
    todo, seen = [schema], 0
    while todo:
        value = todo.pop()
        seen += 1
        if seen > _LARGEST_SCHEMA:
            raise UsageError(f"the JSON schema has more than {_LARGEST_SCHEMA} parts")
        if isinstance(value, dict):
            todo += value.values()
            counts = [value[name] for name in _COUNTS if isinstance(value.get(name), int)]
            pattern = value.get("pattern")
            if isinstance(pattern, str):
                # Repetitions may be nested, so what they come to together counts.
                given = re.findall(r"(?<=[{,])\s*(\d{1,18})", pattern)
                counts.append(math.prod(max(1, int(n)) for n in given[:_LARGEST_SCHEMA]))
            if max(counts, default=0) > _MOST_REPEATED:
                raise UsageError(
                    f"the JSON schema repeats something {max(counts)} times; "
                    f"a grammar can do {_MOST_REPEATED}"
                )
        elif isinstance(value, list):
            todo += value


def context_size(metadata: Metadata, wanted: int | None, progress: Progress = SILENT) -> int:
    """Tokens of context: those wanted, or the trained ones within :data:`DEFAULT_CONTEXT`.

    Args:
        metadata: of the model.
        wanted: what the user asked for.
        progress: warned if that is more than the model was trained with.
    """
    trained = metadata.trained_context
    if wanted is None:
        return min(trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if trained and wanted > trained:
        progress.warn(
            f"a context of {wanted} tokens is more than the {trained} that the model "
            "was trained with; answers may get worse"
        )
    return wanted


def check_room(
    metadata: Metadata, cells: int, *, cache_nbytes: float, progress: Progress = SILENT
) -> None:
    """Forecast, because a system that is out of memory ends programs without a word.

    Args:
        metadata: of the model.
        cells: tokens of context altogether.
        cache_nbytes: bytes of keys and values of one token in this machine's
            memory; 0 if they lie elsewhere or are not known.
        progress: warned if it is more than is free.

    Raises:
        ToolError: if it is more than the machine has.
    """
    per_token = _CELL_NBYTES + cache_nbytes
    need = cells * per_token
    total, available = host.total_memory_nbytes(), host.available_memory_nbytes()
    told = f"a context of {cells} tokens takes {need / _GIB:.1f} GiB of memory"
    if total and need > total:
        raise ToolError(
            f"{told}, and this machine has {total / _GIB:.1f} GiB",
            f"Ask for a smaller one: -c {int(total // 2 // per_token)}",
        )
    if available and need > available:
        progress.warn(f"{told}, and only {available / _GIB:.1f} GiB are free")


def cache_nbytes_per_token(metadata: Metadata) -> int:
    """Bytes of keys and values (F16) of one token; 0 where attention is of another kind."""
    layers = metadata.of_architecture("block_count")
    heads = metadata.of_architecture("attention.head_count_kv")
    width = metadata.of_architecture("embedding_length")
    queries = metadata.of_architecture("attention.head_count")
    other = ("attention.kv_lora_rank", "ssm.state_size", "wkv.head_size")
    if any(metadata.of_architecture(key) for key in other):
        return 0
    if not all(isinstance(n, int) and n > 0 for n in (layers, heads, width, queries)):
        return 0
    key = metadata.of_architecture("attention.key_length") or width // queries
    value = metadata.of_architecture("attention.value_length") or width // queries
    return int(layers * heads * (key + value) * 2)


def no_gpu_message(backend: str) -> str:
    """Why layers cannot go to a GPU, and what would help."""
    if backend == "cpu":
        return (
            "this is a CPU-only build of llama.cpp, so -ngl changes nothing; "
            "for a GPU: ggufkit build --backend cuda (or vulkan, metal, hip)"
        )
    return (
        f"this build of llama.cpp is for {backend}, but sees no such GPU here, "
        "so -ngl changes nothing; what is seen: ggufkit doctor"
    )


def check_parts(metadata: Metadata) -> None:
    """A model in parts is loaded by its first, and needs all."""
    if split_count(metadata.gguf) < 2:
        return
    parts = split_parts(metadata.gguf)
    if metadata.get("split.no"):
        raise UsageError(
            f"{metadata.gguf.path.name} is a later part", f"Name the first: {parts[0]}"
        )
    missing = [p.name for p in parts if not p.exists()]
    if missing:
        raise UsageError(f"parts of the model are missing: {', '.join(missing)}")
