"""From requests to the engine to a response, whole or as a stream of events."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ggufkit.errors import GgufkitError
from ggufkit.serve.api.errors import as_api_error, of_end
from ggufkit.serve.api.models import Models
from ggufkit.serve.api.options import Limits
from ggufkit.serve.hosting import Hosted
from ggufkit.serve.requests import BusyError, EmbedRequest, Event, Finish, Request, Ticket

T = TypeVar("T")
_Batch = list[tuple[int, Event]]
"""Events with the numbers of their requests."""
_GONE = 499
"""What logs say of a client that went away; it is told nothing."""


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Answer(Protocol):
    """Makes what clients are told out of what the engine says."""

    def opening(self) -> Iterable[dict[str, Any]]:
        """Events before the first."""

    def take(self, number: int, event: Event) -> Iterable[dict[str, Any]]:
        """Note an event of one of the requests; give what to tell of it."""

    def closing(self) -> Iterable[dict[str, Any]]:
        """Events after the last."""

    def whole(self) -> dict[str, Any]:
        """All of it in one."""


@dataclass
class Service:
    """What all requests share.

    Attributes:
        models: the models.
        limits: what clients may ask.
        active: what is on its way through engines.
    """

    models: Models
    limits: Limits = field(default_factory=Limits)
    active: set[Ticket] = field(default_factory=set)

    def give_up(self) -> None:
        """Cancel all answers; whoever waits for one is told."""
        for ticket in list(self.active):
            ticket.cancel()

    async def respond(
        self,
        http: HttpRequest,
        hosted: Hosted,
        requests: Sequence[Request] | Sequence[EmbedRequest],
        answer: Answer,
        *,
        stream: bool,
        stack: AsyncExitStack,
    ) -> Response:
        """Have requests answered.

        Args:
            http: the client's request, whose body was read.
            hosted: the model.
            requests: for the engine.
            answer: makes what the client is told.
            stream: whether it is told as it comes.
            stack: closed when all is over.

        Raises:
            ApiError: if there is no answer; also before the first event of a stream.
        """
        gone = asyncio.ensure_future(gone_from(http.receive))
        stack.callback(gone.cancel)
        events = _Feed(self, hosted, requests, gone).events()
        stack.push_async_callback(events.aclose)
        try:
            if stream:
                nothing: _Batch = []
                first = await anext(events, nothing)
                told = [*answer.opening(), *_told(answer, first)]
                rest = stack.pop_all()
                return _Stream(told, answer, events, rest)
            async for batch in events:
                for _ in _told(answer, batch):
                    pass
            return JSONResponse(answer.whole())
        except ClientGoneError:
            return Response(status_code=_GONE)


async def gone_from(receive: Receive) -> None:
    """Wait until a client, whose request was read, goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _told(answer: Answer, batch: Iterable[tuple[int, Event]]) -> Iterator[dict[str, Any]]:
    """What to tell of events.

    Raises:
        ApiError: if one of them is an end that is no answer.
    """
    for number, event in batch:
        if isinstance(event, Finish):
            if event.error is not None:
                raise as_api_error(event.error)
            if error := of_end(event.reason):
                raise error
        yield from answer.take(number, event)


class _Feed:
    """Hands requests to the engine, no more of them at once than it can use."""

    def __init__(
        self,
        service: Service,
        hosted: Hosted,
        requests: Sequence[Request] | Sequence[EmbedRequest],
        gone: asyncio.Future[None],
    ) -> None:
        self._service = service
        self._hosted = hosted
        self._waiting: list[tuple[int, Request | EmbedRequest]] = list(enumerate(requests))
        self._waiting.reverse()
        self._gone = gone
        self._running: dict[int, Ticket] = {}
        self._ready = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def events(self) -> AsyncGenerator[_Batch, None]:
        """Events as they come, with the numbers of their requests."""
        self._gone.add_done_callback(lambda _: self._ready.set())
        try:
            await self._fill()
            while self._running:
                await self._ready.wait()
                self._ready.clear()
                if self._gone.done():
                    raise ClientGoneError
                batch = self._take()
                if batch:
                    yield batch
                await self._fill()
        finally:
            for ticket in self._running.values():
                ticket.on_ready(None)
                ticket.cancel()
                self._service.active.discard(ticket)

    def _take(self) -> _Batch:
        batch: _Batch = []
        for number, ticket in list(self._running.items()):
            for event in ticket.take():
                batch.append((number, event))
                if isinstance(event, Finish):
                    del self._running[number]
                    self._service.active.discard(ticket)
        return batch

    async def _fill(self) -> None:
        engine = self._hosted.engine
        while self._waiting and len(self._running) < 2 * engine.parallel:
            number, request = self._waiting[-1]
            try:
                ticket = await in_thread(
                    self._hosted, partial(engine.submit, request), Ticket.cancel
                )
            except BusyError:
                if self._running:
                    return  # room will come, if only by our own
                raise
            self._waiting.pop()
            self._running[number] = ticket
            self._service.active.add(ticket)
            ticket.on_ready(lambda: self._loop.call_soon_threadsafe(self._ready.set))


async def in_thread(
    hosted: Hosted, work: Callable[[], T], dropped: Callable[[T], None] = lambda _: None
) -> T:
    """Do work of a model that would hold up the event loop.

    Args:
        hosted: the model.
        work: what to do.
        dropped: gets the result if nobody waits for it any more.
    """
    future = asyncio.get_running_loop().run_in_executor(hosted.threads, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(
            lambda f: dropped(f.result()) if not (f.cancelled() or f.exception()) else None
        )
        raise


class _Stream(Response):
    """Server-sent events, for as long as somebody reads them."""

    media_type = "text/event-stream"

    def __init__(
        self,
        told: list[dict[str, Any]],
        answer: Answer,
        events: AsyncIterator[_Batch],
        stack: AsyncExitStack,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._told = told
        self._answer = answer
        self._events = events
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self._stack:
            with suppress(ClientGoneError):
                await self._send_all(send)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._body(send, b"".join(map(_event, self._told)))
            async for batch in self._events:
                if lines := b"".join(map(_event, _told(self._answer, batch))):
                    await self._body(send, lines)
            rest = b"".join(map(_event, self._answer.closing())) + b"data: [DONE]\n\n"
        except GgufkitError as error:
            rest = _event(as_api_error(error).body)
        await send({"type": "http.response.body", "body": rest, "more_body": False})

    async def _body(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(value: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


@dataclass
class Spent:
    """Tokens of all requests that one answer is made of.

    Attributes:
        prompts: tokens of each prompt, by its number; several answers to one count once.
        cached: how many of them needed no computing.
        written: tokens written.
    """

    prompts: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    written: int = 0

    def add(self, prompt: int, finish: Finish) -> None:
        """Count a request that has ended."""
        usage = finish.usage
        self.prompts[prompt] = usage.prompt_tokens
        self.cached[prompt] = max(self.cached.get(prompt, 0), usage.cached_tokens)
        self.written += usage.generated_tokens

    def told(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        read = sum(self.prompts.values())
        return {
            "prompt_tokens": read,
            "completion_tokens": self.written,
            "total_tokens": read + self.written,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


def now() -> int:
    """Seconds since 1970, as answers tell it."""
    return int(time.time())


def service_of(http: HttpRequest) -> Service:
    """What all requests of an application share."""
    service: Service = http.app.state.service
    return service
