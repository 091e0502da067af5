"""Questions in a file: JSON Lines, one question in a row."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ggufkit.errors import UsageError
from ggufkit.llamacpp.template import Message
from ggufkit.serve.answers import digest
from ggufkit.serve.chat import Style
from ggufkit.serve.model import Sampling

_NUMBERS = {
    **{"temperature": float, "top_p": float, "min_p": float, "repeat_penalty": float},
    **{"presence_penalty": float, "frequency_penalty": float},
    **{"top_k": int, "max_tokens": int, "seed": int},
}
"""Sampling parameters that a row may set, and what they are."""
_FIELDS = {"id", "prompt", "messages", "system", "stop", "grammar", "json_schema", *_NUMBERS}
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content")
_MESSAGE_FIELDS = {"role", "content", "tool_calls", *_MESSAGE_TEXTS}
_SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Row:
    """One question of the file.

    Attributes:
        line: its number in the file, from 1.
        id: the file's own name for it, or one made of its content.
        messages: the conversation; None for a bare prompt.
        prompt: text to go on with, without a template; None for a conversation.
        sampling: how its answer is chosen.
    """

    line: int
    id: str | int
    messages: tuple[Message, ...] | None
    prompt: str | None
    sampling: Sampling


class FaultError(Exception):
    """What is wrong with a row."""


def read_rows(
    text: bytes,
    *,
    name: str,
    sampling: Sampling,
    style: Style,
    system: str | None,
    grammar: Callable[[Any], str],
) -> list[Row]:
    """The questions of a JSON Lines file.

    A row is an object with ``prompt`` or ``messages``, and may have ``id``,
    ``system``, ``stop``, ``grammar``, ``json_schema`` and sampling parameters.
    Messages are OpenAI's: content is text or a list of parts of text, and there may
    be ``tool_calls``, answers to these, and ``reasoning_content``.

    Args:
        text: what the file holds.
        name: of the file, for errors.
        sampling: what holds where a row says nothing.
        style: whether prompts are bare text, and what surrounds them.
        system: system message of rows that have none.
        grammar: makes a grammar out of a JSON schema.

    Raises:
        UsageError: if there are rows that cannot be used; all of them are named.
    """
    rows, faults = list[Row](), list[str]()
    seen: Counter[str] = Counter()
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            raw = _parsed(line)
            own = _own_sampling(raw, sampling, grammar)
            own.resolve()
            prompt, messages = _question(raw, style, system)
            rows.append(Row(number, _id(raw, seen), messages, prompt, own))
        except (FaultError, UsageError) as error:
            faults.append(f"line {number}: {error}")
    tell_faults(name, faults)
    doubled = [f"id {row_id!r}" for row_id, n in Counter(r.id for r in rows).items() if n > 1]
    if doubled:
        raise UsageError(f"{name}: several rows have {', '.join(doubled[:_SHOWN_FAULTS])}")
    if not rows:
        raise UsageError(f"{name} has no rows")
    return rows


def tell_faults(name: str, faults: Sequence[str]) -> None:
    """Name the rows that cannot be answered, if there are any.

    Raises:
        UsageError: if so.
    """
    if not faults:
        return
    more = len(faults) - _SHOWN_FAULTS
    shown = [*faults[:_SHOWN_FAULTS], *([f"and {more} more"] if more > 0 else [])]
    raise UsageError(
        f"{name} has rows that cannot be answered; nothing was begun\n  " + "\n  ".join(shown),
        'A row is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
    )


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(line, parse_constant=_no_constant)
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise FaultError(f"it is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FaultError("it is not an object")
    if unknown := sorted(set(raw) - _FIELDS):
        known = ", ".join(sorted(_FIELDS))
        raise FaultError(f"there is no field '{unknown[0]}'; there are: {known}")
    return raw


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _own_sampling(
    raw: Mapping[str, Any], sampling: Sampling, grammar: Callable[[Any], str]
) -> Sampling:
    changes: dict[str, Any] = {}
    for field, kind in _NUMBERS.items():
        value = raw.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise FaultError(f"{field} is {value!r}")
        changes[field] = value
    if changes.get("max_tokens", 1) < 1:
        raise FaultError(f"max_tokens is {changes['max_tokens']}")
    if raw.get("stop") is not None:
        stop = [raw["stop"]] if isinstance(raw["stop"], str) else raw["stop"]
        if not (isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)):
            raise FaultError("stop is neither a text nor a list of texts")
        changes["stop"] = tuple(stop)
    if raw.get("grammar") is not None and raw.get("json_schema") is not None:
        raise FaultError("it has both a grammar and a JSON schema")
    if raw.get("grammar") is not None:
        if not isinstance(raw["grammar"], str):
            raise FaultError("grammar is not text")
        changes["grammar"] = raw["grammar"]
    if raw.get("json_schema") is not None:
        changes["grammar"] = grammar(raw["json_schema"])
    return replace(sampling, **changes)


def _question(
    raw: Mapping[str, Any], style: Style, system: str | None
) -> tuple[str | None, tuple[Message, ...] | None]:
    """Either a bare prompt or a conversation."""
    if ("prompt" in raw) == ("messages" in raw):
        raise FaultError("it needs either 'prompt' or 'messages'")
    if raw.get("system") is not None:
        system = raw["system"]
        if not isinstance(system, str):
            raise FaultError("system is not text")
    if "messages" in raw:
        if style.completion:
            raise FaultError("'messages' need a chat template, and this is a completion")
        return None, _conversation(raw["messages"], system, own_system="system" in raw)
    if not isinstance(raw["prompt"], str):
        raise FaultError("prompt is not text")
    text = f"{style.prefix}{raw['prompt']}{style.suffix}"
    if style.completion:
        return (system or "") + text, None
    return None, _conversation([{"role": "user", "content": text}], system)


def _conversation(
    given: Any, system: str | None, *, own_system: bool = False
) -> tuple[Message, ...]:
    if not (isinstance(given, list) and given):
        raise FaultError("messages is not a list of messages")
    for message in given:
        _check_message(message)
    if given[0]["role"] == "system":
        if own_system:
            raise FaultError("it has two system messages")
        return tuple(given)
    return (*([{"role": "system", "content": system}] if system is not None else []), *given)


def _check_message(message: Any) -> None:
    """See that a message is what chat templates know."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise FaultError(f"a message is not a role ({', '.join(_ROLES)}) and its content")
    if unknown := sorted(set(message) - _MESSAGE_FIELDS):
        known = ", ".join(sorted(_MESSAGE_FIELDS))
        raise FaultError(f"a message has no field '{unknown[0]}'; it may have: {known}")
    for name in _MESSAGE_TEXTS:
        if not isinstance(message.get(name) or "", str):
            raise FaultError(f"{name} of a message is not text")
    calls = message.get("tool_calls") or []
    if not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
        raise FaultError(
            'tool_calls of a message is no list of {"function": {"name": ..., "arguments": {...}}}'
        )
    content = message.get("content")
    if content is None and not calls:
        raise FaultError("a message is not a role and its content: content is missing or null")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise FaultError(f"a message has a part of type '{kind}', and only text is answered")
    if not isinstance(content, str | list | None):
        raise FaultError("content of a message is neither text nor a list of parts")


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), dict | str)
    )


def _id(raw: Mapping[str, Any], seen: Counter[str]) -> str | int:
    """The row's own id, or one that does not depend on where it stands."""
    given = raw.get("id")
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise FaultError(f"its id {given!r} is neither text nor a whole number")
        return given
    made = digest(raw)
    seen[made] += 1
    return made if seen[made] == 1 else f"{made}-{seen[made]}"
