"""Tables that several verbs print."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.cli.session import nbytes_text
from ggufkit.values import EvalResult, QuantizeResult

if TYPE_CHECKING:
    from rich.console import Console

    from ggufkit.evaluate.domains import Worst


def print_quantized(console: "Console", results: Sequence[QuantizeResult]) -> None:
    """One line for each file: asked, got, fallbacks, size, seconds."""
    for row in results:
        console.print(f"[bold]{row.path}[/]", soft_wrap=True)
        console.print(
            f"  {row.label}: {row.bits_per_weight_asked:.2f} bits per weight asked, "
            f"{row.bits_per_weight:.2f} got; {_fallbacks(row)}; "
            f"{nbytes_text(row.nbytes)}; " + ("reused" if row.reused else f"{row.seconds:.1f} s"),
            soft_wrap=True,
        )
    for note in dict.fromkeys(note for row in results for note in row.notes):
        console.print(f"  note: {note}", soft_wrap=True)


def _fallbacks(row: QuantizeResult) -> str:
    if not row.fallbacks:
        return "no fallbacks"
    to = ", ".join(f"{count} to {type}" for type, count in sorted(row.fallbacks.items()))
    return f"{sum(row.fallbacks.values())} of {row.tensors} tensors fell back: {to}"


def print_perplexities(console: "Console", results: Sequence[EvalResult]) -> None:
    """One table of perplexities; with several models also how they compare to the first.

    Perplexities of different texts are not to be compared, so each is shown beside that of the
    first model on the same text. With several texts the worst for each model is said.
    """
    from rich.table import Table

    from ggufkit.evaluate.domains import worst_by_perplexity

    first: dict[str, EvalResult] = {}
    for row in results:
        first.setdefault(row.text, row)
    several = len(results) > len(first)
    for told in first.values():
        console.print(
            f"{told.text}: {told.tokens} tokens, {told.chunks} chunks of {told.context}",
            soft_wrap=True,
        )
    table = Table(box=None, pad_edge=False)
    if len(first) > 1:
        table.add_column("text", overflow="fold")
    table.add_column("model", overflow="fold")
    table.add_column("PPL", justify="right")
    if several:
        table.add_column("to first", justify="right")
    for title in ("tokens/s", "memory", "file"):
        table.add_column(title, justify="right")
    for row in results:
        difference = row.perplexity - first[row.text].perplexity
        table.add_row(
            *([_short(row.text) if row is first[row.text] else ""] if len(first) > 1 else []),
            row.model.stem + (LEAK_MARK if _leaks(row) else ""),
            f"{row.perplexity:.4f} ± {row.error:.4f}",
            *([f"{difference:+.4f}"] if several else []),
            "reused" if row.reused else f"{row.tokens_per_second:.0f}",
            nbytes_text(row.peak_rss_nbytes),
            nbytes_text(row.file_nbytes),
        )
    console.print(table)
    print_worst(console, worst_by_perplexity(results))
    for row in filter(_leaks, results):
        console.print(
            f"{LEAK_MARK.strip()} calibrated on text that holds {100 * (row.overlap or 0):.0f} % "
            f"of {row.text}: {row.model.stem} looks better there than it is",
            soft_wrap=True,
        )


def _short(text: str) -> str:
    """A text's name, or the last part of its path."""
    return Path(text).name


LEAK_MARK = " [!]"
"""Behind the name of a model that was calibrated on the text."""


def _leaks(row: EvalResult) -> bool:
    from ggufkit.evaluate.leaks import is_leak

    return is_leak(row.overlap)


def print_worst(console: "Console", worst: Sequence["Worst"]) -> None:
    """Say on which text each model loses most."""
    for row in worst:
        if row.measure == "divergence":
            what = f"KL divergence {row.loss:.5f}, elsewhere {row.elsewhere:.5f}"
        else:
            here, elsewhere = (100 * math.expm1(loss) for loss in (row.loss, row.elsewhere))
            what = f"perplexity {here:+.2f} % to the first, elsewhere {elsewhere:+.2f} %"
        console.print(f"{row.model.stem} loses most on {_short(row.text)}: {what}", soft_wrap=True)
