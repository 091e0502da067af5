"""``ggufkit chat``: talk to a model."""

import io
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggufkit.cli.running import (
    context_options,
    draft_options,
    model_options,
    sampling_options,
)
from ggufkit.cli.session import Session, json_option, pass_session
from ggufkit.cli.terminal import harmless, stopping_at_ctrl_c
from ggufkit.errors import GgufkitError, UsageError
from ggufkit.values import to_json

if TYPE_CHECKING:
    from ggufkit.serve.chat import Conversation
    from ggufkit.serve.dialogue import Writer
    from ggufkit.serve.model import Statistics


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("chat")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL.")
@click.option("-sys", "--system", help="System message.  [default: the chat template's]")
@click.option("-p", "--prompt", help="First message.")
@click.option(
    "-st", "--single-turn", is_flag=True, help="Answer one message and leave; best with -p."
)
@click.option(
    "--completion",
    is_flag=True,
    help="No conversation: the model goes on with the text, as a base model needs it.",
)
@click.option("--in-prefix", default="", metavar="TEXT", help="Put before each message.")
@click.option("--in-suffix", default="", metavar="TEXT", help="Put after each message.")
@click.option(
    "--chat-template",
    metavar="FILE|NAME",
    help="Jinja file, or a template that llama.cpp knows, instead of the model's own.",
)
@click.option("--mmproj", type=_FILE, help="Projector (GGUF) that the model sees images with.")
@click.option(
    "--image",
    "images",
    type=_FILE,
    multiple=True,
    help="Image that the first message shows; needs --mmproj.",
)
@sampling_options
@model_options
@draft_options
@context_options
@click.option("--color/--no-color", default=None, help="[default: if it is a terminal]")
@click.option(
    "--markdown/--no-markdown", default=True, help="Show answers on a terminal as Markdown."
)
@click.option(
    "--history/--no-history", default=True, help="Remember what is typed, for the next time."
)
@json_option
@pass_session
def command(session: Session, /, **given: Any) -> None:
    """Talk to a model.

    MODEL is a GGUF, or a name that `ggufkit models` lists; without it, the
    newest. On a terminal, /help shows what can be typed, and Ctrl-C ends an
    answer. Else answers alone are printed: to -p, and to each line of stdin
    (with --completion, to all of it); with --json, each is a line of JSON.
    """
    names = [name for name in (given.pop("model"), given.pop("model_option")) if name]
    if len(names) > 1:
        raise UsageError("the model is given twice", "Give MODEL or -m MODEL, not both")
    from ggufkit import pipeline

    spec = names[0] if names else None
    path = pipeline.find_model(spec, session.models_dir)
    if spec is None:
        session.progress.say(f"talking to the newest model: {path}")
    _chat(session, path, _Wishes(**given))


@dataclass(frozen=True)
class _Wishes:
    """The command line, but for the model's name."""

    prompt: str | None
    single_turn: bool
    system: str | None
    completion: bool
    in_prefix: str
    in_suffix: str
    chat_template: str | None
    mmproj: Path | None
    images: tuple[Path, ...]
    draft: Any
    sampling: Any
    options: Any
    scales: Any
    context_options: Any
    color: bool | None
    markdown: bool
    history: bool
    as_json: bool


def _chat(session: Session, path: Path, wishes: _Wishes) -> None:
    typing = sys.stdin is not None and sys.stdin.isatty()
    terminal = typing and sys.stdout.isatty() and not wishes.as_json
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Models write emoji, whatever the terminal's alphabet.
        sys.stdout.reconfigure(errors="replace")
    with _open(session, path, wishes, ask=terminal) as conversation:
        for image in wishes.images:
            conversation.show(image)
        if terminal:
            _at_terminal(session, conversation, wishes)
        else:
            _in_a_pipe(session, conversation, wishes, typing)


def _open(session: Session, path: Path, wishes: _Wishes, *, ask: bool) -> "Conversation":
    from ggufkit import pipeline
    from ggufkit.llamacpp.conversing import NoTemplateError
    from ggufkit.serve.chat import Style

    def load(completion: bool) -> "Conversation":
        return pipeline.chat(
            path,
            system=wishes.system,
            sampling=wishes.sampling,
            style=Style(completion, wishes.in_prefix, wishes.in_suffix),
            options=wishes.options,
            context=wishes.context_options,
            scales=wishes.scales,
            chat_template=wishes.chat_template,
            mmproj=wishes.mmproj,
            draft=wishes.draft,
            progress=session.progress,
        )

    try:
        return load(wishes.completion)
    except NoTemplateError as error:
        if not ask:
            raise
        click.echo(f"{error.message}.", err=True)
        if not click.confirm("Shall it go on with the text that you type instead?", err=True):
            raise
    return load(True)


def _at_terminal(session: Session, conversation: "Conversation", wishes: _Wishes) -> None:
    from rich.console import Console

    from ggufkit.cli.markdown import THEME
    from ggufkit.cli.terminal import TerminalReader, TerminalWriter
    from ggufkit.serve.dialogue import answer, converse

    colour = wishes.color if wishes.color is not None else not Console().no_color
    console = Console(highlight=False, no_color=not colour, theme=THEME)
    model = conversation.model
    completion = conversation.style.completion
    writer = TerminalWriter(
        console,
        lambda: model.statistics,
        markdown=wishes.markdown and not completion,
        quiet=session.quiet,
    )
    reader = TerminalReader(model, history=wishes.history, colour=colour, say=writer.say)
    kind = "it goes on with what you type; " if completion else ""
    writer.say(f"{model.path.name}: {kind}/help for help, /exit or Ctrl-D to leave")
    if wishes.prompt is not None:
        writer.typed(wishes.prompt)
        answer(conversation, wishes.prompt, writer)
    if wishes.single_turn:
        if wishes.prompt is None and (text := reader()) is not None:
            answer(conversation, text, writer)
        return
    converse(conversation, reader, writer)


def _in_a_pipe(
    session: Session, conversation: "Conversation", wishes: _Wishes, typing: bool
) -> None:
    from ggufkit.serve.dialogue import answer, converse

    writer: Writer = _JsonLines(session) if wishes.as_json else _Plain(session)
    if wishes.prompt is not None:
        answer(conversation, wishes.prompt, writer)
        if typing or wishes.single_turn:
            return
    read = _whole() if conversation.style.completion else _lines()
    if not wishes.single_turn:
        converse(conversation, read, writer)
    elif (text := read()) is not None:
        answer(conversation, text, writer)


def _lines() -> Callable[[], str | None]:
    """A reader of stdin, one message per line; closed, it has none."""
    lines = iter(sys.stdin.buffer if sys.stdin is not None else ())

    def read() -> str | None:
        line = next(lines, None)
        # The model refuses what is not UTF-8, with a message of its own.
        return None if line is None else line.decode("utf-8", "surrogateescape")

    return read


def _whole() -> Callable[[], str | None]:
    """A reader of all of stdin as one message; there is none if it is empty."""
    read = sys.stdin.buffer.read() if sys.stdin is not None else b""
    left = iter([read.decode("utf-8", "surrogateescape")] if read else [])
    return lambda: next(left, None)


class _Plain:
    """Answers on stdout and nothing else."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def writing(self, stop: Callable[[], None]) -> AbstractContextManager[None]:
        return stopping_at_ctrl_c(stop)

    def piece(self, text: str) -> None:
        sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
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
