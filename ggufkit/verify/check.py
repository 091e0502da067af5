"""A GGUF held against the checkpoint that it was made from.

transformers and llama.cpp each answer in a process of their own; here their answers
are compared. What transformers says does not depend on the GGUF, so it is asked while
the converter is still writing.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Self

import numpy as np

from ggufkit import settings
from ggufkit.checkpoint.chat_template import TOKENIZER_CONFIG
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import IntegrityError, ToolError, UsageError
from ggufkit.llamacpp import host, observing
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.workers import Worker, WorkerEndedError, worker
from ggufkit.values import Json
from ggufkit.verify import compare, probe, reference
from ggufkit.verify.values import NAMES, Mismatch, Verification

_REFERENCE = "ggufkit.verify.reference"
_FLOATS = {"F32", "F16", "BF16", "F64"}
_UNKNOWN_MEMORY = 8 << 30

Suspects = Callable[[], Mapping[str, Any]]


def warm_up() -> None:
    """Start the process that asks transformers, whose import takes seconds."""
    worker(_REFERENCE).warm_up()


class Verifier:
    """Compares GGUFs with one checkpoint. A context manager; leaving it ends what it started.

    Args:
        index: the checkpoint, as it was prepared for the converter.
        original: its directory before that, if it was.
        trust_remote_code: let transformers run the checkpoint's own code.
        stored: dtype of the GGUF's matrices, such as ``BF16``.
        allowed: names of differences that are no errors.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        *,
        original: Path | None = None,
        trust_remote_code: bool = False,
        stored: str,
        allowed: Sequence[str] = (),
    ) -> None:
        self._index = index
        mended = original and not (index.path / TOKENIZER_CONFIG).is_symlink()
        self._original = original if original and mended else index.path
        self._allowed = tuple(sorted(set(allowed)))
        self._trust = trust_remote_code
        self._stored = stored
        self._scratch = tempfile.TemporaryDirectory(prefix="ggufkit-verify-")
        self._worker: Worker | None = None
        self._answer: Future[dict[str, Json]] = Future()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._worker is not None and not self._answer.done():
            self._worker.kill()
        self._scratch.cleanup()

    def start(self) -> None:
        """Begin to ask transformers; returns at once."""
        if self._worker is not None:
            return
        # Code of a checkpoint does not get into a process that serves others.
        self._worker = Worker(_REFERENCE) if self._trust else worker(_REFERENCE)
        out = Path(self._scratch.name)
        free = host.available_memory_nbytes() or host.total_memory_nbytes() or _UNKNOWN_MEMORY
        request = {
            "checkpoint": str(self._index.path.absolute()),
            "original": str(self._original.absolute()),
            "trust_remote_code": self._trust,
            "parameters": self._index.parameters,
            "available_nbytes": free,
            "threads": settings.threads(),
            "stored": self._stored,
            "scratch": str(out / "offload"),
            "out": str(out),
        }
        Thread(target=self._ask, args=(self._worker, request), daemon=True).start()

    def _ask(self, asked: Worker, request: dict[str, Json]) -> None:
        try:
            self._answer.set_result(asked.ask(request))
        except BaseException as error:
            self._answer.set_exception(error)
        if self._trust:
            asked.close()

    def check(self, gguf: Path, suspects: Suspects = dict) -> Verification:
        """Compare a GGUF.

        Args:
            gguf: the file.
            suspects: gives config keys that the converter does not read, and their values;
                asked if predictions differ.

        Raises:
            UnusableGGUFError: if llama.cpp cannot open or run it.
            IntegrityError: if it is no sound GGUF.
        """
        self.start()
        observing.warm_up()
        header = read_gguf(gguf)
        try:
            expected = self._answer.result()
        except WorkerEndedError as error:
            raise ToolError(
                f"{gguf.name} cannot be compared with its checkpoint: transformers' process "
                f"ended with: {error.message}",
                "Most often the memory was full. Free some, or leave the comparison out: "
                "--no-verify",
            ) from error
        started = time.monotonic()
        got = observing.ask(self._request(gguf, expected), gguf)
        exact = {tensor.type for tensor in header.tensors} <= _FLOATS
        mismatches, figures, missing = _compare(
            self._index,
            expected,
            got,
            Metadata(header),
            Path(self._scratch.name),
            suspects,
            exact=exact,
        )
        return Verification(
            gguf=gguf,
            against=self._index.path.name,
            mismatches=tuple(sorted(mismatches, key=lambda m: not m.error)),
            allowed=self._allowed,
            figures=figures,
            not_compared=tuple(missing),
            exact=exact,
            seconds=time.monotonic() - started + float(expected.get("seconds") or 0),
        )

    def _request(self, gguf: Path, expected: Json) -> dict[str, Json]:
        request: dict[str, Json] = {"gguf": str(gguf.absolute()), "out": self._scratch.name}
        tokenizer, rows = expected["tokenizer"], expected["conversations"]
        if "error" not in tokenizer:
            request["texts"] = [text for _, text, _ in tokenizer["lines"]]
        if "error" not in rows:
            request["conversations"] = probe.plain_conversations() if rows else []
            request["prompts"] = [row["texts"][0] for row in rows if row["texts"]]
        if "error" not in expected["predictions"]:
            request |= {key: expected["predictions"][key] for key in ("tokens", "positions")}
        else:
            # It must run all the same.
            request |= {"tokens": [0, 1, 2, 3], "positions": [3]}
        return request


def _compare(
    index: CheckpointIndex,
    expected: Json,
    got: Json,
    metadata: Metadata,
    scratch: Path,
    suspects: Suspects,
    *,
    exact: bool,
) -> tuple[list[Mismatch], dict[str, float], list[str]]:
    """Differences, figures, and what could not be compared."""
    found: list[Mismatch] = []
    figures: dict[str, float] = {}
    missing = [
        f"{what}: {expected[part]['error']}"
        for part, what in (
            ("tokenizer", "tokens"),
            ("conversations", "chat template"),
            ("predictions", "predictions"),
        )
        if "error" in expected[part]
    ]
    tokenizer, rows, predictions = (
        expected[part] for part in ("tokenizer", "conversations", "predictions")
    )
    ends = {*got["end"], *(metadata.get("ggufkit.stop_token_ids") or [])}
    found += compare.end_tokens(_end_ids(index), sorted(ends), metadata)
    if "error" not in tokenizer:
        figures["lines"] = len(tokenizer["lines"])
        lines, ids = list(tokenizer["lines"]), list(got["ids"])
        if "error" not in rows:
            lines += [["prompt", row["texts"][0], row["ids"]] for row in rows if row["texts"]]
            ids += got["prompts"]
        found += compare.lines(lines, ids)
        found += compare.vocabulary(tokenizer, metadata)
        found += compare.around(tokenizer, got["begin"], got["finish"])
    if "error" not in rows and rows:
        figures["conversations"] = len(rows)
        found += compare.conversations(rows, got["conversations"])
    if "error" not in predictions:
        found += compare.keys(predictions)
        found += compare.window(index.config, got["window"], len(predictions["tokens"]))
        more, kl = _function(predictions, got, scratch, suspects)
        figures |= kl
        # A quantized file is another function by design; its distance is a figure.
        found += more if exact else compare.far(kl)
    return found, figures, missing


def _function(
    predictions: Json, got: Json, scratch: Path, suspects: Suspects
) -> tuple[list[Mismatch], dict[str, float]]:
    if "finite" not in got:
        return [], {}
    exact = np.load(scratch / reference.LOGITS)
    rounded = np.load(scratch / reference.ROUNDED) if predictions["rounded"] else None
    logits = np.load(scratch / observing.LOGITS)
    return compare.function(exact, rounded, logits, predictions["positions"], suspects)


def _end_ids(index: CheckpointIndex) -> list[int]:
    """Ids that end an answer by config.json and generation_config.json."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        path = index.path / name
        try:
            content = index.config if name == "config.json" else json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise IntegrityError(f"{path} is not valid JSON: {error}") from error
        for section in (content, content.get("text_config") or {}):
            ids = section.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
    return list(dict.fromkeys(found))


def verify_opens_only(gguf: Path) -> Verification:
    """What can be said of a GGUF without its checkpoint: that llama.cpp opens and runs it.

    Raises:
        UnusableGGUFError: if it does not.
    """
    started = time.monotonic()
    header = Metadata(read_gguf(gguf))
    size = max(1, len(header.tokens))
    tokens = [n % size for n in range(16)]
    request: dict[str, Json] = {"gguf": str(gguf.absolute()), "tokens": tokens, "positions": [15]}
    if header.chat_template:
        request["conversations"] = probe.plain_conversations()[:1]
    got = observing.ask(request, gguf)
    mismatches = tuple(
        Mismatch("template", True, f"the chat template does not work: {row['refused']}")
        for row in got.get("conversations") or []
        if "refused" in row
    )
    return Verification(
        gguf,
        "",
        mismatches,
        not_compared=("tokens, chat template and predictions: no checkpoint was named",),
        exact=False,
        seconds=time.monotonic() - started,
    )


def require_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of ``--allow-difference``, if all are known.

    Raises:
        UsageError: if one is not.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UsageError(
            f"there is no difference called '{unknown[0]}'", f"Known are: {', '.join(NAMES)}"
        )
    return tuple(sorted(set(names)))
