"""What this machine is, as far as a native build depends on it."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

_CPUS = Path("/sys/devices/system/cpu")

# Instruction sets that `-march=native` may use. The kernel lists much more
# (mitigations, virtualization), and that part changes with kernel updates.
_X86_FEATURES = re.compile(
    r"sse|ssse|avx|fma|f16c|bmi|abm|popcnt|movbe|aes|vaes|gfni|pclmul|vpclmul|adx|sha|amx|xop|cx16"
)


def cpu_identity() -> str:
    """CPU model and instruction sets: a build made for another may not run here."""
    if sys.platform == "linux":
        return _from_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    if sys.platform == "darwin":
        return _from_sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _from_cpuinfo(text: str) -> str:
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        # The first CPU counts; the rest of a machine is the same, or near enough.
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or fields.get("CPU part") or platform.machine()
    if "flags" in fields:
        features = [f for f in fields["flags"].split() if _X86_FEATURES.match(f)]
    else:
        features = fields.get("Features", "").split()
    return f"{model}: {' '.join(sorted(features))}"


def _from_sysctl(name: str) -> str:
    size = ctypes.c_size_t(256)
    buffer = ctypes.create_string_buffer(size.value)
    call = ctypes.CDLL(None).sysctlbyname
    if call(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return ""
    return buffer.value.decode(errors="replace")


def available_memory_nbytes() -> int | None:
    """Memory that can be taken without swapping; None if the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return None


def total_memory_nbytes() -> int | None:
    """Memory of the machine; None if the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "darwin":
        return _number_from_sysctl("hw.memsize", ctypes.c_uint64(0))
    return None


def return_freed_memory() -> None:
    """Give the system what was freed but is kept for later, where the C library can.

    Threads leave holes of megabytes in the heap, which nobody else can use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's only
        if trim is not None:
            trim(0)


def physical_cores(cpus: Path = _CPUS) -> int | None:
    """Cores that this process may run on, not counting hyperthreads; None if not known.

    Args:
        cpus: the kernel's description of them, on Linux.
    """
    if sys.platform == "darwin":
        return _number_from_sysctl("hw.physicalcpu", ctypes.c_int32(0))
    if not hasattr(os, "sched_getaffinity"):
        return None
    places = [cpus / f"cpu{n}/topology/thread_siblings_list" for n in os.sched_getaffinity(0)]
    try:
        return len({place.read_text().strip() for place in places})
    except OSError:
        return None


def last_level_cache_nbytes(cpus: Path = _CPUS) -> int:
    """Bytes of all caches of the last level together; 0 if not known.

    In a virtual machine it is often the host's, shared with others.

    Args:
        cpus: the kernel's description of them, on Linux.
    """
    if sys.platform == "darwin":
        kinds = (_number_from_sysctl(f"hw.l{n}cachesize", ctypes.c_uint64(0)) for n in (3, 2))
        return next((nbytes for nbytes in kinds if nbytes), 0)
    caches: dict[tuple[int, str], int] = {}
    for place in cpus.glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = (
                (place / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
        except OSError:
            continue
        if found := re.fullmatch(r"(\d+)K", size):
            caches[int(level), shared] = int(found[1]) * 1024
    last = max((level for level, _ in caches), default=0)
    return sum(nbytes for (level, _), nbytes in caches.items() if level == last)


def _number_from_sysctl(name: str, value: Any) -> int | None:
    """A number that the system knows; ``value`` is of the C type that it has there."""
    size = ctypes.c_size_t(ctypes.sizeof(value))
    call = ctypes.CDLL(None).sysctlbyname
    done = call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return int(value.value) if done == 0 else None
