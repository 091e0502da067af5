"""``ggufkit compare``: models beside a reference, and which differences are real."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ggufkit.cli.options import leak_option
from ggufkit.cli.session import Session, json_option, nbytes_text, pass_session
from ggufkit.cli.tables import print_worst

if TYPE_CHECKING:
    from rich.console import Console

    from ggufkit.values import BytesComparison, Comparison, ComparisonReport, Difference

_MEASURES = {
    "log_perplexity": "log perplexity",
    "divergence": "divergence from the reference",
    "bits_per_byte": "bits per byte",
}


@click.command("compare")
@click.argument("reference")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--text",
    "texts",
    multiple=True,
    help="Name or file of a text; may be given several times.  [default: wikitext]",
)
@click.option(
    "--domains",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of texts, one file for each domain.",
)
@click.option(
    "-c",
    "--context",
    type=click.IntRange(min=8),
    default=512,
    show_default=True,
    help="Tokens per chunk.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Read only the first chunks.")
@click.option(
    "-ngl", "--gpu-layers", type=int, default=0, show_default=True, help="Layers on the GPU."
)
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of the verdicts.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option(
    "--reference-cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of compact references: written the first time, used instead of the "
    "reference from then on. Divergences are then lower bounds.",
)
@leak_option
@click.option("--column", help="Column of parquet, arrow, jsonl or json texts.")
@click.option(
    "--text-dir",
    type=click.Path(path_type=Path),
    help="Offline copies of named texts.  [default: $GGUFKIT_TEXT_DIR]",
)
@json_option
@pass_session
def command(
    session: Session,
    reference: str,
    models: tuple[str, ...],
    texts: tuple[str, ...],
    domains: Path | None,
    context: int,
    chunks: int | None,
    gpu_layers: int,
    confidence: float,
    seed: int,
    reference_cache: Path | None,
    allow_leak: bool,
    column: str | None,
    text_dir: Path | None,
    as_json: bool,
) -> None:
    """Compare models with a reference, such as quantized ones with F32.

    All read the same chunks side by side: KL divergence, agreement and perplexity
    come out as llama-perplexity defines them, without its file of logits, and it is
    said which differences are more than chance.
    """
    from ggufkit import pipeline

    found = [pipeline.find_model(m, session.models_dir) for m in (reference, *models)]
    report = pipeline.compare(
        found[0],
        found[1:],
        texts=texts if texts or domains else ("wikitext",),
        domains=domains,
        context=context,
        chunks=chunks,
        gpu_layers=gpu_layers,
        confidence=confidence,
        seed=seed,
        reference_cache=reference_cache,
        allow_leak=allow_leak,
        column=column,
        text_dir=text_dir,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(as_json, report, lambda: _print(session.console, report))


def _print(console: "Console", report: "ComparisonReport") -> None:
    from ggufkit.evaluate.domains import worst_by_divergence

    texts = [row.text for row in report.comparisons] + [row.text for row in report.by_bytes]
    for text in dict.fromkeys(texts):
        _print_table(console, [r for r in report.comparisons if r.text == text])
        _print_bytes(console, [r for r in report.by_bytes if r.text == text])
        _print_verdicts(console, [p.difference for p in report.differences if p.text == text])
        console.print()
    print_worst(console, worst_by_divergence(report.comparisons))
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _print_table(console: "Console", rows: Sequence["Comparison"]) -> None:
    from rich.table import Table

    if not rows:
        return
    told = rows[0]
    console.print(
        f"[bold]{told.text}[/]: {told.chunks} chunks of {told.context}, {told.tokens} tokens "
        f"scored; reference {told.reference.stem}, {nbytes_text(told.reference_file_nbytes)}, "
        f"PPL {math.exp(told.reference_log_perplexity):.4f}, "
        f"{told.reference_bits_per_byte:.4f} bits per byte",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    titles = ("file", "PPL", "Δ log PPL", "KL divergence", "99 %", "max", "same top", "RMS Δp")
    for title in titles:
        table.add_column(title, justify="right")
    table.add_column("against the reference")
    for row in rows:
        bound = "" if row.divergence_shortfall is None else "≥ "
        table.add_row(
            row.model.stem,
            nbytes_text(row.file_nbytes),
            f"{math.exp(row.log_perplexity):.4f}",
            f"{row.delta_log_perplexity:+.5f} ± {row.delta_log_perplexity_error:.5f}",
            f"{bound}{row.divergence:.5f} ± {row.divergence_error:.5f}",
            f"{row.divergence_percentiles['99']:.4f}",
            f"{row.divergence_percentiles['100']:.3f}",
            f"{100 * row.agreement:.2f} ± {100 * row.agreement_error:.2f} %",
            f"{100 * row.delta_p_rms:.3f} %",
            ", ".join(v.verdict for v in row.verdicts) + (" (reused)" if row.reused else ""),
        )
    console.print(table)


def _print_bytes(console: "Console", rows: Sequence["BytesComparison"]) -> None:
    for row in rows:
        console.print(
            f"[bold]{row.text}[/]: {row.model.stem} has another vocabulary than "
            f"{row.reference.stem}: {row.vocabulary_difference}",
            soft_wrap=True,
        )
        console.print(
            f"  {row.bits_per_byte:.4f} bits per byte, the reference "
            f"{row.reference_bits_per_byte:.4f}; {row.chunks} chunks, {row.nbytes} bytes scored"
        )
        for verdict in row.verdicts:
            console.print(f"  {sentence(verdict)}", soft_wrap=True)


def _print_verdicts(console: "Console", differences: Sequence["Difference"]) -> None:
    if not differences:
        return
    told = differences[0]
    console.print(
        f"pairs, at {100 * told.confidence:g} % confidence (bootstrap over chunks, "
        f"seed {told.seed}):"
    )
    for difference in differences:
        console.print(f"  {sentence(difference)}", soft_wrap=True)


def sentence(told: "Difference") -> str:
    """A difference in words."""
    names = f"{told.model.stem} and {told.other.stem}"
    figures = f"{told.difference:+.5f}, {told.low:+.5f} to {told.high:+.5f}"
    measure = _MEASURES[told.measure]
    if told.verdict != "indistinguishable":
        return (
            f"{told.model.stem} is {told.verdict} than {told.other.stem} in {measure} ({figures})"
        )
    if told.difference == 0:
        more = "they are equal"
    elif told.chunks_to_decide is None:
        more = "no text is long enough to decide"
    else:
        missing = told.chunks_to_decide - told.chunks
        more = f"some {missing} more chunks would decide if the difference is this large"
    return f"{names} are indistinguishable in {measure} at this length ({figures}): {more}"
