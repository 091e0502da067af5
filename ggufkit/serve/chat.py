"""A conversation with a model, without a terminal: reader and writer are given."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from ggufkit.errors import GgufkitError
from ggufkit.llamacpp.runtime import Sampling, Statistics
from ggufkit.llamacpp.template import Message

HELP = """\
/reset   forget the conversation, keep the system message
/help    show this
/exit    leave (also Ctrl-D)
Anything else is said to the model."""


class Model(Protocol):
    """What a conversation needs of a model."""

    statistics: Statistics

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """Write the answer piece by piece."""

    def close(self) -> None:
        """Free it."""


class Writer(Protocol):
    """Where a conversation is shown."""

    def piece(self, text: str) -> None:
        """Show a piece of an answer as it comes."""

    def answered(self, prompt: str, answer: str, statistics: Statistics) -> None:
        """An answer has ended, by itself or by an interruption."""

    def say(self, text: str) -> None:
        """Show something that is not the model's."""

    def failed(self, error: GgufkitError) -> None:
        """A message could not be answered; raise to end the conversation."""


class Conversation:
    """What was said so far.

    Args:
        model: who answers; closed together with the conversation.
        system: the system message; None leaves it to the chat template.
        sampling: how tokens are chosen.
    """

    def __init__(
        self, model: Model, *, system: str | None = None, sampling: Sampling | None = None
    ) -> None:
        self.model = model
        self._sampling = sampling or Sampling()
        self._system: list[Message] = []
        if system is not None:
            self._system = [{"role": "system", "content": system}]
        self._history: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """System message and history."""
        return [*self._system, *self._history]

    def ask(self, text: str) -> Iterator[str]:
        """Say something and get the answer piece by piece.

        If it is interrupted, what was answered so far stays in the history;
        if nothing was answered, neither does the question.
        """
        pieces: list[str] = []
        question: Message = {"role": "user", "content": text}
        try:
            for piece in self.model.stream([*self.messages, question], self._sampling):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                answer = {"role": "assistant", "content": "".join(pieces)}
                self._history += [question, answer]

    def reset(self) -> None:
        """Forget all but the system message."""
        self._history.clear()

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


def converse(conversation: Conversation, read: Callable[[], str | None], writer: Writer) -> None:
    """Answer what is read until there is no more, or ``/exit``.

    Args:
        conversation: the conversation.
        read: gives the next message; None at the end.
        writer: where answers go. Ctrl-C during an answer ends that answer.
    """
    while (text := read()) is not None:
        match text.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
                writer.say("the conversation begins anew")
            case "/help":
                writer.say(HELP)
            case message:
                answer(conversation, message, writer)


def answer(conversation: Conversation, text: str, writer: Writer) -> None:
    """Answer one message."""
    pieces: list[str] = []
    stream = conversation.ask(text)
    try:
        for piece in stream:
            pieces.append(piece)
            writer.piece(piece)
    except KeyboardInterrupt:
        # It may have come while the writer wrote; the model must be told then too.
        stream.close()  # type: ignore[attr-defined]
    except GgufkitError as error:
        if pieces:
            writer.answered(text, "".join(pieces), conversation.model.statistics)
        writer.failed(error)
        return
    writer.answered(text, "".join(pieces), conversation.model.statistics)
