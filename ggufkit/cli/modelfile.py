"""``ggufkit modelfile``: a GGUF for Ollama."""

from pathlib import Path

import click

from ggufkit.cli.session import Session, json_option, pass_session
from ggufkit.values import to_json


@click.command("modelfile")
@click.argument("model", required=False)
@click.option(
    "-o",
    "--out",
    metavar="FILE",
    help="File to write; - for stdout.  [default: Modelfile beside the GGUF]",
)
@click.option("-sys", "--system", help="System message.  [default: the chat template's]")
@click.option(
    "--num-ctx",
    type=click.IntRange(min=16),
    help="Tokens of context.  [default: as trained, at most 8192]",
)
@click.option("--force", is_flag=True, help="Replace another file of that name.")
@json_option
@pass_session
def command(
    session: Session,
    model: str | None,
    out: str | None,
    system: str | None,
    num_ctx: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write an Ollama Modelfile for a model.

    MODEL is a GGUF, or a name that `ggufkit models` lists; without it, the
    newest. Template, stops, sampling and context come out of the model's files.
    """
    from ggufkit import pipeline

    path = pipeline.find_model(model, session.models_dir)
    if model is None:
        session.progress.say(f"for the newest model: {path}")
    if out == "-":
        value = pipeline.describe_for_ollama(
            path,
            Path.cwd(),
            system=system,
            context=num_ctx,
            models_dir=session.models_dir,
            progress=session.progress,
        )
        text = value.render()
        session.emit(as_json, to_json(value), lambda: click.echo(text, nl=False))
        return
    written, value = pipeline.modelfile(
        path,
        out=Path(out) if out else None,
        system=system,
        context=num_ctx,
        force=force,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    found = {"path": str(written), **to_json(value)}
    session.emit(as_json, found, lambda: click.echo(str(written)))
