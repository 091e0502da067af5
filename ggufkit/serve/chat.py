"""A conversation with a model: what was said, and what is said next."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ggufkit.errors import IntegrityError, SourceError, UsageError
from ggufkit.llamacpp.template import Message
from ggufkit.serve.model import Sampling, Statistics
from ggufkit.store import write_atomically

_FORMAT = "ggufkit conversation"
_VERSION = 1
_LONGEST_FILE = 64 << 20
_SEEDS = 1 << 32


class Model(Protocol):
    """What a conversation needs of a model."""

    path: Path
    statistics: Statistics

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """Write the answer to a conversation piece by piece."""

    def complete(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Go on with a text piece by piece."""

    def look(self, path: Path) -> tuple[int, int]:
        """See that an image can be shown; its width and height."""

    def stop(self) -> None:
        """End the answer that is being written."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True)
class Style:
    """How what is typed becomes what the model reads.

    Attributes:
        completion: no chat template: the model goes on with the text so far.
        prefix: put before each message.
        suffix: put after it.
    """

    completion: bool = False
    prefix: str = ""
    suffix: str = ""


class Conversation:
    """What was said so far.

    Args:
        model: who answers; closed together with the conversation.
        system: the system message; None leaves it to the chat template. In a
            completion it is the text that everything begins with.
        sampling: how tokens are chosen.
        style: how what is typed becomes what the model reads.

    Attributes:
        system: the system message.
        sampling: how the next answer is chosen.
        history: questions and answers, taking turns.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        style: Style | None = None,
    ) -> None:
        self.model = model
        self.system = system
        self.sampling = sampling or Sampling()
        self.style = style or Style()
        self.history: list[Message] = []
        self._attempt = 0
        self._images: list[str] = []

    @property
    def messages(self) -> list[Message]:
        """System message and history."""
        return [*self._beginning(), *self.history]

    def _beginning(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Iterator[str]:
        """Say something and get the answer piece by piece.

        If it is interrupted, what was answered so far stays in the history;
        if nothing was answered, neither does the question.
        """
        self._attempt = 0
        wrapped = f"{self.style.prefix}{text}{self.style.suffix}"
        question: Message = {"role": "user", "content": wrapped}
        if self._images:
            question = {**question, "images": list(self._images)}
        return self._answer(question, self.history)

    def show(self, path: Path) -> tuple[int, int]:
        """Let the next message show an image; it is read now.

        Returns:
            Its width and height in pixels.

        Raises:
            UsageError: if the model cannot see, or this is no image.
            SourceError: if the file cannot be read.
        """
        if self.style.completion:
            raise UsageError("a completion has no images", "Begin without --completion")
        path = path.absolute()
        size = self.model.look(path)
        self._images.append(str(path))
        return size

    def again(self) -> Iterator[str]:
        """Answer the last question anew; a seed that was given is counted up.

        The old answer stays if no new one comes.

        Raises:
            UsageError: if nothing was asked yet.
        """
        if not self.history:
            raise UsageError("nothing was said yet")
        self._attempt += 1
        *before, question, _ = self.history
        return self._answer(question, before)

    def _answer(self, question: Message, before: list[Message]) -> Iterator[str]:
        pieces: list[str] = []
        try:
            for piece in self._stream([*self._beginning(), *before, question]):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                answer = {"role": "assistant", "content": "".join(pieces)}
                self.history = [*before, question, answer]
                self._images = []

    def _stream(self, messages: list[Message]) -> Iterator[str]:
        sampling = self.sampling
        if sampling.seed is not None and self._attempt:
            sampling = replace(sampling, seed=(sampling.seed + self._attempt) % (_SEEDS - 1))
        if self.style.completion:
            text = "".join(m["content"] for m in messages)
            return self.model.complete(text, sampling)
        return self.model.stream(messages, sampling)

    def stop(self) -> None:
        """End the answer that is being written; safe in a signal handler."""
        self.model.stop()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.history, self._images = [], []

    def close(self) -> None:
        """Free the model."""
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Conversations as files.

    def save(self, path: Path) -> None:
        """Write system message, history and sampling as JSON.

        A conversation that was saved there is replaced, any other file is not.

        Raises:
            UsageError: if something else lies there, or it cannot be written.
        """
        if path.exists():
            try:
                read_conversation(path)
            except (IntegrityError, SourceError) as error:
                raise UsageError(
                    f"{path} exists and is not a conversation", "Choose another name"
                ) from error
        value = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model.path.name,
            "style": asdict(self.style),
            "sampling": asdict(self.sampling),
            "system": self.system,
            "messages": self.history,
        }
        try:
            write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error

    def load(self, path: Path) -> str:
        """Go on with a conversation that was saved; all of it or nothing is taken.

        Returns:
            Name of the model that it was held with.

        Raises:
            SourceError: if the file cannot be read.
            IntegrityError: if it is not a conversation.
            UsageError: if it is a completion and this is not, or the other way round.
        """
        saved = read_conversation(path)
        if saved.style.completion != self.style.completion:
            kinds = ("a chat", "a completion")
            raise UsageError(
                f"{path} is {kinds[saved.style.completion]}, and "
                f"this is {kinds[self.style.completion]}",
                "Begin ggufkit chat with --completion for the one, without it for the other",
            )
        self.style, self.sampling = saved.style, saved.sampling
        self.system, self.history = saved.system, saved.history
        self._images = []
        self._attempt = 0
        return saved.model


@dataclass(frozen=True)
class Saved:
    """What :meth:`Conversation.save` writes.

    Attributes:
        model: file name of the model.
        style: how messages were read.
        sampling: how answers were chosen.
        system: the system message.
        history: questions and answers.
    """

    model: str
    style: Style
    sampling: Sampling
    system: str | None
    history: list[Message]


def read_conversation(path: Path) -> Saved:
    """Read a conversation that was saved.

    Raises:
        SourceError: if the file cannot be read.
        IntegrityError: if it is not a conversation.
    """
    try:
        if path.stat().st_size > _LONGEST_FILE:
            raise IntegrityError(f"{path} is too large for a conversation")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}") from error
    try:
        return _saved(raw)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise IntegrityError(
            f"{path} is not a conversation that ggufkit saved", f"What does not fit: {error}"
        ) from error


def _saved(raw: Any) -> Saved:
    if raw["format"] != _FORMAT or raw["version"] != _VERSION:
        raise ValueError(f"format {raw['format']!r}, version {raw['version']!r}")
    system = raw["system"]
    if system is not None:
        _check_text(system, "the system message")
    style = _built(Style, raw["style"])
    sampling = _built(Sampling, {**raw["sampling"], "stop": tuple(raw["sampling"]["stop"])})
    sampling.resolve()
    return Saved(str(raw["model"]), style, sampling, system, _history(raw["messages"]))


def _built(kind: Any, values: dict[str, Any]) -> Any:
    """An instance whose values are of the types of its defaults, or numbers."""
    for field in fields(kind):
        value = values[field.name]
        fits = (
            value is None or isinstance(value, int | float)
            if field.default is None
            else isinstance(value, type(field.default))
        )
        if not fits or isinstance(value, bool) != isinstance(field.default, bool):
            raise ValueError(f"{field.name} is {value!r}")
        if isinstance(value, str):
            _check_text(value, field.name)
    return kind(**values)


def _history(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or len(messages) % 2:
        raise ValueError("messages are not pairs of question and answer")
    history: list[Message] = []
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role != ("user", "assistant")[number % 2]:
            raise ValueError(f"message {number + 1} is by {role!r}")
        _check_text(content, f"message {number + 1}")
        images = message.get("images", [])
        for path in images:
            _check_text(path, f"an image of message {number + 1}")
        shown = {"images": list(images)} if images else {}
        history.append({"role": role, "content": content, **shown})
    return history


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text")
    value.encode()
