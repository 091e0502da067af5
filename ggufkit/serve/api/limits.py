"""What stands before the application: keys, and limits on what clients may send."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.options import Limits

OPEN_PATHS = ("/health",)
"""What needs no key: it tells nothing but that the server is there."""


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class Keys:
    """Lets in who has a key. Comparing takes as long for a wrong key as for a right one.

    Args:
        app: the application behind it.
        keys: the keys; none lets everybody in.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http":
            given = _bearer(scope)
            open_to_all = not self._digests or scope["path"] in OPEN_PATHS
            if not open_to_all and not self._knows(given):
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
        most = self._limits.body_nbytes
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told[:20]) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="timeout") from None


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
