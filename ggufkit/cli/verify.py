"""``ggufkit verify``: a GGUF beside the checkpoint that it was made from."""

from typing import TYPE_CHECKING

import click

from ggufkit.cli.options import fetch_options
from ggufkit.cli.session import Session, json_option, pass_session
from ggufkit.values import FetchOptions

if TYPE_CHECKING:
    from ggufkit.verify.values import Verification


@click.command("verify")
@click.argument("gguf")
@click.option(
    "--against",
    metavar="CHECKPOINT",
    help="A directory, hf:ORG/NAME, ms:ORG/NAME or demo.  [default: where the GGUF came from]",
)
@click.option(
    "--allow-difference",
    "allowed",
    metavar="NAME",
    multiple=True,
    help="Let a difference of this name pass; may be repeated.",
)
@fetch_options
@json_option
@pass_session
def command(
    session: Session,
    gguf: str,
    against: str | None,
    allowed: tuple[str, ...],
    fetch: FetchOptions,
    as_json: bool,
) -> None:
    """Compare a GGUF with the checkpoint that it was made from.

    llama.cpp opens the file; then tokens, end tokens, chat template and predictions of
    both are compared. Any error ends with exit code 1. GGUF is a file, or a name that
    `ggufkit models` lists.

    \b
    Examples:
      ggufkit verify model-BF16.gguf --against ./model
      ggufkit verify qwen2.5-0.5b-instruct-q4_0
    """  # noqa: D301 - click takes the control character itself
    from ggufkit import pipeline

    found = pipeline.verify(
        pipeline.find_model(gguf, session.models_dir),
        against=against,
        allowed=allowed,
        models_dir=session.models_dir,
        fetch=fetch,
        progress=session.progress,
    )
    session.emit(as_json, found, lambda: _print(session, found))
    if found.errors:
        click.get_current_context().exit(1)


def _print(session: Session, found: "Verification") -> None:
    from rich.markup import escape

    console = session.console
    for mismatch in found.mismatches:
        kind = "[red]error[/]" if mismatch in found.errors else "[yellow]warning[/]"
        allowed = " (allowed)" if mismatch.error and mismatch not in found.errors else ""
        console.print(f"{kind} {mismatch.name}: {escape(mismatch.message)}{allowed}")
    for reason in found.not_compared:
        console.print(f"[yellow]not compared[/] {escape(reason)}")
    figures = found.figures
    if "lines" in figures:
        console.print(f"lines of text: {figures['lines']:.0f}")
    if "conversations" in figures:
        console.print(f"conversations: {figures['conversations']:.0f}")
    if "kl_mean" in figures:
        console.print(
            f"predictions: {figures['positions']:.0f}; KL divergence {figures['kl_mean']:.1e} nats "
            f"on average (at most {figures['kl_mean_limit']:.1e} is rounding), "
            f"{figures['kl_max']:.1e} at most"
        )
    if not found.against:
        console.print("opened and run by llama.cpp; --against CHECKPOINT compares it")
    elif not (found.mismatches or found.not_compared) and found.exact:
        console.print(f"[green]same[/] as the checkpoint {escape(found.against)}")
    elif not found.exact:
        console.print(
            "the file is quantized, so its distance is a figure and no error; "
            "ggufkit compare says what it costs"
        )
