"""One pass over a text by a reference and several candidates, chunk by chunk.

All models are loaded at once and read the same chunks in turn; what a chunk gave
is scored where llama.cpp put it and appended to the candidates' files. So memory
does not grow with the text, and a pass that was killed goes on at the chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Self

import numpy as np

from ggufkit import settings
from ggufkit.errors import GgufkitError
from ggufkit.evaluate.divergence import CompactReference, Logits, Meter, Tokens, TokenScores
from ggufkit.evaluate.reference_cache import CacheWriter, ReferenceCache
from ggufkit.llamacpp.scoring import Block, Scorer
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Task
from ggufkit.values import Text


class Scorers:
    """The models that are loaded, each when it is first asked for.

    Args:
        context: tokens per chunk.
        gpu_layers: layers to put on a GPU.
        build: the native build.
    """

    def __init__(self, context: int, gpu_layers: int, build: NativeBuild) -> None:
        self._context = context
        self._gpu_layers = gpu_layers
        self._build = build
        self._loaded: dict[tuple[Path, bool], Scorer] = {}

    def get(self, path: Path, *, is_reference: bool = False) -> Scorer:
        """A model; one that is reference and candidate at once is loaded for each."""
        key = (path, is_reference)
        if key not in self._loaded:
            self._loaded[key] = Scorer(
                path, context=self._context, gpu_layers=self._gpu_layers, build=self._build
            )
        return self._loaded[key]

    def keep_only(self, paths: Sequence[Path]) -> None:
        """Free all other models."""
        for key in [k for k in self._loaded if k[0] not in paths]:
            self._loaded.pop(key).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.keep_only(())


@dataclass
class Candidate:
    """One candidate of a pass, and its file of scores.

    Attributes:
        model: its GGUF.
        scores: the file; chunks are appended to it.
        done: chunks that are in it.
        computed: chunks that this process put there.
        seconds: wall time of this model's decoding and of its part of the scoring.
    """

    model: Path
    scores: Path
    done: int = 0
    computed: int = 0
    seconds: float = 0.0

    def resume(self, chunk_nbytes: int, step: int, total: int) -> None:
        """Find out what a killed run left, and cut off what is not whole.

        Of chunks that are decoded together all are there or none, so that the rest
        is computed exactly as it would have been.
        """
        with self.scores.open("ab") as file:
            whole = min(file.tell() // chunk_nbytes, total)
            self.done = whole if whole == total else whole // step * step
            file.truncate(self.done * chunk_nbytes)

    def append(self, scores: TokenScores) -> None:
        """Add the scores of the next chunks, shape (chunks, tokens)."""
        with self.scores.open("ab") as file:
            file.write(scores.to_bytes())
        self.done += len(scores.nll)
        self.computed += len(scores.nll)


def chunk_count(tokens: Tokens, text: Text, context: int, chunks: int | None) -> int:
    """How many chunks are read, as llama-perplexity counts them.

    Raises:
        GgufkitError: if the text is shorter than two contexts.
    """
    if len(tokens) < 2 * context:
        raise GgufkitError(
            f"{text.name} has only {len(tokens)} tokens; a context of {context} needs at least "
            f"{2 * context}",
            f"Use a longer text, or a shorter context: --context {max(8, len(tokens) // 2)}",
        )
    whole = len(tokens) // context
    return min(whole, chunks) if chunks else whole


class Pass:
    """A reference and some candidates that read the same chunks.

    Args:
        reference: the reference's GGUF, or a finished cache of what it said.
        candidates: at least one, all with the reference's vocabulary.
        tokens: of the text.
        context: tokens per chunk.
        total: number of chunks.
        scorers: loads the models.
        writer: makes a cache on the way.
    """

    def __init__(
        self,
        reference: Path | ReferenceCache,
        candidates: Sequence[Candidate],
        tokens: Tokens,
        context: int,
        total: int,
        scorers: Scorers,
        writer: CacheWriter | None = None,
    ) -> None:
        self._reference = reference
        self._candidates = candidates
        self._tokens = tokens
        self._context = context
        self._total = total
        self._scorers = scorers
        self._writer = writer
        self._first = context // 2
        self._scored = context - 1 - self._first
        self._layout = scorers.get(candidates[0].model).layout

    def run(self, task: Task) -> None:
        """Read what is missing in the candidates' files, and in the cache.

        Raises:
            GgufkitError: if a model gives logits that are no finite numbers.
        """
        step = self._layout.sequences
        for candidate in self._candidates:
            candidate.resume(TokenScores.nbytes(self._scored), step, self._total)
        begin = min(c.done for c in self._candidates)
        if self._writer:
            begin = min(begin, self._writer.chunks // step * step)
        vocabulary = self._scorers.get(self._candidates[0].model).vocabulary
        with Meter(vocabulary, settings.threads()) as meter:
            for start in range(begin, self._total, step):
                task.update(start)
                self._read(range(start, min(start + step, self._total)), meter)
            task.update(self._total)

    def _read(self, numbers: range, meter: Meter) -> None:
        """Read chunks that are decoded together."""
        chunks = [self._chunk(n) for n in numbers]
        active = [c for c in self._candidates if c.done <= numbers.start]
        found = [TokenScores.empty(len(chunks), self._scored) for _ in active]
        compact: list[list[CompactReference]] = [[] for _ in chunks]
        streams = [_timed(self._scorers.get(c.model).read(chunks), c) for c in active]
        for said, *blocks in zip(self._said(numbers), *streams, strict=True):
            for n, (at, rows) in enumerate(said):
                targets = chunks[n][at + 1 : at + 1 + len(rows)]
                logits = [b[n].logits for b in blocks]
                started = monotonic()
                scores = meter.score(rows, logits, targets)
                for candidate, all_, part in zip(active, found, scores, strict=True):
                    all_.put(n, at - self._first, part)
                    candidate.seconds += (monotonic() - started) / len(active)
                if self._writer and numbers[n] >= self._writer.chunks:
                    assert not isinstance(rows, CompactReference)
                    compact[n].append(meter.compact(rows, targets, self._writer.kept))
                    bounds = meter.score(compact[n][-1], logits, targets)
                    self._note_shortfall(active, scores, bounds)
        for candidate, scores_ in zip(active, found, strict=True):
            self._check(candidate.model, scores_, numbers)
        for parts in filter(None, compact):
            assert self._writer
            self._writer.append(CompactReference.join(parts))
        for candidate, scores_ in zip(active, found, strict=True):
            candidate.append(scores_)

    def _chunk(self, number: int) -> Tokens:
        return self._tokens[number * self._context : (number + 1) * self._context]

    def _said(self, numbers: range) -> Iterator[list[tuple[int, "Logits | CompactReference"]]]:
        """What the reference says: for each chunk a position and the rows from there on."""
        if isinstance(self._reference, Path):
            scorer = self._scorers.get(self._reference, is_reference=True)
            for blocks in scorer.read([self._chunk(n) for n in numbers]):
                yield [(block.first, block.logits) for block in blocks]
            return
        kept = [self._reference.chunk(n) for n in numbers]
        for call in self._layout.calls(self._context, self._first):
            if call.scored > call.begin:
                part = slice(call.begin - self._first, call.scored - self._first)
                yield [(call.begin, chunk.rows(part)) for chunk in kept]

    def _note_shortfall(
        self,
        active: Sequence[Candidate],
        exact: Sequence[TokenScores],
        bounds: Sequence[TokenScores],
    ) -> None:
        assert self._writer
        for candidate, true, bound in zip(active, exact, bounds, strict=True):
            sums = (float(s.divergence.sum(dtype=np.float64)) for s in (true, bound))
            self._writer.note(candidate.model.stem, *sums)

    def _check(self, model: Path, scores: TokenScores, numbers: range) -> None:
        """Refuse logits that are no finite numbers, and find out whose they are."""
        if scores.are_finite().all():
            return
        if isinstance(self._reference, Path) and not np.isfinite(scores.nll_reference).all():
            broken = self._reference, self._scorers.get(self._reference, is_reference=True)
            at = int(np.isfinite(scores.nll_reference).all(axis=1).argmin())
        else:
            broken = model, self._scorers.get(model)
            at = int(scores.are_finite().argmin())
        path, scorer = broken
        number = numbers[at]
        tensor = scorer.first_broken_tensor(self._chunk(number))
        where = f"; the first tensor with one is {tensor}" if tensor else ""
        raise GgufkitError(
            f"{path.name} gives logits that are no finite numbers in chunk {number + 1}{where}",
            "Its weights are damaged or overflow; convert or quantize it again"
            + (_layer_hint(tensor) if tensor else ""),
        )


def _layer_hint(tensor: str) -> str:
    name, dash, block = tensor.rpartition("-")
    return f". Look at block {block} ({name}): ggufkit inspect" if dash and block.isdigit() else ""


def _timed(steps: Iterator[list[Block]], candidate: Candidate) -> Iterator[list[Block]]:
    """The same steps; the time they take is added to the candidate's."""
    while True:
        started = monotonic()
        blocks = next(steps, None)
        candidate.seconds += monotonic() - started
        if blocks is None:
            return
        yield blocks
