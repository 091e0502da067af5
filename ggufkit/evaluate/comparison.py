"""Candidates beside a reference on texts: passes planned, results kept as stages.

One stage holds the scores of one candidate against one reference on one text,
token by token, so that any later question (percentiles, differences between
chunks, other confidences) is answered without reading the text again.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufkit.errors import UsageError
from ggufkit.evaluate import by_bytes, significance, vocabularies
from ggufkit.evaluate.divergence import Tokens, TokenScores
from ggufkit.evaluate.leaks import Leak
from ggufkit.evaluate.perplexity import name_in_store
from ggufkit.evaluate.reading import Candidate, Pass, Scorers, chunk_count
from ggufkit.evaluate.reference_cache import CacheWriter, Identity, ReferenceCache
from ggufkit.llamacpp import host
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata, split_parts
from ggufkit.llamacpp.runtime import check_parts
from ggufkit.llamacpp.scoring import layout_for
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Progress
from ggufkit.store import Store, stage_key
from ggufkit.values import (
    Artifact,
    BytesComparison,
    Comparison,
    ComparisonReport,
    Difference,
    Json,
    PairDifference,
    Text,
    to_json,
)

STAGE = "compare"
SCORES = "scores.bin"
_VERSION = 1
_DIVERGENCE_PERCENTS = (0, 0.1, 1, 5, 10, 50, 90, 95, 99, 99.9, 100)
_DELTA_P_PERCENTS = (0, 0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
"""Those that llama-perplexity prints."""
_SHARE_OF_MEMORY = 0.9


@dataclass(frozen=True)
class Setting:
    """How models are compared.

    Attributes:
        context: tokens per chunk.
        chunks: how many chunks at most; None for all.
        gpu_layers: layers to put on a GPU.
        confidence: of the verdicts, such as 0.95.
        seed: of the bootstrap behind them.
        reference_cache: directory of compact reusable references.
    """

    context: int = 512
    chunks: int | None = None
    gpu_layers: int = 0
    confidence: float = 0.95
    seed: int = 0
    reference_cache: Path | None = None


class Model:
    """A GGUF that takes part.

    Attributes:
        path: the file; of a model in parts, the first.
        digest: SHA-256 of the file, or of the parts' digests.
        nbytes: size of all parts.
        trained_context: tokens of context that it was trained with, if it says so.
    """

    def __init__(self, path: Path, store: Store, progress: Progress) -> None:
        self.path = path
        header = read_gguf(path, arrays=False)
        self.trained_context = Metadata(header).trained_context
        check_parts(Metadata(header))
        digests = [store.digest(part, progress) for part in split_parts(header)]
        self.nbytes = sum(d.nbytes for d in digests)
        self.digest = digests[0].sha256
        if len(digests) > 1:
            joined = [d.sha256 for d in digests]
            self.digest = stage_key("parts", 1, {"parts": joined}, {}, {})

    @cached_property
    def metadata(self) -> Metadata:
        """The header, with its vocabulary."""
        return Metadata(read_gguf(self.path))

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return max(1, len(self.metadata.tokens))


class Comparer:
    """Compares candidates with a reference.

    Args:
        store: keeps results, so that asking again is instant.
        build: whose libraries to run.
        reference: the reference's GGUF.
        models: the candidates' GGUFs.
        setting: how they are compared.
        progress: who to tell.

    Raises:
        IntegrityError: if a file is no whole GGUF.
    """

    def __init__(
        self,
        store: Store,
        build: NativeBuild,
        reference: Path,
        models: Sequence[Path],
        setting: Setting,
        progress: Progress,
    ) -> None:
        self._store = store
        self._build = build
        self._setting = setting
        self._progress = progress
        self._reference = Model(reference, store, progress)
        self._models = [Model(path, store, progress) for path in models]
        self._notes: list[str] = []
        self._leaks: dict[tuple[str, Path], Leak] = {}
        self._vocabularies: dict[str, str] = {}
        self._warn_of_context()

    def compare(
        self, texts: Sequence[Text], leaks: Mapping[tuple[str, Path], Leak] | None = None
    ) -> ComparisonReport:
        """Compare on some texts.

        Args:
            texts: what to read.
            leaks: what the models were calibrated on, by a text's digest and a model's
                path, to be kept with the results.

        Raises:
            GgufkitError: if a text is too short, or a model gives no numbers.
            UsageError, IntegrityError: if a reference cache cannot be used.
        """
        self._leaks = dict(leaks or {})
        self._notes += [note for leak in self._leaks.values() if leak.told for note in leak.notes]
        comparisons: list[Comparison] = []
        bytewise: list[BytesComparison] = []
        pairs: list[PairDifference] = []
        with Scorers(self._setting.context, self._setting.gpu_layers, self._build) as scorers:
            for text in texts:
                found = self._artifacts(text, scorers)
                rows = [(m, found[m.digest]) for m in self._models if m.digest in found]
                comparisons += [self._comparison(m, artifact, text) for m, artifact in rows]
                pairs += self._pairs(text, rows)
                if others := [m for m in self._models if m.digest not in found]:
                    scorers.keep_only(())
                    bytewise += [self._compare_bytes(m, text) for m in others]
        notes = tuple(dict.fromkeys(self._notes))
        return ComparisonReport(tuple(comparisons), tuple(bytewise), tuple(pairs), notes)

    def _warn_of_context(self) -> None:
        for model in (self._reference, *self._models):
            trained = model.trained_context
            if trained and self._setting.context > trained:
                self._progress.warn(
                    f"a context of {self._setting.context} tokens is more than the {trained} that "
                    f"{model.path.name} was trained with"
                )

    # What is there, and what has to be read.

    def _artifacts(self, text: Text, scorers: Scorers) -> dict[str, Artifact]:
        """The scores of all candidates with the reference's vocabulary, by digest."""
        found: dict[str, Artifact] = {}
        missing: dict[str, Model] = {}
        for model in self._models:
            if artifact := self._stored(model, text):
                found[model.digest] = artifact
            elif not self._vocabulary_difference(model):
                missing[model.digest] = model
        if missing:
            found |= self._measure(text, list(missing.values()), scorers)
        elif found and self._setting.reference_cache:
            self._progress.say(f"{text.name}: all is there already, no reference cache was needed")
        return found

    def _stored(self, model: Model, text: Text) -> Artifact | None:
        """An exact result, or one from a cache if caches are wanted."""
        kinds: list[int | None] = [None]
        if self._setting.reference_cache:
            kinds.append(self._identity(text).kept)
        stages = (self._stage(model, text, kept) for kept in kinds)
        found = (self._store.find(**stage, progress=self._progress) for stage in stages)
        return next((artifact for artifact in found if artifact), None)

    def _vocabulary_difference(self, model: Model) -> str:
        if model.digest not in self._vocabularies:
            told = vocabularies.difference(self._reference.metadata, model.metadata)
            self._vocabularies[model.digest] = told
            if told:
                self._progress.warn(
                    f"{model.path.name} has another vocabulary than {self._reference.path.name}: "
                    f"{told}. Their predictions are of different tokens, so only bits per byte "
                    "are compared"
                )
        return self._vocabularies[model.digest]

    def _groups(self, models: list[Model]) -> list[list[Model]]:
        """Candidates that fit into memory together, the reference beside them."""
        available = host.available_memory_nbytes()
        if available is None or self._setting.gpu_layers:
            return [models]
        vocabulary = self._reference.vocabulary
        # llama.cpp holds logits twice: as it computes them and as it gives them out.
        logits = 2 * 4 * vocabulary * layout_for(self._setting.context, vocabulary).rows
        room = int(_SHARE_OF_MEMORY * available) - self._reference.nbytes - logits
        groups: list[list[Model]] = [[]]
        used = 0
        for model in models:
            if groups[-1] and used + model.nbytes + logits > room:
                groups.append([])
                used = 0
            groups[-1].append(model)
            used += model.nbytes + logits
        if len(groups) > 1:
            self._progress.say(
                f"{len(models)} candidates do not fit into memory together: {len(groups)} groups, "
                "and the reference reads the text once for each"
            )
        return groups

    def _stage(self, model: Model, text: Text, kept: int | None) -> dict[str, Json]:
        """What names a candidate's stage; ``kept`` is the size of a compact reference."""
        options = {
            "context": self._setting.context,
            "chunks": self._setting.chunks,
            "gpu_layers": self._setting.gpu_layers,
        }
        return {
            "stage": STAGE,
            "version": _VERSION,
            "model": name_in_store(self._store, model.path),
            "inputs": {
                "model": model.digest,
                "reference": self._reference.digest,
                "text": text.digest,
            },
            "options": options | ({"compact_reference": kept} if kept else {}),
            "tool": {"llama.cpp": self._build.commit, "backend": self._build.backend},
        }

    # Reading.

    def _measure(self, text: Text, models: list[Model], scorers: Scorers) -> dict[str, Artifact]:
        """Read the text with some candidates, and with the reference or its cache."""
        groups = self._groups(models)
        scorers.keep_only([self._reference.path, *(m.path for m in groups[0])])
        tokens = scorers.get(groups[0][0].path).tokenize(text.path.read_bytes())
        total = chunk_count(tokens, text, self._setting.context, self._setting.chunks)
        cache, writer = self._cache_for(text, total)
        reference = cache or self._reference.path
        kept = self._identity(text).kept if cache else None
        found: dict[str, Artifact] = {}
        try:
            for n, group in enumerate(groups):
                scorers.keep_only([self._reference.path, *(m.path for m in group)])
                # The first pass makes the whole cache.
                own = None if n else writer
                job = _Job(text, tokens, total, reference, kept, own, scorers)
                found |= self._publish(job, sorted(group, key=lambda m: m.digest), [])
            if writer and writer.chunks >= total:
                self._tell_written(writer, writer.finish())
        finally:
            for file in (writer, cache):
                if file:
                    file.close()
        return found

    def _publish(
        self, job: "_Job", models: Sequence[Model], candidates: list[Candidate]
    ) -> dict[str, Artifact]:
        """Open the stages of all candidates, one inside the other, and read in the innermost.

        Sorted, so that two processes cannot wait for each other's stages.
        """
        if not models:
            if candidates:
                self._read(job, candidates)
            return {}
        model, *rest = models
        inner: dict[str, Artifact] | None = None

        def work(directory: Path) -> dict[str, Json]:
            nonlocal inner
            candidate = Candidate(model.path, directory / SCORES)
            if not candidate.scores.exists():
                self._take_over(model, job, candidate.scores)
            inner = self._publish(job, rest, [*candidates, candidate])
            return self._facts(model, job, candidate)

        stage = self._stage(model, job.text, job.kept)
        artifact = self._store.run(**stage, work=work, resume=True, progress=self._progress)
        if inner is None:  # stored already, by another process or with the same cache
            inner = self._publish(job, rest, candidates)
        return {model.digest: artifact, **inner}

    def _read(self, job: "_Job", candidates: list[Candidate]) -> None:
        work = Pass(
            job.reference,
            candidates,
            job.tokens,
            self._setting.context,
            job.total,
            job.scorers,
            job.writer,
        )
        names = [c.model.stem for c in candidates]
        told = ", ".join(names) if len(names) < 4 else f"{len(names)} models"
        title = f"comparing {told} on {job.text.name}"
        with self._progress.task(title, job.total, "chunks") as task:
            work.run(task)

    def _take_over(self, model: Model, job: "_Job", scores: Path) -> None:
        """Begin with the chunks of a run that differs in the number of chunks alone."""
        wanted = to_json(self._stage(model, job.text, job.kept))
        wanted["options"].pop("chunks")
        best: tuple[int, Path] | None = None
        for artifact in self._store.artifacts(STAGE):
            manifest = artifact.manifest
            options = {k: v for k, v in manifest.options.items() if k != "chunks"}
            told = (manifest.version, manifest.inputs, options, manifest.tool)
            if told != tuple(wanted[k] for k in ("version", "inputs", "options", "tool")):
                continue
            file, chunks = artifact.path / SCORES, int(manifest.facts["chunks"])
            whole = file.is_file() and self._store.digest(file) == manifest.outputs.get(SCORES)
            if whole and (best is None or chunks > best[0]):
                best = (chunks, file)
        if best:
            shutil.copyfile(best[1], scores)
            self._progress.say(f"{model.path.stem}: {min(best[0], job.total)} chunks are there")

    # Reference caches.

    def _identity(self, text: Text) -> Identity:
        return Identity(
            reference=self._reference.digest,
            text=text.digest,
            context=self._setting.context,
            vocabulary=self._reference.vocabulary,
            gpu_layers=self._setting.gpu_layers,
            llamacpp=self._build.commit,
            backend=self._build.backend,
        )

    def _cache_for(
        self, text: Text, total: int
    ) -> tuple[ReferenceCache | None, CacheWriter | None]:
        """The cache if it holds all chunks that are wanted, else one to be written."""
        directory = self._setting.reference_cache
        if directory is None:
            return None, None
        if directory.exists() and not directory.is_dir():
            raise UsageError(
                f"{directory} is not a directory",
                "Name the directory that shall hold reference caches",
            )
        identity = self._identity(text)
        name = f"{self._reference.path.stem}-{Path(text.name).stem}-{text.digest[:8]}"
        place = directory / f"{name}-c{self._setting.context}.reference"
        if place.exists():
            cache = ReferenceCache(place, identity)
            if cache.chunks >= total:
                return cache, None
            cache.close()
        return None, CacheWriter(place, identity, total)

    def _tell_written(self, writer: CacheWriter, shortfall: dict[str, float]) -> None:
        nbytes = writer.path.stat().st_size
        shares = ", ".join(f"{name}: {_percent(share)}" for name, share in shortfall.items())
        self._notes.append(
            f"reference cache {writer.path}: {nbytes / (1 << 20):.1f} MiB; by how much mean "
            f"divergences from it are too low: {shares or 'not measured'}"
        )

    # Results.

    def _facts(self, model: Model, job: "_Job", candidate: Candidate) -> dict[str, Json]:
        scores = _load_scores(candidate.scores, job.total)
        shortfall = None
        if isinstance(job.reference, ReferenceCache):
            shortfall = max(job.reference.shortfall.values(), default=None)
        comparison = _summary(
            scores,
            model=model,
            reference=self._reference,
            text=job.text,
            context=self._setting.context,
            nbytes=_scored_nbytes(job, candidate, self._setting.context),
        )
        comparison = replace(
            comparison,
            verdicts=self._verdicts(model, scores),
            seconds=round(candidate.seconds, 3),
            computed_chunks=candidate.computed,
            divergence_shortfall=shortfall,
            **self._marks(model, job.text),
        )
        facts: dict[str, Json] = to_json(comparison)
        return facts

    def _comparison(self, model: Model, artifact: Artifact, text: Text) -> Comparison:
        facts = artifact.manifest.facts
        known = {f.name: facts[f.name] for f in fields(Comparison) if f.name in facts}
        known |= self._marks(model, text)
        known |= {
            "model": model.path,
            "reference": self._reference.path,
            "text": text.name,
            "verdicts": self._verdicts(model, scores_of(artifact)),
            "computed_chunks": 0 if artifact.reused else facts["computed_chunks"],
            "reused": artifact.reused,
        }
        found = Comparison(**known)
        if found.divergence_shortfall is not None:
            self._notes.append(
                "the reference came out of a cache: divergences are lower bounds; when the cache "
                f"was written, their means were too low by {_percent(found.divergence_shortfall)} "
                "at most"
            )
        return found

    def _marks(self, model: Model, text: Text) -> dict[str, Any]:
        """What is known of calibration on a text, of a candidate and of the reference."""
        own, reference = (
            self._leaks.get((text.digest, m.path), Leak()) for m in (model, self._reference)
        )
        return {"overlap": own.overlap, "notes": (*own.notes, *reference.notes)}

    def _verdicts(self, model: Model, scores: TokenScores) -> tuple[Difference, ...]:
        means = _chunk_means(scores.nll) - _chunk_means(scores.nll_reference)
        told = self._judge("log_perplexity", model.path, self._reference.path, means)
        return (told,) if told else ()

    def _pairs(self, text: Text, rows: Sequence[tuple[Model, Artifact]]) -> list[PairDifference]:
        """Each pair of candidates, by divergence and by log perplexity."""
        scores = [scores_of(artifact) for _, artifact in rows]
        found: list[PairDifference] = []
        for measure, name in (("divergence", "divergence"), ("log_perplexity", "nll")):
            means = [_chunk_means(getattr(s, name)) for s in scores]
            for n, m in combinations(range(len(rows)), 2):
                one, other = rows[n][0].path, rows[m][0].path
                if told := self._judge(measure, one, other, means[n] - means[m]):
                    found.append(PairDifference(text.name, told))
        return found

    def _judge(
        self, measure: str, model: Path, other: Path, differences: npt.NDArray[np.float64]
    ) -> Difference | None:
        if len(differences) < significance.MIN_CHUNKS:
            self._notes.append(
                f"no verdicts: {len(differences)} chunks are too few to tell a difference from "
                f"chance; {significance.MIN_CHUNKS} are needed"
            )
            return None
        return significance.paired(
            measure,
            model,
            other,
            differences,
            confidence=self._setting.confidence,
            seed=self._setting.seed,
        )

    def _compare_bytes(self, model: Model, text: Text) -> BytesComparison:
        found = by_bytes.measure(
            self._store,
            self._build,
            (model.path, model.digest),
            (self._reference.path, self._reference.digest),
            text,
            context=self._setting.context,
            chunks=self._setting.chunks,
            gpu_layers=self._setting.gpu_layers,
            progress=self._progress,
        )
        told = self._judge("bits_per_byte", model.path, self._reference.path, found.differences)
        return replace(
            found.comparison,
            vocabulary_difference=self._vocabulary_difference(model),
            file_nbytes=model.nbytes,
            reference_file_nbytes=self._reference.nbytes,
            verdicts=(told,) if told else (),
        )


@dataclass(frozen=True)
class _Job:
    """One text to be read by one group of candidates."""

    text: Text
    tokens: Tokens
    total: int
    reference: Path | ReferenceCache
    kept: int | None
    writer: CacheWriter | None
    scorers: Scorers


def scores_of(artifact: Artifact) -> TokenScores:
    """The scores in a published stage, shape (chunks, scored tokens)."""
    return _load_scores(artifact.path / SCORES, int(artifact.manifest.facts["chunks"]))


def _load_scores(file: Path, chunks: int) -> TokenScores:
    return TokenScores.from_bytes(file.read_bytes(), chunks)


def _scored_nbytes(job: _Job, candidate: Candidate, context: int) -> int:
    """Bytes of the text in its scored tokens."""
    scorer = job.scorers.get(candidate.model)
    targets = job.tokens[: job.total * context].reshape(job.total, context)
    targets = targets[:, context // 2 + 1 :]
    tokens, counts = np.unique(targets, return_counts=True)
    lengths = [len(scorer.piece(int(token))) for token in tokens]
    return int(np.dot(lengths, counts))


def _summary(
    scores: TokenScores,
    *,
    model: Model,
    reference: Model,
    text: Text,
    context: int,
    nbytes: int,
) -> Comparison:
    nll, nll_reference = (a.astype(np.float64).ravel() for a in (scores.nll, scores.nll_reference))
    divergence = scores.divergence.astype(np.float64).ravel()
    delta_p = scores.delta_p.astype(np.float64).ravel()
    same_top = scores.same_top.astype(np.float64).ravel()
    bits = nbytes * np.log(2)
    return Comparison(
        model=model.path,
        reference=reference.path,
        text=text.name,
        context=context,
        chunks=len(scores.nll),
        tokens=nll.size,
        log_perplexity=float(nll.mean()),
        log_perplexity_error=_error(nll),
        reference_log_perplexity=float(nll_reference.mean()),
        delta_log_perplexity=float((nll - nll_reference).mean()),
        delta_log_perplexity_error=_error(nll - nll_reference),
        divergence=float(divergence.mean()),
        divergence_error=_error(divergence),
        divergence_percentiles=_percentiles(divergence, _DIVERGENCE_PERCENTS),
        agreement=float(same_top.mean()),
        agreement_error=_error(same_top),
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(np.sqrt((delta_p**2).mean())),
        delta_p_percentiles=_percentiles(delta_p, _DELTA_P_PERCENTS),
        bits_per_byte=float(nll.sum() / bits),
        reference_bits_per_byte=float(nll_reference.sum() / bits),
        file_nbytes=model.nbytes,
        reference_file_nbytes=reference.nbytes,
    )


def _error(values: npt.NDArray[np.float64]) -> float:
    """Standard error of the mean, as llama-perplexity has it: as if tokens were independent."""
    return float(values.std() / np.sqrt(max(1, values.size - 1)))


def _percentiles(values: npt.NDArray[np.float64], percents: Sequence[float]) -> dict[str, float]:
    found = np.percentile(values, percents)
    return {f"{p:g}": float(v) for p, v in zip(percents, found, strict=True)}


def _chunk_means(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    means: npt.NDArray[np.float64] = values.mean(axis=1, dtype=np.float64)
    return means


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
