"""``ggufkit run``: answer a file of prompts."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggufkit.cli.running import context_options, draft_options, model_options, sampling_options
from ggufkit.cli.session import Session, json_option, pass_session
from ggufkit.cli.terminal import guesses_text
from ggufkit.errors import GgufkitError, UsageError

if TYPE_CHECKING:
    from ggufkit.serve.batch import BatchReport


@click.command("run")
@click.argument("model")
@click.argument("prompts", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that answers are added to.  [default: stdout]",
)
@click.option(
    *("-np", "--parallel"),
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Answers that are written at once.",
)
@click.option("-sys", "--system", help="System message of rows that have none.")
@click.option("--completion", is_flag=True, help="No chat template: go on with each prompt.")
@click.option("--in-prefix", default="", metavar="TEXT", help="Put before each prompt.")
@click.option("--in-suffix", default="", metavar="TEXT", help="Put after each prompt.")
@click.option(
    "--chat-template",
    metavar="FILE|NAME",
    help="Jinja file, or a template that llama.cpp knows, instead of the model's own.",
)
@sampling_options
@model_options
@draft_options
@context_options
@json_option
@pass_session
def command(session: Session, /, **given: Any) -> None:
    """Answer a file of prompts in batches.

    PROMPTS is JSON Lines (- for stdin): rows with "prompt" or "messages", and if
    need be "id", "system", "max_tokens", "temperature", "stop" and so on. With
    -o, each answer is a line that is added when it is complete; run again after
    an interruption, it goes on with what has no answer yet. Answers have at most
    1024 tokens unless -n or the row says otherwise.
    """
    from ggufkit import pipeline
    from ggufkit.serve.batch import BatchOptions
    from ggufkit.serve.chat import Style

    out: Path | None = given["out"]
    if out is None and given["as_json"]:
        raise UsageError("without -o, stdout has the answers", "Name a file with -o")
    options = BatchOptions(
        system=given["system"],
        sampling=given["sampling"],
        style=Style(given["completion"], given["in_prefix"], given["in_suffix"]),
        model=given["options"],
        context=given["context_options"],
        scales=given["scales"],
        chat_template=given["chat_template"],
        parallel=given["parallel"],
        draft=given["draft"],
    )
    report = pipeline.run(
        pipeline.find_model(given["model"], session.models_dir),
        _read(given["prompts"]),
        out or _print,
        options=options,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(given["as_json"], report, lambda: session.progress.say(_told(report)))
    if report.failed:
        raise GgufkitError(
            f"{report.failed} of {report.rows} prompts could not be answered",
            f"{out or 'The output'} says why; run it again to try again",
        )


def _read(prompts: Path) -> Path | bytes:
    return sys.stdin.buffer.read() if str(prompts) == "-" else prompts


def _print(answer: Mapping[str, Any]) -> None:
    from ggufkit.serve.answers import as_line

    sys.stdout.buffer.write(as_line(answer))
    sys.stdout.buffer.flush()


def _told(report: "BatchReport") -> str:
    if not report.answered:
        return f"reused: all {report.rows} prompts were answered before"
    reused = f", {report.reused} answered before" if report.reused else ""
    return (
        f"{report.answered} answers{reused}, {report.generated_tokens} tokens in "
        f"{report.seconds:.1f} s, {report.tokens_per_second:.1f} tokens/s"
        f"{guesses_text(report)}"
    )
