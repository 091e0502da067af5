"""Make the native build: fetch, verify, unpack, compile, publish; install the binding.

Layout, below the cache directory::

    archives/<sdist>            the pinned source archive
    wheels/<version>/*.whl      the Python binding, ready to install
    native/<key>/build.json     a finished build; written last
    native/<key>/bin, scripts   its tools and libraries; its converters
    native/<key>.work/          sources and objects of a build under way
    logs/                       what cmake and pip printed

A build that was killed leaves its work directory, and the next one goes on
from there. Only ``os.replace`` makes a finished build appear.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from ggufkit import settings
from ggufkit.errors import (
    DiskSpaceError,
    GgufkitError,
    IntegrityError,
    SourceError,
    ToolError,
    UsageError,
)
from ggufkit.llamacpp import host, output, reasons, toolchain
from ggufkit.llamacpp.pin import COMMIT_LENGTH, Pin, backends, native_dir, read_pin, recipe_digest
from ggufkit.llamacpp.toolchain import BUILD_FILE, TOOLS, NativeBuild, ToolRun
from ggufkit.progress import SILENT, Progress
from ggufkit.values import to_json

_GIB = 1 << 30
_DISK_NBYTES = {"cpu": 3 * _GIB // 2, "metal": 3 * _GIB // 2}
_DISK_NBYTES_GPU = 6 * _GIB
_NBYTES_PER_COMPILER = 3 * _GIB // 2
_CMAKE_WANTED = (3, 21)
_KEY_LENGTH = 16
_COMPILER_VARIABLES = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "HIPFLAGS")

_INSTALL_COMPILER = (
    "Install one. Debian, Ubuntu: apt install g++ | Fedora: dnf install gcc-c++ | "
    "macOS: xcode-select --install"
)
_INSTALL_CMAKE = (
    "Install one. Debian, Ubuntu: apt install cmake | macOS: brew install cmake | "
    "anywhere: pip install cmake"
)
_BACKEND_COMPILERS = {
    "cuda": ("nvcc", "Install the CUDA toolkit, and put its bin directory into PATH"),
    "vulkan": ("glslc", "Install the Vulkan SDK. Debian, Ubuntu: apt install libvulkan-dev glslc"),
    "hip": ("hipcc", "Install ROCm, and put its bin directory into PATH"),
}
_SCRIPTS = (
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "conversion",
    "gguf-py",
    "models/templates",
    "LICENSE",
)
# Most of the archive's bytes: vocabularies for tests, pictures, other programs.
_NOT_UNPACKED = ("docs", "media", "benches", "tests", "app", "examples", "pocs", "ci")


@dataclass(frozen=True)
class BuildReport:
    """What :func:`build` did.

    Attributes:
        build: the native build.
        reused: whether it was there already.
        binding: version of llama-cpp-python that is installed for it, or empty.
        binding_reused: whether that was installed already.
        seconds: time of it all.
    """

    build: NativeBuild
    reused: bool
    binding: str
    binding_reused: bool
    seconds: float


@dataclass(frozen=True)
class _Origin:
    """Where the sources of a build come from."""

    kind: str
    source: str
    commit: str
    digest: str
    directory: Path | None


def build(
    backend: str = "cpu",
    *,
    source: Path | None = None,
    force: bool = False,
    install_binding: bool = True,
    cmake_args: Sequence[str] = (),
    progress: Progress = SILENT,
) -> BuildReport:
    """Build llama.cpp's tools and libraries, unless that is done already.

    Args:
        backend: one of the presets, such as ``cpu`` or ``cuda``.
        source: somebody's own llama.cpp checkout instead of the pinned archive.
        force: build again even if there is a build.
        install_binding: install llama-cpp-python into this Python environment.
        cmake_args: further arguments for CMake, such as ``-DGGML_NATIVE=OFF``.
        progress: who to tell.

    Raises:
        UsageError: if there is no such backend or checkout.
        ToolError: if a compiler is missing, or the build fails.
        SourceError: if the archive cannot be fetched.
        IntegrityError: if it is not the pinned one.
        DiskSpaceError: if the disk is too full.
    """
    started = time.monotonic()
    if backend not in backends():
        raise UsageError(f"there is no backend '{backend}'", f"Known: {', '.join(backends())}")
    compiler = find_compiler()
    require_cmake()
    _require_backend_compiler(backend)
    origin = _checkout(source) if source else _pinned(read_pin())
    flags = (*cmake_args, *(f"{v}={os.environ[v]}" for v in _COMPILER_VARIABLES if v in os.environ))
    plan = NativeBuild(
        root=Path(),
        key=build_key(origin.digest, backend, flags, compiler, host.cpu_identity()),
        commit=origin.commit,
        backend=backend,
        compiler=compiler,
        cpu=host.cpu_identity(),
        flags=flags,
        tools=(),
        built="",
        source_kind=origin.kind,
        source=origin.source,
        recipe=recipe_digest(),
    )
    with _lock(toolchain.builds_dir() / f".{plan.key}.lock", progress):
        root = toolchain.builds_dir() / plan.key
        reused = (root / BUILD_FILE).exists() and not force
        made = toolchain.read_build(root) if reused else _make(plan, origin, progress)
    had = binding_version()
    binding = _install_binding(made, progress) if install_binding else ""
    seconds = round(time.monotonic() - started, 3)
    return BuildReport(made, reused, binding, binding == had != "", seconds)


def build_key(
    source_digest: str, backend: str, flags: Sequence[str], compiler: str, cpu: str
) -> str:
    """Hex key over all that can change a build."""
    parts = [source_digest, backend, list(flags), compiler, cpu, recipe_digest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_LENGTH]


# What is needed.


def find_compiler() -> str:
    """First line of the version of the C++ compiler that CMake will take.

    Raises:
        ToolError: if there is none, or it does not run.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    names = named[:1] or ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        what = f"the C++ compiler CXX={named[0]}" if named else "a C++ compiler"
        raise ToolError(f"building llama.cpp needs {what}, which is not here", _INSTALL_COMPILER)
    ran = toolchain.run([found, "--version"])
    if ran.returncode != 0 or not ran.tail:
        raise ToolError(f"the C++ compiler {found} does not run", _INSTALL_COMPILER)
    return ran.tail[0]


def require_cmake() -> str:
    """The version of CMake.

    Raises:
        ToolError: if there is none, or it is too old.
    """
    wanted = ".".join(map(str, _CMAKE_WANTED))
    if shutil.which("cmake") is None:
        raise ToolError(
            f"building llama.cpp needs CMake {wanted}, which is not here", _INSTALL_CMAKE
        )
    ran = toolchain.run(["cmake", "--version"])
    found = re.search(r"cmake version (\d+)\.(\d+)\S*", "\n".join(ran.tail))
    if ran.returncode != 0 or not found:
        raise ToolError("cmake does not say its version", _INSTALL_CMAKE)
    if (int(found[1]), int(found[2])) < _CMAKE_WANTED:
        raise ToolError(
            f"CMake {found[1]}.{found[2]} is too old; {wanted} is needed", _INSTALL_CMAKE
        )
    return found[0].removeprefix("cmake version ")


def _require_backend_compiler(backend: str) -> None:
    program, hint = _BACKEND_COMPILERS.get(backend, ("", ""))
    if program and shutil.which(program) is None:
        raise ToolError(f"the {backend} backend needs {program}, which is not here", hint)


def _require_disk(backend: str) -> None:
    needed = _DISK_NBYTES.get(backend, _DISK_NBYTES_GPU)
    cache = settings.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DiskSpaceError(
            f"building llama.cpp needs {needed / _GIB:.1f} GiB in {cache}, but only "
            f"{free / _GIB:.1f} GiB are free",
            "Free some space, or name another place: GGUFKIT_CACHE=DIR",
        )


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say("another process is building the same; waiting for it")
        lock.acquire()
    with lock:
        lock.release()  # `with` took it a second time
        yield


# Where the sources come from.


def _pinned(pin: Pin) -> _Origin:
    return _Origin("pin", pin.sha256, pin.commit, pin.sha256, None)


def _checkout(source: Path) -> _Origin:
    directory = source.resolve()
    if not (directory / "ggml" / "CMakeLists.txt").is_file():
        raise UsageError(f"{source} is not a llama.cpp source tree", "Give the root of a checkout")
    commit, digest = _git_identity(directory) or _tree_identity(directory)
    return _Origin("checkout", str(directory), commit, digest, directory)


def _git_identity(directory: Path) -> tuple[str, str] | None:
    """Commit, and a digest that also covers changes that are not committed."""
    if shutil.which("git") is None or not (directory / ".git").exists():
        return None
    commit = _git(directory, "rev-parse", "HEAD").strip()
    changes = _git(directory, "diff", "HEAD", "--no-ext-diff", "--binary")
    changes += _git(directory, "status", "--porcelain")
    digest = hashlib.sha256(f"{directory}\0{commit}\0{changes}".encode()).hexdigest()
    short = _git(directory, "rev-parse", f"--short={COMMIT_LENGTH}", "HEAD").strip()
    return (f"{short}-dirty" if changes else short), digest


def _git(directory: Path, *arguments: str) -> str:
    text: list[str] = []
    ran = toolchain.run(["git", "-C", directory, *arguments], on_text=text.append)
    if ran.returncode != 0:
        raise toolchain.explain_failure(ran, f"asking git about {directory}", None)
    return "".join(text)


def _tree_identity(directory: Path) -> tuple[str, str]:
    """A name and a digest for a tree without git, out of its sources."""
    summer = hashlib.sha256(f"{directory}\0".encode())
    kinds = {".c", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".m", ".metal", ".txt", ".cmake", ".comp"}
    for path in sorted(p for p in directory.rglob("*") if p.suffix in kinds and p.is_file()):
        summer.update(path.relative_to(directory).as_posix().encode() + b"\0")
        summer.update(hashlib.sha256(path.read_bytes()).digest())
    digest = summer.hexdigest()
    return f"tree{digest[:9]}", digest


def fetch_archive(pin: Pin, progress: Progress = SILENT) -> Path:
    """The pinned source archive, from the cache or else from the package index.

    Raises:
        SourceError: if it cannot be fetched.
        IntegrityError: if it is not the one that the pin names.
    """
    place = settings.cache_dir() / "archives"
    archive = place / pin.sdist
    with _lock(place / f".{pin.sdist}.lock", progress):
        if archive.exists():
            with contextlib.suppress(IntegrityError):
                toolchain.check_sha256(archive, pin.sha256)
                progress.say(f"reused {pin.sdist}")
                return archive
            progress.warn(f"{archive} is damaged and is fetched again")
        scratch = place / f"{pin.sdist}.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        fetched = toolchain.pip_download(
            pin.requirement, pin.sha256, scratch, progress, source=True
        )
        os.replace(fetched, archive)
        shutil.rmtree(scratch)
    return archive


def unpack(archive: Path, target: Path, progress: Progress = SILENT) -> None:
    """Unpack what a build needs of the archive's ``vendor/llama.cpp``.

    Only files and directories below the target are written, whatever the
    archive says: links, devices and names with ``..`` are refused. (Not every
    Python 3.11 has tarfile's own filter.)

    Args:
        archive: the source archive of llama-cpp-python.
        target: becomes the llama.cpp source tree; appears whole or not at all.
        progress: who to tell.

    Raises:
        IntegrityError: if the archive is broken, unsafe or has no llama.cpp.
    """
    if target.exists():
        return
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with (
            progress.task(f"unpacking {archive.name}", unit="files") as task,
            tarfile.open(archive) as tar,
        ):
            for count, member in enumerate(tar):
                if (inside := _inside_llama_cpp(member)) is not None:
                    _unpack_member(tar, member, scratch / inside)
                task.update(count)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise IntegrityError(f"{archive} cannot be unpacked: {error}") from error
    if not (scratch / "CMakeLists.txt").is_file():
        raise IntegrityError(f"{archive.name} holds no llama.cpp in vendor/llama.cpp")
    os.replace(scratch, target)


def _inside_llama_cpp(member: tarfile.TarInfo) -> PurePosixPath | None:
    path = PurePosixPath(member.name)
    if path.parts[1:3] != ("vendor", "llama.cpp") or len(path.parts) < 4:
        return None
    inside = PurePosixPath(*path.parts[3:])
    if ".." in path.parts or path.is_absolute() or not (member.isfile() or member.isdir()):
        raise IntegrityError(f"the archive has an unsafe member: {member.name}")
    unwanted = inside.parts[0] in _NOT_UNPACKED
    unwanted |= inside.parts[0] == "models" and inside.parts[1:2] != ("templates",)
    return None if unwanted else inside


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)
    # Build scripts look at times; the archive's own keep a resumed build short.
    os.utime(path, (member.mtime, member.mtime))


# The build.


def _make(plan: NativeBuild, origin: _Origin, progress: Progress) -> NativeBuild:
    _require_disk(plan.backend)
    final = toolchain.builds_dir() / plan.key
    work = final.with_name(f"{plan.key}.work")
    tree = origin.directory
    if tree is None:
        archive = fetch_archive(read_pin(), progress)
        tree = work / "llama.cpp"
        unpack(archive, tree, progress)
    log = log_file("build")
    _configure(plan, tree, work / "build", log, progress)
    _compile(plan, work / "build", log, progress)
    partial = final.with_name(f"{plan.key}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _collect(work / "build" / "bin", tree, partial)
    made = replace(
        plan,
        root=partial,
        tools=tuple(t for t in TOOLS if (partial / "bin" / t).exists()),
        built=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    require_commit(made)
    described = to_json(made)
    del described["root"]
    (partial / BUILD_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    _publish(partial, final)
    shutil.rmtree(work)
    return replace(made, root=final)


def log_file(name: str) -> Path:
    """A new file for what a program prints."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return settings.cache_dir() / "logs" / f"{name}-{stamp}-{os.getpid()}.log"


def _configure(
    plan: NativeBuild, tree: Path, directory: Path, log: Path, progress: Progress
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    argv: list[str | Path] = [
        *("cmake", "--preset", plan.backend, "-B", directory),
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
        f"-DLLAMA_CPP_SOURCE_DIR={tree}",
        f"-DLLAMA_BUILD_COMMIT={plan.commit}",
        "-DLLAMA_BUILD_NUMBER=0",
        *(f for f in plan.flags if not f.startswith(_COMPILER_VARIABLES)),
    ]
    with progress.task("configuring llama.cpp"):
        ran = toolchain.run(argv, cwd=native_dir(), log=log)
    if ran.returncode != 0:
        # A half-configured tree would poison the next attempt.
        shutil.rmtree(directory, ignore_errors=True)
        raise _cmake_error(ran, "configuring llama.cpp", log)


def _compile(plan: NativeBuild, directory: Path, log: Path, progress: Progress) -> None:
    argv: list[str | Path] = [
        *("cmake", "--build", directory, "--target", "ggufkit_tools"),
        *("--config", "Release", "--parallel", str(_jobs())),
    ]
    with progress.task(f"building llama.cpp {plan.commit} ({plan.backend})", unit="steps") as task:

        def on_step(done: int, total: int, what: str) -> None:
            task.set_total(total)
            task.update(done, what)

        ran = toolchain.run(argv, on_text=output.BuildSteps(on_step).feed, log=log)
    if ran.returncode != 0:
        raise _cmake_error(ran, "building llama.cpp", log)


def _jobs() -> int:
    """Compilers at a time: as many as the threads, and as memory has room for."""
    memory = host.available_memory_nbytes()
    room = max(1, memory // _NBYTES_PER_COMPILER) if memory else settings.threads()
    return min(settings.threads(), room)


def _cmake_error(ran: ToolRun, what: str, log: Path) -> ToolError:
    if ran.returncode < 0:
        return toolchain.explain_failure(ran, what, log)
    text = log.read_text(encoding="utf-8", errors="replace")
    return toolchain.explain_failure(ran, what, log, reasons.build_error(text))


def _collect(bin_dir: Path, tree: Path, partial: Path) -> None:
    """Put tools, libraries and converters side by side, away from sources and objects."""
    partial.mkdir(parents=True)
    shutil.copytree(bin_dir, partial / "bin", symlinks=True)
    for name in _SCRIPTS:
        path, target = tree / name, partial / "scripts" / name
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__", "tests"))
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if not (partial / "scripts" / "convert_hf_to_gguf.py").is_file():
        raise ToolError(f"there is no convert_hf_to_gguf.py in {tree}")


def require_commit(made: NativeBuild) -> None:
    """Check that a build's tools run here and are of the commit that they should be.

    Raises:
        ToolError: if not.
    """
    commit = toolchain.identify(made)
    if commit != made.commit:
        raise ToolError(
            f"the tools just built say they are of commit {commit}, not {made.commit}",
            "Run: ggufkit build --force",
        )


def _publish(partial: Path, final: Path) -> None:
    aside = final.with_name(f"{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    os.replace(partial, final)
    shutil.rmtree(aside, ignore_errors=True)


# The Python binding.


def binding_version() -> str:
    """The version of llama-cpp-python in this environment, or empty."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _install_binding(made: NativeBuild, progress: Progress) -> str:
    """Install the binding of the pin, which loads the libraries of the build.

    Its ctypes structures are written by hand for one commit of llama.cpp, so it
    is not installed for another.
    """
    pin = read_pin()
    if made.commit != pin.commit:
        progress.warn(
            f"llama-cpp-python {pin.version} is made for llama.cpp {pin.commit}; "
            f"this is {made.commit}, so it is not installed, and `ggufkit chat` does not run on it"
        )
        return ""
    if binding_version() == pin.version:
        return pin.version
    wheel = binding_wheel(pin, progress)
    log = log_file("binding")
    ran = toolchain.pip(
        ["install", "--no-deps", "--no-index", "--force-reinstall", "--no-input", wheel], log=log
    )
    if ran.returncode != 0:
        raise _install_error(ran, log)
    return pin.version


def binding_wheel(pin: Pin, progress: Progress = SILENT) -> Path:
    """A wheel of the binding without libraries, made once and kept."""
    place = settings.cache_dir() / "wheels" / f"{pin.version}-{pin.sha256[:_KEY_LENGTH]}"
    if wheels := list(place.glob("*.whl")):
        return wheels[0]
    archive = fetch_archive(pin, progress)
    scratch = place.with_name(f"{place.name}.{os.getpid()}.partial")
    log = log_file("binding")
    try:
        with progress.task(f"preparing {pin.requirement}"):
            ran = toolchain.pip(
                ["wheel", "--no-deps", "--no-input", "--wheel-dir", scratch, archive],
                env={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"},
                log=log,
            )
        if ran.returncode != 0:
            raise SourceError(
                f"{pin.requirement} cannot be prepared: {reasons.essential_line(ran.tail)}",
                f"All that pip printed: {log}",
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another process was first
            os.replace(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return next(place.glob("*.whl"))


def _install_error(ran: ToolRun, log: Path) -> GgufkitError:
    if any("externally-managed-environment" in line for line in ran.tail):
        return ToolError(
            f"{sys.executable} belongs to the operating system and lets nothing be installed",
            "Use a virtual environment: python3 -m venv .venv",
        )
    return ToolError(
        f"llama-cpp-python cannot be installed: {reasons.essential_line(ran.tail)}",
        f"All that pip printed: {log}",
    )
