"""``/v1/completions``."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ggufkit.serve.api.answering import Spent, gone_from, in_thread, now, service_of
from ggufkit.serve.api.asking import (
    FINGERPRINT,
    engine_requests,
    finite,
    new_id,
    one_grammar,
    token_text,
)
from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.limits import user_of
from ggufkit.serve.api.options import Limits
from ggufkit.serve.api.reading import StrictRoute
from ggufkit.serve.api.schemas import MOST_INPUTS, CompletionRequest, Tokens
from ggufkit.serve.hosting import Hosted
from ggufkit.serve.requests import ChosenToken, ClosedError, Delta, Event, Finish, Request

_MOST_SCORES = 2_000_000
router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


@router.post("/v1/completions", summary="Go on with a text")
async def completions(http: HttpRequest, asked: CompletionRequest) -> Response:
    """What the model goes on with, whole or as server-sent events.

    With ``echo`` and ``logprobs``, the log-probabilities of the prompt come too.
    """
    service = service_of(http)
    async with AsyncExitStack() as stack:
        hosted = await stack.enter_async_context(service.models.use(asked.model))
        user = user_of(http.scope)
        plan = await in_thread(hosted, lambda: _plan(hosted, asked, service.limits, user))
        if asked.echo and asked.logprobs is not None:
            plan.scores = await _scores(http, hosted, plan.prompts, asked.logprobs, service.limits)
        return await service.respond(
            http,
            hosted,
            plan.requests,
            _Answer(hosted, asked, plan),
            stream=bool(asked.stream),
            stack=stack,
        )


@dataclass
class _Plan:
    """A request as the engine takes it.

    Attributes:
        prompts: tokens of each prompt.
        requests: for each prompt, one for each choice.
        scores: log-probabilities of the tokens of each prompt, if they are wanted.
    """

    prompts: list[Tokens]
    requests: list[Request]
    scores: list[list[ChosenToken]] | None = None


def _plan(hosted: Hosted, asked: CompletionRequest, limits: Limits, user: str) -> _Plan:
    if asked.suffix:
        raise ApiError(400, "a suffix is not supported", param="suffix")
    if asked.best_of is not None and asked.best_of != asked.choices:
        raise ApiError(400, "best_of is not supported", param="best_of")
    if asked.limit == 0 and not asked.echo:
        raise ApiError(400, "max_tokens of 0 needs echo", param="max_tokens")
    if len(asked.prompts) * asked.choices > MOST_INPUTS:
        raise ApiError(400, f"there may be {MOST_INPUTS} answers at once", param="n")
    prompts = [hosted.tokens_of(prompt) for prompt in asked.prompts]
    if asked.echo and asked.logprobs is not None:
        _check_scores(prompts, asked.logprobs)
    grammar = one_grammar(asked.grammar)
    requests = [
        request
        for prompt in prompts
        for request in engine_requests(
            hosted,
            asked,
            prompt,
            limits=limits,
            user=user,
            max_tokens=asked.limit or 1,
            grammar=grammar,
            logprobs=asked.logprobs,
        )
    ]
    return _Plan(prompts, requests if asked.limit else [])


def _check_scores(prompts: Sequence[Tokens], top: int) -> None:
    """All log-probabilities of a request are in memory together."""
    count = sum(map(len, prompts)) * (1 + top)
    if count > _MOST_SCORES:
        message = f"there may be {_MOST_SCORES} log-probabilities of prompts at once, not {count}"
        raise ApiError(400, message, param="logprobs")


async def _scores(
    http: HttpRequest, hosted: Hosted, prompts: Sequence[Tokens], top: int, limits: Limits
) -> list[list[ChosenToken]]:
    scorer = hosted.scorer
    if scorer is None:
        raise ApiError(400, "this model cannot score prompts", param="echo")
    gone = asyncio.ensure_future(gone_from(http.receive))
    end = time.monotonic() + limits.timeout_seconds
    loop = asyncio.get_running_loop()

    def wanted() -> bool:
        return not gone.done() and time.monotonic() < end

    try:
        return [
            await loop.run_in_executor(hosted.scoring, partial(scorer.score, prompt, top, wanted))
            for prompt in prompts
        ]
    except ClosedError:
        if time.monotonic() < end:
            raise
        raise ApiError(504, "the prompt took longer than it may", code="timeout") from None
    finally:
        gone.cancel()


@dataclass
class _Choice:
    """One answer, as far as it has come."""

    text: list[str] = field(default_factory=list)
    logprobs: "_Logprobs | None" = None
    finish: str = "length"


@dataclass
class _Logprobs:
    """Log-probabilities as completions tell them: one list of each kind."""

    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    top: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, text: str, value: float | None, top: dict[str, float] | None) -> None:
        """Note a token."""
        self.tokens.append(text)
        self.values.append(None if value is None else finite(value))
        self.top.append(top)
        self.offsets.append(self.offset)
        self.offset += len(text)

    def told(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        return {
            # Copies: more tokens may come before this is sent.
            "tokens": self.tokens[:],
            "token_logprobs": self.values[:],
            "top_logprobs": self.top[:],
            "text_offset": self.offsets[:],
        }


class _Answer:
    """Makes OpenAI's objects; see :class:`~ggufkit.serve.api.answering.Answer`."""

    def __init__(self, hosted: Hosted, asked: CompletionRequest, plan: _Plan) -> None:
        self._hosted = hosted
        self._per_prompt = asked.choices
        self._wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._wants_logprobs = asked.logprobs is not None
        self._spent = Spent({n: len(p) for n, p in enumerate(plan.prompts)})
        self._base = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": hosted.name,
            "system_fingerprint": FINGERPRINT,
        }
        self._echoed = [self._echo(n, asked, plan) for n in range(len(plan.prompts))]
        count = len(plan.prompts) * asked.choices
        self._choices = [self._begun(*self._echoed[n // asked.choices]) for n in range(count)]

    def _begun(self, text: str, logprobs: _Logprobs) -> _Choice:
        if not self._wants_logprobs:
            return _Choice([text])
        own = _Logprobs(
            *(logprobs.offset, logprobs.tokens[:], logprobs.values[:]),
            *(logprobs.top[:], logprobs.offsets[:]),
        )
        return _Choice([text], own)

    def _echo(self, number: int, asked: CompletionRequest, plan: _Plan) -> tuple[str, _Logprobs]:
        """A prompt as it stands before its answers: nothing, unless it is echoed."""
        told = _Logprobs()
        if not asked.echo:
            return "", told
        prompt = plan.prompts[number]
        pieces = [self._hosted.words.piece(token, special=True) for token in prompt]
        given = asked.prompts[number]
        text = given if isinstance(given, str) else b"".join(pieces).decode(errors="replace")
        if plan.scores is not None:
            told.add(token_text(pieces[0]), None, None)
            for chosen in plan.scores[number]:
                told.add(token_text(chosen.piece), chosen.logprob, self._top(chosen))
        return text, told

    def _top(self, chosen: ChosenToken) -> dict[str, float]:
        best: dict[str, float] = {}
        for each in chosen.top:
            name = token_text(self._hosted.words.piece(each.token, special=True))
            best.setdefault(name, finite(each.logprob))
        # OpenAI tells the chosen token whether it is among the best or not.
        best.setdefault(token_text(chosen.piece), finite(chosen.logprob))
        return best

    def opening(self) -> Iterator[dict[str, Any]]:
        for number, choice in enumerate(self._choices):
            text, told = "".join(choice.text), choice.logprobs
            if text:
                yield self._chunk(number, text, told if told and told.tokens else None)

    def take(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        choice = self._choices[number]
        if isinstance(event, Delta):
            piece = self._noted(choice, event)
            choice.text.append(event.text)
            if event.text or piece:
                yield self._chunk(number, event.text, piece)
        elif isinstance(event, Finish):
            choice.finish = "stop" if event.reason == "stop" else "length"
            self._spent.add(number // self._per_prompt, event)
            yield self._chunk(number, "", None, choice.finish)

    def _noted(self, choice: _Choice, event: Delta) -> _Logprobs | None:
        if choice.logprobs is None or not event.chosen:
            return None
        piece = _Logprobs(choice.logprobs.offset)
        for chosen in event.chosen:
            for told in (choice.logprobs, piece):
                told.add(token_text(chosen.piece), chosen.logprob, self._top(chosen))
        return piece

    def _chunk(
        self, number: int, text: str, logprobs: _Logprobs | None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = _told_choice(number, text, logprobs, finish)
        told = {**self._base, "choices": [choice]}
        return {**told, "usage": None} if self._wants_usage else told

    def closing(self) -> Iterator[dict[str, Any]]:
        if self._wants_usage:
            yield {**self._base, "choices": [], "usage": self._spent.told()}

    def whole(self) -> dict[str, Any]:
        choices = [
            _told_choice(n, "".join(c.text), c.logprobs, c.finish)
            for n, c in enumerate(self._choices)
        ]
        return {**self._base, "choices": choices, "usage": self._spent.told()}


def _told_choice(
    number: int, text: str, logprobs: _Logprobs | None, finish: str | None
) -> dict[str, Any]:
    return {
        "index": number,
        "text": text,
        "logprobs": logprobs.told() if logprobs else None,
        "finish_reason": finish,
    }
