"""From a checkpoint to a verdict, each step in a process of its own.

What takes seconds to import (torch, transformers, the converter) is imported once, and
each step runs in a fork of that process: whatever it changes in a module is gone
afterwards, and when llama.cpp ends its process, the others go on.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ggufkit import pipeline
from ggufkit.errors import GgufkitError
from ggufkit.library import manifest_of
from ggufkit.llamacpp import converter, toolchain
from ggufkit.llamacpp.observing import UnusableGGUFError
from ggufkit.llamacpp.toolchain import NativeBuild, ToolRun
from ggufkit.values import FetchOptions, Json, VerifyOptions
from ggufkit.verify.values import NAMES
from tests.architectures import vocabularies
from tests.architectures.making import make
from tests.architectures.recipes.shared import VOCAB
from tests.architectures.row import Kind, Verdict

_TAIL_LINES = 40
_ROUNDING = 3e-7
"""Mean KL divergence in nats that no order of float32 sums exceeds here."""


class EndedError(Exception):
    """The process of a step ended without an answer; says by which signal or status."""


def isolated(work: Callable[[], Any], log: Path) -> Any:
    """Run ``work`` in a fork of this process.

    Args:
        work: what it gives, or raises, must be picklable.
        log: gets all that it prints.

    Returns:
        What ``work`` gives.

    Raises:
        EndedError: if the process ended on its own account. Whatever ``work`` raises, too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(work, writing, log)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        if os.WIFSIGNALED(status):
            raise EndedError(signal.Signals(os.WTERMSIG(status)).name)
        raise EndedError(f"exit status {os.WEXITSTATUS(status)}")
    good, value = pickle.loads(answer)
    if good:
        return value
    raise value


def _answer(work: Callable[[], Any], writing: int, log: Path) -> None:
    """Never returns: the child has copies of all that its parent must clean up."""
    status = 1
    try:
        with log.open("ab") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        try:
            answer = pickle.dumps((True, work()))
        except Exception as error:
            traceback.print_exc()
            answer = pickle.dumps((False, _picklable(error)))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
        status = 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# --- the converter --------------------------------------------------------------


def import_all(build: NativeBuild) -> None:
    """Import what every step needs, the gguf-py that the converter came with before others.

    The converter knows byte-level tokenizers by a hash over published vocabularies;
    here it is told how the one of these recipes splits text.
    """
    sys.path[:0] = [str(build.scripts), str(build.scripts / "gguf-py")]
    from conversion import base  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = _pre_tokenizer
    toolchain.run = _run
    import transformers
    from transformers.models.llama import modeling_llama  # brings along what all models use

    assert modeling_llama
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _pre_tokenizer(model: Any, _: Any) -> str:
    config = json.loads((model.dir_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    rule: str = config[vocabularies.RULE]
    return rule


_start = toolchain.run


def _run(argv: Sequence[str | Path], **options: Any) -> ToolRun:
    """As ``toolchain.run``; but the converter runs in a fork, which has imported it all."""
    spelled = [str(argument) for argument in argv]
    if spelled[1:2] != [converter.__file__]:
        return _start(argv, **options)
    task = _read_task(options["stdin"], options["on_start"])
    log: Path = options["log"]
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    started = time.monotonic()
    try:
        status = isolated(lambda: _python(spelled[1:], options["env"], task), log)
    except EndedError as end:
        status = -int(signal.Signals[str(end)]) if str(end).startswith("SIG") else 1
    seconds = time.monotonic() - started
    printed = log.read_bytes()[begin:].decode("utf-8", "replace") if log.exists() else ""
    options["on_text"](printed)
    return ToolRun(tuple(spelled), status, seconds, 0, tuple(printed.splitlines()[-_TAIL_LINES:]))


def _read_task(stdin: int, on_start: Callable[[Callable[[], None]], None]) -> bytes:
    """What the converter is sent: read before the fork, while other threads only wait."""
    own = os.dup(stdin)
    on_start(lambda: None)
    with os.fdopen(own, "rb") as pipe:
        return pipe.readline()


def _python(arguments: list[str], env: Mapping[str, str | None], stdin: bytes) -> int:
    """Exit status of ``python SCRIPT ARGUMENT...``."""
    for name, value in env.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv = arguments
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# --- one recipe -----------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of a recipe.

    Attributes:
        name: of the recipe.
        verdict: how it ended.
        figures: what verify measured, by name.
        warnings: names of differences that are no errors.
        seconds: wall time.
    """

    name: str
    verdict: Verdict
    figures: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def try_recipe(name: str, directory: Path, tokenizers: Path) -> Result:
    """Make a recipe's checkpoint, and convert it as a user would; that compares the two.

    Args:
        name: a row of ``RECIPES``.
        directory: for its files, and the log of all steps.
        tokenizers: a directory with one of each kind.
    """
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, models = directory / name, directory / "models"
    try:
        isolated(lambda: make(name, checkpoint, tokenizers) and None, directory / "log")
    except Exception as error:
        result = Result(name, Verdict(Kind.NOT_MADE, _one_line(error)))
    else:
        result = _converted(name, checkpoint, models)
    return replace(result, seconds=time.monotonic() - started)


def _converted(name: str, checkpoint: Path, models: Path) -> Result:
    try:
        (made,) = pipeline.convert(
            str(checkpoint),
            types=["f32"],
            models_dir=models,
            # What differs is wanted as a list, not as the first error.
            verify=VerifyOptions(allowed=NAMES),
            fetch=FetchOptions(trust_remote_code=any(checkpoint.glob("*.py"))),
        )
    except GgufkitError as error:
        kind = Kind.UNUSABLE if isinstance(error, UnusableGGUFError) else Kind.REFUSED
        left = [path.name for path in models.rglob("*.gguf")]
        if left:
            return Result(name, Verdict(Kind.FAULT, f"{left[0]} is there after: {error}"))
        return Result(name, Verdict(kind, _one_line(error)))
    except Exception as error:
        traceback.print_exc()
        return Result(name, Verdict(Kind.FAULT, f"{type(error).__name__}: {_one_line(error)}"))
    manifest = manifest_of(made.path)
    assert manifest is not None
    return _judged(name, manifest.facts["verification"])


def _judged(name: str, facts: Json) -> Result:
    figures = facts["figures"]
    errors = [f"{m['name']}: {m['message']}" for m in facts["mismatches"] if m["error"]]
    warnings = tuple(m["name"] for m in facts["mismatches"] if not m["error"])
    kl = figures.get("kl_mean", math.inf)
    if errors:
        verdict = Verdict(Kind.DIFFERS, "; ".join(errors))
    elif facts["not_compared"] or math.isinf(kl):
        verdict = Verdict(Kind.NEARLY, f"not compared: {facts['not_compared']}")
    elif kl > _ROUNDING + figures["kl_rounding"]:
        verdict = Verdict(Kind.NEARLY, f"mean KL divergence {kl:.1e} nats")
    else:
        verdict = Verdict(Kind.OK)
    return Result(name, verdict, figures, warnings)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def results(names: Sequence[str], directory: Path, *, jobs: int) -> Iterator[Result]:
    """Try recipes, ``jobs`` at a time; results come in the order in which they are done."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizers = directory / "tokenizers"
    isolated(lambda: _write_tokenizers(tokenizers), directory / "log")
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        work = partial(_in_turn, directory=directory, tokenizers=tokenizers)
        yield from pool.imap_unordered(work, names)


def _write_tokenizers(directory: Path) -> None:
    for kind in vocabularies.KINDS:
        vocabularies.write(kind, directory / kind, VOCAB)


def _in_turn(name: str, directory: Path, tokenizers: Path) -> Result:
    torch.set_num_threads(1)
    result = try_recipe(name, directory / name, tokenizers)
    shutil.rmtree(directory / name / "models", ignore_errors=True)
    return result
