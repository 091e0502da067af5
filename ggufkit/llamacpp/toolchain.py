"""Build, find, identify and run the native tools. The only user of subprocess.

One source archive gives the tools, the converter and the Python binding the
same llama.cpp. A build lives in the cache, under a key that covers the pin,
backend, flags, compiler and CPU; ``build.json`` is written last, so what is
half-built is never found.
"""

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

from filelock import FileLock

from ggufkit import settings
from ggufkit.errors import GgufkitError, IntegrityError, ToolError, UsageError
from ggufkit.llamacpp import output
from ggufkit.llamacpp.pin import COMMIT_LENGTH, Pin, native_dir, read_pin
from ggufkit.progress import SILENT, Progress
from ggufkit.store import require_space, write_atomically
from ggufkit.values import GGUFFile

BACKENDS = ("cpu", "cuda", "vulkan", "metal", "hip")
TOOLS = (
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
    "llama-bench",
    "llama-gguf-split",
    "llama-export-lora",
)
BINDING = "llama-cpp-python"
_MANIFEST = "build.json"
_SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py/gguf")
_MIN_CMAKE = (3, 21)
_BUILD_NBYTES = {"cpu": 1 << 30, "cuda": 6 << 30}
_TAIL_LINES = 40


# --- running -----------------------------------------------------------------


@dataclass(frozen=True)
class ToolRun:
    """A finished process.

    Attributes:
        argv: what was run.
        returncode: its exit status; negative for a signal.
        seconds: wall time.
        peak_rss_nbytes: peak resident memory, from the operating system.
        tail: its last lines.
    """

    argv: tuple[str, ...]
    returncode: int
    seconds: float
    peak_rss_nbytes: int
    tail: tuple[str, ...]


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    log: Path | None = None,
) -> ToolRun:
    """Run a program to its end, reading stdout and stderr together as they come.

    The program dies with us: Ctrl-C ends it, and on Linux so does kill -9.

    Args:
        argv: program and arguments; never a shell.
        cwd: directory to run in.
        env: variables to add to ours.
        on_line: gets each line; carriage returns end lines too.
        on_text: gets the output in pieces, as soon as it comes.
        log: takes all output.

    Raises:
        ToolError: if the program cannot be started.
    """
    words = tuple(str(word) for word in argv)
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise ToolError(f"{words[0]} cannot be started: {error.strerror}") from error
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        _pump(process, tail, on_line, on_text, log)
        status, usage = _wait(process)
    except BaseException:
        process.terminate()
        _wait(process)
        raise
    # macOS counts bytes, Linux kibibytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return ToolRun(words, status, time.monotonic() - started, usage * scale, tuple(tail))


def _die_with_parent() -> None:
    """Ask the kernel to end this child when its parent is gone (prctl(2))."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _pump(
    process: "subprocess.Popen[bytes]",
    tail: deque[str],
    on_line: Callable[[str], None] | None,
    on_text: Callable[[str], None] | None,
    log: Path | None,
) -> None:
    import codecs
    from contextlib import ExitStack

    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    with ExitStack() as stack:
        stack.enter_context(process.stdout)
        sink = stack.enter_context(log.open("ab")) if log else None
        while block := os.read(process.stdout.fileno(), 1 << 16):
            if sink:
                sink.write(block)
                sink.flush()
            text = decoder.decode(block)
            if on_text:
                on_text(text)
            *lines, rest = re.split(r"[\r\n]+", rest + text)
            for line in lines:
                tail.append(line)
                if on_line:
                    on_line(line)
        if rest:
            tail.append(rest)
            if on_line:
                on_line(rest)


def _wait(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """Reap a child: its exit status and its peak resident memory."""
    if not hasattr(os, "wait4"):
        return process.wait(), 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss


def _check(ran: ToolRun, log: Path, failure: tuple[str, str] | None = None) -> None:
    """Raise what a failed run means, with the place of its log."""
    if ran.returncode == 0:
        return
    name = Path(ran.argv[0]).name
    message, hint = failure or (f"{name} failed: {_last_words(ran)}", "")
    if ran.returncode < 0:
        message = f"{name} was ended by {signal.Signals(-ran.returncode).name}: {_last_words(ran)}"
    place = f"Its output is in {log}"
    raise ToolError(message, f"{hint}. {place}" if hint else place)


def _last_words(ran: ToolRun) -> str:
    words = [line.strip() for line in ran.tail if line.strip()]
    return words[-1] if words else f"exit status {ran.returncode}, no output"


# --- finding -----------------------------------------------------------------


@dataclass(frozen=True)
class NativeBuild:
    """A finished build of the tools and libraries.

    Attributes:
        root: its directory.
        key: what it is cached under.
        commit: llama.cpp's commit, shortened.
        source: ``pin``, or the place of the checkout it was made from.
        backend: one of :data:`BACKENDS`.
        flags: further CMake arguments.
        compiler: compiler and version.
        cpu: identity of the CPU that it was made for.
        tools: names of the programs that were built.
        built: UTC time, ISO 8601.
    """

    root: Path
    key: str
    commit: str
    source: str
    backend: str
    flags: tuple[str, ...]
    compiler: str
    cpu: str
    tools: tuple[str, ...]
    built: str

    @property
    def bin(self) -> Path:
        """Directory of programs and shared libraries."""
        return self.root / "bin"

    @property
    def scripts(self) -> Path:
        """Directory of the converter."""
        return self.root / "scripts"

    def tool(self, name: str) -> Path:
        """A program of the build.

        Raises:
            ToolError: if the build has none of that name.
        """
        if name not in self.tools:
            raise ToolError(
                f"the native build has no {name}", "Run: ggufkit build --force; then ggufkit doctor"
            )
        return self.bin / (name + (".exe" if sys.platform == "win32" else ""))


def native_cache() -> Path:
    """Where builds are kept."""
    return settings.cache_dir() / "native"


def find_build(backend: str | None = None) -> NativeBuild:
    """The newest build for this machine.

    Args:
        backend: only builds with this backend.

    Raises:
        ToolError: if there is none, with what to type.
    """
    if given := os.environ.get("GGUFKIT_NATIVE"):
        return _read_build(Path(given))
    found = [b for b in _builds() if b.cpu == cpu_identity() and backend in (None, b.backend)]
    ours = [b for b in found if b.commit == read_pin().commit or b.source != "pin"]
    if not ours:
        which = f" with the {backend} backend" if backend else ""
        old = f" ({len(found)} of another pin)" if found else ""
        raise ToolError(
            f"llama.cpp is not built yet{which} in {native_cache()}{old}",
            "Run: ggufkit build" + (f" --backend {backend}" if backend else ""),
        )
    return max(ours, key=lambda b: b.built)


def _builds() -> list[NativeBuild]:
    return [_read_build(p.parent) for p in native_cache().glob(f"*/{_MANIFEST}")]


def _read_build(root: Path) -> NativeBuild:
    try:
        raw = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))
        raw |= {"flags": tuple(raw["flags"]), "tools": tuple(raw["tools"]), "root": root}
        return NativeBuild(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ToolError(
            f"{root} is not a native build ({error})", f"Remove {root} and run: ggufkit build"
        ) from error


@cache
def cpu_identity() -> str:
    """The CPU that native code is made for: model and a digest of its features."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    model = re.search(r"^(?:model name|CPU part|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    features = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    spelled = " ".join(sorted(features[1].split())) if features else ""
    digest = hashlib.sha256(spelled.encode()).hexdigest()[:12]
    return f"{platform.machine()} {model[1].strip() if model else 'unknown'} {digest}"


def compiler() -> str:
    """The C++ compiler that CMake will take, and its version.

    Raises:
        ToolError: if there is none, with how to get one.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return run([path, "--version"]).tail[0]
    raise ToolError(
        "there is no C++ compiler",
        "Debian, Ubuntu: apt install g++   macOS: xcode-select --install   "
        "Windows: Visual Studio Build Tools",
    )


def cmake_version() -> str:
    """The version of CMake.

    Raises:
        ToolError: if there is none, or one that is too old.
    """
    hint = "Debian, Ubuntu: apt install cmake   macOS: brew install cmake   or: pip install cmake"
    if not shutil.which("cmake"):
        raise ToolError("there is no cmake", hint)
    first = run(["cmake", "--version"]).tail[0]
    match = re.search(r"(\d+)\.(\d+)[.\d]*", first)
    if not match:
        raise ToolError(f"cmake does not say its version: {first}", hint)
    if (int(match[1]), int(match[2])) < _MIN_CMAKE:
        raise ToolError(f"cmake {match[0]} is too old; {_MIN_CMAKE[0]}.{_MIN_CMAKE[1]} is needed", hint)
    return match[0]


# --- building ----------------------------------------------------------------


@dataclass(frozen=True)
class BuildReport:
    """What ``build`` did.

    Attributes:
        build: the native build.
        reused: whether it was there already.
        binding: version of llama-cpp-python in this environment; empty if it
            was not wanted or does not fit.
        binding_reused: whether that was there already.
        seconds: time of it all.
    """

    build: NativeBuild
    reused: bool
    binding: str
    binding_reused: bool
    seconds: float


def build(
    backend: str = "cpu",
    *,
    source: Path | None = None,
    force: bool = False,
    install_binding: bool = True,
    cmake_args: Sequence[str] = (),
    progress: Progress = SILENT,
) -> BuildReport:
    """Build llama.cpp's tools and libraries once, and install the binding on them.

    Args:
        backend: one of :data:`BACKENDS`.
        source: a llama.cpp checkout to build instead of the pinned source.
        force: build again even if there is a build.
        install_binding: install llama-cpp-python into this environment.
        cmake_args: further arguments for CMake.
        progress: who to tell.

    Raises:
        UsageError: if there is no such backend.
        IntegrityError: if the fetched archive has another hash than the pin.
        ToolError: if something is missing or the build fails.
    """
    started = time.monotonic()
    if backend not in BACKENDS:
        raise UsageError(f"there is no backend '{backend}'", f"Use one of: {', '.join(BACKENDS)}")
    cmake_version()
    pin = read_pin()
    commit = _checkout_commit(source) if source else pin.commit
    identity = {
        "source": _checkout_identity(source) if source else pin.sha256,
        "backend": backend,
        "flags": list(cmake_args),
        "compiler": compiler(),
        "cpu": cpu_identity(),
        "native": [_file_digest(native_dir() / n) for n in ("CMakeLists.txt", "CMakePresets.json")],
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    final = native_cache() / f"{backend}-{key}"
    native_cache().mkdir(parents=True, exist_ok=True)
    with FileLock(native_cache() / f"{final.name}.lock"):
        reused = (final / _MANIFEST).exists() and not force
        if not reused:
            _build_into(final, source, commit, backend, cmake_args, progress)
    made = _read_build(final)
    binding, had = "", False
    if install_binding:
        if made.commit == pin.commit:
            binding, had = _install_binding(pin, progress)
        else:
            progress.warn(
                f"{BINDING} {pin.version} needs llama.cpp {pin.commit}, and {source} is at "
                f"{made.commit}: chat and serve will not run on this build"
            )
    return BuildReport(made, reused, binding, had, round(time.monotonic() - started, 3))


def _build_into(
    final: Path,
    source: Path | None,
    commit: str,
    backend: str,
    cmake_args: Sequence[str],
    progress: Progress,
) -> None:
    require_space(
        native_cache(), _BUILD_NBYTES.get(backend, 2 << 30), f"building llama.cpp for {backend}"
    )
    # Kept when a build is killed: CMake goes on where it stopped.
    work = final.with_name(final.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    tree = source or _unpack(_fetch_archive(read_pin(), progress), work / "source", progress)
    log = work / "build.log"
    configure = ["cmake", "-S", native_dir(), "--preset", backend, "-B", work / "cmake"]
    if shutil.which("ninja") and not (work / "cmake" / "Makefile").exists():
        configure += ["-G", "Ninja"]
    configure += [
        f"-DLLAMA_CPP_SOURCE_DIR={tree.resolve()}",
        f"-DLLAMA_BUILD_COMMIT={commit}",
        "-DLLAMA_BUILD_NUMBER=0",
        *cmake_args,
    ]
    progress.say(f"building llama.cpp {commit} for {backend}; the log is {log}")
    _check(run(configure, cwd=native_dir(), log=log), log)
    with progress.task("building llama.cpp", 1.0) as task:

        def on_line(line: str) -> None:
            if (share := output.build_share(line)) is not None:
                task.update(share)

        command = ["cmake", "--build", work / "cmake", "--target", "ggufkit_tools"]
        command += ["--parallel", str(settings.threads())]
        ran = run(command, on_line=on_line, log=log)
    _check(ran, log, None if ran.returncode == 0 else (_compile_error(log, ran), ""))
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(work / "cmake" / "bin", partial / "bin", symlinks=True)
    _copy_scripts(tree, partial / "scripts")
    tools = tuple(t for t in TOOLS if any((partial / "bin").glob(f"{t}*")))
    told = output.parse_version("\n".join(run([partial / "bin" / TOOLS[1], "--version"]).tail))
    if told != commit:
        raise ToolError(f"the tools say they are llama.cpp {told}, not {commit}")
    manifest = {
        "key": final.name,
        "commit": commit,
        "source": str(source.resolve()) if source else "pin",
        "backend": backend,
        "flags": list(cmake_args),
        "compiler": compiler(),
        "cpu": cpu_identity(),
        "tools": list(tools),
        "built": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(partial / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    shutil.rmtree(work, ignore_errors=True)


def _compile_error(log: Path, ran: ToolRun) -> str:
    """The first error line of a build log."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if re.search(r"\b(fatal )?error:|CMake Error", line):
            return f"the build failed: {line.strip()}"
    return f"the build failed: {_last_words(ran)}"


def _copy_scripts(tree: Path, target: Path) -> None:
    for name in _SCRIPTS:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (tree / name).is_dir():
            shutil.copytree(tree / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        elif (tree / name).exists():
            shutil.copy(tree / name, place)


def _checkout_commit(source: Path) -> str:
    if not (source / "CMakeLists.txt").is_file() or not (source / "ggml").is_dir():
        raise UsageError(f"{source} is not a llama.cpp checkout", "It has CMakeLists.txt and ggml/")
    ran = run(["git", "-C", source, "rev-parse", "HEAD"]) if shutil.which("git") else None
    if ran is None or ran.returncode != 0:
        raise UsageError(
            f"the commit of {source} cannot be told", "Give a git checkout, so that builds can be named"
        )
    return ran.tail[0][:COMMIT_LENGTH]


def _checkout_identity(source: Path) -> str:
    """Commit and uncommitted changes of a checkout, hashed."""
    told = [
        run(["git", "-C", source, *words]).tail
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain"), ("diff", "HEAD"))
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_archive(pin: Pin, progress: Progress) -> Path:
    return pip_download(
        f"{pin.package}=={pin.version}",
        pin.sha256,
        settings.cache_dir() / "archives",
        pin.sdist,
        source=True,
        progress=progress,
    )


def pip_download(
    requirement: str,
    sha256: str,
    directory: Path,
    file_name: str,
    *,
    source: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Fetch one file from the package index that pip is set up for.

    Args:
        requirement: ``name==version``.
        sha256: hash that the file must have, hex.
        directory: where to keep it.
        file_name: its name there.
        source: fetch the source archive and not a wheel.
        progress: who to tell.

    Raises:
        IntegrityError: if what came has another hash.
        ToolError: if pip is missing or could not fetch it.
    """
    target = directory / file_name
    if target.is_file():
        if _file_digest(target) == sha256:
            return target
        progress.warn(f"{target} has another hash than its pin; fetched again")
        target.unlink()
    _require_pip()
    scratch = directory / f".{file_name}.{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    log = scratch / "pip.log"
    try:
        (scratch / "requirement.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--no-binary" if source else "--only-binary", ":all:"]
        command += ["-r", str(scratch / "requirement.txt"), "-d", str(scratch / "got")]
        with progress.task(f"fetching {file_name}"):
            ran = run(command, log=log)
        if ran.returncode != 0:
            text = "\n".join(ran.tail)
            if "DO NOT MATCH" in text:
                got = re.search(r"Got\s+([0-9a-f]{64})", text)
                raise IntegrityError(
                    f"{file_name} has hash {got[1] if got else 'unknown'}, its pin says {sha256}",
                    "Do not use it: the index serves another file than the one that was checked",
                )
            errors = [line for line in ran.tail if line.startswith("ERROR")] or [_last_words(ran)]
            raise ToolError(
                f"{requirement} could not be fetched: {errors[-1]}",
                f"Check the network and pip's settings, or put the file at {target}",
            )
        got_file = scratch / "got" / file_name
        if not got_file.is_file() or _file_digest(got_file) != sha256:
            raise IntegrityError(f"{file_name} is not what its pin says ({sha256})")
        os.replace(got_file, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _require_pip() -> None:
    if run([sys.executable, "-m", "pip", "--version"]).returncode != 0:
        raise ToolError(
            f"{sys.executable} has no pip", f"Run: {sys.executable} -m ensurepip --upgrade"
        )


def _unpack(archive: Path, target: Path, progress: Progress) -> Path:
    """Take llama.cpp out of the source archive of the binding."""
    done = target / ".complete"
    inside = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    if not done.exists():
        shutil.rmtree(target, ignore_errors=True)
        with progress.task("unpacking llama.cpp"), tarfile.open(archive) as tar:
            members = []
            for member in tar:
                if member.name.startswith(inside):
                    member.name = member.name[len(inside) :]
                    members.append(member)
            if not members:
                raise IntegrityError(f"{archive} holds no {inside}")
            tar.extractall(target, members, filter="data")
        done.touch()
    return target


def binding_version() -> str:
    """The version of llama-cpp-python in this environment; empty if there is none."""
    try:
        return package_version(BINDING)
    except PackageNotFoundError:
        return ""


def _install_binding(pin: Pin, progress: Progress) -> tuple[str, bool]:
    """Install the binding without a second build; a wheel of it is kept in the cache."""
    if binding_version() == pin.version:
        return pin.version, True
    _require_pip()
    tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    wheels = settings.cache_dir() / "wheels" / tag / pin.sha256[:12]
    wheels.mkdir(parents=True, exist_ok=True)
    log = wheels / "pip.log"
    pip = [sys.executable, "-m", "pip"]
    with progress.task(f"installing {BINDING} {pin.version}"):
        if not list(wheels.glob("*.whl")):
            archive = _fetch_archive(pin, progress)
            ran = run(
                [*pip, "wheel", "--no-deps", "-w", wheels, archive],
                env={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"},
                log=log,
            )
            _check(ran, log)
        (wheel,) = wheels.glob("*.whl")
        install = [*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel]
        _check(run(install, log=log), log)
    return pin.version, False


# --- the tools ---------------------------------------------------------------


def identify(build: NativeBuild) -> str:
    """The commit that the build's programs say they are."""
    ran = run([build.tool("llama-perplexity"), "--version"])
    return output.parse_version("\n".join(ran.tail))


def list_devices(build: NativeBuild) -> tuple[str, ...]:
    """GPU devices that the build sees."""
    ran = run([build.tool("llama-bench"), "--list-devices"])
    return output.parse_devices("\n".join(ran.tail))


def convert_checkpoint(
    build: NativeBuild,
    checkpoint: Path,
    out: Path,
    *,
    outtype: str,
    name: str,
    vocab_only: bool = False,
    log: Path,
    progress: Progress = SILENT,
) -> ToolRun:
    """Convert a checkpoint with llama.cpp's own converter, in a process of its own.

    Args:
        build: whose converter to run.
        checkpoint: directory of the checkpoint.
        out: the GGUF to write.
        outtype: ``f32``, ``f16`` or ``bf16``.
        name: ``general.name``; given, so that it does not hang on directory names.
        vocab_only: write metadata and tokenizer, no tensors.
        log: takes its output.
        progress: told how far it is.

    Raises:
        ToolError: if it fails, with its reason in plain words.
    """
    command = [sys.executable, build.scripts / "convert_hf_to_gguf.py", checkpoint.absolute()]
    command += ["--outfile", out.absolute(), "--outtype", outtype, "--model-name", name]
    command += ["--vocab-only"] if vocab_only else []
    title = "reading the tokenizer" if vocab_only else f"converting to {outtype.upper()}"
    with progress.task(title, 1.0) as task:

        def on_line(line: str) -> None:
            if (share := output.convert_share(line)) is not None:
                task.update(share)

        ran = run(
            command,
            env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            on_line=on_line,
            log=log,
        )
    _check(ran, log, None if ran.returncode == 0 else output.convert_failure(ran.tail))
    if not out.is_file():
        raise ToolError(f"the converter ended well but wrote no {out.name}", f"See {log}")
    return ran


@dataclass(frozen=True)
class QuantizeOutput:
    """A finished llama-quantize: what it said, and what it took."""

    told: output.Quantized
    seconds: float
    peak_rss_nbytes: int

    @property
    def tensors(self) -> tuple[output.TensorPlan, ...]:
        """All tensors, in file order."""
        return self.told.tensors

    @property
    def fallbacks(self) -> dict[str, int]:
        """Type fallen back to, and how many tensors did."""
        return self.told.fallback_counts()

    def bits_per_weight_asked(self, written: GGUFFile) -> float:
        """Bits per weight if every tensor had the type that was wanted for it."""
        return self.told.bits_per_weight_asked(written)


def quantize(
    build: NativeBuild,
    source: Path,
    out: Path,
    type: str,
    *,
    imatrix: Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    allow_requantize: bool = False,
    dry_run: bool = False,
    threads: int,
    log: Path,
    progress: Progress = SILENT,
) -> QuantizeOutput:
    """Quantize a GGUF with llama-quantize, or ask what it would do.

    Args:
        build: whose llama-quantize to run.
        source: the GGUF to read; an absolute path.
        out: the GGUF to write; an absolute path. Not written by a dry run.
        type: quantization type.
        imatrix: importance matrix. llama-quantize stores its path as typed, so
            it is run beside it with a bare name.
        tensor_types: exact tensor name to ggml type.
        allow_requantize: accept tensors that are quantized already.
        dry_run: only say which type each tensor would get.
        threads: threads to use.
        log: takes its output.
        progress: told tensor by tensor.

    Raises:
        ToolError: if it fails, with its reason in plain words.
    """
    command: list[str | Path] = [build.tool("llama-quantize")]
    command += ["--dry-run"] if dry_run else []
    command += ["--allow-requantize"] if allow_requantize else []
    command += ["--imatrix", imatrix.name] if imatrix else []
    for name, kind in (tensor_types or {}).items():
        command += ["--tensor-type", f"^{re.escape(name)}$={kind}"]
    command += [source] if dry_run else [source, out]
    command += [type, str(threads)]
    lines: list[str] = []
    with progress.task(f"quantizing to {type}") as task:

        def on_line(line: str) -> None:
            lines.append(line)
            if parsed := output.parse_tensor_line(line):
                task.set_total(parsed[1])
                task.update(parsed[0])

        ran = run(command, cwd=imatrix.absolute().parent if imatrix else None, on_line=on_line, log=log)
    failure = None
    if ran.returncode != 0:
        message, hint = output.quantize_failure(lines)
        failure = (f"{source.name} cannot be quantized to {type}: {message}", hint)
    _check(ran, log, failure)
    return QuantizeOutput(output.parse_quantize(lines), ran.seconds, ran.peak_rss_nbytes)


@dataclass(frozen=True)
class PerplexityOutput:
    """A finished llama-perplexity: its numbers, and what it took.

    Attributes:
        perplexity: the final estimate.
        error: its standard error.
        tokens: tokens read: chunks times context.
        chunks: contexts read.
        context: tokens of each.
        estimates: the running estimate after each chunk.
        seconds: wall time.
        peak_rss_nbytes: peak resident memory.
    """

    perplexity: float
    error: float
    tokens: int
    chunks: int
    context: int
    estimates: tuple[float, ...]
    seconds: float
    peak_rss_nbytes: int


def perplexity(
    build: NativeBuild,
    model: Path,
    text: Path,
    *,
    context: int,
    chunks: int | None = None,
    gpu_layers: int = 0,
    threads: int,
    log: Path,
    on_estimate: Callable[[int, int | None, float], None] | None = None,
) -> PerplexityOutput:
    """Measure perplexity with llama-perplexity.

    Args:
        build: whose llama-perplexity to run.
        model: the GGUF.
        text: a UTF-8 text; its bytes are scored as they are.
        context: tokens per chunk.
        chunks: how many chunks at most.
        gpu_layers: layers to put on a GPU.
        threads: threads to use.
        log: takes its output.
        on_estimate: called with chunks done, chunks in all, running estimate.

    Raises:
        GgufkitError: if the text is shorter than two contexts.
        ToolError: if it fails.
    """
    command = [build.tool("llama-perplexity"), "-m", model.absolute(), "-f", text.absolute()]
    command += ["-c", str(context), "-t", str(threads), "-ngl", str(gpu_layers)]
    command += ["--chunks", str(chunks)] if chunks else []
    reader = output.PerplexityReader()

    def on_text(piece: str) -> None:
        if reader.feed(piece) and on_estimate:
            on_estimate(len(reader.estimates), reader.total, reader.estimates[-1])

    ran = run(command, on_text=on_text, log=log)
    if (tokens := reader.too_short()) is not None:
        raise GgufkitError(
            f"the text has only {tokens} tokens; a context of {context} needs at least {2 * context}",
            f"Give a longer text, or a smaller context: -c {max(8, tokens // 4)}",
        )
    _check(ran, log)
    result = reader.result()
    return PerplexityOutput(
        perplexity=result.perplexity,
        error=result.error,
        tokens=result.chunks * result.context,
        chunks=result.chunks,
        context=result.context,
        estimates=result.estimates,
        seconds=ran.seconds,
        peak_rss_nbytes=ran.peak_rss_nbytes,
    )
