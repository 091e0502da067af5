"""The report as Markdown: the page's words and tables, for places without a browser."""

import html
import re
from collections.abc import Iterable, Iterator, Sequence

from ggufkit.evaluate.report import tables, words
from ggufkit.evaluate.report.html import GENERATOR
from ggufkit.evaluate.report.typemap import bits_of
from ggufkit.evaluate.report.values import Entry, Report, Study
from ggufkit.values import Comparison

_SPECIAL = re.compile(r"([\\`*_\[\]|~#])")


def render(report: Report) -> str:
    """The whole text; names from outside cannot become markup."""
    parts = [f"<!-- {GENERATOR} {report.version} -->", "# Which file to take"]
    for study in report.studies:
        parts += _study(study)
    if report.left_out:
        parts += ["## Left out", _list(map(_plain, report.left_out))]
    parts += ["## How to read this", *map(_plain, tables.explained(report))]
    made = f"Made {words.moment(report.created)} by ggufkit {report.version} on {report.machine}."
    return "\n\n".join([*parts, _plain(made)]) + "\n"


def _study(study: Study) -> Iterator[str]:
    yield f"## {_plain(study.title)}"
    yield _plain(tables.in_words(study))
    yield from _recommendation(study)
    yield "### All files"
    columns = tables.columns(study)
    yield _table(
        [f"{c.title}, {c.unit}" if c.unit else c.title for c in columns],
        [[c.cell(entry) for c in columns] for entry in tables.all_entries(study)],
    )
    if study.generation_setting:
        machines = f", on {' and '.join(study.machines)}" if study.machines else ""
        yield _plain(f"Speed: {study.generation_setting}{machines}.")
    yield from _percentiles(study)
    yield from _texts(study)
    yield from _tasks(study)
    yield from _types(study)
    yield from _provenance(study)


def _recommendation(study: Study) -> Iterator[str]:
    pick = study.recommendation
    if pick.file:
        word = "Closest" if pick.certainty == "closest" else "Recommended"
        yield f"**{word}: {_plain(pick.file)}** ({tables.CERTAINTIES[pick.certainty]})"
    yield _plain(pick.headline)
    yield from map(_plain, pick.reasons)
    if pick.cautions:
        yield _list(map(_plain, pick.cautions))
    if pick.alternatives:
        yield _list(f"{a.wish}? **{_plain(a.file)}**: {_plain(a.why)}" for a in pick.alternatives)
    if pick.commands:
        yield "To fill the gaps:"
        yield _code(pick.commands)


def _percentiles(study: Study) -> Iterator[str]:
    compared = [(e, e.comparison) for e in study.entries if e.comparison]
    if compared:
        names = list(compared[0][1].divergence_percentiles)
        yield "### KL divergence, percentiles over tokens"
        yield _table(
            ["File", *(f"{name} %" for name in names)],
            [
                [e.label, *(words.figures(c.divergence_percentiles.get(n, 0.0)) for n in names)]
                for e, c in compared
            ],
        )


def _texts(study: Study) -> Iterator[str]:
    names = list(dict.fromkeys(name for entry in study.entries for name in entry.texts))
    if names:
        yield f"### {tables.MEASURES[study.measure]}, text by text"
        yield _table(
            ["File", study.text, *names],
            [
                [e.label, words.figures(e.cost), *(_cost(e, name) for name in names)]
                for e in study.entries
            ],
        )


def _cost(entry: Entry, name: str) -> str:
    score = entry.texts.get(name)
    if score is None:
        return tables.NOTHING
    return words.figures(score.divergence if isinstance(score, Comparison) else score.perplexity)


def _tasks(study: Study) -> Iterator[str]:
    entries = tables.all_entries(study)
    names = list(dict.fromkeys(name for entry in entries for name in entry.tasks))
    if names:
        yield "### Tasks, share answered rightly"
        yield _table(["File", *names], [[e.label, *(_score(e, n) for n in names)] for e in entries])


def _score(entry: Entry, name: str) -> str:
    told = entry.tasks.get(name)
    if told is None:
        return tables.NOTHING
    low, high = words.percent(told.low), words.percent(told.high)
    return f"{words.percent(told.score)} ({low} to {high}) of {told.questions}"


def _types(study: Study) -> Iterator[str]:
    mapped = [(e, e.types) for e in tables.all_entries(study) if e.types]
    if mapped:
        yield "### What the tensors became"
        roles = list(dict.fromkeys(row.role for _, types in mapped for row in types.rows))
        others = list(dict.fromkeys(name for _, types in mapped for name in types.others))
        rows = []
        for entry, types in mapped:
            told = {row.role: tables.row_in_words(row) for row in types.rows}
            cells = [told.get(role, tables.NOTHING) for role in roles]
            cells += [types.others.get(name, tables.NOTHING) for name in others]
            rows.append([entry.label, tables.shares_in_words(types), *cells])
        yield _table(["File", "share of the file", *roles, *others], rows)
        used = sorted({p.type for _, types in mapped for p in types.parts}, key=bits_of)
        yield _plain("Bits per weight: " + ", ".join(f"{t} {bits_of(t):g}" for t in used) + ".")


def _provenance(study: Study) -> Iterator[str]:
    yield "### Where it all comes from"
    yield _table(
        ["File", "Origin", "Verified", "Calibrated on", "llama.cpp", "Made", "SHA-256"],
        [
            [
                entry.file,
                entry.provenance.origin or "not known",
                entry.provenance.verified or "not known",
                tables.calibration(entry.provenance),
                entry.provenance.llama_cpp or "not known",
                words.moment(entry.provenance.created) or "not known",
                entry.provenance.sha256,
            ]
            for entry in tables.all_entries(study)
        ],
    )
    first, last = map(words.moment, study.measured)
    commits = " and ".join(study.llama_cpp) or "of an unknown commit"
    yield _plain(
        f"Measured {first if first == last else f'{first} to {last}'} on {study.text} "
        f"(SHA-256 {study.text_digest}) with llama.cpp {commits}."
    )
    for title, commands in (
        ("To measure this again:", [study.command] if study.command else []),
        ("To make the files again:", tables.making(study)),
    ):
        if commands:
            yield title
            yield _code(commands)


def _plain(text: str) -> str:
    """Text that stays text: no markup, no HTML, one line."""
    one_line = " ".join(text.split())
    return html.escape(_SPECIAL.sub(r"\\\1", one_line), quote=False)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    shown = [[cell if n == 1 else _plain(cell) for cell in line] for n, line in enumerate(lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _code(commands: Iterable[str]) -> str:
    # Indented, as no name can end such a block early.
    return "\n".join(f"    {' '.join(command.splitlines())}" for command in commands)
