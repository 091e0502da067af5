"""``ggufkit convert``: a checkpoint to GGUFs."""

from pathlib import Path

import click

from ggufkit.cli.options import (
    awq_options,
    calibration_options,
    fetch_options,
    out_option,
    rounding_options,
    verify_options,
)
from ggufkit.cli.session import Session, json_option, pass_session
from ggufkit.values import AwqOptions, Calibration, FetchOptions, RoundingOptions, VerifyOptions


@click.command("convert")
@click.argument("model")
@click.option(
    "--type",
    "types",
    metavar="TYPE",
    multiple=True,
    default=("q4_k_m",),
    show_default=True,
    help="Quantization type, such as q4_0, q5_k_m, q8_0, f16; may be given many times.",
)
@click.option("--awq", is_flag=True, help="Fold in activation-aware scales, searched per type.")
@awq_options
@click.option(
    "--imatrix",
    metavar="auto|FILE",
    help="Quantize with an importance matrix: auto makes one of the calibration text.",
)
@rounding_options
@click.option(
    "--guard", is_flag=True, help="Keep plain files where they are better on held-back text."
)
@calibration_options
@click.option("--keep-intermediate", is_flag=True, help="Keep the float GGUF.")
@verify_options
@out_option
@fetch_options
@json_option
@pass_session
def command(
    session: Session,
    model: str,
    types: tuple[str, ...],
    awq: bool,
    awq_options: AwqOptions,
    imatrix: str | None,
    rounding: RoundingOptions,
    guard: bool,
    calibration: Calibration,
    keep_intermediate: bool,
    verify: VerifyOptions,
    out: Path | None,
    fetch: FetchOptions,
    as_json: bool,
) -> None:
    """Make GGUFs out of a checkpoint.

    MODEL is a checkpoint directory, hf:ORG/NAME, ms:ORG/NAME, ORG/NAME, a GGUF
    file (which is only quantized), or demo.
    """
    from ggufkit import pipeline
    from ggufkit.cli.tables import print_quantized

    results = pipeline.convert(
        model,
        types=types,
        awq=awq,
        awq_options=awq_options,
        imatrix="auto" if imatrix == "auto" else Path(imatrix) if imatrix else None,
        rounding=rounding,
        guard=guard,
        out=out,
        calibration=calibration,
        keep_intermediate=keep_intermediate,
        verify=verify,
        models_dir=session.models_dir,
        fetch=fetch,
        progress=session.progress,
    )
    session.emit(as_json, results, lambda: print_quantized(session.console, results))
