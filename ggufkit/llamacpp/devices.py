"""What llama.cpp can compute on: GPUs and other machines, and how much fits there."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp.toolchain import NativeBuild

_REGISTRY = ("libggml.so", "libggml.dylib", "ggml.dll")
_KINDS = ("cpu", "gpu", "igpu", "accelerator")
"""``enum ggml_backend_dev_type`` of ggml-backend.h, by number."""
RESERVE_NBYTES = 512 << 20
"""Left free on a GPU, for compute buffers and the driver."""


@dataclass(frozen=True)
class Device:
    """Something that computes.

    Attributes:
        name: as llama.cpp calls it, such as ``CUDA0``.
        description: the maker's name of it.
        kind: ``cpu``, ``gpu``, ``igpu``, ``accelerator`` or ``other``.
        free_nbytes: memory that is free.
        total_nbytes: its memory.
    """

    name: str
    description: str
    kind: str
    free_nbytes: int
    total_nbytes: int


def _registry(build: NativeBuild) -> Any:
    path = next((p for name in _REGISTRY if (p := Path(build.bin) / name).exists()), None)
    if path is None:
        raise ToolError(f"there is no libggml in {build.bin}", "Run: ggufkit build")
    lib = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, *arguments in (
        ("ggml_backend_dev_count", size),
        ("ggml_backend_dev_get", pointer, size),
        ("ggml_backend_dev_name", ctypes.c_char_p, pointer),
        ("ggml_backend_dev_description", ctypes.c_char_p, pointer),
        ("ggml_backend_dev_type", ctypes.c_int, pointer),
        ("ggml_backend_dev_memory", None, pointer, ctypes.POINTER(size), ctypes.POINTER(size)),
        ("ggml_backend_reg_by_name", pointer, ctypes.c_char_p),
        ("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p),
        ("ggml_backend_register", None, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def devices(build: NativeBuild) -> tuple[Device, ...]:
    """All devices that this build of llama.cpp can use here."""
    lib = _registry(build)
    handles = [lib.ggml_backend_dev_get(n) for n in range(lib.ggml_backend_dev_count())]
    return tuple(_device(lib, handle) for handle in handles)


def _device(lib: Any, handle: Any) -> Device:
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    lib.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    kind = int(lib.ggml_backend_dev_type(handle))
    return Device(
        name=lib.ggml_backend_dev_name(handle).decode(errors="replace"),
        description=lib.ggml_backend_dev_description(handle).decode(errors="replace"),
        kind=_KINDS[kind] if kind < len(_KINDS) else "other",
        free_nbytes=free.value,
        total_nbytes=total.value,
    )


def fitting_layers(free_nbytes: int, *, model_nbytes: int, layers: int, cache_nbytes: int) -> int:
    """How many layers fit into a GPU's free memory; ``layers + 1`` includes the output.

    Every layer is counted as equally large, with its share of the KV cache, and
    the output matrix as one more layer.

    Args:
        free_nbytes: free memory of all GPUs together.
        model_nbytes: size of the model's file.
        layers: blocks of the model.
        cache_nbytes: size of the whole KV cache.
    """
    one = (model_nbytes + cache_nbytes) / (layers + 1)
    return max(0, min(layers + 1, int((free_nbytes - RESERVE_NBYTES) / one)))


def add_rpc_servers(build: NativeBuild, endpoints: tuple[str, ...]) -> None:
    """Let llama.cpp compute on other machines too, where its RPC server runs.

    Call it before a model is loaded. Each server becomes a device like a GPU.

    Args:
        build: the native build.
        endpoints: ``HOST:PORT`` of each.

    Raises:
        UsageError: if an endpoint is not ``HOST:PORT``.
        ToolError: if the build has no RPC, or a server does not answer.
    """
    for endpoint in endpoints:
        host, colon, port = endpoint.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise UsageError(f"'{endpoint}' is not HOST:PORT")
    if not endpoints:
        return
    lib = _registry(build)
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    if not registry:
        raise ToolError(
            f"this build of llama.cpp ({build.backend}) has no RPC",
            "Build one with the flag -DGGML_RPC=ON",
        )
    place = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(place)
    for endpoint in endpoints:
        added = add(endpoint.encode())
        if not added:
            raise ToolError(f"the RPC server at {endpoint} does not answer")
        lib.ggml_backend_register(added)
