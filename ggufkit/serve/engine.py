"""The engine: many answers at once out of one model.

One thread owns the backend (model and context). In each step it computes one
batch: first the next token of every answer that is being written, then as much
of the waiting prompts as fits; while there are some, every other batch is theirs
alone. So a long prompt slows the others down and never stops them. What
sequences hold is remembered after their answers, and a prompt that begins like
one of them, or like one that is being computed right now, takes over that
beginning.

Requests come from any thread by :meth:`Engine.submit`; a
:class:`~ggufkit.serve.requests.Ticket` carries the events back.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ggufkit.errors import GgufkitError, ToolError, UsageError
from ggufkit.llamacpp.batching import Decoded
from ggufkit.llamacpp.images import Seen
from ggufkit.llamacpp.runtime import ContextError
from ggufkit.llamacpp.sampling import GrammarError, SamplingParams, TokenLogprob
from ggufkit.serve.queueing import FairQueue
from ggufkit.serve.requests import (
    Adapters,
    BusyError,
    ChosenToken,
    ClosedError,
    Delta,
    Embedding,
    EmbedRequest,
    Finish,
    FinishReason,
    Request,
    Ticket,
    Usage,
)
from ggufkit.serve.text import TextStream

_WORTH_WAITING = 32
"""Tokens: so much of a prompt must be on its way elsewhere to wait for it."""
_WORTH_SHARING = 16
"""Tokens: a shorter beginning is computed again, unless it is half of the prompt."""
_HEADROOM = 32
"""Tokens that a running answer is expected to need soon."""
_SWEEP_SECONDS = 0.1
_MAX_LOGPROBS = 100
_MAX_STOPS = 64


class TokenSampler(Protocol):
    """Chooses the tokens of one answer."""

    def prime(self, prompt: Sequence[int]) -> None:
        """Show it the prompt."""

    def sample(self, index: int) -> int:
        """Choose after the token at this place of the last batch."""

    def logprobs(self, index: int, chosen: int, count: int) -> tuple[TokenLogprob, ...]:
        """The chosen token and the likeliest ones there."""

    def close(self) -> None:
        """Free it."""


class Pieces(Protocol):
    """The vocabulary, as far as the engine needs it."""

    size: int

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of a token."""


class Backend(Protocol):
    """What the engine needs of a model: :class:`~ggufkit.llamacpp.batching.BatchContext`."""

    context: int
    cells: int
    sequences: int
    at_once: int
    batch: int
    can_trim: bool
    can_share: bool

    @property
    def vocabulary(self) -> Pieces:
        """The model's tokens."""

    @property
    def room(self) -> int:
        """Tokens that still fit into the batch."""

    @property
    def embedding_context(self) -> int:
        """Tokens of a text to embed at most."""

    def warm_up(self) -> None:
        """Get ready."""

    def clear(self) -> None:
        """Begin an empty batch."""

    def rank(self, sequence: int) -> int:
        """Single tokens are computed fastest if they are added in this order."""

    def add(self, sequence: int, position: int, tokens: Sequence[int], *, output: bool) -> int:
        """Put tokens of a sequence into the batch; the place to sample at."""

    def decode(self) -> Decoded:
        """Compute the batch."""

    def see(self, sequence: int, position: int, image: Seen) -> Decoded:
        """Compute a part of an image as the next positions of a sequence."""

    def forget(self, sequence: int, start: int = 0) -> bool:
        """Take back a sequence's tokens from a position on."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Let an empty sequence share another's beginning."""

    def forget_all(self) -> None:
        """Empty all sequences."""

    def sampler(self, params: SamplingParams) -> TokenSampler:
        """A sampler for one answer."""

    def check_adapters(self, adapters: Adapters) -> None:
        """Say if they cannot be used."""

    def use_adapters(self, adapters: Adapters) -> None:
        """Apply them to the batches to come."""

    def embed(self, tokens: Sequence[int]) -> Sequence[float]:
        """Embed a text."""

    def abort(self) -> None:
        """End what is being computed."""

    def close(self) -> None:
        """Free it."""


class Guesser(Protocol):
    """Guesses the next tokens: :class:`~ggufkit.serve.drafting.Drafter`."""

    count: int

    def warm_up(self) -> None:
        """Get ready."""

    def guess(self, wanted: Mapping[int, tuple[Sequence[int], int]]) -> dict[int, list[int]]:
        """By sequence: from its tokens and how many guesses there may be, to guesses."""

    def abort(self) -> None:
        """End what is being computed."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine.

    Attributes:
        parallel: answers that are written at once at most; None for half of the
            backend's sequences, so that the other half can be remembered.
        queue: requests that may wait; one more is refused.
        unread: events of one ticket that may wait to be read; a reader that
            falls behind further is cut off.
    """

    parallel: int | None = None
    queue: int = 256
    unread: int = 1024


@dataclass(slots=True)
class Metrics:
    """Counts since the engine began, and its state now.

    Attributes:
        running: answers that are being written now.
        waiting: requests that wait now.
        remembered: sequences that are kept for later requests now.
        cells: room for tokens.
        cells_used: of it, roughly, taken now (shared beginnings count once).
        finished: answers by the reason of their end.
        refused: requests refused because too many waited.
        preempted: answers set back because there was no room.
        prompt_tokens: tokens of prompts that were computed.
        cached_tokens: tokens of prompts that were known already.
        generated_tokens: tokens written.
        guessed_tokens: tokens that a draft model guessed.
        right_tokens: guesses that were right; they count as written.
        embedded_tokens: tokens of texts embedded.
        steps: batches computed.
        decode_seconds: time in llama.cpp's batches.
        step_seconds: time in steps altogether.
        queue_seconds: sum of the time that requests waited for a sequence.
        first_token_seconds: sum of the times to the first token.
        first_tokens: how many answers have had their first token.
    """

    running: int = 0
    waiting: int = 0
    remembered: int = 0
    cells: int = 0
    cells_used: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    right_tokens: int = 0
    embedded_tokens: int = 0
    steps: int = 0
    decode_seconds: float = 0.0
    step_seconds: float = 0.0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    first_tokens: int = 0


class _Slot:
    """A sequence of the backend: the tokens that it holds, and who is using it."""

    __slots__ = ("adapters", "number", "task", "tokens", "used")

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: list[int] = []
        self.adapters: Adapters = ()
        self.task: _Task | None = None
        self.used = 0


class _Task:
    """A request on its way through the engine.

    ``tokens`` is the prompt and what was written so far; the first of them are
    computed, as many as the slot holds, and the rest is to be computed.
    """

    __slots__ = (
        *("chosen", "deadline", "first", "generated", "leader", "limit", "order", "prompt"),
        *("request", "sampler", "shared", "slot", "stream", "submitted", "ticket", "tokens"),
        *("guess", "unsent", "usage"),
    )

    def __init__(self, ticket: Ticket, request: Request, sampler: TokenSampler, limit: int):
        self.ticket = ticket
        self.request = request
        self.sampler = sampler
        self.limit = limit
        self.prompt = len(request.prompt)
        self.tokens = list(request.prompt)
        self.stream = TextStream(request.stop)
        self.usage = Usage(prompt_tokens=self.prompt)
        self.submitted = time.monotonic()
        self.deadline = _deadline(self.submitted, request.timeout_seconds)
        self.order = -1
        self.generated = 0
        self.first = 0.0
        self.shared = 0
        self.slot: _Slot | None = None
        self.leader: _Task | None = None
        self.guess: list[int] = []
        self.unsent: list[int] = []
        self.chosen: list[ChosenToken] = []

    @property
    def pending(self) -> int:
        """Tokens to be computed before the next can be chosen."""
        return len(self.tokens) - (len(self.slot.tokens) if self.slot else 0)


class _EmbedTask:
    """A text that waits to be embedded."""

    __slots__ = ("deadline", "request", "submitted", "ticket")

    def __init__(self, ticket: Ticket, request: EmbedRequest) -> None:
        self.ticket = ticket
        self.request = request
        self.submitted = time.monotonic()
        self.deadline = _deadline(self.submitted, request.timeout_seconds)


def _deadline(submitted: float, seconds: float | None) -> float | None:
    return None if seconds is None else submitted + seconds


class Engine:
    """Writes answers to requests, many at once.

    Args:
        backend: the model; the engine owns it from now on and closes it.
        options: limits.
        guesser: guesses ahead, so that several tokens are computed at once; the
            backend must have outputs for them. The engine owns it too.
    """

    def __init__(
        self,
        backend: Backend,
        options: EngineOptions | None = None,
        guesser: Guesser | None = None,
    ) -> None:
        self._backend = backend
        self._guesser = guesser
        self.options = options or EngineOptions()
        half = max(1, backend.sequences // 2)
        self.parallel = min(self.options.parallel or half, backend.at_once)
        self._ends = backend.vocabulary.end_tokens
        self._slots = [_Slot(n) for n in range(backend.sequences)]
        self._running: list[_Task] = []
        self._preempted: list[_Task] = []
        self._queue: FairQueue[_Task | _EmbedTask] = FairQueue()
        self._state = threading.Condition()
        self._open = True
        self._stopping = False
        self._submitting = 0
        self._sweep_asked = False
        self._sweep_due = 0.0
        self._clock = 0
        self._turn = 0
        self._alone = False
        self._metrics = Metrics(cells=backend.cells)
        self._failure: GgufkitError | None = None
        self._thread = threading.Thread(target=self._run, name="ggufkit-engine", daemon=True)
        self._thread.start()

    # What other threads call.

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return self._backend.context

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return self._open and self._failure is None

    def submit(self, request: Request | EmbedRequest) -> Ticket:
        """Queue a request up. Nothing of it is computed before it is known to fit.

        Raises:
            ContextError: if the prompt leaves no room for an answer.
            UsageError: if a value makes no sense.
            BusyError: if too many requests wait.
            ClosedError: if the engine is closed.
        """
        self._check(request)
        with self._state:
            self._check_open()
            self._submitting += 1
        try:
            return self._enqueue(request)
        finally:
            with self._state:
                self._submitting -= 1
                self._state.notify_all()

    def _enqueue(self, request: Request | EmbedRequest) -> Ticket:
        ticket = Ticket(request, self.options.unread, self._ask_sweep)
        task: _Task | _EmbedTask
        if isinstance(request, EmbedRequest):
            task = _EmbedTask(ticket, request)
        else:
            room = self._backend.context - len(request.prompt)
            limit = room if request.max_tokens is None else min(request.max_tokens, room)
            task = _Task(ticket, request, self._backend.sampler(request.sampling), limit)
        try:
            with self._state:
                self._check_open()
                if len(self._queue) >= self.options.queue:
                    self._metrics.refused += 1
                    raise BusyError(
                        f"{len(self._queue)} requests are waiting already", "Try again later"
                    )
                self._queue.push(request.client, task)
                self._state.notify_all()
        except GgufkitError:
            if isinstance(task, _Task):
                task.sampler.close()
            raise
        return ticket

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure.message}")
        if not self._open:
            raise ClosedError("the engine is closed")

    def _check(self, request: Request | EmbedRequest) -> None:
        prompt, size = request.prompt, self._backend.vocabulary.size
        if not len(prompt):
            raise UsageError("the prompt is empty")
        shows = isinstance(request, Request) and bool(request.images)
        if not ((min(prompt) >= 0 or shows) and max(prompt) < size):
            raise UsageError(f"the prompt has a token that is not among the model's {size}")
        seconds = request.timeout_seconds
        if seconds is not None and not seconds > 0:
            raise UsageError(f"the timeout is {seconds} seconds, and must be more than 0")
        if isinstance(request, EmbedRequest):
            self._check_room(len(prompt), self._backend.embedding_context)
            return
        self._check_room(len(prompt) + 1, self._backend.context)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise UsageError(f"max_tokens is {request.max_tokens}, and must be at least 1")
        if len(request.stop) > _MAX_STOPS or "" in request.stop:
            raise UsageError(f"there may be {_MAX_STOPS} stop strings, none of them empty")
        if request.logprobs is not None and not 0 <= request.logprobs <= min(_MAX_LOGPROBS, size):
            raise UsageError(f"logprobs is {request.logprobs}, and must be 0 to {_MAX_LOGPROBS}")
        self._backend.check_adapters(request.adapters)

    def _check_room(self, needed: int, room: int) -> None:
        if needed > room:
            raise ContextError(
                f"the prompt has {needed} tokens (with one for the answer), and the context {room}",
                "Shorten the prompt, or give the model more context",
            )

    def metrics(self) -> Metrics:
        """A snapshot."""
        with self._state:
            told = Metrics(
                **{name: getattr(self._metrics, name) for name in Metrics.__dataclass_fields__}
            )
            told.finished = self._metrics.finished.copy()
            told.waiting = len(self._queue) + len(self._preempted)
        running = list(self._running)
        told.running = len(running)
        told.remembered = sum(1 for s in self._slots if s.task is None and s.tokens)
        shared = sum(t.shared for t in running)
        told.cells_used = max(0, sum(len(s.tokens) for s in self._slots) - shared)
        return told

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: finish what runs and waits; otherwise it is cancelled at once.
            timeout: seconds after which the rest is cancelled.
        """
        with self._state:
            self._open = False
            self._stopping = self._stopping or not drain
            self._state.notify_all()
        if not drain:
            self._backend.abort()
            if self._guesser is not None:
                self._guesser.abort()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.close(drain=False)

    def _ask_sweep(self) -> None:
        # Without the lock: a ticket may be cancelled by whoever holds another.
        self._sweep_asked = True

    # The engine's own thread.

    def _run(self) -> None:
        try:
            self._backend.warm_up()
            if self._guesser is not None:
                self._guesser.warm_up()
            while self._wait():
                self._step()
        except BaseException as error:  # whoever waits must hear of it
            if isinstance(error, GgufkitError):
                self._failure = error
            else:
                self._failure = ToolError(f"the engine broke: {error!r}")
                raise
        finally:
            self._wind_up()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._state:
            while not self._stopping:
                if self._running or self._preempted or len(self._queue):
                    return True
                if not self._open:
                    return False
                self._state.wait()
            return False

    def _wind_up(self) -> None:
        with self._state:
            self._open = False
            self._state.wait_for(lambda: self._submitting == 0)
            waiting = self._queue.remove(lambda _: True)
        error = self._failure
        reason: FinishReason = "error" if error else "cancelled"
        for task in [*self._running, *self._preempted, *waiting]:
            self._finish(task, reason, error=error)
        if self._guesser is not None:
            self._guesser.close()
        self._backend.close()

    def _step(self) -> None:
        started = time.monotonic()
        self._sweep(started)
        self._admit(started)
        self._look()
        plan = self._plan()
        if not plan:
            return
        computing = time.monotonic()
        try:
            outcome = self._backend.decode()
        except ToolError as error:
            self._give_up(error)
            return
        computed = time.monotonic()
        self._metrics.steps += 1
        self._metrics.decode_seconds += computed - computing
        if outcome is Decoded.FULL:
            self._make_room()
        elif outcome is Decoded.DONE:
            self._advance(plan, computed)
        self._metrics.step_seconds += time.monotonic() - started

    # Ending what nobody wants any more.

    def _sweep(self, now: float) -> None:
        if not self._sweep_asked and now < self._sweep_due:
            return
        self._sweep_asked, self._sweep_due = False, now + _SWEEP_SECONDS
        with self._state:
            gone = self._queue.remove(lambda task: _is_over(task, now))
        gone += [t for t in (*self._running, *self._preempted) if _is_over(t, now)]
        for task in gone:
            self._finish(task, "cancelled" if task.ticket.cancelled else "timeout")

    def _give_up(self, error: ToolError) -> None:
        """A batch has failed: nobody knows what sequences hold now."""
        for task in list(self._running):
            self._finish(task, "error", error=error)
        self._backend.forget_all()
        for slot in self._slots:
            slot.tokens = []

    # Letting requests in.

    def _admit(self, now: float) -> None:
        while len(self._running) < self.parallel:
            task = self._next()
            if task is None:
                return
            if isinstance(task, _EmbedTask):
                self._embed(task)
                return  # one at a time, so that answers go on
            if task.order < 0:
                self._clock += 1
                task.order = self._clock
                task.usage.queue_seconds = now - task.submitted
                self._metrics.queue_seconds += task.usage.queue_seconds
                task.sampler.prime([token for token in task.request.prompt if token >= 0])
            self._place(task)
            self._running.append(task)

    def _next(self) -> _Task | _EmbedTask | None:
        """The next request, if there is room for it."""
        if self._preempted:
            return self._preempted.pop(0) if self._fits(self._preempted[0]) else None
        with self._state:
            if not len(self._queue) or not self._fits(self._queue.peek()):
                return None
            return self._queue.pop()

    def _fits(self, task: _Task | _EmbedTask) -> bool:
        if isinstance(task, _EmbedTask) or not self._running:
            return True
        return sum(map(_need, self._running)) + _need(task) <= self._backend.cells

    def _embed(self, task: _EmbedTask) -> None:
        usage = Usage(prompt_tokens=len(task.request.prompt))
        usage.queue_seconds = time.monotonic() - task.submitted
        try:
            vector = self._backend.embed(task.request.prompt)
        except ToolError as error:
            self._finish(task, "error", error=error)
            return
        self._metrics.embedded_tokens += usage.prompt_tokens
        task.ticket.put(Embedding(vector))
        self._count_end("stop")
        task.ticket.put(Finish("stop", usage))

    # Where a request is computed, and what is known of it already.

    def _place(self, task: _Task) -> None:
        source, common = self._best_source(task)
        task.leader = self._leader(task, common)
        idle = [s for s in self._slots if s.task is None]
        if source is not None and source.task is None and self._take_over(source, common, idle):
            slot = source
            common = self._trim(slot, common)
        else:
            slot = min((s for s in idle if s is not source), key=lambda s: (bool(s.tokens), s.used))
            self._empty(slot)
            common = self._share(task, slot, source, common)
        slot.task, slot.adapters, task.slot = task, task.request.adapters, slot
        self._count_known(task, common)

    def _take_over(self, source: _Slot, common: int, idle: list[_Slot]) -> bool:
        """Whether to go on in a remembered sequence rather than to copy its beginning."""
        if not self._backend.can_share or len(idle) == 1:
            return True
        return common * 2 > len(source.tokens)

    def _best_source(self, task: _Task) -> tuple[_Slot | None, int]:
        """The sequence that holds most of a prompt's beginning."""
        best, most = None, 0
        for slot in self._slots:
            if slot.adapters != task.request.adapters:
                continue
            common = common_prefix(slot.tokens, task.tokens)
            # The last token is always computed: its logits are what sampling needs.
            common = min(common, len(task.tokens) - 1)
            if not self._backend.can_trim and common < len(slot.tokens):
                continue
            if slot.task is not None and not self._backend.can_share:
                continue
            if common > most and worth_sharing(common, len(task.tokens)):
                best, most = slot, common
        return best, most

    def _leader(self, task: _Task, known: int) -> _Task | None:
        """A request that is computing the beginning of this one right now."""
        if not self._backend.can_share:
            return None
        for other in self._running:
            if other.request.adapters != task.request.adapters or other.pending < 2:
                continue
            if common_prefix(other.tokens, task.tokens[:-1]) >= known + _WORTH_WAITING:
                return other
        return None

    def _trim(self, slot: _Slot, count: int) -> int:
        if count < len(slot.tokens):
            if not self._backend.forget(slot.number, count):
                self._backend.forget(slot.number)
                count = 0
            del slot.tokens[count:]
        return count

    def _empty(self, slot: _Slot) -> None:
        if slot.tokens:
            self._backend.forget(slot.number)
            slot.tokens = []

    def _share(self, task: _Task, slot: _Slot, source: _Slot | None, common: int) -> int:
        if source is None or common == 0:
            return 0
        self._backend.copy(source.number, slot.number, common)
        slot.tokens = source.tokens[:common]
        task.shared = common
        return common

    def _count_known(self, task: _Task, common: int) -> None:
        if task.generated == 0:  # not one that was set back
            self._metrics.cached_tokens += common - task.usage.cached_tokens
            task.usage.cached_tokens = common

    def _follow(self, task: _Task) -> bool:
        """Whether a request still waits for another to compute their common beginning."""
        leader, slot = task.leader, task.slot
        assert slot is not None
        if leader is None:
            return False
        if leader.slot is not None:
            wanted = common_prefix(leader.tokens, task.tokens[:-1])
            if len(leader.slot.tokens) < wanted:
                return True
        task.leader = None
        source, common = self._best_source(task)
        if source is not None and source is not slot and common > len(slot.tokens):
            self._empty(slot)
            self._count_known(task, self._share(task, slot, source, common))
        return False

    # Batches.

    def _look(self) -> None:
        """Compute an image whose turn it is in a prompt, by itself; one in each step."""
        for task in self._running:
            slot = task.slot
            assert slot is not None
            image = task.request.images.get(len(slot.tokens))
            if image is None or task.leader is not None:
                continue
            self._backend.use_adapters(task.request.adapters)
            try:
                outcome = self._backend.see(slot.number, len(slot.tokens), image)
            except ToolError as error:
                self._give_up(error)
                return
            if outcome is Decoded.FULL:
                self._make_room()
            elif outcome is Decoded.DONE:
                slot.tokens += image.tokens
                self._metrics.prompt_tokens += len(image.tokens)
            return

    def _plan(self) -> list[tuple[_Task, int, int]]:
        """Fill the batch: tasks, how many of their tokens, and where to sample (or -1)."""
        backend, plan = self._backend, list[tuple[_Task, int, int]]()
        backend.clear()
        writers, prompts = [], []
        for task in self._group():
            assert task.slot is not None
            known = len(task.slot.tokens)
            if len(task.tokens) - known > 1 or task.leader is not None:
                prompts.append(task)
            else:
                writers.append((backend.rank(task.slot.number), known, task))
        if self._goes_alone(prompts, len(writers)):
            writers = []
        if self._guesser is not None:
            self._guess([task for _, _, task in writers], self._guesser)
        for _, known, task in sorted(writers, key=lambda writer: writer[0])[: backend.room]:
            assert task.slot is not None
            place = backend.add(task.slot.number, known, task.tokens[known:], output=True)
            for ahead, token in enumerate(task.guess, 1):
                backend.add(task.slot.number, known + ahead, [token], output=True)
            plan.append((task, 1, place))
        for task in prompts:
            if not backend.room:
                break
            if self._follow(task):
                continue
            slot, tokens = task.slot, task.tokens
            assert slot is not None
            known = len(slot.tokens)
            count = min(backend.room, _next_image(task, known) - known)
            if not count:
                continue
            last = known + count == len(tokens)
            place = backend.add(slot.number, known, tokens[known : known + count], output=last)
            plan.append((task, count, place if last else -1))
        return plan

    def _goes_alone(self, prompts: list[_Task], writers: int) -> bool:
        """Whether prompts get a batch of their own: every other one, so that all soon begin."""
        mixed = len(prompts) + writers < len(self._running)  # groups take turns already
        self._alone = bool(prompts) and not mixed and not self._alone
        return self._alone

    def _guess(self, writers: list[_Task], guesser: Guesser) -> None:
        """Guess what answers will go on with, as far as the batch has room."""
        wanted = {}
        share = self._backend.room // max(1, len(writers)) - 1
        for task in writers:
            assert task.slot is not None
            # A guess that is right brings one token more.
            most = min(guesser.count, share, task.limit - task.generated - 1)
            wanted[task.slot.number] = (task.tokens, most)
        guesses = guesser.guess(wanted)
        for task in writers:
            assert task.slot is not None
            task.guess = guesses.get(task.slot.number, [])

    def _group(self) -> list[_Task]:
        """Who may share a batch: those with the same adapters; groups take turns."""
        kinds = list(dict.fromkeys(t.request.adapters for t in self._running))
        if not kinds:
            return []
        self._turn = (self._turn + 1) % len(kinds)
        kind = kinds[self._turn]
        self._backend.use_adapters(kind)
        return (
            self._running
            if len(kinds) == 1
            else [t for t in self._running if t.request.adapters == kind]
        )

    def _make_room(self) -> None:
        """No cells are left: forget the oldest memory, or set back the youngest answer."""
        idle = [s for s in self._slots if s.task is None and s.tokens]
        if idle:
            self._empty(min(idle, key=lambda s: s.used))
            return
        youngest = max(self._running, key=lambda t: t.order)
        if len(self._running) == 1:
            error = ToolError("llama.cpp finds no room for a single answer")
            self._finish(youngest, "error", error=error)
            return
        slot = self._release(youngest)
        self._empty(slot)
        youngest.leader, youngest.shared, youngest.guess = None, 0, []
        self._preempted.append(youngest)
        self._preempted.sort(key=lambda t: t.order)
        self._metrics.preempted += 1

    def _advance(self, plan: list[tuple[_Task, int, int]], now: float) -> None:
        """Note what was computed, and choose the next tokens."""
        for task, count, place in plan:
            slot = task.slot
            assert slot is not None
            known = len(slot.tokens)
            slot.tokens += task.tokens[known : known + count]
            if known < task.prompt:
                self._metrics.prompt_tokens += min(count, task.prompt - known)
            if place >= 0 and task.guess:
                self._go_along(task, slot, place, now)
            elif place >= 0:
                self._choose(task, place, now)

    def _go_along(self, task: _Task, slot: _Slot, place: int, now: float) -> None:
        """As long as what is chosen is what was guessed, the next choice is there too."""
        guess, task.guess = task.guess, []
        self._count_guess(task, len(guess), 0)
        self._choose(task, place, now)
        for ahead, token in enumerate(guess, 1):
            if task.slot is None or task.tokens[-1] != token:
                break
            slot.tokens.append(token)
            self._count_guess(task, 0, 1)
            self._choose(task, place + ahead, now)
        self._backend.forget(slot.number, len(slot.tokens))

    def _count_guess(self, task: _Task, guessed: int, right: int) -> None:
        task.usage.guessed_tokens += guessed
        task.usage.right_tokens += right
        self._metrics.guessed_tokens += guessed
        self._metrics.right_tokens += right

    # Tokens and text.

    def _choose(self, task: _Task, place: int, now: float) -> None:
        try:
            token = task.sampler.sample(place)
        except GrammarError as error:
            self._finish(task, "error", error=error)
            return
        if task.generated == 0:
            task.first = now
            task.usage.first_token_seconds = now - task.submitted
            self._metrics.first_token_seconds += task.usage.first_token_seconds
            self._metrics.first_tokens += 1
        request = task.request
        is_end = token in self._ends and not request.ignore_end
        if is_end or token in request.stop_tokens:
            self._finish(task, "stop")
            return
        task.tokens.append(token)
        task.generated += 1
        self._metrics.generated_tokens += 1
        task.usage.generate_seconds = now - task.first
        self._write(task, token, place)

    def _write(self, task: _Task, token: int, place: int) -> None:
        request = task.request
        piece = self._backend.vocabulary.piece(token, special=request.special)
        task.unsent.append(token)
        if request.logprobs is not None:
            first, *top = task.sampler.logprobs(place, token, request.logprobs)
            task.chosen.append(ChosenToken(token, piece, first.logprob, tuple(top)))
        text = task.stream.push(piece)
        if text and not self._send(task, text):
            self._finish(task, "slow")
        elif task.stream.stopped_by is not None:
            self._finish(task, "stop")
        elif task.generated >= task.limit:
            self._finish(task, "length")

    def _send(self, task: _Task, text: str) -> bool:
        delta = Delta(text, tuple(task.unsent), tuple(task.chosen))
        task.unsent.clear()
        task.chosen.clear()
        return task.ticket.put(delta)

    def _finish(
        self, task: _Task | _EmbedTask, reason: FinishReason, error: GgufkitError | None = None
    ) -> None:
        self._count_end(reason)
        if isinstance(task, _EmbedTask):
            usage = Usage(prompt_tokens=len(task.request.prompt))
            task.ticket.put(Finish(reason, usage, error=error))
            return
        rest = task.stream.finish()
        if rest or task.unsent:
            self._send(task, rest)
        if task.slot is not None:
            slot = self._release(task)
            if not task.request.remember:
                self._empty(slot)
        elif task in self._preempted:
            self._preempted.remove(task)
        task.sampler.close()
        task.usage.generated_tokens = task.generated
        task.ticket.put(Finish(reason, task.usage, stop=task.stream.stopped_by, error=error))

    def _release(self, task: _Task) -> _Slot:
        slot = task.slot
        assert slot is not None
        self._clock += 1
        slot.task, slot.used, task.slot = None, self._clock, None
        self._running.remove(task)
        return slot

    def _count_end(self, reason: FinishReason) -> None:
        with self._state:
            self._metrics.finished[reason] += 1


def _is_over(task: _Task | _EmbedTask, now: float) -> bool:
    return task.ticket.cancelled or (task.deadline is not None and now >= task.deadline)


def _next_image(task: _Task, start: int) -> int:
    """Where the text ends that goes on here: at an image, or at the end."""
    images = task.request.images
    return min((place for place in images if place >= start), default=len(task.tokens))


def _need(task: _Task | _EmbedTask) -> int:
    """Cells that a request takes now and soon, besides those it shares."""
    if isinstance(task, _EmbedTask):
        return 0
    soon = min(_HEADROOM, task.limit - task.generated)
    return len(task.tokens) - task.shared + soon


def worth_sharing(common: int, prompt: int) -> bool:
    """Whether a known beginning is more than a coincidence, such as the BOS token."""
    return common >= _WORTH_SHARING or common * 2 >= prompt


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two lists have in common from the start."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    # Slices are compared in C; halving costs one comparison of the whole altogether.
    while low + 1 < high:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
