"""Which file to take, and why, in words.

A file is *within the tolerance* if it costs at most so much perplexity in two
ways of looking at it: on the text itself (the paired difference of log
perplexity), and by the reference's own judgement (the mean KL divergence, which
is what that difference would be on text drawn from the reference). Both are in
nats per token, so one bound serves both. The smallest file within the tolerance
is recommended; whether that is *shown* or only *estimated* depends on the upper
ends of the intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1, log, log1p

from ggufkit.evaluate.report import words
from ggufkit.evaluate.report.values import Alternative, Entry, Recommendation
from ggufkit.values import Comparison, Difference

FEWEST_CHUNKS = 10
"""Below this many chunks an interval over chunks is a guess itself."""
_CONFIDENCE, _NORMAL = 0.95, 1.96
"""What intervals are made of standard errors with, where no verdict holds one."""


@dataclass(frozen=True)
class _Cost:
    """What a file costs, in nats per token: the figure and the upper end of its interval."""

    entry: Entry
    estimate: float
    bound: float


def recommend(
    measure: str,
    entries: Sequence[Entry],
    reference: Entry | None,
    *,
    tolerance: float,
    chunks: int,
) -> Recommendation:
    """Choose among the models of a study.

    Args:
        measure: ``divergence`` or ``perplexity``.
        entries: the models, without the reference.
        reference: the reference; None if there is none.
        tolerance: share of perplexity that the file may cost, such as 0.05.
        chunks: chunks that all of them read.
    """
    if measure == "divergence" and reference:
        costs = [_against_reference(e) for e in entries]
        return _choose(costs, reference, tolerance=tolerance, chunks=chunks)
    return _by_perplexity(entries, tolerance=tolerance)


def verdict_on(comparison: Comparison, measure: str) -> Difference | None:
    """What was said of a candidate against the reference in one measure."""
    return next((v for v in comparison.verdicts if v.measure == measure), None)


def delta_interval(comparison: Comparison) -> tuple[float, float]:
    """Interval of the difference of log perplexity from the reference."""
    told = verdict_on(comparison, "log_perplexity")
    if told:
        return told.low, told.high
    middle = comparison.delta_log_perplexity
    reach = _NORMAL * comparison.delta_log_perplexity_error
    return middle - reach, middle + reach


def _against_reference(entry: Entry) -> _Cost:
    comparison = entry.comparison
    assert comparison
    told = verdict_on(comparison, "divergence")
    reach = _NORMAL * comparison.divergence_error
    divergence_bound = told.high if told else comparison.divergence + reach
    return _Cost(
        entry,
        estimate=max(comparison.divergence, comparison.delta_log_perplexity),
        bound=max(divergence_bound, delta_interval(comparison)[1]),
    )


def _choose(
    costs: Sequence[_Cost], reference: Entry, *, tolerance: float, chunks: int
) -> Recommendation:
    limit = log1p(tolerance)
    allowed = f"{100 * tolerance:g} %"
    by_size = sorted(costs, key=lambda c: (c.entry.nbytes, c.estimate))
    shown = [c for c in by_size if c.bound <= limit and chunks >= FEWEST_CHUNKS]
    estimated = [c for c in by_size if c.estimate <= limit]
    alone = len(by_size) == 1
    if shown:
        chosen, certainty = shown[0], "shown"
        headline = (
            f"The only file measured stays within {allowed} of the reference's perplexity."
            if alone
            else f"The smallest file that stays within {allowed} of the reference's perplexity, "
            "its margin of error included."
        )
    elif estimated:
        chosen, certainty = estimated[0], "estimated"
        headline = (
            f"{'The only file measured' if alone else 'The smallest file that'} seems to stay "
            f"within {allowed} of the reference's perplexity, but {chunks} chunks are too few to "
            "be sure."
        )
    else:
        chosen, certainty = min(by_size, key=lambda c: c.estimate), "closest"
        headline = (
            f"No file measured stays within {allowed} of the reference's perplexity; "
            "this one comes closest."
        )
    comparison = chosen.entry.comparison
    assert comparison
    return Recommendation(
        file=chosen.entry.file,
        certainty=certainty,
        headline=headline,
        sha256=chosen.entry.provenance.sha256,
        reasons=(_quality(comparison), _trade(chosen.entry, reference)),
        cautions=_cautions(chosen, by_size, limit, allowed, chunks, comparison),
        alternatives=_alternatives(chosen.entry, [c.entry for c in by_size], reference),
    )


def _quality(comparison: Comparison) -> str:
    low, high = delta_interval(comparison)
    told = verdict_on(comparison, "log_perplexity")
    verdict = {
        "indistinguishable": ", which at this length cannot be told from no change",
        "worse": ", which is more than chance",
        "better": ", better than the reference by more than chance",
        None: "",
    }[told.verdict if told else None]
    return (
        f"Its predictions differ from the reference's by {words.figures(comparison.divergence)} "
        f"nats per token (KL divergence), its likeliest next token is the same in "
        f"{words.percent(comparison.agreement)} of all places, and its perplexity changes by "
        f"{words.change(comparison.delta_log_perplexity)} "
        f"({words.percent(told.confidence if told else _CONFIDENCE, 0)} interval "
        f"{words.change(low)} to {words.change(high)}){verdict}."
    )


def _trade(entry: Entry, reference: Entry) -> str:
    share = entry.nbytes / reference.nbytes
    text = (
        f"It takes {words.size(entry.nbytes)} where the reference takes "
        f"{words.size(reference.nbytes)}: {words.percent(share, 0)} of the size"
    )
    own, other = entry.generation, reference.generation
    if own and other:
        ratio = own.tokens_per_second / other.tokens_per_second
        text += (
            f", and writes {words.figures(own.tokens_per_second)} tokens per second where the "
            f"reference writes {words.figures(other.tokens_per_second)} ({ratio:.2g} times as many)"
        )
    elif own:
        text += f", and writes {words.figures(own.tokens_per_second)} tokens per second"
    return text + "."


def _cautions(
    chosen: _Cost,
    by_size: Sequence[_Cost],
    limit: float,
    allowed: str,
    chunks: int,
    comparison: Comparison,
) -> tuple[str, ...]:
    said = []
    if chunks < FEWEST_CHUNKS:
        said.append(
            f"Only {chunks} {'chunk was' if chunks == 1 else 'chunks were'} read: intervals over "
            f"fewer than {FEWEST_CHUNKS} are not to be trusted."
        )
    told = verdict_on(comparison, "log_perplexity")
    if told and told.verdict == "indistinguishable" and told.chunks_to_decide:
        said.append(
            "Whether its perplexity differs from the reference's at all would take about "
            f"{told.chunks_to_decide} chunks to tell, if the difference is as it looks now."
        )
    maybe = [c for c in by_size if c.estimate <= limit < c.bound]
    smaller = [c.entry for c in maybe if c.entry.nbytes < chosen.entry.nbytes]
    if smaller:
        said.append(
            f"{' and '.join(e.file for e in smaller)} may be within {allowed} as well; measure "
            "more chunks to know."
        )
    for name, other in chosen.entry.texts.items():
        if isinstance(other, Comparison):
            worst = max(other.divergence, other.delta_log_perplexity)
            if worst > limit:
                said.append(
                    f"On {words.short_text(name)} it costs more: {words.figures(other.divergence)} "
                    f"nats per token, perplexity {words.change(other.delta_log_perplexity)}."
                )
    if comparison.divergence_shortfall is not None:
        said.append(
            "The reference came out of a compact cache: divergences are lower bounds, too low by "
            f"{words.percent(comparison.divergence_shortfall)} at most when it was written."
        )
    if len(by_size) == 1:
        said.append("There was nothing to choose from: no other file was measured this way.")
    return tuple(said)


def _alternatives(
    chosen: Entry, entries: Sequence[Entry], reference: Entry
) -> tuple[Alternative, ...]:
    """Neighbours on the front of size, and the closest file that is notably faster."""
    front = [e for e in entries if e.on_size_front]
    found = []
    smaller = [e for e in front if e.nbytes < chosen.nbytes]
    larger = [e for e in front if e.nbytes > chosen.nbytes]
    if smaller:
        found.append(Alternative("Smaller", smaller[-1].file, _beside(smaller[-1], chosen)))
    if larger:
        found.append(Alternative("Closer", larger[0].file, _beside(larger[0], chosen)))
    faster = [e for e in entries if e.on_speed_front and _speed(e) > 1.05 * _speed(chosen) > 0]
    if faster:
        closest = min(faster, key=lambda e: e.cost)
        if closest.file not in {a.file for a in found}:
            found.append(Alternative("Faster", closest.file, _beside(closest, chosen)))
    return tuple(found)


def _speed(entry: Entry) -> float:
    return entry.generation.tokens_per_second if entry.generation else 0.0


def _beside(other: Entry, chosen: Entry) -> str:
    """What another file takes and gives, relative to the chosen one."""
    sizes = other.nbytes / chosen.nbytes - 1
    parts = [f"{abs(100 * sizes):.0f} % {'smaller' if sizes < 0 else 'larger'}"]
    if other.comparison and chosen.comparison and chosen.comparison.divergence > 0:
        ratio = other.comparison.divergence / chosen.comparison.divergence
        parts.append(f"{words.figures(ratio, 2)} times the divergence")
        theirs, ours = (e.comparison.delta_log_perplexity for e in (other, chosen) if e.comparison)
        parts.append(f"perplexity {words.change(theirs)} instead of {words.change(ours)}")
    elif other.perplexity and chosen.perplexity:
        changed = log(other.perplexity.perplexity / chosen.perplexity.perplexity)
        parts.append(f"perplexity {words.change(changed)}")
    if other.generation and chosen.generation:
        faster = other.generation.tokens_per_second / chosen.generation.tokens_per_second
        parts.append(f"{words.figures(faster, 2)} times the speed")
    return ", ".join(parts)


def _by_perplexity(entries: Sequence[Entry], *, tolerance: float) -> Recommendation:
    """Without a reference: beside the file with the most bits per weight."""
    if len(entries) < 2:
        return Recommendation(
            file="",
            certainty="none",
            headline="Only one file was measured, so there is nothing to choose from.",
            cautions=("A perplexity says little alone: it becomes telling beside another file's.",),
        )
    best = max(entries, key=lambda e: e.nbytes)
    assert best.perplexity
    base = best.perplexity.perplexity
    costs = [
        _Cost(e, log(e.perplexity.perplexity / base), float("inf")) for e in entries if e.perplexity
    ]
    allowed = f"{100 * tolerance:g} %"
    within = [c for c in costs if c.estimate <= log1p(tolerance)]
    chosen = min(within, key=lambda c: (c.entry.nbytes, c.estimate)).entry
    assert chosen.perplexity
    changed = expm1(log(chosen.perplexity.perplexity / base))
    headline = (
        f"No smaller file stays within {allowed} of the perplexity of the largest, {best.file}."
        if chosen is best
        else "The smallest file whose perplexity is within "
        f"{allowed} of that of the largest, {best.file}."
    )
    own = f"{chosen.perplexity.perplexity:.3f} ± {chosen.perplexity.error:.3f}"
    reasons = [f"Its perplexity is {own}."]
    if chosen is not best:
        reasons = [
            f"Its perplexity is {own}, {100 * changed:+.1f} % beside {base:.3f}.",
            _trade(chosen, best).replace("the reference", "the largest"),
        ]
    return Recommendation(
        file=chosen.file,
        certainty="estimated",
        headline=headline,
        sha256=chosen.provenance.sha256,
        reasons=tuple(reasons),
        cautions=(
            "Perplexities alone cannot say whether files differ: their ± is about the text, which "
            "all of them share. A comparison over the same chunks can.",
        ),
        alternatives=_alternatives(chosen, entries, best),
    )
