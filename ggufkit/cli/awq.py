"""``ggufkit awq``: fold activation-aware scales into a checkpoint."""

from pathlib import Path

import click

from ggufkit.cli.options import awq_options, calibration_options, fetch_options
from ggufkit.cli.session import Session, json_option, pass_session
from ggufkit.values import AwqOptions, AwqResult, Calibration, FetchOptions


@click.command("awq")
@click.argument("model")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the new checkpoint.",
)
@click.option(
    "--type",
    metavar="TYPE",
    default="q4_0",
    show_default=True,
    help="Quantization type that the scales are searched for.",
)
@awq_options
@click.option(
    "--imatrix",
    is_flag=True,
    help="Search for use with an importance matrix, and write it to awq/imatrix.gguf.",
)
@calibration_options
@fetch_options
@json_option
@pass_session
def command(
    session: Session,
    model: str,
    out: Path,
    type: str,
    awq_options: AwqOptions,
    imatrix: bool,
    calibration: Calibration,
    fetch: FetchOptions,
    as_json: bool,
) -> None:
    """Write a checkpoint with the same function that quantizes better.

    Nothing is quantized yet: the result is an ordinary float checkpoint that
    transformers loads and the converter takes.
    """
    from ggufkit import pipeline

    result = pipeline.awq(
        model,
        out=out,
        type=type,
        awq_options=awq_options,
        imatrix=imatrix,
        calibration=calibration,
        models_dir=session.models_dir,
        fetch=fetch,
        progress=session.progress,
    )
    session.emit(as_json, result, lambda: _print(session, result))


def _print(session: Session, result: AwqResult) -> None:
    session.console.print(f"[bold]{result.path}[/]", soft_wrap=True)
    won = ""
    if result.objective_ratio is not None:
        won = (
            f"output error {100 * result.objective_ratio:.0f} % of plain rounding's on "
            f"{result.tokens} tokens of {result.calibration}; "
        )
    session.console.print(
        f"  scales for {result.type}: {won}"
        f"{result.groups_left_alone} of {result.groups} groups left alone; "
        + ("reused" if result.reused else f"{result.seconds:.1f} s"),
        soft_wrap=True,
    )
    what = f"{result.rows_clipped} rows clipped" if result.rows_clipped else "same function"
    session.console.print(
        f"  {what}: mean KL divergence {result.divergence:.1e} nats per token on held-back text",
        soft_wrap=True,
    )
