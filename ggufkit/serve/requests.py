"""What is asked of the engine, and what it answers."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ggufkit.errors import GgufkitError
from ggufkit.llamacpp.images import Seen
from ggufkit.llamacpp.sampling import SamplingParams, TokenLogprob

Adapters = tuple[tuple[str, float], ...]
FinishReason = Literal["stop", "length", "cancelled", "timeout", "slow", "error"]


class BusyError(GgufkitError):
    """So many requests wait that another one is refused; try again later."""


class ClosedError(GgufkitError):
    """The engine does not take requests any more."""


@dataclass(frozen=True)
class Request:
    """One answer to be written.

    Attributes:
        prompt: tokens, at least one, fewer than the context.
        sampling: how tokens are chosen, seed and grammar included.
        max_tokens: length of the answer at most; None for what the context holds.
        stop: strings that end the answer and are not part of it.
        stop_tokens: tokens that do the same, besides the model's own.
        logprobs: give log-probabilities of each token and of this many
            alternatives; None for none.
        special: whether control tokens are spelled out.
        ignore_end: go on after tokens that end an answer.
        adapters: LoRA adapters by name, with the scale of each.
        client: whose request it is; clients that wait take turns.
        timeout_seconds: from submission to the end, waiting included.
        remember: keep what was computed, for requests that begin the same.
        images: what the prompt shows, by the place where it begins in there.
    """

    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    special: bool = False
    ignore_end: bool = False
    adapters: Adapters = ()
    client: str = ""
    timeout_seconds: float | None = None
    remember: bool = True
    images: Mapping[int, Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbedRequest:
    """One text to be embedded.

    Attributes:
        prompt: its tokens, at least one.
        client: whose request it is.
        timeout_seconds: from submission on; it counts until the work begins.
    """

    prompt: Sequence[int]
    client: str = ""
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """A token of an answer, if log-probabilities were asked for.

    Attributes:
        token: its id.
        piece: its bytes.
        logprob: natural logarithm of its probability, before sampling parameters.
        top: the likeliest tokens there, best first.
    """

    token: int
    piece: bytes
    logprob: float
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer.

    Attributes:
        text: whole characters, free of stop strings; it may be empty.
        tokens: the tokens since the last piece; their text may still be held back.
        chosen: the same with log-probabilities, if they were asked for.
    """

    text: str
    tokens: tuple[int, ...] = ()
    chosen: tuple[ChosenToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a text was embedded as.

    Attributes:
        vector: as the model gives it, not normalized.
    """

    vector: Sequence[float]


@dataclass(slots=True)
class Usage:
    """One request in numbers.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them were known already.
        generated_tokens: tokens written; one that ends the answer does not count.
        guessed_tokens: tokens that a draft model guessed for it.
        right_tokens: guesses that were right.
        queue_seconds: from submission until it got a sequence.
        first_token_seconds: from submission to the first token.
        generate_seconds: from the first token to the last.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    right_tokens: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    generate_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing after the first token."""
        more = self.generated_tokens - 1
        return more / self.generate_seconds if more > 0 and self.generate_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer; nothing comes after it.

    Attributes:
        reason: ``stop`` is the model's own end or a stop string, ``length`` the
            limit on tokens or the context, ``slow`` a reader that did not read.
        usage: the request in numbers.
        stop: the stop string that was met, if one was.
        error: what went wrong, if the reason is ``error``.
    """

    reason: FinishReason
    usage: Usage
    stop: str | None = None
    error: GgufkitError | None = None


Event = Delta | Embedding | Finish


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: all of it.
        tokens: its tokens.
        chosen: the same with log-probabilities, if they were asked for.
        vector: the embedding, if that was asked for.
        finish: how it ended.
    """

    text: str
    tokens: tuple[int, ...]
    chosen: tuple[ChosenToken, ...]
    vector: Sequence[float] | None
    finish: Finish


class Ticket:
    """A request on its way. The engine puts events in; one reader takes them out.

    Read it in one of three ways: as an iterator (blocks), by :meth:`events` in a
    coroutine, or by :meth:`on_ready` and :meth:`take` from anything else.

    Args:
        request: what was asked.
        limit: events that may wait to be read.
        wake: tells the engine of a cancellation.
    """

    def __init__(
        self, request: Request | EmbedRequest, limit: int, wake: Callable[[], None]
    ) -> None:
        self.request = request
        self.cancelled = False
        self._limit = limit
        self._wake = wake
        self._events: deque[Event] = deque()
        self._ready = threading.Condition()
        self._notify: Callable[[], object] | None = None
        self._taken_finish = False

    def cancel(self) -> None:
        """Give up the answer, from any thread; a :class:`Finish` still comes."""
        self.cancelled = True
        self._wake()

    def put(self, event: Event) -> bool:
        """For the engine: hand over an event; False if the reader cannot be served.

        That is when too many events wait unread, or when it cannot be told.
        """
        with self._ready:
            if len(self._events) >= self._limit and not isinstance(event, Finish):
                return False
            first = not self._events
            self._events.append(event)
            if first:
                self._ready.notify()
                return self._tell()
        return True

    def _tell(self) -> bool:
        if self._notify is None:
            return True
        try:
            self._notify()
        except Exception:  # one reader's failure, such as a closed loop, is not the engine's
            self._notify = None
            return False
        return True

    def take(self) -> list[Event]:
        """All events that wait; none if there are none. Never blocks for long."""
        with self._ready:
            events = list(self._events)
            self._events.clear()
        return events

    def on_ready(self, callback: Callable[[], object] | None) -> None:
        """Call this, on the engine's thread, when there is something to take again.

        It must return at once: ``loop.call_soon_threadsafe`` is meant.
        """
        with self._ready:
            self._notify = callback
            if callback is not None and self._events:
                callback()

    def __iter__(self) -> Iterator[Event]:
        """Events as they come; leaving early does not cancel."""
        while not self._taken_finish:
            with self._ready:
                self._ready.wait_for(lambda: self._events)
                event = self._events.popleft()
                self._taken_finish = isinstance(event, Finish)
            yield event

    async def events(self) -> AsyncIterator[Event]:
        """Events as they come, in a coroutine; ends after :class:`Finish`."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        self.on_ready(lambda: loop.call_soon_threadsafe(ready.set))
        try:
            while True:
                await ready.wait()
                ready.clear()
                for event in self.take():
                    yield event
                    if isinstance(event, Finish):
                        return
        finally:
            self.on_ready(None)

    def answer(self) -> Answer:
        """Wait for the whole answer.

        Raises:
            GgufkitError: if it ended by an error.
        """
        text, tokens, chosen = [], list[int](), list[ChosenToken]()
        vector: Sequence[float] | None = None
        for event in self:
            match event:
                case Delta():
                    text.append(event.text)
                    tokens += event.tokens
                    chosen += event.chosen
                case Embedding():
                    vector = event.vector
                case Finish():
                    if event.error is not None:
                        raise event.error
                    return Answer("".join(text), tuple(tokens), tuple(chosen), vector, event)
        raise AssertionError("an answer without an end")
