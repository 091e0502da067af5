"""Find, identify and run the native tools. The only user of :mod:`subprocess`.

:mod:`ggufkit.llamacpp.building` makes what is found here.
"""

import codecs
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from ggufkit import settings
from ggufkit.errors import GgufkitError, IntegrityError, SourceError, ToolError, ToolOutputError
from ggufkit.llamacpp import converter, host, leash, output, reasons
from ggufkit.llamacpp.output import PerplexityOutput, QuantizeOutput
from ggufkit.llamacpp.pin import read_pin, recipe_digest
from ggufkit.progress import SILENT, Progress, Task
from ggufkit.values import Json

BUILD_FILE = "build.json"
TOOLS = (
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
    "llama-bench",
    "llama-gguf-split",
    "llama-export-lora",
    "ggml-rpc-server",
)
_LIBLLAMA = ("libllama.so", "libllama.dylib", "llama.dll")
_TAIL_LINES = 40
_TAIL_CHARACTERS = 16_384
_CHUNK = 65_536
# llama.cpp's logger is a thread that is not waited for when a tool ends, so the
# reason to give up may be lost, and so may the result of a small model, which is
# freed at once. Both come early: asking again costs little.
_TRIES_FOR_A_REASON = 8
_BUILD_HINT = "Run: ggufkit build"


@dataclass(frozen=True)
class NativeBuild:
    """A finished build of llama.cpp in the cache.

    Attributes:
        root: its directory; nothing in it refers to another place.
        key: over all that can change the build.
        commit: short hash of the llama.cpp commit.
        backend: such as ``cpu`` or ``cuda``.
        compiler: first line of the compiler's ``--version``.
        cpu: model and instruction sets of the CPU that it was built for.
        flags: further settings: CMake arguments, compiler flags of the environment.
        tools: names of the tools that were built.
        built: UTC time, ISO 8601.
        source_kind: ``pin``, or ``checkout`` for somebody's own llama.cpp.
        source: SHA-256 of the pinned archive, or path of the checkout.
        recipe: digest of the build files.
    """

    root: Path
    key: str
    commit: str
    backend: str
    compiler: str
    cpu: str
    flags: tuple[str, ...]
    tools: tuple[str, ...]
    built: str
    source_kind: str
    source: str
    recipe: str

    @property
    def bin(self) -> Path:
        """The directory of the tools and the shared libraries."""
        return self.root / "bin"

    @property
    def scripts(self) -> Path:
        """The directory of the converters and what they import."""
        return self.root / "scripts"

    def tool(self, name: str) -> Path:
        """The executable of that name.

        Raises:
            ToolError: if this build has none.
        """
        path = self.bin / (name + (".exe" if os.name == "nt" else ""))
        if name not in self.tools or not path.is_file():
            raise ToolError(
                f"this build of llama.cpp has no {name}: {self.root}", "Run: ggufkit build --force"
            )
        return path

    def digest_of(self, tool: str) -> str:
        """SHA-256 (hex) over a tool and the libraries beside it.

        The executables are thin; what they do lies in the libraries.
        """
        libraries = sorted(
            p
            for p in self.bin.iterdir()
            if not p.is_symlink() and re.search(r"\.so|\.dylib|\.dll", p.name)
        )
        return _digest_of_files((self.tool(tool), *libraries))


@functools.lru_cache
def _digest_of_files(paths: tuple[Path, ...]) -> str:
    summer = hashlib.sha256()
    for path in paths:
        summer.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return summer.hexdigest()


def read_build(root: Path) -> NativeBuild:
    """Read a build's own description.

    Raises:
        IntegrityError: if the directory holds no finished build.
    """
    path = root / BUILD_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw |= {"root": root, "flags": tuple(raw["flags"]), "tools": tuple(raw["tools"])}
        return NativeBuild(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{root} holds no finished build: {error}", _BUILD_HINT) from error


def builds_dir() -> Path:
    """Where finished builds are kept."""
    return settings.cache_dir() / "native"


def find_build(backend: str | None = None, source: Path | None = None) -> NativeBuild:
    """The newest build of the present pin that runs on this CPU.

    Args:
        backend: such as ``cuda``; None for any.
        source: the llama.cpp checkout that it was built from, instead of the pin.

    Raises:
        ToolError: if there is none. ``GGUFKIT_NATIVE`` names one explicitly,
            and then it must be good.
    """
    if named := settings.native_build():
        return _named_build(named)
    wanted = _wanted_source(source)
    found, reasons = [], []
    for path in builds_dir().glob(f"*/{BUILD_FILE}"):
        if path.parent.suffix:
            continue
        try:
            build = read_build(path.parent)
        except IntegrityError:
            reasons.append("it is damaged, or of another version of ggufkit")
            continue
        if (build.source_kind, build.source) != wanted or backend not in (None, build.backend):
            continue
        if build.cpu != host.cpu_identity():
            reasons.append("it was built for another CPU")
        elif build.recipe != recipe_digest():
            reasons.append("it was built with other build files")
        else:
            found.append(build)
    if found:
        return max(found, key=lambda b: b.built)
    what = f"llama.cpp {read_pin().commit}" if source is None else f"{source}"
    what += f" for {backend}" if backend else ""
    why = f": there is a build, but {reasons[0]}" if reasons else " yet"
    raise ToolError(f"{what} is not built{why}", _build_command(backend, source))


def _wanted_source(source: Path | None) -> tuple[str, str]:
    return ("pin", read_pin().sha256) if source is None else ("checkout", str(source.resolve()))


def _build_command(backend: str | None, source: Path | None) -> str:
    options = f" --backend {backend}" if backend else ""
    options += f" --source {shlex.quote(str(source))}" if source else ""
    return f"{_BUILD_HINT}{options}"


def _named_build(root: Path) -> NativeBuild:
    build = read_build(root.absolute())
    if build.cpu != host.cpu_identity():
        raise ToolError(
            f"GGUFKIT_NATIVE names a build for another CPU ({build.cpu.partition(':')[0]}): {root}",
            "Unset GGUFKIT_NATIVE, or build again here: ggufkit build",
        )
    return build


# Running programs.


@dataclass(frozen=True)
class ToolRun:
    """A program that has run to its end.

    Attributes:
        argv: its command line.
        returncode: its exit status; negative is the signal that ended it.
        seconds: wall time.
        peak_rss_nbytes: its peak resident memory.
        tail: the last lines it printed.
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
    env: Mapping[str, str | None] | None = None,
    on_text: Callable[[str], None] | None = None,
    stderr_only: bool = False,
    serves: bool = False,
    stdin: int = subprocess.DEVNULL,
    on_start: Callable[[Callable[[], None]], None] | None = None,
    log: Path | None = None,
) -> ToolRun:
    """Run a program to its end, without a shell.

    It runs in a process group of its own, on a leash: when this process ends
    in any way, or an exception such as KeyboardInterrupt leaves this function,
    the program and all that it started are ended and reaped.

    Args:
        argv: program and arguments.
        cwd: working directory.
        env: additions to the environment; None as a value removes a name.
        on_text: gets stdout and stderr, merged, in pieces as they come.
        stderr_only: leave stdout out of that, and put it into the log alone.
        serves: whether it has clients, and must not be ended by one that goes away
            while it is being answered.
        stdin: a file descriptor that the program reads; nothing by default.
        on_start: gets a function that ends the program, for another thread to call.
        log: a file that gets the command line and all output.

    Raises:
        ToolError: if there is no such program, or it vanished without a status.
    """
    spelled = [str(a) for a in argv]
    program = shutil.which(spelled[0])
    if program is None:
        raise ToolError(f"there is no program '{spelled[0]}'")
    environment = {**os.environ, **(env or {})}
    started = time.monotonic()
    with ExitStack() as stack:
        sink = _open_log(stack, log, spelled)
        lifeline_end, lifeline = _pipe(stack)
        report, report_end = _pipe(stack)
        ends = (lifeline_end.fileno(), report_end.fileno())
        taken = [signal.SIGTERM, signal.SIGINT, *([] if serves else [signal.SIGPIPE])]
        signals = ",".join(str(int(number)) for number in taken)
        leashed = [sys.executable, "-I", "-S", leash.__file__, *map(str, ends), signals, program]
        process = subprocess.Popen(
            [*leashed, *spelled[1:]],
            cwd=cwd,
            env={name: value for name, value in environment.items() if value is not None},
            stdin=stdin,
            stdout=(sink or subprocess.DEVNULL) if stderr_only else subprocess.PIPE,
            stderr=subprocess.PIPE if stderr_only else subprocess.STDOUT,
            pass_fds=ends,
            start_new_session=True,
        )
        stream = process.stderr if stderr_only else process.stdout
        assert stream is not None
        try:
            with stream:
                lifeline_end.close()
                report_end.close()
                if on_start:
                    on_start(lifeline.close)
                tail = _pump(stream, on_text, sink)
                told = report.read()
        finally:
            lifeline.close()
            process.wait()
    if not told:
        raise ToolError(f"{Path(program).name} was ended from outside", _log_hint(log))
    return ToolRun(
        argv=tuple(spelled), seconds=time.monotonic() - started, tail=tail, **json.loads(told)
    )


def start_worker(module: str, errors: IO[bytes] | None = None) -> "subprocess.Popen[bytes]":
    """Start a module of this package as a process that is talked to.

    It must end when its stdin does, which is also when this process ends.
    Ctrl-C does not reach it.

    Args:
        module: such as ``ggufkit.llamacpp.rendering``.
        errors: a file that gets its stderr; None to drop it.
    """
    root = str(Path(__file__).parent.parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", module],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if errors is None else errors,
        start_new_session=True,
    )


def _pipe(stack: ExitStack) -> tuple[FileIO, FileIO]:
    reading, writing = os.pipe()
    return stack.enter_context(FileIO(reading, "r")), stack.enter_context(FileIO(writing, "w"))


def _open_log(stack: ExitStack, log: Path | None, argv: list[str]) -> IO[bytes] | None:
    if log is None:
        return None
    log.parent.mkdir(parents=True, exist_ok=True)
    sink = stack.enter_context(log.open("ab"))
    sink.write(f"$ {shlex.join(argv)}\n".encode())
    sink.flush()
    return sink


def _pump(
    stream: IO[bytes], on_text: Callable[[str], None] | None, sink: IO[bytes] | None
) -> tuple[str, ...]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tail = ""
    while chunk := os.read(stream.fileno(), _CHUNK):
        if sink:
            sink.write(chunk)
            sink.flush()
        text = decoder.decode(chunk)
        tail = (tail + text)[-_TAIL_CHARACTERS:]
        if on_text:
            on_text(text)
    return tuple(tail.splitlines()[-_TAIL_LINES:])


def _log_hint(log: Path | None) -> str:
    return f"All that it printed: {log}" if log else ""


_SIGNAL_HINTS = {
    "SIGILL": "The build uses instructions that this CPU lacks. Run: ggufkit build --force",
    "SIGKILL": "Most often the system was out of memory. Use a smaller context or model",
}


def explain_failure(ran: ToolRun, what: str, log: Path | None, line: str = "") -> ToolError:
    """The error for a program that ended with a status other than 0.

    Args:
        ran: the run.
        what: what it was to do, in words.
        log: where its output was kept.
        line: its essential line; looked for in the tail if empty.
    """
    if ran.returncode < 0:
        name = signal.Signals(-ran.returncode).name
        hint = _SIGNAL_HINTS.get(name, "")
        why = reasons.abort_reason(ran.tail)
        return ToolError(
            f"{what} failed: {Path(ran.argv[0]).name} was ended by {name}"
            + (f" ({why})" if why else ""),
            ". ".join(part for part in (hint, _log_hint(log)) if part),
        )
    return ToolError(f"{what} failed: {line or reasons.essential_line(ran.tail)}", _log_hint(log))


# pip, by which everything is fetched.


def pip(arguments: Sequence[str | Path], **options: Any) -> ToolRun:
    """Run pip of this Python; options as for :func:`run`.

    Raises:
        ToolError: if this environment has no pip.
    """
    if find_spec("pip") is None:
        raise ToolError(
            f"the Python environment {sys.prefix} has no pip, which fetches and installs",
            f"Run: {shlex.quote(sys.executable)} -m ensurepip --upgrade",
        )
    return run([sys.executable, "-m", "pip", *arguments], **options)


def pip_download(
    requirement: str,
    sha256: str,
    directory: Path,
    progress: Progress = SILENT,
    *,
    source: bool = False,
) -> Path:
    """Fetch one file of the package index that the user's pip is set up for.

    Args:
        requirement: ``name==version``.
        sha256: of the file, hex; pip looks for the file that has it, and the
            result is checked once more.
        directory: where to put it; made if missing.
        progress: told that it is under way.
        source: take the source archive rather than a wheel.

    Returns:
        The file.

    Raises:
        SourceError: if it cannot be fetched.
        IntegrityError: if what the index has hashes otherwise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    log = directory / "pip.log"
    name = requirement.partition("==")[0]
    kind = ["--no-binary" if source else "--only-binary", name]
    with progress.task(f"fetching {requirement}") as task:
        lines = _Counter(task)
        ran = pip(
            [
                *("download", "--no-deps", "--require-hashes", *kind, "--no-input"),
                *("--dest", directory, "-r", wanted),
            ],
            on_text=lines,
            log=log,
        )
    if ran.returncode != 0:
        raise _download_error(requirement, sha256, ran, log)
    wanted.unlink()
    log.unlink()
    files = [p for p in directory.iterdir() if p.suffix in (".whl", ".gz", ".zip")]
    if len(files) != 1:
        raise ToolOutputError(f"pip left {len(files)} files in {directory} instead of one")
    check_sha256(files[0], sha256)
    return files[0]


class _Counter:
    """Shows that something moves where nobody says how far it is."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._count = 0

    def __call__(self, text: str) -> None:
        self._count += 1
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self._task.update(self._count, lines[-1][:60] if lines else "")


def _download_error(requirement: str, sha256: str, ran: ToolRun, log: Path) -> GgufkitError:
    text = "\n".join(ran.tail)
    if got := re.search(r"Got\s+([0-9a-f]{64})", text):
        return IntegrityError(
            f"{requirement} hashes to {got[1]}, but {sha256} is expected",
            "The package index gives another file; do not use it",
        )
    why = reasons.connection_problem(ran.tail) or reasons.essential_line(ran.tail)
    return SourceError(
        f"{requirement} cannot be fetched: {why}",
        f"Look at the network, or at the index: {sys.executable} -m pip config list. "
        + _log_hint(log),
    )


def check_sha256(path: Path, sha256: str) -> None:
    """Compare a file's hash.

    Raises:
        IntegrityError: if it is another, naming both.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise IntegrityError(
            f"{path.name} hashes to {found}, but {sha256} is expected", f"Remove {path}"
        )


# The tools.


def identify(build: NativeBuild) -> str:
    """The commit that a build's own llama-perplexity says it is of.

    Raises:
        ToolError: if it does not run on this machine.
    """
    ran = run([build.tool("llama-perplexity"), "--version"])
    if ran.returncode != 0:
        raise explain_failure(ran, f"starting the tools in {build.bin}", None)
    return output.parse_version("\n".join(ran.tail))


def devices(build: NativeBuild) -> tuple[str, ...]:
    """The GPUs that a build sees, one line each.

    Raises:
        ToolError: if llama-bench does not run.
    """
    text: list[str] = []
    ran = run([build.tool("llama-bench"), "--list-devices"], on_text=text.append)
    if ran.returncode != 0:
        raise explain_failure(ran, "looking for GPUs", None)
    return output.parse_devices("".join(text))


_PRINT_SYSTEM_INFO = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.llama_print_system_info.restype = ctypes.c_char_p
print("system_info:", library.llama_print_system_info().decode())
"""


def cpu_features(build: NativeBuild) -> tuple[str, ...]:
    """The CPU features that a build uses, such as ``AVX2``.

    Its libllama is asked in a process of its own, where a library that does
    not fit can do no harm.

    Raises:
        ToolError: if the library does not load.
    """
    library = next((p for n in _LIBLLAMA if (p := build.bin / n).exists()), build.bin)
    ran = run([sys.executable, "-I", "-S", "-c", _PRINT_SYSTEM_INFO, library])
    if ran.returncode != 0:
        raise explain_failure(ran, f"loading {library}", None)
    return output.parse_system_info("\n".join(ran.tail))


def nvidia_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs that the driver sees, one line each; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    text: list[str] = []
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    ran = run(["nvidia-smi", *query], on_text=text.append)
    return tuple("".join(text).splitlines()) if ran.returncode == 0 else ()


_CONVERTER_ENV: dict[str, str | None] = {
    # A checkpoint is complete on disk, or it is not converted.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    # The converter must use the gguf-py that it came with.
    "NO_LOCAL_GGUF": None,
    "PYTHONPATH": None,
}


class Converter:
    """llama.cpp's converter, started before its task is known: it imports for seconds.

    Args:
        build: whose converter.
        log: gets what it prints.
    """

    def __init__(self, build: NativeBuild, log: Path) -> None:
        self.log = log
        self._listener: Callable[[str], None] = lambda _: None
        self._end: Callable[[], None] = lambda: None
        self._started = threading.Event()
        self._ran: Future[ToolRun] = Future()
        reading, self._writing = os.pipe()
        self._thread = threading.Thread(target=self._run, args=(build, reading), daemon=True)
        self._thread.start()

    def _run(self, build: NativeBuild, reading: int) -> None:
        def on_start(end: Callable[[], None]) -> None:
            os.close(reading)
            self._end = end
            self._started.set()

        try:
            ran = run(
                [sys.executable, converter.__file__, build.scripts],
                env=_CONVERTER_ENV,
                on_text=lambda text: self._listener(text),
                stdin=reading,
                on_start=on_start,
                log=self.log,
            )
        except BaseException as error:
            self._ran.set_exception(error)
        else:
            self._ran.set_result(ran)
        finally:
            self._started.set()

    def run(self, task: Mapping[str, Json], on_text: Callable[[str], None]) -> ToolRun:
        """Give it its only task, and wait for the end."""
        self._listener = on_text
        with suppress(BrokenPipeError), os.fdopen(self._writing, "wb") as pipe:
            self._writing = -1
            pipe.write(json.dumps(task).encode() + b"\n")
        return self._ran.result()

    def close(self) -> None:
        """End it, whatever it does."""
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1
        self._started.wait()
        self._end()
        self._thread.join()


def convert_checkpoint(
    build: NativeBuild,
    checkpoint: Path,
    out: Path,
    *,
    outtype: str,
    name: str,
    vocab_only: bool = False,
    mmproj: bool = False,
    options: Mapping[str, Json] | None = None,
    report: Path | None = None,
    started: Converter | None = None,
    log: Path,
    progress: Progress = SILENT,
) -> ToolRun:
    """Convert a checkpoint to a GGUF with llama.cpp's converter.

    It runs inside :mod:`ggufkit.llamacpp.converter`, which lets it read
    ``config.json`` as it is written.

    Args:
        build: whose converter to run.
        checkpoint: its directory.
        out: the GGUF to write; removed again on failure.
        outtype: ``f32``, ``f16`` or ``bf16``.
        name: the model's name in the metadata; given because the converter
            would make one up from the directory's name.
        vocab_only: write metadata and vocabulary but no tensors.
        mmproj: write the part that sees images instead of the one that writes.
        options: what else the converter has to know of the checkpoint, such as its
            end tokens (``Prepared.converter_options``).
        report: gets what was read of the config, as JSON; also of a failed run.
        started: one that waits for a task already; it is ended here.
        log: gets what it prints, unless ``started`` has a log of its own.
        progress: told how much is written.

    Raises:
        ToolError: if the converter fails, with its reason.
    """
    argv = [
        *(checkpoint.absolute(), "--outfile", out.absolute()),
        *("--outtype", outtype, "--model-name", name),
        *(["--vocab-only"] if vocab_only else []),
        *(["--mmproj"] if mmproj else []),
    ]
    given = {
        **{"no_mtp": False, "end_tokens": [], "renamed": {}, "dropped": []},
        **(options or {}),
        "report": str(report) if report else None,
        "argv": [str(argument) for argument in argv],
    }
    title = f"reading the vocabulary of {name}" if vocab_only else f"converting {name}"
    title += " (projector)" if mmproj else ""
    job = started or Converter(build, log)
    with closing(job), progress.task(title, 100, "percent") as task:
        watch = output.Percentages(lambda percent: task.update(percent))
        try:
            ran = job.run(given, watch.feed)
            if ran.returncode != 0:
                problem = output.conversion_problem(ran.tail)
                raise _explained(ran, f"converting {checkpoint.name}", job.log, problem)
            if not out.is_file():
                raise ToolOutputError(f"the converter wrote no {out.name}", _log_hint(job.log))
        except BaseException:
            job.close()
            out.unlink(missing_ok=True)
            raise
        task.update(100)
    return ran


def _explained(ran: ToolRun, what: str, log: Path, problem: output.Problem | None) -> ToolError:
    """The plain explanation of a failure where there is one, else the tool's own words."""
    if problem is None or ran.returncode < 0:
        return explain_failure(ran, what, log)
    return ToolError(f"{what} failed: {problem.message}", f"{problem.hint}. {_log_hint(log)}")


def quantize(
    build: NativeBuild,
    source: Path,
    out: Path,
    type: str,
    *,
    imatrix: Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    allow_requantize: bool = False,
    pure: bool = False,
    dry_run: bool = False,
    threads: int,
    log: Path,
    progress: Progress = SILENT,
) -> QuantizeOutput:
    """Quantize a GGUF with llama-quantize.

    Args:
        build: whose llama-quantize to run.
        source: the GGUF to read.
        out: the GGUF to write, an absolute path; removed again on failure,
            ignored by a dry run.
        type: quantization type.
        imatrix: importance matrix.
        tensor_types: exact tensor name to ggml type, overriding the mixture.
        allow_requantize: let already quantized tensors be quantized again.
        pure: give all tensors the same type.
        dry_run: only plan.
        threads: how many to use.
        log: gets what it prints.
        progress: told tensor by tensor.

    Raises:
        ToolError: if it fails, or a tensor did not get the type asked for.
    """
    if not out.is_absolute():
        raise ValueError(f"{out} is not an absolute path")
    flags: list[str | Path] = []
    flags += ["--allow-requantize"] if allow_requantize else []
    flags += ["--pure"] if pure else []
    flags += ["--dry-run"] if dry_run else []
    # The GGUF keeps the imatrix path as it was typed: type a base name.
    flags += ["--imatrix", imatrix.name] if imatrix else []
    text: list[str] = []
    title = f"planning {type}" if dry_run else f"quantizing {source.stem} to {type}"
    with ExitStack() as stack:
        if tensor_types:
            flags += ["--tensor-type-file", _overrides_file(stack, tensor_types)]
        task = stack.enter_context(progress.task(title, unit="tensors"))
        watch = output.TensorCount(task.set_total, task.update)

        def on_text(piece: str) -> None:
            text.append(piece)
            watch.feed(piece)

        argv = [
            *(build.tool("llama-quantize"), *flags, source.absolute()),
            *([] if dry_run else [out]),
            *(type, str(threads)),
        ]
        try:
            # It prints tensors to stderr and a few remarks to stdout, whose buffer
            # is flushed into the middle of a tensor's line.
            ran = run(
                argv,
                cwd=imatrix.absolute().parent if imatrix else None,
                on_text=on_text,
                stderr_only=True,
                log=log,
            )
            if ran.returncode != 0:
                raise _explained(
                    ran,
                    f"quantizing {source.name} to {type}",
                    log,
                    output.quantize_problem(ran.tail),
                )
            told = output.parse_quantize(
                "".join(text), seconds=ran.seconds, peak_rss_nbytes=ran.peak_rss_nbytes
            )
            _require_overrides(told, tensor_types or {})
        except BaseException:
            if not dry_run:
                out.unlink(missing_ok=True)
            raise
    return told


def _overrides_file(stack: ExitStack, tensor_types: Mapping[str, str]) -> Path:
    """Exact names as the patterns that llama-quantize wants, in a file.

    A file, because a large model's names do not fit on a command line.
    """
    directory = Path(stack.enter_context(TemporaryDirectory(prefix="ggufkit-")))
    path = directory / "tensor-types.txt"
    lines = (f"^{re.escape(name)}$={type}\n" for name, type in tensor_types.items())
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _require_overrides(told: QuantizeOutput, tensor_types: Mapping[str, str]) -> None:
    got = {t.name: t.type.lower() for t in told.tensors}
    for name, type in tensor_types.items():
        if name not in told.fallback_tensors and got.get(name) != type.lower():
            raise ToolError(
                f"tensor {name} was to become {type}, but llama-quantize made it "
                f"{got.get(name, 'vanish')}",
                "Override only tensors that the type quantizes",
            )


def perplexity(
    build: NativeBuild,
    model: Path,
    text: Path,
    *,
    context: int = 512,
    chunks: int | None = None,
    batch: int | None = None,
    gpu_layers: int = 0,
    threads: int,
    log: Path,
    text_name: str = "the text",
    on_estimate: Callable[[int, int | None, float], None] | None = None,
) -> PerplexityOutput:
    """Measure perplexity with llama-perplexity.

    Args:
        build: whose llama-perplexity to run.
        model: the GGUF.
        text: a UTF-8 file.
        context: tokens per chunk.
        chunks: how many chunks at most; None for all.
        batch: tokens computed at once; None for the tool's default.
        gpu_layers: layers to put on a GPU.
        threads: how many to use.
        log: gets what it prints.
        text_name: what to call the text in errors.
        on_estimate: called after each chunk with its number (from 1), the
            number of chunks, and the perplexity so far.

    Raises:
        GgufkitError: if the text is shorter than two contexts.
        ToolError: if the tool fails.
    """
    argv: list[str | Path] = [
        *(build.tool("llama-perplexity"), "-m", model.absolute(), "-f", text.absolute()),
        *("-c", str(context), "-t", str(threads), "-ngl", str(gpu_layers)),
        *(["--chunks", str(chunks)] if chunks else []),
        *(["-b", str(batch)] if batch else []),
    ]
    for _ in range(_TRIES_FOR_A_REASON):
        printed: list[str] = []
        watch = output.Estimates(on_estimate)

        def on_text(
            piece: str, printed: list[str] = printed, watch: output.Estimates = watch
        ) -> None:
            printed.append(piece)
            watch.feed(piece)

        ran = run(argv, on_text=on_text, log=log)
        ended = watch.chunks if ran.returncode else output.says_estimate(printed)
        if ran.returncode < 0 or ended or reasons.says_error(ran.tail):
            break
    if ran.returncode != 0 or not watch.chunks:
        raise _perplexity_error(ran, model, text_name, context, log)
    return output.parse_perplexity(
        "".join(printed), seconds=ran.seconds, peak_rss_nbytes=ran.peak_rss_nbytes
    )


def _perplexity_error(
    ran: ToolRun, model: Path, text: str, context: int, log: Path
) -> GgufkitError:
    if (counts := output.parse_short_text("\n".join(ran.tail))) is None:
        return explain_failure(ran, f"measuring {model.name}", log)
    have, need = counts
    return GgufkitError(
        f"{text} has only {have} tokens; a context of {context} needs at least {need}",
        f"Use a longer text, or a shorter context: --context {max(8, have // 2)}",
    )
