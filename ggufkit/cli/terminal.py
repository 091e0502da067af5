"""A chat at the terminal: what is typed, and how answers are shown."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from unicodedata import category

from ggufkit import settings
from ggufkit.errors import GgufkitError

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.key_binding import KeyPressEvent
    from rich.console import Console
    from rich.status import Status

    from ggufkit.cli.markdown import StreamedMarkdown
    from ggufkit.serve.batch import BatchReport
    from ggufkit.serve.chat import Model
    from ggufkit.serve.model import Statistics

_NOTES = {
    "limit": "stopped at the length asked for",
    "interrupted": "interrupted",
    "context": "context full",
}


@contextmanager
def stopping_at_ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C end an answer in an orderly way; pressed again, it does not wait."""
    pressed = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _keys_unseen() -> Iterator[None]:
    """Do not echo what is typed during an answer; it is there at the next prompt."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent: list[Any] = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def harmless(text: str) -> str:
    """Without control characters: a model's text must not command the terminal."""
    return "".join(c for c in text if c in "\n\t" or category(c) != "Cc")


class TerminalWriter:
    """Shows answers as they come, talk in dim letters.

    Args:
        console: the terminal.
        statistics: of the answer that is being written.
        markdown: whether answers are shown as Markdown.
        quiet: whether talk is left out.
    """

    def __init__(
        self,
        console: "Console",
        statistics: Callable[[], "Statistics"],
        *,
        markdown: bool = True,
        quiet: bool = False,
    ) -> None:
        self._console = console
        self._statistics = statistics
        self._markdown = markdown and not console.is_dumb_terminal
        self._quiet = quiet
        self._waiting: Status | None = None
        self._view: StreamedMarkdown | None = None

    @contextmanager
    def writing(self, stop: Callable[[], None]) -> Iterator[None]:
        """Around an answer: Ctrl-C ends it, and keys are not echoed into it."""
        with _keys_unseen(), stopping_at_ctrl_c(stop), ExitStack() as stack:
            self._stack = stack
            self._waiting = self._console.status("[dim]reading[/]", spinner="dots")
            self._waiting.start()
            stack.callback(self._end)
            yield

    def _end(self) -> None:
        self._stop_waiting()
        self._view = None

    def _stop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.stop()

    def piece(self, text: str) -> None:
        """Show a piece of an answer."""
        if self._waiting is not None:
            self._begin()
        if self._view is not None:
            self._view.feed(harmless(text))
        else:
            sys.stdout.write(harmless(text))
            sys.stdout.flush()

    def _begin(self) -> None:
        self._stop_waiting()
        if self._markdown:
            from ggufkit.cli.markdown import StreamedMarkdown

            view = StreamedMarkdown(self._console, self._progress)
            self._view = self._stack.enter_context(view)

    def _progress(self) -> str:
        told = self._statistics()
        return f"{told.generated_tokens} tokens, {told.tokens_per_second:.1f}/s, Ctrl-C stops"

    def answered(self, prompt: str, answer: str, statistics: "Statistics") -> None:
        """Close the answer, and say why it ended if not by itself."""
        if not self._markdown and not answer.endswith("\n"):
            sys.stdout.write("\n")
        if not answer and statistics.stopped == "end":
            self.say("the model has nothing to say")
        if note := _NOTES.get(statistics.stopped):
            self.say(f"{note}, {summary(statistics)}")
        sys.stdout.write("\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Show something that is not the model's."""
        if not self._quiet:
            from rich.text import Text

            self._console.print(Text(text, style="dim"))

    def typed(self, text: str) -> None:
        """Show a message as if it had been typed."""
        from rich.text import Text

        self._console.print(Text("> ", style="bold green"), Text(harmless(text)), sep="")

    def failed(self, error: GgufkitError) -> None:
        """Show an error and go on."""
        from rich.text import Text

        self._console.print(Text("error: ", style="bold red"), Text(error.message), sep="")
        if error.hint:
            self._console.print(Text("hint: ", style="bold cyan"), Text(error.hint), sep="")


def summary(told: "Statistics") -> str:
    """An answer in numbers."""
    return (
        f"{told.generated_tokens} tokens, {told.tokens_per_second:.1f} tokens/s, "
        f"context {told.context_used} of {told.context}{guesses_text(told)}"
    )


def guesses_text(told: "Statistics | BatchReport") -> str:
    """How many guesses of a draft model were right; nothing without guesses."""
    if not told.guessed_tokens:
        return ""
    return f", {100 * told.right_tokens / told.guessed_tokens:.0f} % of guesses right"


class TerminalReader:
    """Reads messages from the keyboard, with editing and a history that stays.

    Args:
        model: whose name and numbers stand below the prompt.
        history: keep what is typed for later sessions.
        colour: whether the terminal is to show colours.
        say: told why there is no history, if it cannot be kept.
    """

    def __init__(
        self,
        model: "Model",
        *,
        history: bool = True,
        colour: bool = True,
        say: Callable[[str], None],
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import ColorDepth
        from prompt_toolkit.shortcuts import CompleteStyle
        from prompt_toolkit.styles import Style

        self._model = model
        self._say = say
        self._session: PromptSession[str] = PromptSession(
            history=_history(history, say),
            multiline=True,
            key_bindings=_bindings(),
            prompt_continuation="  ",
            bottom_toolbar=self._status,
            completer=_completer(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            color_depth=None if colour else ColorDepth.DEPTH_1_BIT,
            style=Style.from_dict(
                {"prompt": "bold ansigreen", "bottom-toolbar": "noreverse ansibrightblack"}
            ),
        )

    def __call__(self) -> str | None:
        """One message; None at Ctrl-D, or at Ctrl-C twice."""
        leaving = False
        while True:
            try:
                return self._session.prompt([("class:prompt", "> ")])
            except EOFError:
                return None
            except KeyboardInterrupt:
                if leaving:
                    return None
                leaving = True
                self._say("Ctrl-C again, or Ctrl-D, to leave")

    def _status(self) -> str:
        told = self._model.statistics
        share = 100 * told.context_used / told.context
        parts = [f"context {told.context_used} of {told.context} ({share:.0f} %)"]
        if told.tokens_per_second:
            parts.append(f"{told.tokens_per_second:.1f} tokens/s{guesses_text(told)}")
        parts += [self._model.path.stem, "Alt-Enter: new line", "/help"]
        width = self._session.output.get_size().columns
        line = parts[0]
        for part in parts[1:]:
            if len(line) + len(part) + 3 < width:
                line += f" · {part}"
        return line


def _bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def _clear(event: "KeyPressEvent") -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def _completer() -> "Completer":
    """Completes commands, and the names of files that follow some."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    from ggufkit.serve.dialogue import COMMANDS

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterator[Completion]:
            typed = document.text_before_cursor
            name, space, rest = typed.partition(" ")
            if not space:
                found = (c for c in COMMANDS if typed.startswith("/") and c.startswith(typed))
                yield from (Completion(c, start_position=-len(typed)) for c in found)
            elif name in ("/image", "/load", "/save"):
                yield from paths.get_completions(Document(rest), complete_event)

    return Commands()


def _history(wanted: bool, say: Callable[[str], None]) -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if not wanted:
        return InMemoryHistory()
    path = settings.state_dir() / "chat-history"
    try:
        _make_private(path)
    except OSError as error:
        say(f"what you type is not remembered: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)


def _make_private(path: Path) -> None:
    """See that a file is there which nobody else can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    path.chmod(0o600)
