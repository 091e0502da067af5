"""``/tokenize`` and ``/detokenize``."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from ggufkit.serve.api.answering import in_thread, service_of
from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.reading import StrictRoute
from ggufkit.serve.api.schemas import DetokenizeRequest, TokenizeRequest

router = APIRouter(route_class=StrictRoute, tags=["tokens"])


@router.post("/tokenize", summary="Turn text into tokens")
async def tokenize(http: HttpRequest, asked: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a prompt, with the BOS token if the model wants it."""
    text = asked.content if asked.content is not None else asked.prompt
    if text is None:
        raise ApiError(400, "there is no text", param="content")
    async with service_of(http).models.use(asked.model) as hosted:
        found = await in_thread(hosted, lambda: hosted.words.tokenize(text, special=asked.special))
        return {"tokens": found, "count": len(found), "max_model_len": hosted.engine.context}


@router.post("/detokenize", summary="Turn tokens into text")
async def detokenize(http: HttpRequest, asked: DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens, control tokens spelled out."""
    async with service_of(http).models.use(asked.model) as hosted:
        if asked.tokens:
            hosted.tokens_of(asked.tokens, room=len(asked.tokens))
        pieces = [hosted.words.piece(token, special=True) for token in asked.tokens]
        text = b"".join(pieces).decode(errors="replace")
        return {"content": text, "prompt": text}
