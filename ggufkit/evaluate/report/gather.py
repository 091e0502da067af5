"""From stored results to a :class:`Report`: which models can be compared with which."""

import shlex
from collections import defaultdict
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from ggufkit import __version__
from ggufkit.errors import SourceError
from ggufkit.evaluate.leaks import THRESHOLD
from ggufkit.evaluate.report import words
from ggufkit.evaluate.report.front import pareto_front
from ggufkit.evaluate.report.provenance import Makers, provenance_of
from ggufkit.evaluate.report.recommend import recommend
from ggufkit.evaluate.report.shelf import Shelf
from ggufkit.evaluate.report.typemap import type_map
from ggufkit.evaluate.report.values import Entry, ModelFile, Recommendation, Report, Study
from ggufkit.evaluate.results import Results, Stored, Value
from ggufkit.llamacpp.host import cpu_identity
from ggufkit.texts.load import BUILT_IN
from ggufkit.values import Comparison, EvalResult, SpeedResult, TaskResult

_Score = Comparison | EvalResult
_Key = TypeVar("_Key", bound=Hashable)
_Length = tuple[str, int, int]
"""What two scores must share to be comparable: text (digest), context, chunks."""
_NOT_YET = Recommendation(file="", certainty="none", headline="")


def gather(
    results: Results,
    files: Sequence[ModelFile],
    *,
    makers: Makers,
    tolerance: float,
    only: Collection[str] | None = None,
) -> Report:
    """Sort results into studies of models that can be compared.

    Args:
        results: what is stored.
        files: GGUFs that results may belong to.
        makers: who made which file, by digest.
        tolerance: share of perplexity that a recommended file may cost.
        only: digests of the models to show (references come along); None for all.

    Raises:
        SourceError: if nothing about the quality of these models is stored.
    """
    shelf = Shelf(files, results)
    sorting = _Sorting(results, shelf, makers, only)
    studies = [*sorting.compared(), *sorting.with_perplexity_alone()]
    if not studies:
        spec = shlex.join(shelf.fitting(only)[:3]) or "MODEL..."
        raise SourceError(
            "there are no stored results on the quality of these models",
            f"Measure first: ggufkit compare REFERENCE {spec} --text wikitext, "
            f"or: ggufkit ppl wikitext {spec}",
        )
    sorting.tell_in_no_study()
    return Report(
        studies=tuple(_judged(study, tolerance) for study in studies),
        left_out=tuple(dict.fromkeys(sorting.left_out)),
        tolerance=tolerance,
        version=__version__,
        machine=cpu_identity().partition(":")[0],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class _Sorting:
    """Who goes where. A model is shown in one study, as far as it goes in any."""

    def __init__(
        self, results: Results, shelf: Shelf, makers: Makers, only: Collection[str] | None
    ) -> None:
        self._shelf = shelf
        self._makers = makers
        self._only = only
        self._comparisons = _newest(results.comparisons, lambda s: (s.reference, _length(s)))
        self._perplexities = _newest(results.perplexities, _length)
        self._speeds = _newest(results.speeds, lambda s: _setting(s.value))
        self._tasks = _newest(results.tasks, lambda s: (s.value.task, s.text, s.value.questions))
        self._shown: set[str] = set()
        self._families: dict[Hashable, str] = {}
        self.left_out = [
            f"{place}: written otherwise than this version of ggufkit reads it"
            for place in results.unreadable
        ]

    def _wanted(self, digest: str) -> bool:
        return self._only is None or digest in self._only

    def compared(self) -> Iterator[Study]:
        """Studies of models beside a reference, the largest first."""
        by_reference: dict[str, list[Stored[Comparison]]] = defaultdict(list)
        for stored in self._comparisons:
            if self._wanted(stored.model):
                by_reference[stored.reference].append(stored)
        models = {ref: {s.model for s in found} for ref, found in by_reference.items()}
        for reference in sorted(models, key=lambda r: (-len(models[r]), r)):
            if again := models[reference] & self._shown:
                self.left_out.append(
                    f"{self._shelf.names(again)} beside {self._shelf.name(reference)}: shown "
                    "beside another reference, and divergences from two references do not compare"
                )
            fresh = [s for s in by_reference[reference] if s.model not in self._shown]
            if fresh:
                yield self._study(fresh, reference)

    def with_perplexity_alone(self) -> Iterator[Study]:
        """Studies of models that have no comparison, one for each kind of model."""
        families: dict[Hashable, list[Stored[EvalResult]]] = defaultdict(list)
        for stored in self._perplexities:
            if stored.model in self._shown or not self._wanted(stored.model):
                continue
            if self._shelf.nbytes(stored.model):
                families[self._shelf.family(stored.model)].append(stored)
            else:
                self.left_out.append(
                    f"{self._shelf.name(stored.model)}: its file is not at hand; name its path "
                    "to have it in the report"
                )
        for family, found in families.items():
            if family not in self._families:
                yield self._study(found, "")
                continue
            models = sorted({s.model for s in found}, key=self._shelf.name)
            specs = [self._shelf.spec(m) for m in (self._families[family], *models)]
            self.left_out.append(
                f"{self._shelf.names(models)}: only a perplexity is stored, which does not go "
                f"into one plot with divergences; to compare: {_typed('compare', *specs)}"
            )

    def tell_in_no_study(self) -> None:
        """Say which models have speeds or tasks only."""
        others = {s.model for s in self._speeds} | {s.model for s in self._tasks}
        for digest in sorted(filter(self._wanted, others - self._shown), key=self._shelf.name):
            self.left_out.append(
                f"{self._shelf.name(digest)}: its speed or its tasks are stored, but nothing that "
                "can be set against other files' quality"
            )

    def _study(self, found: Sequence[Stored[_Score]], reference: str) -> Study:
        """The study of results that share a reference, or that have none."""
        groups = _grouped(found, _length)
        # Of several texts, the one with most files, then most tokens, then the first.
        length, main = min(
            groups.items(), key=lambda g: (-len(g[1]), -g[0][1] * g[0][2], g[1][0].created)
        )
        models = [s.model for s in main]
        members = [reference, *models] if reference else models
        self._shown |= set(members)
        self._families.setdefault(self._shelf.family(members[0]), members[0])
        generation, prompt = self._speed("generation", members), self._speed("prompt", members)
        known = _Known(
            labels=self._shelf.labels(members),
            scores={s.model: s.value for s in main},
            perplexities={s.model: s.value for s in self._perplexities if _length(s) == length},
            texts=self._further(groups, length, set(models)),
            generation=generation,
            prompt=prompt,
            tasks=self._shared_tasks(members),
        )
        entries = _with_fronts([self._entry(model, known) for model in models])
        return Study(
            title=self._shelf.title(members),
            measure="divergence" if reference else "perplexity",
            text=_text_name(main[0]),
            text_spec=_text_spec(main[0].value.text),
            text_digest=length[0],
            context=length[1],
            chunks=length[2],
            reference=self._entry(reference, known) if reference else None,
            entries=tuple(sorted(entries, key=lambda e: (e.nbytes, e.cost))),
            generation_setting=_setting_in_words(generation),
            prompt_setting=_setting_in_words(prompt),
            machines=tuple(sorted({s.machine for s in (*generation.values(), *prompt.values())})),
            llama_cpp=tuple(sorted({str(s.tool["llama.cpp"]) for s in main if s.tool})),
            measured=(min(s.created for s in main), max(s.created for s in main)),
            command=self._command(main[0], models, reference),
            recommendation=_NOT_YET,
        )

    def _entry(self, digest: str, known: "_Known") -> Entry:
        file = self._shelf.file(digest)
        header = file.header if file else None
        score = known.scores.get(digest)
        return Entry(
            name=self._shelf.name(digest),
            label=known.labels[digest],
            file=self._shelf.file_name(digest),
            spec=self._shelf.spec(digest),
            nbytes=self._shelf.nbytes(digest),
            bits_per_weight=header.bits_per_weight if header else None,
            comparison=score if isinstance(score, Comparison) else None,
            perplexity=known.perplexities.get(digest),
            texts={name: of[digest] for name, of in known.texts.items() if digest in of},
            generation=known.generation.get(digest),
            prompt=known.prompt.get(digest),
            tasks={name: of[digest] for name, of in known.tasks.items() if digest in of},
            types=type_map(header) if header else None,
            provenance=provenance_of(digest, file, self._makers),
        )

    def _further(
        self,
        groups: dict[_Length, list[Stored[_Score]]],
        main: _Length,
        models: set[str],
    ) -> dict[str, dict[str, _Score]]:
        """Scores of the study's models on further texts: by text, then by model.

        For each text the length counts that most of the models have; what cannot go in is
        told as left out.
        """
        best: dict[str, _Length] = {main[0]: main}
        for length, found in groups.items():
            if length[0] == main[0] or length[1] != main[1]:
                continue
            rank = len({s.model for s in found} & models), length[2]
            other = best.get(length[0])
            if other is None or rank > (
                len({s.model for s in groups[other]} & models),
                other[2],
            ):
                best[length[0]] = length
        texts: dict[str, dict[str, _Score]] = {}
        for length, found in groups.items():
            chosen = best.get(length[0]) == length
            strangers = {s.model for s in found} - (models if chosen else set())
            if strangers:
                self.left_out.append(
                    f"{self._shelf.names(strangers)} on {_text_name(found[0])}, "
                    f"{_chunks_in_words(length)}: not the text, context and chunks that the other "
                    "files have in common"
                )
            if chosen and length != main:
                values = {s.model: s.value for s in found if s.model in models}
                if values:
                    name = _text_name(found[0])
                    unique = name not in texts and name != _text_name(groups[main][0])
                    texts[name if unique else f"{name} ({length[0][:6]})"] = values
        return texts

    def _speed(self, work: str, members: Collection[str]) -> dict[str, SpeedResult]:
        """Speeds of the models in the one setting that most of them have."""
        found = [s for s in self._speeds if s.value.work == work and s.model in members]
        groups = _grouped(found, lambda s: _setting(s.value))
        if not groups:
            return {}
        chosen = max(groups, key=lambda g: (len(groups[g]), groups[g][-1].created))
        speeds = {s.model: s.value for s in groups[chosen]}
        if missing := {s.model for s in found} - speeds.keys():
            self.left_out.append(
                f"Speeds ({work}) of {self._shelf.names(missing)}: measured in another setting "
                "or on another machine than those of the other files"
            )
        return speeds

    def _shared_tasks(self, members: Collection[str]) -> dict[str, dict[str, TaskResult]]:
        """Results of each task, on the questions that most of the models were asked."""
        found = [s for s in self._tasks if s.model in members]
        tasks: dict[str, dict[str, TaskResult]] = {}
        for name, of_task in _grouped(found, lambda s: s.value.task).items():
            groups = _grouped(of_task, lambda s: (s.text, s.value.questions))
            chosen = max(groups, key=lambda g: (len(groups[g]), groups[g][-1].created))
            tasks[name] = {s.model: s.value for s in groups[chosen]}
            if missing := {s.model for s in of_task} - tasks[name].keys():
                self.left_out.append(
                    f"{name} of {self._shelf.names(missing)}: other questions than the other files "
                    "were asked"
                )
        return tasks

    def _command(self, first: Stored[_Score], models: Sequence[str], reference: str) -> str:
        """What to type to measure the same again."""
        text, score = _text_spec(first.value.text), first.value
        specs = [self._shelf.spec(m) for m in sorted(models, key=self._shelf.nbytes)]
        length = ["--context", str(score.context), "--chunks", str(score.chunks)]
        if not text:
            return ""
        if reference:
            return _typed("compare", self._shelf.spec(reference), *specs, "--text", text, *length)
        return _typed("ppl", text, *specs, *length)


@dataclass(frozen=True)
class _Known:
    """What is known of the models of a study, by digest."""

    labels: dict[str, str]
    scores: Mapping[str, _Score]
    perplexities: Mapping[str, EvalResult]
    texts: Mapping[str, Mapping[str, _Score]]
    generation: Mapping[str, SpeedResult]
    prompt: Mapping[str, SpeedResult]
    tasks: Mapping[str, Mapping[str, TaskResult]]


def _newest(
    found: Sequence[Stored[Value]], kind: Callable[[Stored[Value]], Hashable]
) -> list[Stored[Value]]:
    """Of results of one model and one kind, the newest only."""
    return list({(s.model, kind(s)): s for s in found}.values())


def _grouped(
    found: Iterable[Stored[Value]], key: Callable[[Stored[Value]], _Key]
) -> dict[_Key, list[Stored[Value]]]:
    groups: dict[_Key, list[Stored[Value]]] = defaultdict(list)
    for stored in found:
        groups[key(stored)].append(stored)
    return groups


def _length(stored: Stored[_Score]) -> _Length:
    return stored.text, stored.value.context, stored.value.chunks


def _chunks_in_words(length: _Length) -> str:
    return f"{length[2]} chunk{'s' * (length[2] != 1)} of {length[1]} tokens"


def _text_name(stored: Stored[_Score]) -> str:
    return words.printable(words.short_text(stored.value.text)) or f"text {stored.text[:8]}"


def _text_spec(name: str) -> str:
    """What to type to name a text: a domain's name, for one, does not do."""
    return name if name in BUILT_IN or Path(name).suffix else ""


def _setting(speed: SpeedResult) -> Hashable:
    """All that has to be the same for two speeds to be comparable."""
    return (
        *(speed.work, speed.tokens, speed.depth, speed.threads, speed.batch, speed.ubatch),
        *(speed.flash_attention, speed.gpu_layers, speed.machine),
    )


def _setting_in_words(speeds: Mapping[str, SpeedResult]) -> str:
    if not speeds:
        return ""
    one = next(iter(speeds.values()))
    read = "written one by one" if one.work == "generation" else "read at once"
    after = f" after {one.depth} others" if one.depth else ""
    layers = "all" if one.gpu_layers < 0 else one.gpu_layers
    return (
        f"{one.tokens} tokens {read}{after}, {one.threads} thread{'s' * (one.threads != 1)}, "
        f"flash attention {'on' if one.flash_attention else 'off'}, {layers} GPU layers"
    )


def _with_fronts(entries: Sequence[Entry]) -> list[Entry]:
    by_size = pareto_front([(e.nbytes, e.cost) for e in entries])
    timed = [e for e in entries if e.generation]
    by_speed = pareto_front(
        [(-e.generation.tokens_per_second, e.cost) for e in timed if e.generation]
    )
    fast = {e.provenance.sha256 for e, on_front in zip(timed, by_speed, strict=True) if on_front}
    return [
        replace(e, on_size_front=on_front, on_speed_front=e.provenance.sha256 in fast)
        for e, on_front in zip(entries, by_size, strict=True)
    ]


def _judged(study: Study, tolerance: float) -> Study:
    """The study with its recommendation, and with what to type to know more."""
    recommendation = recommend(
        study.measure, study.entries, study.reference, tolerance=tolerance, chunks=study.chunks
    )
    cautions = (*_leaks(study, recommendation.sha256), *recommendation.cautions)
    commands = _next_commands(study)
    return replace(
        study, recommendation=replace(recommendation, cautions=cautions, commands=commands)
    )


def _leaks(study: Study, chosen: str) -> Iterator[str]:
    """Whether the recommended file was fitted to the very text that it was measured on."""
    for entry in study.entries:
        score = entry.comparison or entry.perplexity
        overlap = score.overlap if score and score.overlap else 0.0
        if any(c.digest == study.text_digest for c in entry.provenance.calibrated or ()):
            overlap = 1.0
        if entry.provenance.sha256 == chosen and overlap >= THRESHOLD:
            yield (
                f"It was calibrated on text that holds {words.percent(overlap, 0)} of the text "
                "that it was measured on, and so looks better than it is: measure on another text."
            )


def _next_commands(study: Study) -> tuple[str, ...]:
    """What to type to fill the gaps of a study."""
    commands = []
    if study.measure == "perplexity" and len(study.entries) > 1:
        *others, largest = (e.spec for e in study.entries)
        text = ["--text", study.text_spec] if study.text_spec else []
        commands.append(_typed("compare", largest, *others, *text))
    slow = [e.spec for e in (*study.entries, study.reference) if e and not e.generation]
    if slow:
        commands.append(_typed("bench", *slow))
    return tuple(commands)


def _typed(*words: str) -> str:
    return shlex.join(["ggufkit", *words])
