"""``ggufkit ppl``: perplexity of models on a text."""

from pathlib import Path

import click

from ggufkit.cli.session import Session, json_option, pass_session


@click.command("ppl")
@click.argument("text")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "-c",
    "--context",
    type=click.IntRange(min=8),
    default=512,
    show_default=True,
    help="Tokens per chunk.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Measure only the first chunks.")
@click.option(
    "-ngl", "--gpu-layers", type=int, default=0, show_default=True, help="Layers on the GPU."
)
@click.option("--column", help="Column of a parquet, arrow or jsonl text.")
@click.option(
    "--text-dir",
    type=click.Path(path_type=Path),
    help="Offline copies of named texts.  [default: $GGUFKIT_TEXT_DIR]",
)
@json_option
@pass_session
def command(
    session: Session,
    text: str,
    models: tuple[str, ...],
    context: int,
    chunks: int | None,
    gpu_layers: int,
    column: str | None,
    text_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure perplexity with llama-perplexity.

    TEXT is wikitext, or a UTF-8, parquet, arrow or jsonl file. Without MODEL
    the newest GGUF of the models directory is measured.
    """
    from ggufkit import pipeline
    from ggufkit.cli.tables import print_perplexities

    found = [pipeline.find_model(m, session.models_dir) for m in models or (None,)]
    if not models:
        session.progress.say(f"measuring the newest model: {found[0]}")
    results = pipeline.ppl(
        text,
        found,
        context=context,
        chunks=chunks,
        gpu_layers=gpu_layers,
        column=column,
        text_dir=text_dir,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(as_json, results, lambda: print_perplexities(session.console, results))
