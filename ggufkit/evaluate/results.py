"""Stored results, read back out of the models directory.

Measuring keeps each result as a stage of the :class:`~ggufkit.store.Store`; here
they become values again, each with what identifies its comparable kin: digests
of model, reference and text, and the settings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ggufkit.store import Store
from ggufkit.values import (
    Comparison,
    Difference,
    EvalResult,
    Json,
    RunManifest,
    SpeedResult,
    TaskResult,
)

AnyResult = EvalResult | Comparison | SpeedResult | TaskResult
Value = TypeVar("Value", bound=AnyResult)
_Held = TypeVar("_Held", bound=AnyResult, covariant=True)


@dataclass(frozen=True)
class Stored(Generic[_Held]):
    """A result and what it belongs to.

    Attributes:
        value: the result.
        model: digest of the model.
        reference: digest of the reference; empty if there is none.
        text: digest of the text or of the file of questions; empty if there is none.
        options: the settings that it was measured with.
        tool: identity of the tools, such as llama.cpp's commit.
        created: UTC time, ISO 8601.
    """

    value: _Held
    model: str
    reference: str
    text: str
    options: Mapping[str, Json]
    tool: Mapping[str, Json]
    created: str


@dataclass(frozen=True)
class Results:
    """All stored results, the oldest first.

    Attributes:
        perplexities: what ``ppl`` measured.
        comparisons: what ``compare`` measured.
        speeds: what ``bench`` measured.
        tasks: what the tasks gave.
        unreadable: places of results that another version of ggufkit wrote otherwise.
    """

    perplexities: tuple[Stored[EvalResult], ...] = ()
    comparisons: tuple[Stored[Comparison], ...] = ()
    speeds: tuple[Stored[SpeedResult], ...] = ()
    tasks: tuple[Stored[TaskResult], ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def every(self) -> tuple[Stored[AnyResult], ...]:
        """All results of all kinds."""
        return (*self.perplexities, *self.comparisons, *self.speeds, *self.tasks)

    @property
    def paths(self) -> set[Path]:
        """Where the models lay when they were measured, as far as that was kept."""
        return {s.value.model for s in self.every} | {s.value.reference for s in self.comparisons}

    def may_be(self, nbytes: int) -> bool:
        """Whether a file of this size can be one of the models."""
        sizes = {s.value.file_nbytes for s in self.every}
        sizes |= {s.value.reference_file_nbytes for s in self.comparisons}
        # 0 stands for a size that an old result does not hold.
        return nbytes in sizes or 0 in sizes


def read_results(store: Store) -> Results:
    """Read all results that a models directory holds."""
    unreadable: list[str] = []

    def read(stage: str, build: "Callable[[RunManifest], Value]") -> tuple[Stored[Value], ...]:
        found = []
        for artifact in store.artifacts(stage):
            if artifact.manifest.stage != stage:  # "task" also finds "task-..."
                continue
            try:
                found.append(_stored(artifact.manifest, build(artifact.manifest)))
            except (KeyError, TypeError, ValueError, AttributeError):
                unreadable.append(str(artifact.path))
        return tuple(sorted(found, key=lambda s: (s.created, s.model)))

    return Results(
        perplexities=read("evaluate", _perplexity),
        comparisons=read("compare", _comparison),
        speeds=read("bench", _speed),
        tasks=read("task", _task),
        unreadable=tuple(unreadable),
    )


def _stored(manifest: RunManifest, value: Value) -> Stored[Value]:
    inputs = manifest.inputs
    return Stored(
        value=value,
        model=str(inputs["model"]),
        reference=str(inputs.get("reference", "")),
        text=str(inputs.get("text") or inputs.get("data") or ""),
        options=manifest.options,
        tool=manifest.tool,
        created=manifest.created,
    )


def _paths(facts: Mapping[str, Json], manifest: RunManifest, *roles: str) -> dict[str, Json]:
    """The facts, with paths of models where names were kept, or nothing was."""
    return {**facts, **{role: Path(str(facts.get(role) or manifest.model)) for role in roles}}


def _perplexity(manifest: RunManifest) -> EvalResult:
    facts = manifest.facts
    return EvalResult(
        model=Path(str(facts.get("model") or manifest.model)),
        text=str(facts.get("text", "")),
        perplexity=facts["perplexity"],
        error=facts["error"],
        tokens=facts["tokens"],
        chunks=facts["chunks"],
        context=facts["context"],
        tokens_per_second=facts["chunks"] * facts["context"] / facts["seconds"],
        peak_rss_nbytes=facts["peak_rss_nbytes"],
        file_nbytes=facts.get("file_nbytes", 0),
        seconds=facts["seconds"],
        reused=True,
        overlap=facts.get("overlap"),
        notes=tuple(facts.get("notes", ())),
    )


def _comparison(manifest: RunManifest) -> Comparison:
    facts = _paths(manifest.facts, manifest, "model", "reference")
    verdicts = tuple(
        Difference(**_known(Difference, _paths(v, manifest, "model", "other")))
        for v in facts["verdicts"]
    )
    return Comparison(**_known(Comparison, {**facts, "verdicts": verdicts, "reused": True}))


def _speed(manifest: RunManifest) -> SpeedResult:
    facts = _paths(manifest.facts, manifest, "model")
    return SpeedResult(**_known(SpeedResult, {**facts, "reused": True}))


def _task(manifest: RunManifest) -> TaskResult:
    facts = _paths(manifest.facts, manifest, "model")
    return TaskResult(**_known(TaskResult, {**facts, "reused": True}))


def _known(kind: type, facts: Mapping[str, Json]) -> dict[str, Json]:
    """The fields of a value among facts, which may hold more."""
    told = {f.name: facts[f.name] for f in dataclasses.fields(kind) if f.name in facts}
    return {name: tuple(of) if isinstance(of, list) else of for name, of in told.items()}
