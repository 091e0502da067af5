"""What this machine is, as far as a native build depends on it."""

import ctypes
import platform
import re
import sys
from pathlib import Path

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
        size, value = ctypes.c_size_t(8), ctypes.c_uint64(0)
        call = ctypes.CDLL(None).sysctlbyname
        done = call(
            b"hw.memsize", ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
        )
        return value.value if done == 0 else None
    return None
