"""The server: sockets, connections, and how it ends."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ggufkit.errors import UsageError
from ggufkit.serve.api.answering import Service
from ggufkit.serve.api.options import Limits

_KEEP_ALIVE_SECONDS = 30
_AFTER_GIVING_UP_SECONDS = 5
_SEND_NBYTES = 128 << 10
_MESSAGE_NBYTES = 1 << 20
"""What the page may say at once; it says what is typed."""
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
    b"retry-after: 1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
)
_FULL_TOLD = (
    b'{"error":{"message":"too many clients are connected","type":"server_error",'
    b'"param":null,"code":"overloaded"}}'
)


class Server(uvicorn.Server):
    """Serves an application until it is told to end.

    On SIGTERM or Ctrl-C it takes nothing new, lets answers finish for a while, and
    then gives up the rest; a second Ctrl-C does that at once.

    Args:
        app: the application.
        service: what its requests share.
        on_start: called when it listens.
    """

    def __init__(
        self, app: FastAPI, service: Service, on_start: Callable[[], None] = lambda: None
    ) -> None:

        class Connection(_Connection):
            limits = service.limits

        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="websockets-sansio" if app.state.ui else "none",
                ws_max_size=_MESSAGE_NBYTES,
                log_config=None,
                access_log=False,
                server_header=False,
                # Anybody on this machine could pass for another client.
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(service.limits.shutdown_seconds)
                + _AFTER_GIVING_UP_SECONDS,
            )
        )
        self._service = service
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers finish, for a while."""
        self._service.models.refuse()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._service.limits.shutdown_seconds, self._service.give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but to end when told to is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ends = (signal.SIGINT, signal.SIGTERM)
        before = {end: signal.signal(end, self.handle_exit) for end in ends}
        try:
            yield
        finally:
            for end, handler in before.items():
                signal.signal(end, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; the second Ctrl-C does not wait for answers."""
        if self.should_exit and sig == signal.SIGINT:
            self._service.give_up()
        self.should_exit = True


class _Connection(H11Protocol):
    """A connection that must send its requests and read its answers in time."""

    limits: Limits
    _impatience: asyncio.TimerHandle | None = None
    _stalling: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Tell of the first byte that the system does not take.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.limits.connections:
            transport.write(_FULL % (len(_FULL_TOLD), _FULL_TOLD))
            transport.close()
            return
        self._be_impatient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._be_patient()
        self._be_read()
        super().connection_lost(exc)

    # Requests must arrive.

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.cycle
        if before is None or before.response_complete:
            self._be_impatient()
        super().data_received(data)
        if self.cycle is not before:
            self._be_patient()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._be_patient()
        super().handle_websocket_upgrade(event)

    def _be_impatient(self) -> None:
        """Cut the connection unless a request comes, with all of its headers."""
        if self._impatience is None:
            self._impatience = self.loop.call_later(
                self.limits.receive_seconds, self.transport.abort
            )

    def _be_patient(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    # Answers must be read.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._be_read()

    def _watch(self, unread: int) -> None:
        self._stalling = self.loop.call_later(self.limits.send_seconds, self._look, unread)

    def _look(self, before: int) -> None:
        """Cut the connection if its client has read nothing since the last look."""
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._watch(unread)
        else:
            self.transport.abort()

    def _be_read(self) -> None:
        if self._stalling is not None:
            self._stalling.cancel()
            self._stalling = None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: address or name of this machine.
        port: 0 for any that is free.

    Raises:
        UsageError: if that cannot be.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        made = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            "Choose another one: --port 0 takes any that is free",
        ) from error
    # Connections inherit it: what a client does not read waits here, not in the system.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_NBYTES)
    made.setblocking(False)
    return made


def silence_logs() -> None:
    """Keep uvicorn from telling more than bugs."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.ERROR)
