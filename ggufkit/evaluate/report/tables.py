"""What both renderings say in the same words: columns, tiles, and sentences."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ggufkit.evaluate.report import words
from ggufkit.evaluate.report.recommend import delta_interval, verdict_on
from ggufkit.evaluate.report.values import (
    Entry,
    Provenance,
    Report,
    Study,
    TypeMap,
    TypeRow,
)

NOTHING = "\u2013"
"""What a cell without a figure holds."""

MEASURES = {"divergence": "KL divergence", "perplexity": "Perplexity"}
CERTAINTIES = {
    "shown": "shown by the intervals",
    "estimated": "an estimate",
    "closest": "outside of the tolerance",
    "none": "",
}


@dataclass(frozen=True)
class Column:
    """A column of the table of all files.

    Attributes:
        title: its title.
        unit: what the figures are, or how they were got; may be empty.
        cell: from a model to the text of its cell.
        text: whether cells hold words, not figures.
    """

    title: str
    unit: str
    cell: Callable[[Entry], str]
    text: bool = False


@dataclass(frozen=True)
class Tile:
    """One figure of the recommended file: title, value, and what it is beside."""

    title: str
    value: str
    note: str = ""


def all_entries(study: Study) -> tuple[Entry, ...]:
    """The models, the smallest first, and then the reference."""
    return (*study.entries, study.reference) if study.reference else study.entries


def chosen(study: Study) -> Entry | None:
    """The recommended one."""
    return next((e for e in study.entries if study.is_chosen(e)), None)


def untimed(study: Study) -> list[Entry]:
    """Models without a decoding speed."""
    return [e for e in all_entries(study) if not e.generation]


def columns(study: Study) -> list[Column]:
    """The columns for which any model has a figure."""
    entries = all_entries(study)
    full = study.reference or entries[-1]
    found = [
        Column("File", "", lambda e: e.label, text=True),
        Column("Size", f"and of {full.label}", lambda e: _size(e, full)),
    ]
    if any(e.bits_per_weight for e in entries):
        found.append(
            Column("Bits", "per weight", lambda e: _or_nothing(e.bits_per_weight, "{:.2f}"))
        )
    if study.measure == "divergence":
        found += [
            Column("KL divergence", "nats per token", _divergence),
            Column("Same top token", "share of places", _agreement),
            Column("Perplexity", "beside the reference", _delta),
            Column("Verdict", "on perplexity", _verdict, text=True),
        ]
    if any(e.perplexity for e in entries):
        found.append(Column("Perplexity", "by llama-perplexity", _perplexity))
    if any(e.generation for e in entries):
        found.append(Column("Writes", "tokens/s", lambda e: _speed(e, "generation")))
    if any(e.prompt for e in entries):
        found.append(Column("Reads", "tokens/s", lambda e: _speed(e, "prompt")))
    if any(e.generation for e in entries):
        found.append(Column("Memory", "peak, writing", _memory))
    found.append(Column("Front", "of", _fronts, text=True))
    return found


def _size(entry: Entry, full: Entry) -> str:
    return f"{words.size(entry.nbytes)}, {words.percent(entry.nbytes / full.nbytes, 0)}"


def _or_nothing(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _fronts(entry: Entry) -> str:
    on = (("size", entry.on_size_front), ("speed", entry.on_speed_front))
    return ", ".join(name for name, is_on in on if is_on) or NOTHING


def _divergence(entry: Entry) -> str:
    told = entry.comparison
    if told is None:
        return NOTHING
    return words.with_error(told.divergence, told.divergence_error)


def _agreement(entry: Entry) -> str:
    return words.percent(entry.comparison.agreement) if entry.comparison else NOTHING


def _delta(entry: Entry) -> str:
    if entry.comparison is None:
        return NOTHING
    low, high = delta_interval(entry.comparison)
    change = words.change(entry.comparison.delta_log_perplexity)
    return f"{change} ({words.change(low).removesuffix(' %')} to {words.change(high)})"


def _verdict(entry: Entry) -> str:
    told = verdict_on(entry.comparison, "log_perplexity") if entry.comparison else None
    return told.verdict if told else NOTHING


def _perplexity(entry: Entry) -> str:
    told = entry.perplexity
    return words.with_error(told.perplexity, told.error) if told else NOTHING


def _speed(entry: Entry, work: str) -> str:
    told = entry.generation if work == "generation" else entry.prompt
    if told is None:
        return NOTHING
    return words.with_error(told.tokens_per_second, told.tokens_per_second_deviation)


def _memory(entry: Entry) -> str:
    return words.size(entry.generation.peak_rss_nbytes) if entry.generation else NOTHING


def tiles(study: Study, entry: Entry) -> list[Tile]:
    """The figures of the recommended file that matter most."""
    full = study.reference or study.entries[-1]
    share = words.percent(entry.nbytes / full.nbytes, 0)
    found = [Tile("Size", words.size(entry.nbytes), f"{share} of {full.label}")]
    if entry.comparison:
        low, high = (words.change(end) for end in delta_interval(entry.comparison))
        change = words.change(entry.comparison.delta_log_perplexity)
        found += [
            Tile("KL divergence", words.figures(entry.comparison.divergence), "nats per token"),
            Tile("Perplexity", change, f"{low} to {high}"),
            Tile("Same top token", words.percent(entry.comparison.agreement), "of all places"),
        ]
    elif entry.perplexity:
        error = f"± {words.figures(entry.perplexity.error, 2)}"
        found.append(Tile("Perplexity", f"{entry.perplexity.perplexity:.2f}", error))
    if entry.generation:
        speed = words.figures(entry.generation.tokens_per_second)
        beside = full.generation
        ratio = (
            entry.generation.tokens_per_second / beside.tokens_per_second
            if beside and entry is not full
            else None
        )
        note = f"tokens/s, {ratio:.1f} times {full.label}" if ratio else "tokens/s"
        found.append(Tile("Writes", speed, note))
    if entry.bits_per_weight:
        found.append(Tile("Bits per weight", f"{entry.bits_per_weight:.2f}"))
    return found


def in_words(study: Study) -> str:
    """What was measured, in a sentence."""
    count = len(study.entries)
    files = f"{count} file{'s' * (count != 1)}"
    beside = f" beside {study.reference.file}" if study.reference else ""
    chunks = f"{study.chunks} chunk{'s' * (study.chunks != 1)} of {study.context} tokens"
    return f"{files}{beside}, measured on {study.text}: {chunks}."


def calibration(provenance: Provenance) -> str:
    """What a file was calibrated on."""
    if provenance.calibrated is None:
        return "not known"
    told = (f"{c.name or 'an unknown text'} ({c.by})" for c in provenance.calibrated)
    return ", ".join(told) or "nothing"


def row_in_words(row: TypeRow) -> str:
    """The types of a row, counted."""
    counts = Counter(type for type in row.types if type)
    if len(counts) == 1:
        return f"all {next(iter(counts))}"
    return ", ".join(f"{count} {type}" for type, count in counts.most_common())


def shares_in_words(types: TypeMap) -> str:
    """What each type has of a file."""
    total = sum(part.nbytes for part in types.parts)
    return ", ".join(f"{p.type} {words.percent(p.nbytes / total, 0)}" for p in types.parts)


def gaps(study: Study) -> list[str]:
    """What to type to know more, without what the plot of speeds says in its place."""
    timed = any(entry.generation for entry in study.entries)
    return [c for c in study.recommendation.commands if timed or " bench " not in c]


def making(study: Study) -> list[str]:
    """What to type to make the files again, as far as it is known."""
    commands = (entry.provenance.command for entry in all_entries(study))
    return list(dict.fromkeys(command for command in commands if command))


def explained(report: Report) -> list[str]:
    """What the words mean."""
    allowed = f"{100 * report.tolerance:g} %"
    choice = "The tolerance is yours to choose: ggufkit report --tolerance PERCENT."
    if all(study.measure == "perplexity" for study in report.studies):
        return [
            "Perplexity: the exponential of the mean surprise at each token of the text (its last "
            "half in each chunk). The ± is how much another text of the kind might change it; all "
            "files read the same text, so it says little about their differences.",
            f"Recommended is the smallest file whose perplexity is at most {allowed} above that of "
            f"the largest. {choice}",
        ]
    return [
        "KL divergence: how far a file's predictions of the next token are from the reference's, "
        "in nats, as a mean over the scored tokens (the last half of each chunk). 0 is the same "
        "predictions; 0.05 costs about 5 % of perplexity on text that the reference itself would "
        "write.",
        "Perplexity beside the reference: both read the same chunks, so what the text does to "
        "both falls out of the difference; its interval is far narrower than the ± of a "
        "perplexity by itself. A file may come out better by chance, or because it fits this text "
        "better: look at its divergence too.",
        "Verdict: indistinguishable means that at this length the difference could be chance, not "
        "that there is none.",
        f"Recommended is the smallest file that costs at most {allowed} of perplexity, by the text "
        "and by the reference's own judgement (the divergence). It is shown if the upper ends of "
        f"the intervals stay below that, estimated if the figures do. {choice}",
    ]
