"""The report as one HTML page that loads nothing."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ggufkit.evaluate.report import plots, tables, words
from ggufkit.evaluate.report.typemap import bits_of
from ggufkit.evaluate.report.values import Entry, Report, Study
from ggufkit.values import Comparison, EvalResult

GENERATOR = "ggufkit report"
"""What the page says it was made by, which is how it is known again."""

_FLOAT_BITS = 32
_HUES = {1: 345, 2: 20, 3: 48, 4: 85, 5: 140, 6: 190, 8: 250, 16: 300, _FLOAT_BITS: 0}
_SHADES = ((0.72, 0), (0.55, -6), (0.85, 6), (0.63, 14), (0.47, 4), (0.78, -12))
"""Lightness and turn of the hue, for types of about as many bits."""
_MIDDLE = "mean"
_PERCENTILES = {"50": "50 %", "90": "90 %", "99": "99 %", "99.9": "99.9 %", "100": "max"}


@dataclass(frozen=True)
class _Task:
    """A task's plot and what stands beside it."""

    name: str
    data: str
    questions: int
    svg: str


@dataclass(frozen=True)
class _Plots:
    """All plots of a study; empty where there is nothing to draw."""

    size: str
    speed: str
    spread: str
    texts: str
    text_names: tuple[str, ...]
    tasks: tuple[_Task, ...]


def render(report: Report) -> str:
    """The whole page.

    Whatever comes from outside (names of models, texts and tensors) is escaped;
    scripts are neither used nor allowed.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    plots.require_matplotlib()
    place = files("ggufkit.evaluate.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": words.size,
        "moment": words.moment,
        "bits": lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
        "in_words": tables.in_words,
        "quoted": shlex.quote,
    }
    template = environment.from_string(place.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        studies=[(study, _draw(study, f"s{n}")) for n, study in enumerate(report.studies)],
        generator=f"{GENERATOR} {report.version}",
        css=Markup(place.joinpath("page.css").read_text(encoding="utf-8")),
        type_css=Markup(_type_css(report)),
        explained=tables.explained(report),
        types_in=_types_in,
        bits_of=bits_of,
        **{name: getattr(tables, name) for name in _HELPERS},
    )


_HELPERS = (
    *(
        "CERTAINTIES",
        "MEASURES",
        "all_entries",
        "calibration",
        "chosen",
        "columns",
        "gaps",
        "making",
    ),
    *("row_in_words", "shares_in_words", "tiles", "untimed"),
)
"""What the template takes from the tables as it is."""


# --- types


def _types_in(entries: Sequence[Entry]) -> list[str]:
    """All types of these models, fewest bits first."""
    types = {part.type for entry in entries if entry.types for part in entry.types.parts}
    return sorted(types, key=lambda type: (bits_of(type), type))


def _type_css(report: Report) -> str:
    """A colour for each type: hue by bits, lightness within the same number of bits."""
    types = _types_in([e for study in report.studies for e in tables.all_entries(study)])
    rules = []
    used: Counter[int] = Counter()
    for type in types:
        bits = min(_HUES, key=lambda known: abs(known - bits_of(type)))
        lightness, turn = _SHADES[used[bits] % len(_SHADES)]
        used[bits] += 1
        chroma = 0.0 if bits == _FLOAT_BITS else 0.13
        rules.append(f".t-{type} {{ --c: oklch({lightness} {chroma} {_HUES[bits] + turn}); }}")
    return "\n".join(rules)


# --- plots


def _draw(study: Study, name: str) -> _Plots:
    texts = _texts(study)
    return _Plots(
        size=Markup(_against_size(study, f"{name}-size")),
        speed=Markup(_against_speed(study, f"{name}-speed")),
        spread=Markup(_spread(study, f"{name}-spread")),
        texts=Markup(
            plots.bars(
                f"{name}-texts",
                [_row(study, entry, values) for entry, values in texts],
                x=_axis(study),
                log=study.measure == "divergence",
            )
            if texts
            else ""
        ),
        text_names=tuple(dict.fromkeys(name for _, values in texts for name in values)),
        tasks=tuple(_tasks(study, f"{name}-task")),
    )


def _axis(study: Study) -> str:
    if study.measure == "divergence":
        return "KL divergence, nats per token (log)"
    return "Perplexity"


def _row(study: Study, entry: Entry, values: Mapping[str, float], **more: Any) -> plots.Row:
    return plots.Row(entry.label, values, study.is_chosen(entry), **more)


def _point(study: Study, entry: Entry, x: float, told: str, on_front: bool) -> plots.Point:
    cost = f"{tables.MEASURES[study.measure]} {words.figures(entry.cost)}"
    return plots.Point(
        label=entry.label,
        x=x,
        y=entry.cost,
        # The ± of a perplexity is the text's, and says nothing about differences.
        error=entry.cost_error if study.measure == "divergence" else 0,
        on_front=on_front,
        chosen=study.is_chosen(entry),
        told=f"{entry.file}: {told}, {cost}",
    )


def _against_size(study: Study, name: str) -> str:
    points = [
        _point(study, e, e.nbytes, words.size(e.nbytes), e.on_size_front) for e in study.entries
    ]
    full = study.reference
    return plots.tradeoff(
        name,
        points,
        x="File size (log)",
        y=_axis(study),
        log_y=study.measure == "divergence",
        sizes=True,
        reference=(f"{full.label} {words.size(full.nbytes)}", full.nbytes) if full else None,
    )


def _against_speed(study: Study, name: str) -> str:
    points = [
        _point(
            study,
            entry,
            told.tokens_per_second,
            f"{words.figures(told.tokens_per_second)} tokens/s",
            entry.on_speed_front,
        )
        for entry in study.entries
        if (told := entry.generation)
    ]
    if not points:
        return ""
    full = study.reference
    beside = full.generation if full else None
    return plots.tradeoff(
        name,
        points,
        x="Tokens written per second",
        y=_axis(study),
        log_y=study.measure == "divergence",
        sizes=False,
        reference=(full.label, beside.tokens_per_second) if full and beside else None,
    )


def _spread(study: Study, name: str) -> str:
    rows = []
    for entry in study.entries:
        if entry.comparison:
            told = entry.comparison.divergence_percentiles
            values = {shown: told[key] for key, shown in _PERCENTILES.items() if key in told}
            rows.append(_row(study, entry, {**values, _MIDDLE: entry.comparison.divergence}))
    if not rows:
        return ""
    return plots.spread(name, rows, x=_axis(study), middle=_MIDDLE)


def _texts(study: Study) -> list[tuple[Entry, dict[str, float]]]:
    """What each model costs on each text; empty if there is only one text."""
    if not any(entry.texts for entry in study.entries):
        return []
    return [
        (entry, {study.text: entry.cost, **{n: _cost(of) for n, of in entry.texts.items()}})
        for entry in study.entries
    ]


def _cost(score: Comparison | EvalResult) -> float:
    return score.divergence if isinstance(score, Comparison) else score.perplexity


def _tasks(study: Study, name: str) -> Iterator[_Task]:
    entries = tables.all_entries(study)
    for number, task in enumerate(dict.fromkeys(t for e in entries for t in e.tasks)):
        told = {e.label: (e, e.tasks[task]) for e in entries if task in e.tasks}
        rows = [
            _row(study, entry, {task: result.score}, ends={task: (result.low, result.high)})
            for entry, result in told.values()
        ]
        _, first = next(iter(told.values()))
        svg = plots.intervals(
            f"{name}{number}", rows, x="Answered rightly", of=task, chance=first.chance
        )
        yield _Task(task, first.data, first.questions, Markup(svg))
