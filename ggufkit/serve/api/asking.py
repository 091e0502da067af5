"""What requests for chats and completions have in common on their way to the engine."""

import secrets
from typing import Any

from ggufkit import __version__
from ggufkit.llamacpp.runtime import schema_grammar
from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.options import Limits
from ggufkit.serve.api.schemas import SamplingFields
from ggufkit.serve.grammars import check_grammar
from ggufkit.serve.hosting import Hosted
from ggufkit.serve.requests import ChosenToken, Request

FINGERPRINT = f"ggufkit-{__version__}"
_UNLIKELY = -9999.0
"""What OpenAI says of a probability of zero; JSON has no infinity."""


def new_id(kind: str) -> str:
    """A name of an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def engine_requests(
    hosted: Hosted,
    asked: SamplingFields,
    prompt: list[int],
    *,
    limits: Limits,
    user: str,
    max_tokens: int | None,
    grammar: str,
    logprobs: int | None,
    special: bool = False,
) -> list[Request]:
    """One request to the engine for each choice of one prompt.

    Args:
        hosted: the model.
        asked: what the client asked for.
        prompt: tokens.
        limits: of the server.
        user: whose request it is.
        max_tokens: length of an answer at most.
        grammar: that answers must follow; empty for none.
        logprobs: alternatives to tell of each token; None for none.
        special: whether control tokens are spelled out.

    Raises:
        UsageError: if a number makes no sense.
    """
    allowed = [n for n in (max_tokens, limits.max_tokens) if n is not None]
    return [
        Request(
            prompt=prompt,
            sampling=asked.params(hosted.recommended, grammar=grammar, choice=choice),
            max_tokens=min(allowed, default=None),
            stop=asked.stops,
            logprobs=logprobs,
            special=special,
            ignore_end=bool(asked.ignore_eos),
            adapters=hosted.adapters,
            client=user,
            timeout_seconds=limits.timeout_seconds,
        )
        for choice in range(asked.choices)
    ]


def one_grammar(*grammars: str | None) -> str:
    """The grammar of an answer, which only one may be given of.

    Raises:
        ApiError: if there are several.
        UsageError: if it would take too much to follow.
    """
    given = [g for g in grammars if g]
    if len(given) > 1:
        told = "of grammar, response_format and a forced tool_choice there can be one"
        raise ApiError(400, told, param="grammar")
    if given:
        check_grammar(given[0])
    return given[0] if given else ""


def grammar_of(schema: dict[str, Any] | None) -> str | None:
    """The grammar of a JSON schema; none of none."""
    return None if schema is None else schema_grammar(schema)


def token_text(piece: bytes) -> str:
    """A token as log-probabilities name it: text, or its bytes if those are no text."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def finite(logprob: float) -> float:
    """A log-probability that JSON can tell."""
    return max(logprob, _UNLIKELY)


def chat_logprob(hosted: Hosted, chosen: ChosenToken) -> dict[str, Any]:
    """A token's log-probability as conversations tell it."""
    told = _chat_token(chosen.piece, chosen.logprob)
    told["top_logprobs"] = [
        _chat_token(hosted.words.piece(t.token, special=True), t.logprob) for t in chosen.top
    ]
    return told


def _chat_token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(piece), "logprob": finite(logprob), "bytes": list(piece)}
