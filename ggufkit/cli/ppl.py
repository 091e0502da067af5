"""``ggufkit ppl``: perplexity of models on texts."""

from pathlib import Path

import click

from ggufkit.cli.options import leak_option
from ggufkit.cli.session import Session, json_option, pass_session


@click.command("ppl")
@click.argument("text_and_models", nargs=-1, metavar="TEXT [MODEL]...")
@click.option("--text", "texts", multiple=True, help="A further text; may be given several times.")
@click.option(
    "--domains",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of texts, one file for each domain. TEXT is left out then.",
)
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
    text_and_models: tuple[str, ...],
    texts: tuple[str, ...],
    domains: Path | None,
    context: int,
    chunks: int | None,
    gpu_layers: int,
    allow_leak: bool,
    column: str | None,
    text_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure perplexity with llama-perplexity.

    TEXT is wikitext, or a UTF-8, parquet, arrow, jsonl or json file. Without MODEL
    the newest GGUF of the models directory is measured.
    """
    from ggufkit import pipeline
    from ggufkit.cli.tables import print_perplexities

    models = text_and_models
    if not domains:
        if not models:
            raise click.UsageError("Missing argument 'TEXT'.")
        texts, models = (models[0], *texts), models[1:]
    found = [pipeline.find_model(m, session.models_dir) for m in models or (None,)]
    if not models:
        session.progress.say(f"measuring the newest model: {found[0]}")
    results = pipeline.ppl(
        texts,
        found,
        domains=domains,
        context=context,
        chunks=chunks,
        gpu_layers=gpu_layers,
        allow_leak=allow_leak,
        column=column,
        text_dir=text_dir,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(as_json, results, lambda: print_perplexities(session.console, results))
