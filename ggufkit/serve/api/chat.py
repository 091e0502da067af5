"""``/v1/chat/completions``."""

from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ggufkit.serve.api.answering import Spent, in_thread, now, service_of
from ggufkit.serve.api.asking import (
    FINGERPRINT,
    chat_logprob,
    engine_requests,
    grammar_of,
    new_id,
    one_grammar,
)
from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.limits import user_of
from ggufkit.serve.api.options import Limits
from ggufkit.serve.api.reading import StrictRoute
from ggufkit.serve.api.schemas import ChatRequest, ToolChoice
from ggufkit.serve.hosting import Hosted
from ggufkit.serve.requests import Delta, Event, Finish, Request
from ggufkit.serve.toolcalls import Dialect, Tool, ToolCall, ToolCallParser, forced_grammar

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(http: HttpRequest, asked: ChatRequest) -> Response:
    """The model's answer to a conversation, whole or as server-sent events."""
    service = service_of(http)
    async with AsyncExitStack() as stack:
        hosted = await stack.enter_async_context(service.models.use(asked.model))
        user = user_of(http.scope)
        plan = await in_thread(hosted, lambda: _plan(hosted, asked, service.limits, user))
        stream = bool(asked.stream)
        return await service.respond(
            http, hosted, plan.requests, _Answer(hosted, asked, plan), stream=stream, stack=stack
        )


@dataclass(frozen=True)
class _Plan:
    """A request as the engine takes it.

    Attributes:
        requests: one for each choice.
        dialect: how calls are told from text; None if there are no functions.
        names: of the functions.
    """

    requests: list[Request]
    dialect: Dialect | None
    names: tuple[str, ...]


def _plan(hosted: Hosted, asked: ChatRequest, limits: Limits, user: str) -> _Plan:
    if hosted.prompts is None:
        message = f"the model '{hosted.name}' has no chat template; use /v1/completions"
        raise ApiError(400, message, code="no_chat_template", param="model")
    if asked.functions is not None or asked.function_call is not None:
        raise ApiError(400, "functions are told by tools and tool_choice", param="functions")
    told = [] if asked.tool_choice == "none" else asked.tools or []
    tools = [tool.tool() for tool in told]
    dialect = hosted.prompts.dialect if tools else None
    forced = _forced(asked, tools, hosted.prompts.dialect)
    shaped = grammar_of(asked.response_format.wanted()) if asked.response_format else None
    grammar = one_grammar(asked.grammar, shaped, forced)
    if tools and grammar and not forced:
        message = "an answer that follows a grammar cannot be a call; set tool_choice to none"
        raise ApiError(400, message, param="tool_choice")
    messages = [message.plain() for message in asked.messages]
    text = hosted.prompts.render(messages, tools, asked.chat_template_kwargs)
    requests = engine_requests(
        hosted,
        asked,
        hosted.tokens_of(text),
        limits=limits,
        user=user,
        max_tokens=asked.limit,
        grammar=grammar,
        logprobs=asked.top,
        special=bool(dialect and dialect.special),
    )
    return _Plan(requests, dialect, tuple(tool.name for tool in tools))


def _forced(asked: ChatRequest, tools: list[Tool], dialect: Dialect) -> str | None:
    """The grammar that makes the answer a call, if it must be one."""
    choice = asked.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.name == choice.function.name]
    if not tools:
        raise ApiError(400, "tool_choice names no function of tools", param="tool_choice")
    several = choice == "required" and bool(asked.parallel_tool_calls)
    return forced_grammar(dialect, tools, several=several, grammar=lambda s: grammar_of(s) or "")


@dataclass
class _Choice:
    """One answer, as far as it has come."""

    parser: ToolCallParser | None
    text: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None


class _Answer:
    """Makes OpenAI's objects; see :class:`~ggufkit.serve.api.answering.Answer`."""

    def __init__(self, hosted: Hosted, asked: ChatRequest, plan: _Plan) -> None:
        self._hosted = hosted
        self._wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._wants_logprobs = asked.top is not None
        self._one_call = asked.parallel_tool_calls is False
        self._spent = Spent()
        self._base = {
            "id": new_id("chatcmpl"),
            "created": now(),
            "model": hosted.name,
            "system_fingerprint": FINGERPRINT,
        }
        self._choices = [
            _Choice(ToolCallParser(plan.dialect, plan.names) if plan.dialect else None)
            for _ in plan.requests
        ]

    def opening(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self._choices)):
            yield self._chunk(number, {"role": "assistant", "content": ""})

    def take(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        choice = self._choices[number]
        if isinstance(event, Delta):
            yield from self._take_delta(number, choice, event)
        elif isinstance(event, Finish):
            rest, calls = choice.parser.finish() if choice.parser else ("", [])
            yield from self._tell(number, choice, rest, calls, [])
            ended = "stop" if event.reason == "stop" else "length"
            choice.finish = "tool_calls" if choice.calls and ended == "stop" else ended
            self._spent.add(0, event)
            yield self._chunk(number, {}, finish=choice.finish)

    def _take_delta(self, number: int, choice: _Choice, event: Delta) -> Iterator[dict[str, Any]]:
        text, calls = event.text, list[ToolCall]()
        if choice.parser:
            text, calls = choice.parser.push(text)
        logprobs = [chat_logprob(self._hosted, chosen) for chosen in event.chosen]
        yield from self._tell(number, choice, text, calls, logprobs)

    def _tell(
        self,
        number: int,
        choice: _Choice,
        text: str,
        calls: list[ToolCall],
        logprobs: list[dict[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        if self._one_call:
            calls = calls[: 1 - len(choice.calls)]
        if not (text or calls or logprobs):
            return
        delta: dict[str, Any] = {"content": text} if text or not calls else {}
        if calls:
            first = len(choice.calls)
            delta["tool_calls"] = [
                {"index": first + n, **_told_call(call)} for n, call in enumerate(calls)
            ]
        choice.text.append(text)
        choice.calls += calls
        choice.logprobs += logprobs
        yield self._chunk(number, delta, logprobs=logprobs)

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        *,
        finish: str | None = None,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "delta": delta, "finish_reason": finish}
        choice["logprobs"] = {"content": logprobs, "refusal": None} if logprobs else None
        told = {**self._base, "object": "chat.completion.chunk", "choices": [choice]}
        return {**told, "usage": None} if self._wants_usage else told

    def closing(self) -> Iterator[dict[str, Any]]:
        if self._wants_usage:
            told = {**self._base, "object": "chat.completion.chunk", "choices": []}
            yield {**told, "usage": self._spent.told()}

    def whole(self) -> dict[str, Any]:
        choices = [self._told_choice(n, choice) for n, choice in enumerate(self._choices)]
        told = {**self._base, "object": "chat.completion", "choices": choices}
        return {**told, "usage": self._spent.told()}

    def _told_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        # Around calls there is often a line break, which nobody wants to be told.
        content = None if choice.calls and not text.strip() else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["tool_calls"] = [_told_call(call) for call in choice.calls]
        logprobs = {"content": choice.logprobs, "refusal": None} if self._wants_logprobs else None
        return {
            "index": number,
            "message": message,
            "finish_reason": choice.finish,
            "logprobs": logprobs,
        }


def _told_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
