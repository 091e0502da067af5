"""Is all here that ggufkit needs, and what to do where it is not."""

import importlib.metadata
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ggufkit import settings
from ggufkit.errors import GgufkitError
from ggufkit.llamacpp import building, host, toolchain
from ggufkit.llamacpp.pin import read_pin
from ggufkit.llamacpp.toolchain import NativeBuild

State = Literal["ok", "warning", "problem"]

_GIB = 1 << 30
_PYTHON_WANTED = (3, 11)
_MODELS_WARN_NBYTES = 5 * _GIB
_CACHE_WARN_NBYTES = 2 * _GIB
_MEMORY_WARN_NBYTES = 2 * _GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what, such as ``cmake``.
        state: ``ok``; ``warning``, where something works less well; or ``problem``.
        detail: what was seen.
        remedy: what to do about it; empty if it is ok.
    """

    subject: str
    state: State
    detail: str
    remedy: str = ""


def examine(models_dir: Path | None = None) -> tuple[Finding, ...]:
    """Look at Python, packages, native build, binding, GPUs, disk and memory.

    Args:
        models_dir: the models directory; that of the settings if None.
    """
    build, why_not = _find_build()
    return (
        _python(),
        *_packages(),
        # Without a build they are needed now; with one, for the next build only.
        _asked("C++ compiler", building.find_compiler, "warning" if build else "problem"),
        _asked("cmake", building.require_cmake, "warning" if build else "problem"),
        *([why_not] if why_not else []),
        *(_native(build) if build else []),
        _binding(build),
        *_gpus(build),
        _disk("disk, models", models_dir or settings.models_dir(), _MODELS_WARN_NBYTES),
        _disk("disk, cache", settings.cache_dir(), _CACHE_WARN_NBYTES),
        _memory(),
    )


def _python() -> Finding:
    detail = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info < _PYTHON_WANTED:
        wanted = ".".join(map(str, _PYTHON_WANTED))
        return Finding("python", "problem", detail, f"Install Python {wanted} or newer")
    if sys.prefix == sys.base_prefix:
        return Finding(
            "python",
            "warning",
            f"{detail}, which is no virtual environment",
            "Use one, so that packages cannot clash: python3 -m venv .venv",
        )
    return Finding("python", "ok", detail)


def _packages() -> Iterator[Finding]:
    for requirement in requirements():
        name, least = _split_requirement(requirement)
        remedy = f"Run: {sys.executable} -m pip install '{requirement}'"
        try:
            # Metadata only: importing torch to learn its version takes seconds.
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(f"package {name}", "problem", "not installed", remedy)
            continue
        if _numbers(version) < _numbers(least):
            yield Finding(f"package {name}", "problem", f"{version}, older than {least}", remedy)
        else:
            yield Finding(f"package {name}", "ok", version)


def requirements() -> list[str]:
    """What ggufkit needs, such as ``numpy>=1.26``; without extras."""
    try:
        needed = importlib.metadata.requires("ggufkit") or []
    except importlib.metadata.PackageNotFoundError:
        # A work tree that is not installed.
        path = Path(__file__).resolve().parent.parent / "pyproject.toml"
        needed = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [r for r in needed if "extra ==" not in r]


def _split_requirement(requirement: str) -> tuple[str, str]:
    found = re.match(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?", requirement)
    assert found is not None, requirement
    return found[1], found[2] or "0"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _asked(subject: str, ask: Callable[[], str], otherwise: State) -> Finding:
    try:
        return Finding(subject, "ok", ask())
    except GgufkitError as error:
        return Finding(subject, otherwise, error.message, error.hint)


def _find_build() -> tuple[NativeBuild | None, Finding | None]:
    try:
        return toolchain.find_build(), None
    except GgufkitError as error:
        return None, Finding("native build", "problem", error.message, error.hint)


def _native(build: NativeBuild) -> Iterator[Finding]:
    rebuild = "Run: ggufkit build --force"
    try:
        commit = toolchain.identify(build)
        features = toolchain.cpu_features(build)
    except GgufkitError as error:
        yield Finding("native build", "problem", error.message, error.hint or rebuild)
        return
    kind = "pinned" if build.source_kind == "pin" else f"from {build.source}"
    detail = f"llama.cpp {commit} ({kind}), {build.backend}, {build.root}"
    if commit != build.commit:
        yield Finding("native build", "problem", f"{detail}, but said {build.commit}", rebuild)
    else:
        yield Finding("native build", "ok", detail)
    yield Finding("CPU features", "ok", " ".join(features) or "none beyond the base")
    missing = [tool for tool in toolchain.TOOLS if tool not in build.tools]
    if missing:
        yield Finding("native tools", "warning", f"not built: {', '.join(missing)}", rebuild)
    else:
        yield Finding("native tools", "ok", ", ".join(build.tools))


def _binding(build: NativeBuild | None) -> Finding:
    pin, version = read_pin(), building.binding_version()
    subject, remedy = "llama-cpp-python", "Run: ggufkit build"
    if not version:
        return Finding(subject, "problem", "not installed; chat needs it", remedy)
    if version != pin.version:
        return Finding(subject, "problem", f"{version}, but {pin.version} is pinned", remedy)
    if build and build.commit != pin.commit:
        return Finding(
            subject,
            "warning",
            f"{version} is for llama.cpp {pin.commit}; the native build is {build.commit}",
            "Chat with the pinned build: unset GGUFKIT_NATIVE",
        )
    return Finding(subject, "ok", f"{version}, made for llama.cpp {pin.commit}")


def _gpus(build: NativeBuild | None) -> Iterator[Finding]:
    seen: tuple[str, ...] = ()
    if build:
        try:
            seen = toolchain.devices(build)
        except GgufkitError as error:
            yield Finding("GPU", "problem", error.message, error.hint)
            return
    for device in seen:
        yield Finding("GPU", "ok", device)
    if seen:
        return
    present = toolchain.nvidia_gpus()
    for gpu in present:
        yield Finding(
            "GPU",
            "warning",
            f"{gpu}: here, but the native build cannot use it",
            "Run: ggufkit build --backend cuda",
        )
    if not present:
        yield Finding("GPU", "ok", "none seen; the CPU computes")


def _disk(subject: str, directory: Path, least: int) -> Finding:
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / _GIB:.1f} GiB free in {directory}"
    if free < least:
        wanted = f"{least / _GIB:.0f} GiB"
        return Finding(subject, "warning", detail, f"Free some space; {wanted} are advisable")
    return Finding(subject, "ok", detail)


def _memory() -> Finding:
    total, available = host.total_memory_nbytes(), host.available_memory_nbytes()
    if total is None:
        return Finding("memory", "ok", "this system does not say")
    detail = f"{total / _GIB:.1f} GiB"
    if available is None:
        return Finding("memory", "ok", detail)
    detail += f", {available / _GIB:.1f} GiB available"
    if available < _MEMORY_WARN_NBYTES:
        return Finding("memory", "warning", detail, "End other programs before large models")
    return Finding("memory", "ok", detail)
