"""What clients may ask: OpenAI's fields, and those that llama.cpp's users know.

Values are checked for their kind here; whether numbers make sense is checked
where they are used, once. Unknown fields are ignored, as clients send many.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

from ggufkit.llamacpp.sampling import RANDOM_SEED, SamplingParams
from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.toolcalls import Tool

MOST_CHOICES = 16
MOST_INPUTS = 2048
_MOST_TOP = 20
_MOST_TOOLS = 128
_MOST_MESSAGES = 10_000
"""To read them holds up everybody."""
_LONGEST_TEXT = 1 << 20
"""Characters; some texts of more would take minutes."""
_DEFAULT_COMPLETION = 16
"""OpenAI's default for completions."""

_CHOOSING = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
)

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Stop = Annotated[str, StringConstraints(max_length=256)]
"""Longer ones would take the engine's time, which is everybody's."""
Tokens = list[int]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(_Schema):
    """What a stream tells besides.

    Attributes:
        include_usage: a last event with the tokens that were used.
    """

    include_usage: bool | None = None


class SamplingFields(_Schema):
    """How tokens are chosen; what is not given is the model's recommendation, or llama.cpp's."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | list[Stop] | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def params(
        self, recommended: dict[str, float], *, grammar: str, choice: int = 0
    ) -> SamplingParams:
        """How tokens of one choice are chosen.

        Args:
            recommended: by the model.
            grammar: that the answer must follow; empty for none.
            choice: number of the choice; each has a seed of its own.

        Raises:
            UsageError: if a number makes no sense.
        """
        values: dict[str, Any] = dict(recommended)
        if "top_k" in values:
            values["top_k"] = int(values["top_k"])
        values |= {n: v for n in _CHOOSING if (v := getattr(self, n)) is not None}
        if self.repetition_penalty is not None and self.repeat_penalty is None:
            values["repeat_penalty"] = self.repetition_penalty
        if self.seed is not None:
            # OpenAI's seeds are larger than llama.cpp's.
            values["seed"] = (self.seed + choice) % RANDOM_SEED
        return SamplingParams(**values, logit_bias=self._biases(), grammar=grammar)

    def _biases(self) -> dict[int, float]:
        given = self.logit_bias or {}
        for token in given:
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ApiError(400, f"'{token[:20]}' is not a token id", param="logit_bias")
        return {int(token): bias for token, bias in given.items()}


# Conversations.


class TextPart(_Schema):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(_Schema):
    """A function that the model asked for, and its arguments as JSON."""

    name: str
    arguments: str


class CallMade(_Schema):
    """A call that the model made in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Schema):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    name: str | None = None
    tool_calls: list[CallMade] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, content: Any) -> Any:
        """Say what is not taken, where pydantic would only say what is."""
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise PydanticCustomError(
                    "text_alone",
                    "a part of type '{kind}' cannot be answered: models are served with text "
                    "alone, without images, sound or files",
                    {"kind": kind[:40]},
                )
        return content

    def plain(self) -> dict[str, Any]:
        """As templates expect it; the template's rule decides on the form of it.

        Raises:
            ApiError: if arguments of a call are no JSON object.
        """
        content = (
            [part.model_dump() for part in self.content]
            if isinstance(self.content, list)
            else self.content
        )
        role = "system" if self.role == "developer" else self.role
        told: dict[str, Any] = {"role": role, "content": content}
        if self.tool_calls:
            told["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        for name in ("reasoning_content", "reasoning", "name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                told[name] = value
        return told


def _plain_call(call: CallMade) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, "the arguments of a tool call are not a JSON object", param="messages")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


class FunctionTold(_Schema):
    """A function that the model may ask for."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolTold(_Schema):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionTold

    def tool(self) -> Tool:
        """As prompts are made of it."""
        told = self.function
        return Tool(told.name, told.description or "", told.parameters or {})


class ChosenFunction(_Schema):
    """The function that must be called."""

    name: str


class ToolChoice(_Schema):
    """The tool that must be used."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(_Schema):
    """A schema that the answer must follow."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    name: str | None = None
    told: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(_Schema):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for any text.

        Raises:
            ApiError: if there is none although one is announced.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None or self.json_schema.told is None:
            raise ApiError(400, "there is no schema", param="response_format.json_schema")
        return self.json_schema.told


class ChatRequest(SamplingFields):
    """What ``/v1/chat/completions`` takes."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    tools: Annotated[list[ToolTold], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    functions: Any = None
    function_call: Any = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Alternatives to tell of each token; None for no log-probabilities."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
        return None


class CompletionRequest(SamplingFields):
    """What ``/v1/completions`` takes."""

    prompt: (
        str
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def limit(self) -> int:
        """Tokens of the answer at most."""
        return _DEFAULT_COMPLETION if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str] | list[Tokens]:
        """All prompts."""
        return _many(self.prompt)


class EmbeddingRequest(_Schema):
    """What ``/v1/embeddings`` takes."""

    model: str | None = None
    input: (
        str
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str] | list[Tokens]:
        """All texts."""
        return _many(self.input)


def _many(given: str | list[Any]) -> list[Any]:
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return given


class TokenizeRequest(_Schema):
    """What ``/tokenize`` takes; ``prompt`` is another name of ``content``."""

    model: str | None = None
    content: Annotated[str, Field(max_length=_LONGEST_TEXT)] | None = None
    prompt: Annotated[str, Field(max_length=_LONGEST_TEXT)] | None = None
    special: bool = True


class DetokenizeRequest(_Schema):
    """What ``/detokenize`` takes."""

    model: str | None = None
    tokens: Tokens
