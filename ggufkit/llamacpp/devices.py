"""What llama.cpp can compute on: GPUs and other machines, and how much fits there."""

import ctypes
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufkit.errors import ToolError
from ggufkit.llamacpp import rpc
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
        kind: ``cpu``, ``gpu``, ``igpu``, ``accelerator``, ``rpc`` or ``other``.
        free_nbytes: memory that is free.
        total_nbytes: its memory.
        handle: its address in llama.cpp.
    """

    name: str
    description: str
    kind: str
    free_nbytes: int
    total_nbytes: int
    handle: int = field(default=0, repr=False, compare=False)


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
        ("ggml_backend_dev_backend_reg", pointer, pointer),
        ("ggml_backend_reg_by_name", pointer, ctypes.c_char_p),
        ("ggml_backend_reg_name", ctypes.c_char_p, pointer),
        ("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p),
        ("ggml_backend_register", None, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def devices(build: NativeBuild, endpoints: Sequence[str] = ()) -> tuple[Device, ...]:
    """All devices that this build of llama.cpp can use here.

    Args:
        build: the native build.
        endpoints: of the RPC servers to list. Others that were added are not even
            asked for their memory: they may be gone, which would end the process.
    """
    lib = _registry(build)
    handles = [lib.ggml_backend_dev_get(n) for n in range(lib.ggml_backend_dev_count())]
    return tuple(_device(lib, h) for h in handles if _is_meant(lib, h, endpoints))


def _is_remote(lib: Any, handle: Any) -> bool:
    registry = lib.ggml_backend_dev_backend_reg(handle)
    return bool(lib.ggml_backend_reg_name(registry) == b"RPC")


def _is_meant(lib: Any, handle: Any, endpoints: Sequence[str]) -> bool:
    name = lib.ggml_backend_dev_description(handle).decode(errors="replace")
    return not _is_remote(lib, handle) or name in endpoints


def _device(lib: Any, handle: Any) -> Device:
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    lib.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    number = int(lib.ggml_backend_dev_type(handle))
    kind = _KINDS[number] if number < len(_KINDS) else "other"
    # It calls every other machine a GPU.
    if _is_remote(lib, handle):
        kind = "rpc"
    return Device(
        name=lib.ggml_backend_dev_name(handle).decode(errors="replace"),
        description=lib.ggml_backend_dev_description(handle).decode(errors="replace"),
        kind=kind,
        free_nbytes=free.value,
        total_nbytes=total.value,
        handle=handle,
    )


def knows_servers(build: NativeBuild) -> bool:
    """Whether RPC servers were added in this process; they cannot be taken away again."""
    lib = _registry(build)
    return any(
        _is_remote(lib, lib.ggml_backend_dev_get(n)) for n in range(lib.ggml_backend_dev_count())
    )


def places_for_layers(build: NativeBuild, endpoints: Sequence[str] = ()) -> tuple[Device, ...]:
    """Where layers of a model can lie besides this machine's memory.

    Those of another machine come first, as llama.cpp has it, so that what layers
    hand on crosses the network seldom. A GPU that shares the machine's memory
    counts only where there is no other.

    Args:
        build: the native build. llama.cpp itself must not be asked: it says yes
            wherever RPC is built in, GPU or not.
        endpoints: of RPC servers that were added and are meant; others that were
            added for another model are not.
    """
    seen = devices(build, endpoints)
    remote = [d for d in seen if d.kind == "rpc"]
    here = [d for d in seen if d.kind == "gpu"] or [d for d in seen if d.kind == "igpu"]
    return (*remote, *here)


def limit_to(params: Any, build: NativeBuild, places: Sequence[Device]) -> Any:
    """Keep llama.cpp to some devices: it would take all, also another model's servers.

    Args:
        params: llama_model_params, to be changed.
        build: the native build.
        places: the devices meant.

    Returns:
        What has to be held until the model is loaded.
    """
    if not knows_servers(build):
        return None
    handles = [place.handle for place in places]
    listed = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
    params.devices = ctypes.addressof(listed)
    return listed


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


def add_rpc_servers(
    build: NativeBuild, endpoints: Sequence[str], connected: Container[str] = ()
) -> None:
    """Let llama.cpp compute on other machines too, where its RPC server runs.

    Call it before a model is loaded. Each server becomes a device like a GPU.

    Args:
        build: the native build.
        endpoints: ``HOST:PORT`` of each.
        connected: those that this process is the client of already, for another
            model; they answer nobody else.

    Raises:
        UsageError: if an endpoint is not ``HOST:PORT``.
        ToolError: if the build has no RPC, or a server cannot be used.
    """
    if not endpoints:
        return
    for endpoint in endpoints:
        rpc.parse_endpoint(endpoint)
    lib = _registry(build)
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    if not registry:
        raise ToolError(
            f"this build of llama.cpp ({build.backend}) has no RPC", "Run: ggufkit build --force"
        )
    place = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(place)
    for endpoint in endpoints:
        # llama.cpp ends the process where there is no server, or another's.
        if endpoint not in connected:
            rpc.check_server(endpoint)
        added = add(endpoint.encode())
        if not added:
            raise ToolError(f"the RPC server at {endpoint} has no devices")
        lib.ggml_backend_register(added)
