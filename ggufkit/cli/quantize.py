"""``ggufkit quantize``: a GGUF to other types."""

from pathlib import Path

import click

from ggufkit.cli.options import out_option
from ggufkit.cli.session import Session, json_option, pass_session

_GGUF = click.Path(path_type=Path)


@click.command("quantize")
@click.argument("gguf", type=_GGUF)
@click.option(
    "--type",
    "types",
    metavar="TYPE",
    multiple=True,
    required=True,
    help="Quantization type; may be given many times.",
)
@click.option("--imatrix", type=_GGUF, help="Importance matrix, as llama-imatrix writes it.")
@click.option("--allow-requantize", is_flag=True, help="Accept a file that is quantized already.")
@out_option
@json_option
@pass_session
def command(
    session: Session,
    gguf: Path,
    types: tuple[str, ...],
    imatrix: Path | None,
    allow_requantize: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Quantize a float GGUF to one or many types."""
    from ggufkit import pipeline
    from ggufkit.cli.tables import print_quantized

    results = pipeline.quantize(
        gguf,
        types=types,
        out=out,
        imatrix=imatrix,
        allow_requantize=allow_requantize,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(as_json, results, lambda: print_quantized(session.console, results))
