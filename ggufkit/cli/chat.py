"""``ggufkit chat``: talk to a model."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

import click

from ggufkit.cli.session import Session, json_option, pass_session
from ggufkit.errors import GgufkitError, UsageError
from ggufkit.values import to_json

if TYPE_CHECKING:
    from ggufkit.llamacpp.runtime import Statistics
    from ggufkit.serve.chat import Writer


class _Layers(click.ParamType[int]):
    name = "layers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value).lower()
        if text == "all":
            return -1
        if text.removeprefix("-").isdigit():
            return max(-1, int(text))
        self.fail(f"'{value}' is neither a number nor 'all'", param, ctx)


@click.command("chat")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL.")
@click.option(
    "-ngl",
    "--gpu-layers",
    type=_Layers(),
    metavar="N|all",
    default=0,
    show_default=True,
    help="Layers to put on the GPU.",
)
@click.option("-sys", "--system", help="System message.  [default: the chat template's]")
@click.option("-p", "--prompt", help="First message.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=1), help="Length of an answer at most, in tokens."
)
@click.option(
    "-c",
    "--context",
    type=click.IntRange(min=16),
    help="Tokens of context.  [default: as trained, at most 8192]",
)
@click.option("-t", "--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--temp", type=click.FloatRange(min=0), help="Temperature; 0 takes the likeliest.")
@click.option("--top-k", type=click.IntRange(min=0), help="Choose among this many tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Choose among this much probability.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Leave out what is less likely.")
@click.option("--repeat-penalty", type=click.FloatRange(min=0, min_open=True), help="1 for none.")
@click.option("--seed", type=click.IntRange(0, 0xFFFFFFFE), help="Of the sampling.")
@click.option(
    "--chat-template",
    metavar="FILE|NAME",
    help="Jinja file, or a template that llama.cpp knows, instead of the model's own.",
)
@json_option
@pass_session
def command(
    session: Session,
    model: str | None,
    model_option: str | None,
    gpu_layers: int,
    system: str | None,
    prompt: str | None,
    max_tokens: int | None,
    context: int | None,
    threads: int | None,
    temp: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repeat_penalty: float | None,
    seed: int | None,
    chat_template: str | None,
    as_json: bool,
) -> None:
    """Talk to a model.

    MODEL is a GGUF, or a name that `ggufkit models` lists; without it, the
    newest. On a terminal, /help shows what can be typed, and Ctrl-C ends an
    answer. From a pipe, each line is a message; with --json, each answer is a
    line of JSON.
    """
    if model and model_option:
        raise UsageError("the model is given twice", "Give MODEL or -m MODEL, not both")
    from ggufkit import pipeline
    from ggufkit.llamacpp.runtime import Sampling
    from ggufkit.serve.chat import answer, converse

    spec = model or model_option
    path = pipeline.find_model(spec, session.models_dir)
    if spec is None:
        session.progress.say(f"talking to the newest model: {path}")
    typing = sys.stdin is not None and sys.stdin.isatty()
    terminal = typing and sys.stdout.isatty() and not as_json
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Models write emoji, whatever the terminal's alphabet.
        sys.stdout.reconfigure(errors="replace")
    with pipeline.chat(
        path,
        system=system,
        sampling=Sampling(temp, top_k, top_p, min_p, repeat_penalty, max_tokens),
        gpu_layers=gpu_layers,
        context=context,
        threads=threads,
        seed=seed,
        chat_template=chat_template,
        progress=session.progress,
    ) as conversation:
        writer: Writer
        if terminal:
            writer = _Terminal(session)
            writer.greet(path)
        else:
            writer = _JsonLines(session) if as_json else _Plain(session)
        if prompt is not None:
            if terminal:
                click.echo(_coloured_prompt() + prompt)
            answer(conversation, prompt, writer)
        if terminal:
            converse(conversation, _typed, writer)
        elif prompt is None or not typing:
            converse(conversation, _lines(), writer)


def _lines() -> Callable[[], str | None]:
    """A reader of stdin, one message per line; closed, it has none."""
    lines = iter(sys.stdin.buffer if sys.stdin is not None else ())

    def read() -> str | None:
        line = next(lines, None)
        # The model refuses what is not UTF-8, with a message of its own.
        return None if line is None else line.decode("utf-8", "surrogateescape")

    return read


def _coloured_prompt() -> str:
    return click.style("> ", fg="green", bold=True)


def _typed() -> str | None:
    """One message from the keyboard; None at Ctrl-D, or at Ctrl-C with nothing typed."""
    while True:
        try:
            # readline must not count the colour's bytes as columns.
            return input("\001\033[1;32m\002> \001\033[0m\002")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            if not _typed_so_far():
                return None


def _typed_so_far() -> str:
    try:
        import readline
    except ImportError:  # Windows: what was typed cannot be known
        return ""
    return readline.get_line_buffer()


def _summary(told: "Statistics") -> str:
    notes = {
        "limit": "stopped at the length asked for, ",
        "interrupted": "interrupted, ",
        "context": "context full, ",
    }
    return (
        f"{notes.get(told.stopped, '')}{told.generated_tokens} tokens, "
        f"{told.tokens_per_second:.1f} tokens/s, "
        f"context {told.context_used} of {told.context}"
    )


class _Plain:
    """Answers on stdout and nothing else."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def piece(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def answered(self, prompt: str, answer: str, statistics: "Statistics") -> None:
        if not answer.endswith("\n"):
            self.piece("\n")
        if statistics.stopped == "interrupted":
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self._session.progress.say(text)

    def failed(self, error: GgufkitError) -> None:
        raise error


class _JsonLines(_Plain):
    """Each answer as one line of JSON, when it is complete."""

    def piece(self, text: str) -> None:
        pass

    def answered(self, prompt: str, answer: str, statistics: "Statistics") -> None:
        value = {"prompt": prompt, "answer": answer, **to_json(statistics)}
        click.echo(json.dumps(value, ensure_ascii=False))
        if statistics.stopped == "interrupted":
            raise KeyboardInterrupt


class _Terminal:
    """Answers as they come, talk in dim letters."""

    def __init__(self, session: Session) -> None:
        self._quiet = session.quiet
        # Loading it is what makes input() edit lines and remember them.
        _typed_so_far()

    def greet(self, path: Path) -> None:
        self.say(f"{path.name}: /help for help, /exit or Ctrl-D to leave")

    def piece(self, text: str) -> None:
        # A model's text must not command the terminal.
        harmless = (c for c in text if c in "\n\t" or category(c) != "Cc")
        click.echo("".join(harmless), nl=False)
        sys.stdout.flush()

    def answered(self, prompt: str, answer: str, statistics: "Statistics") -> None:
        click.echo()
        self.say(_summary(statistics))

    def say(self, text: str) -> None:
        if not self._quiet:
            click.secho(text, dim=True, err=True)

    def failed(self, error: GgufkitError) -> None:
        click.secho(f"error: {error.message}", fg="red", err=True)
        if error.hint:
            click.secho(f"hint: {error.hint}", fg="cyan", err=True)
