"""What stands before the application: keys, and limits on what clients may send."""

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.options import Limits

_DROPPED = 8
"""Times the limit: so much of a request that is too large is read before it is refused."""


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class Keys:
    """Lets in who has a key. Comparing takes as long for a wrong key as for a right one.

    Args:
        app: the application behind it.
        keys: the keys; none lets everybody in.
        open_to_all: paths that need no key; one that ends with a slash stands for all below.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str] = (), open_to_all: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._open = frozenset(open_to_all)
        self._open_below = tuple(path for path in open_to_all if path[1:].endswith("/"))
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http":
            given = _bearer(scope)
            if not self._is_open(scope["path"]) and not self._knows(given):
                told = "the API key is wrong" if given else "an API key is needed"
                refusal = ApiError(
                    401, f"{told}: Authorization: Bearer KEY", code="invalid_api_key"
                )
                await error_response(refusal)(scope, receive, send)
                return
            client = scope.get("client")
            scope["ggufkit.user"] = (
                _digest(given).hex() if self._digests and given else client[0] if client else ""
            )
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return not self._digests or path in self._open or path.startswith(self._open_below)

    def _knows(self, given: str) -> bool:
        digest = _digest(given)
        # All are compared, whichever fits.
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.decode("utf-8", "surrogateescape").partition(" ")
            return key.strip() if kind.lower() == "bearer" else ""
    return ""


class OwnNames:
    """Refuses requests under a name that is not this machine's own.

    A web page can let its name lead to 127.0.0.1 after it was loaded, and is then no
    stranger to the browser. What it cannot change is the name that it asks under.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if _is_own(host):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
        else:
            told = f"'{host[:100]}' is not localhost; other names need the option --api-key"
            refusal = ApiError(403, told, code="unknown_host")
            await error_response(refusal)(scope, receive, send)


def _is_own(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in ("", "localhost") or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class BodyLimit:
    """Refuses requests that are too large, or that take too long to arrive.

    Args:
        app: the application behind it.
        limits: the limits.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            response = error_response(error)
            # The rest of the request would be read as the next one otherwise.
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _again(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client went away."""
        most = self._limits.body_nbytes
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        too_large = length.isdigit() and int(length[:20]) > most
        if too_large and b"expect" in headers:
            raise _too_large(most)
        body, seen = bytearray(), 0
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                more = True
                # Most clients listen only when they have sent all, so what is too
                # large is read on and dropped, unless there is no end to it.
                while more and seen <= most * _DROPPED:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    more = message.get("more_body", False)
                    seen += len(piece)
                    too_large = too_large or seen > most
                    if not too_large:
                        body += piece
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="timeout") from None
        if too_large:
            raise _too_large(most)
        return bytes(body)


def _too_large(most: int) -> ApiError:
    message = f"the request is larger than {most} bytes"
    return ApiError(413, message, code="request_too_large")


def _again(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return given.pop() if given else await receive()

    return replay


def user_of(scope: Scope) -> str:
    """Whose request it is: of its key, or else of its address."""
    found: Any = scope.get("ggufkit.user", "")
    return str(found)
