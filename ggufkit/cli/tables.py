"""Tables that several verbs print."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ggufkit.cli.session import nbytes_text
from ggufkit.values import EvalResult, QuantizeResult

if TYPE_CHECKING:
    from rich.console import Console


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
    """A table of perplexities; with several models also their difference to the first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("PPL", justify="right")
    if len(results) > 1:
        table.add_column("to first", justify="right")
    for title in ("tokens/s", "memory", "file"):
        table.add_column(title, justify="right")
    for row in results:
        difference = f"{row.perplexity - results[0].perplexity:+.4f}"
        table.add_row(
            row.model.stem,
            f"{row.perplexity:.4f} ± {row.error:.4f}",
            *([difference] if len(results) > 1 else []),
            "reused" if row.reused else f"{row.tokens_per_second:.0f}",
            nbytes_text(row.peak_rss_nbytes),
            nbytes_text(row.file_nbytes),
        )
    told = results[0]
    console.print(
        f"{told.text}: {told.tokens} tokens, {told.chunks} chunks of {told.context}", soft_wrap=True
    )
    console.print(table)
