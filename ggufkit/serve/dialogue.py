"""Leading a conversation, without a terminal: reader and writer are given."""

import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Protocol

from ggufkit.errors import GgufkitError, UsageError
from ggufkit.serve.chat import Conversation
from ggufkit.serve.model import Sampling, Statistics

HELP = """\
/regen           answer the last message anew
/system [TEXT]   show or change the system message ("" for none)
/params [N V]    show or change how answers are chosen: /params temp 0.2
/image FILE      show an image together with the next message, if the model can see
/save FILE       keep the conversation in a file
/load FILE       go on with one that was kept
/reset           forget the conversation, keep the system message
/help            show this
/exit            leave (also Ctrl-D, or Ctrl-C twice)
Anything else is said to the model; begin with a space to say a /word."""

COMMANDS = ("/exit", "/help", "/image", "/load", "/params", "/regen", "/reset", "/save", "/system")

_SHORT = {"temperature": "temp", "max_tokens": "n"}
_TEXTS = ("grammar", "stop")
_WHOLE = ("top_k", "seed", "max_tokens")


class Writer(Protocol):
    """Where a conversation is shown."""

    def writing(self, stop: Callable[[], None]) -> AbstractContextManager[None]:
        """Around an answer; ``stop`` ends it early."""

    def piece(self, text: str) -> None:
        """Show a piece of an answer as it comes."""

    def answered(self, prompt: str, answer: str, statistics: Statistics) -> None:
        """An answer has ended, by itself or by an interruption."""

    def say(self, text: str) -> None:
        """Show something that is not the model's."""

    def failed(self, error: GgufkitError) -> None:
        """A message could not be answered; raise to end the conversation."""


def converse(conversation: Conversation, read: Callable[[], str | None], writer: Writer) -> None:
    """Answer what is read until there is no more, or ``/exit``.

    Args:
        conversation: the conversation.
        read: gives the next message; None at the end.
        writer: where answers go.
    """
    while (text := read()) is not None:
        name, _, rest = text.strip().partition(" ")
        if _is_command(text, name):
            if name == "/exit":
                return
            try:
                _obey(conversation, name, rest.strip(), writer)
            except GgufkitError as error:
                writer.failed(error)
        elif text.strip() or conversation.style.completion:
            answer(conversation, _message(conversation, text), writer)


def _is_command(text: str, name: str) -> bool:
    """A path such as ``/usr/bin`` is none, nor is what begins with a space."""
    return text.startswith("/") and name[1:].isalpha()


def _message(conversation: Conversation, text: str) -> str:
    # In a completion each space counts, and the end of the line was the Enter key.
    return text.rstrip("\r\n") if conversation.style.completion else text.strip()


def answer(conversation: Conversation, text: str, writer: Writer) -> None:
    """Answer one message."""
    _show(conversation, conversation.ask(text), text, writer)


def _show(conversation: Conversation, stream: Iterator[str], question: str, writer: Writer) -> None:
    pieces: list[str] = []
    try:
        with writer.writing(conversation.stop):
            for piece in stream:
                pieces.append(piece)
                writer.piece(piece)
    except KeyboardInterrupt:
        # It may have come while the writer wrote; the model must be told then too.
        stream.close()  # type: ignore[attr-defined]
    except GgufkitError as error:
        if pieces:
            writer.answered(question, "".join(pieces), conversation.model.statistics)
        writer.failed(error)
        return
    writer.answered(question, "".join(pieces), conversation.model.statistics)


def _obey(conversation: Conversation, name: str, rest: str, writer: Writer) -> None:
    match name:
        case "/regen":
            stream = conversation.again()
            if conversation.sampling.temperature == 0:
                writer.say("the temperature is 0, so the answer will be the same")
            _show(conversation, stream, conversation.history[-2]["content"], writer)
        case "/reset":
            conversation.reset()
            writer.say("the conversation begins anew")
        case "/help":
            writer.say(HELP)
        case "/system":
            _system(conversation, rest, writer)
        case "/params":
            _params(conversation, rest, writer)
        case "/save":
            path = _path(name, rest)
            conversation.save(path)
            writer.say(f"saved in {path}")
        case "/load":
            _load(conversation, _path(name, rest), writer)
        case "/image":
            path = _path(name, rest)
            width, height = conversation.show(path)
            writer.say(f"the next message shows {path.name}, {width} x {height} pixels")
        case _:
            raise UsageError(
                f"there is no command {name}",
                "/help lists them; to say it to the model, begin with a space",
            )


def _path(name: str, rest: str) -> Path:
    if not rest:
        raise UsageError(f"{name} needs the name of a file", f"{name} talk.json")
    return Path(rest).expanduser()


def _system(conversation: Conversation, rest: str, writer: Writer) -> None:
    if rest:
        conversation.system = None if rest in ('""', "''") else rest
    told = conversation.system
    writer.say("there is no system message" if told is None else f"system message: {told}")


def _load(conversation: Conversation, path: Path, writer: Writer) -> None:
    model = conversation.load(path)
    count = len(conversation.history)
    own = conversation.model.path.name
    other = "" if model == own else f", held with {model}; this is {own}"
    writer.say(f"loaded {count} messages{other}")


def option_name(field: str) -> str:
    """What a sampling parameter is called by who types it."""
    return _SHORT.get(field, field.replace("_", "-"))


def _params(conversation: Conversation, rest: str, writer: Writer) -> None:
    if rest:
        conversation.sampling = _changed(conversation.sampling, rest)
    writer.say(parameters_text(conversation.sampling))


def parameters_text(sampling: Sampling) -> str:
    """What is set, by the names that are typed, one in a line."""
    told = []
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if field.name not in _TEXTS:
            told.append((option_name(field.name), "default" if value is None else str(value)))
    if sampling.grammar:
        told.append(("grammar", f"{len(sampling.grammar)} characters"))
    told += [("stop", repr(stop)) for stop in sampling.stop]
    return "\n".join(f"{name:<19}{value}" for name, value in told)


def _changed(sampling: Sampling, text: str) -> Sampling:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"cannot read '{text}': {error}") from error
    names = {option_name(f.name): f.name for f in fields(sampling) if f.name not in _TEXTS}
    if len(words) % 2:
        raise UsageError("/params takes names and values", "/params temp 0.2 top-k 20")
    changes = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        field = names.get(name.lstrip("-").replace("_", "-"))
        if field is None:
            raise UsageError(f"there is no parameter '{name}'", f"There are: {', '.join(names)}")
        changes[field] = None if value == "default" else _number(field, value)
    if changes.get("max_tokens", 1) is not None and changes.get("max_tokens", 1) < 1:  # type: ignore[operator]
        raise UsageError("n must be at least 1")
    changed = replace(sampling, **changes)  # type: ignore[arg-type]
    changed.resolve()
    return changed


def _number(field: str, text: str) -> int | float:
    try:
        value = int(text) if field in _WHOLE else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        kind = "a whole number" if field in _WHOLE else "a number"
        raise UsageError(f"'{text}' is not {kind}", f"/params {option_name(field)} default")
    return value
