"""The server's own endpoint, asked as any other client asks it."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from ggufkit.errors import GgufkitError

_CONNECT_SECONDS = 10.0


class EndpointError(GgufkitError):
    """What the server said instead of an answer.

    Args:
        message: what is wrong, in the server's words.
        status: of HTTP; None if there was no response, or it broke off.
        code: a short name of it.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: what comes next.
        finish: why the answer has ended; None while it goes on.
        tokens: length of the answer; told once, at the end.
    """

    text: str = ""
    finish: str | None = None
    tokens: int | None = None


class Endpoint:
    """A client of the server.

    Args:
        address: where it listens, such as ``http://127.0.0.1:8080``.
    """

    def __init__(self, address: str) -> None:
        # The server itself bounds how long an answer may take. It has no
        # certificate, and reading those of others takes time.
        self._http = httpx.AsyncClient(
            base_url=address,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            trust_env=False,
            verify=False,
        )

    async def models(self, key: str) -> list[str]:
        """The names of the models.

        Args:
            key: the API key; empty for none.

        Raises:
            EndpointError: if the server refuses to tell.
        """
        try:
            response = await self._http.get("/v1/models", headers=_headers(key))
        except httpx.HTTPError as error:
            raise _unreachable() from error
        if response.is_error:
            raise _refusal(response.status_code, response.content)
        return [model["id"] for model in response.json()["data"]]

    async def answer(self, asked: dict[str, Any], key: str) -> AsyncGenerator[Piece]:
        """An answer, as it is written. Closing the generator ends it on the server too.

        Args:
            asked: fields of ``/v1/chat/completions``.
            key: the API key; empty for none.

        Raises:
            EndpointError: if there is none, or if it breaks off.
        """
        body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
        url = "/v1/chat/completions"
        try:
            async with self._http.stream("POST", url, json=body, headers=_headers(key)) as response:
                if response.is_error:
                    raise _refusal(response.status_code, await response.aread())
                async for event in _events(response.aiter_lines()):
                    yield _piece(event)
        except httpx.HTTPError as error:
            raise _unreachable() from error

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()


def _headers(key: str) -> dict[bytes, bytes]:
    return {b"Authorization": f"Bearer {key}".encode()} if key else {}


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; each is one line here."""
    async for line in lines:
        kind, _, data = line.partition(": ")
        if kind != "data":
            continue
        if data == "[DONE]":
            return
        yield json.loads(data)
    raise EndpointError("The answer broke off: the server went away.")


def _piece(event: dict[str, Any]) -> Piece:
    if error := event.get("error"):
        raise EndpointError(error["message"], code=error.get("code"))
    usage = event.get("usage") or {}
    choice = event["choices"][0] if event["choices"] else {}
    return Piece(
        text=choice.get("delta", {}).get("content") or "",
        finish=choice.get("finish_reason"),
        tokens=usage.get("completion_tokens"),
    )


def _refusal(status: int, body: bytes) -> EndpointError:
    try:
        error = json.loads(body)["error"]
        return EndpointError(error["message"], status=status, code=error.get("code"))
    except (ValueError, KeyError, TypeError):
        return EndpointError(f"The server answered with status {status}.", status=status)


def _unreachable() -> EndpointError:
    return EndpointError("The server cannot be reached, or it went away.")
