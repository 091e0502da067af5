"""``ggufkit serve``: models for many users, over HTTP."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggufkit.cli.running import context_options, draft_options, model_options
from ggufkit.cli.session import Session, pass_session
from ggufkit.errors import UsageError

if TYPE_CHECKING:
    from ggufkit.serve.api.options import ServeOptions
    from ggufkit.serve.hosting import Hosted

_GIB = 1 << 30
_MIB = 1 << 20


@click.command("serve")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--alias", help="Name of the model for clients.  [default: the file's]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 for any that is free.",
)
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    envvar="GGUFKIT_API_KEY",
    show_envvar=True,
    help="Key that clients must have; may be given several times.",
)
@click.option(
    "--cors",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web page that may ask from a browser, such as http://localhost:3000.",
)
@click.option(
    *("-np", "--parallel"),
    type=click.IntRange(1, 128),
    default=4,
    show_default=True,
    help="Answers that are written at once.",
)
@click.option(
    "--cells",
    type=click.IntRange(min=16),
    help="Tokens that all users together have room for.  [default: the context for each of -np, "
    "as far as a quarter of the free memory goes]",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory that loaded models may take together; those longest unused make room.  "
    "[default: 80 % of the machine's if there are several]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Requests that may wait; one more is refused.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Length of any answer at most.")
@click.option(
    "--max-body",
    type=click.FloatRange(min=0.01),
    metavar="MIB",
    default=8.0,
    show_default=True,
    help="Size of a request.",
)
@click.option(
    "--max-clients",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Clients that may be connected.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    default=600.0,
    show_default=True,
    help="For a request and its answer.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="For answers to finish when the server is told to end.",
)
@click.option("--ui", is_flag=True, help="Also a page to chat in the browser.")
@click.option(
    "--chat-template",
    metavar="FILE|NAME",
    help="Jinja file, or a template that llama.cpp knows, instead of the models' own.",
)
@model_options
@draft_options
@context_options
@pass_session
def command(session: Session, /, **given: Any) -> None:
    """Serve models to many users, as OpenAI's clients expect it.

    MODEL is a GGUF, a name that `ggufkit models` lists, or NAME=MODEL to choose
    what clients call it. The first is loaded at once, others when they are asked
    for. -c is the context of one user. Ctrl-C ends it when answers are finished.
    """
    from ggufkit import pipeline

    models = _named(session, given["models"], given["alias"])
    options = _options(given)

    def tell(address: str, first: "Hosted") -> None:
        say = session.progress.say
        say(f"serving at {address}/v1")
        if given["ui"]:
            say(f"page: {address}")
        say(f"models: {', '.join(models)}")
        together = f"room for {first.engine.metrics().cells} tokens together"
        users = f"{first.engine.parallel} users at once"
        say(f"context: {first.engine.context} tokens for each user, {users}, {together}")
        say("stop: Ctrl-C")

    pipeline.serve(models, options=options, on_start=tell, progress=session.progress)


def _options(given: dict[str, Any]) -> "ServeOptions":
    from ggufkit.serve.api.options import Limits, ServeOptions
    from ggufkit.serve.hosting import HostOptions

    return ServeOptions(
        host=given["host"],
        port=given["port"],
        keys=given["keys"],
        origins=given["origins"],
        ui=given["ui"],
        memory_nbytes=None if given["memory"] is None else int(given["memory"] * _GIB),
        limits=Limits(
            body_nbytes=int(given["max_body"] * _MIB),
            max_tokens=given["max_tokens"],
            timeout_seconds=given["timeout"],
            connections=given["max_clients"],
            shutdown_seconds=given["grace"],
        ),
        hosting=HostOptions(
            model=given["options"],
            context=replace(given["context_options"], cells=given["cells"]),
            scales=given["scales"],
            chat_template=given["chat_template"],
            parallel=given["parallel"],
            queue=given["max_queue"],
            draft=given["draft"],
        ),
    )


def _named(session: Session, specs: tuple[str, ...], alias: str | None) -> dict[str, Path]:
    """The models by what clients call them."""
    from ggufkit import pipeline

    if alias and len(specs) > 1:
        raise UsageError("--alias names one model, and there are several", "Use NAME=MODEL")
    models: dict[str, Path] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not equals or Path(spec).exists():
            name, rest = "", spec
        path = pipeline.find_model(rest, session.models_dir)
        name = alias or name or path.stem
        if name in models:
            raise UsageError(f"two models are called '{name}'", "Name them: NAME=MODEL")
        models[name] = path
    return models
