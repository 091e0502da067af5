"""``/v1/embeddings``."""

import base64
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ggufkit.errors import ToolError
from ggufkit.serve.api.answering import in_thread, service_of
from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.limits import user_of
from ggufkit.serve.api.reading import StrictRoute
from ggufkit.serve.api.schemas import EmbeddingRequest
from ggufkit.serve.requests import Embedding, EmbedRequest, Event, Finish

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


@router.post("/v1/embeddings", summary="Turn texts into vectors")
async def embeddings(http: HttpRequest, asked: EmbeddingRequest) -> Response:
    """One vector of length 1 for each text."""
    if asked.dimensions is not None:
        raise ApiError(400, "dimensions cannot be chosen", param="dimensions")
    service = service_of(http)
    async with AsyncExitStack() as stack:
        hosted = await stack.enter_async_context(service.models.use(asked.model))
        user = user_of(http.scope)

        def plan() -> list[EmbedRequest]:
            return [
                EmbedRequest(
                    hosted.tokens_of(text, ends=True),
                    client=user,
                    timeout_seconds=service.limits.timeout_seconds,
                )
                for text in asked.inputs
            ]

        requests = await in_thread(hosted, plan)
        answer = _Answer(hosted.name, len(requests), asked.encoding_format == "base64")
        return await service.respond(http, hosted, requests, answer, stream=False, stack=stack)


class _Answer:
    """Makes OpenAI's object; see :class:`~ggufkit.serve.api.answering.Answer`."""

    def __init__(self, model: str, count: int, packed: bool) -> None:
        self._model = model
        self._packed = packed
        self._vectors: list[Any] = [None] * count
        self._read = 0

    def opening(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def closing(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def take(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Embedding):
            vector = _normalized(event.vector)
            self._vectors[number] = _packed(vector) if self._packed else vector
        elif isinstance(event, Finish):
            self._read += event.usage.prompt_tokens
        return iter(())

    def whole(self) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": n, "embedding": vector}
            for n, vector in enumerate(self._vectors)
        ]
        usage = {"prompt_tokens": self._read, "total_tokens": self._read}
        return {"object": "list", "data": data, "model": self._model, "usage": usage}


def _normalized(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(x * x for x in vector))
    if not math.isfinite(length):
        raise ToolError("the model's embedding is not a number")
    return [x / length for x in vector] if length else list(vector)


def _packed(vector: list[float]) -> str:
    """Little-endian 32-bit floats, in base64."""
    numbers = array("f", vector)
    if numbers.itemsize != 4:
        raise ToolError("this machine's floats are not of 32 bits")
    if not _LITTLE:
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


_LITTLE = array("H", [1]).tobytes()[0] == 1
