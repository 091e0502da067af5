"""What a row of a file says: a chat, or a question with its answer, in one form.

Chats come in the forms of OpenAI (``role`` and ``content``, calls beside them)
and of ShareGPT (``from`` and ``value``, calls as turns of their own), and with
the columns that LLaMA-Factory and others put beside them. All become a
:class:`Conversation` as transformers' ``apply_chat_template`` takes it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ggufkit.texts.columns import (
    ANSWERED_KEYS,
    ASKED_KEYS,
    CONTEXT_KEYS,
    HISTORY_KEY,
    SYSTEM_KEYS,
    TOOLS_KEYS,
)
from ggufkit.texts.files import turns_in
from ggufkit.values import Json

Message = Mapping[str, Json]
"""``role`` and ``content``, and what else a turn has, such as ``tool_calls``."""

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""Other names of roles, in ShareGPT's files and in OpenAI's older and newer ones."""
_ROLES_KNOWN = ("system", "user", "assistant", "tool")
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of ShareGPT's turns whose value is a call, or a list of calls, in JSON."""
_BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Fields that say something in a turn without content."""


class RowFault(ValueError):  # noqa: N818 - not an error of the program
    """A row that cannot be used; the text says why."""


class EmptyRow(RowFault):
    """A row that has nothing in the columns that are read."""


@dataclass(frozen=True)
class Conversation:
    """A chat, or a question with its answer.

    Attributes:
        messages: the turns, a system message first if there is one. Of the
            fields of a message only ``content`` may be None.
        tools: definitions of the functions that may be called, in OpenAI's form.
        pair: whether it was a question with its answer.
    """

    messages: tuple[Message, ...]
    tools: tuple[Json, ...] = ()
    pair: bool = False

    def to_row(self) -> dict[str, Json]:
        """The conversation as a row of JSON Lines that reads back as the same."""
        row: dict[str, Json] = {"tools": list(self.tools)} if self.tools else {}
        if not self.pair:
            return {"messages": list(self.messages), **row}
        said = [message["content"] for message in self.messages]
        if self.messages[0]["role"] == "system":
            row["system"] = said.pop(0)
        *history, last = zip(said[::2], said[1::2], strict=True)
        if history:
            row["history"] = [list(exchange) for exchange in history]
        return {"question": last[0], "answer": last[1], **row}

    def bare_text(self) -> str:
        """What is said, without roles and calls; turns are separated by newlines."""
        said = (text_of(message.get("content")) for message in self.messages)
        return "\n".join(text for text in said if text)


def text_of(content: Json) -> str:
    """The text of a message's content: a string, None, or a list of parts."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def read_text(value: Json, what: str) -> str:
    """A string that UTF-8 can hold.

    Args:
        value: the string, or what is there instead.
        what: what it is, in words.

    Raises:
        RowFault: it is no such string.
    """
    if not isinstance(value, str):
        raise RowFault(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowFault(f"{what} has half a surrogate pair") from error
    return value


def read_chat(row: Mapping[str, Json], column: str) -> Conversation:
    """The conversation in a row of a file of chats.

    Args:
        row: the row.
        column: what holds the turns.

    Raises:
        EmptyRow: there are no turns, or nothing is said in them.
        RowFault: it is no chat.
    """
    turns = row.get(column)
    if turns is None or turns == [] or (isinstance(turns, str) and not turns.strip()):
        raise EmptyRow(f"a chat without turns in '{column}'")
    if isinstance(turns, str):
        turns = turns_in(turns) or turns
    return _chat(row, _turns(turns, column))


def read_pair(row: Mapping[str, Json], asked: str, answered: str) -> Conversation:
    """The conversation in a row of questions and answers.

    Args:
        row: the row.
        asked: the column of the question.
        answered: the column of the answer.

    Raises:
        EmptyRow: question or answer is missing.
        RowFault: it is no question with an answer.
    """
    for column in (asked, answered):
        if row.get(column) is None or row[column] == []:
            raise EmptyRow(f"it has no '{column}'")
    if isinstance(row[asked], list) or isinstance(row[answered], list):
        return _joined_chats(row, asked, answered)
    contexts = (read_text(row.get(key) or "", f"'{key}'") for key in CONTEXT_KEYS if key != asked)
    question = "\n\n".join(p for p in (read_text(row[asked], f"'{asked}'"), *contexts) if p.strip())
    answer = read_text(row[answered], f"'{answered}'")
    for column, text in ((asked, question), (answered, answer)):
        if not text.strip():
            raise EmptyRow(f"'{column}' is blank")
    messages = [*_before(row), _message("user", question), _message("assistant", answer)]
    return _conversation(messages, _tools(row), pair=True)


def _joined_chats(row: Mapping[str, Json], asked: str, answered: str) -> Conversation:
    """A chat of which the first turns are the question, the last ones the answer."""
    turns: list[Message] = []
    for column, role in ((asked, "user"), (answered, "assistant")):
        value = row[column]
        turns += [_message(role, value)] if isinstance(value, str) else _turns(value, column)
    return _chat(row, turns)


def _chat(row: Mapping[str, Json], turns: Sequence[Message]) -> Conversation:
    """The conversation of some turns and of what stands beside them."""
    if not any(text_of(m.get("content")).strip() or _says_more(m) for m in turns):
        raise EmptyRow("a chat in which nothing is said")
    return _conversation(_one_system(_before(row), turns), _tools(row))


def _conversation(
    messages: Sequence[Message], tools: Sequence[Json], *, pair: bool = False
) -> Conversation:
    found = Conversation(tuple(messages), tuple(tools), pair)
    try:
        json.dumps(found.to_row(), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise RowFault("there is half a surrogate pair in it") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RowFault(f"it holds a value that JSON does not have: {error}") from error
    return found


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# --- turns -------------------------------------------------------------------


def _turns(turns: Json, column: str) -> list[Message]:
    if not isinstance(turns, list):
        raise RowFault(f"a chat without turns: '{column}' is no list")
    if not all(isinstance(turn, dict) for turn in turns):
        if column in (*ASKED_KEYS, *ANSWERED_KEYS):
            raise RowFault(f"'{column}' is not text")
        raise RowFault(f"'{column}' has a turn that is no object")
    return [_turn(turn) for turn in turns]


def _turn(raw: Mapping[str, Json]) -> Message:
    fields = {key: value for key, value in raw.items() if value is not None}
    role, content = _one_of(fields, "from", "role"), _one_of(fields, "value", "content")
    if role is None:
        raise RowFault("a turn has no 'role'")
    if role in _CALL_ROLES:
        calls = _parsed(content, f"a turn of {role}")
        return {"role": "assistant", "content": "", "tool_calls": _calls(calls), **fields}
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES_KNOWN:
        known = ", ".join((*_ROLES_KNOWN, *_ROLES, *_CALL_ROLES))
        raise RowFault(f"unknown role '{role}' (known are {known})")
    message: dict[str, Json] = {"role": role}
    if content is not None:
        message["content"] = _content(content)
    elif "content" in raw or "value" in raw:
        message["content"] = None
    calls = fields.pop("tool_calls", None) or fields.pop("function_call", None)
    if calls:
        message["tool_calls"] = _calls(_parsed(calls, "'tool_calls'"))
    message.update(fields)
    if content is None and not any(message.get(key) for key in _BESIDE_CONTENT):
        raise RowFault("a turn has no 'content'")
    return message


def _one_of(fields: dict[str, Json], first: str, second: str) -> Json:
    """Take the value of a field that has two names; None if there is neither."""
    one, other = fields.pop(first, None), fields.pop(second, None)
    if one is not None and other is not None and one != other:
        raise RowFault(f"a turn has both '{first}' and '{second}', and they differ")
    return other if one is None else one


def _says_more(message: Message) -> bool:
    return any(message.get(key) for key in _BESIDE_CONTENT)


def _content(value: Json) -> Json:
    """A string, or parts that all are text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowFault("a turn whose content is not text")
    parts: list[Json] = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            named = f": a part of type {kind}" if kind and kind != "text" else ""
            raise RowFault(f"a turn whose content is not text{named}")
        parts.append({"type": "text", **part})
    return parts


def _one_system(before: Sequence[Message], turns: Sequence[Message]) -> list[Message]:
    """The turns behind what stands before them, which may have the same system message.

    Raises:
        RowFault: both have one, and they differ.
    """
    if not before or turns[0]["role"] != "system":
        return [*before, *turns]
    if before[0]["role"] != "system":
        return [turns[0], *before, *turns[1:]]
    if text_of(before[0]["content"]) != text_of(turns[0].get("content")):
        raise RowFault("it has two system messages, and they differ")
    return [*before, *turns[1:]]


# --- what stands beside the turns ----------------------------------------------


def _before(row: Mapping[str, Json]) -> list[Message]:
    """The system message and the earlier exchanges that columns of their own hold."""
    systems = [read_text(row[key], f"'{key}'") for key in SYSTEM_KEYS if row.get(key) is not None]
    systems = list(dict.fromkeys(text for text in systems if text.strip()))
    if len(systems) > 1:
        raise RowFault("it has two system messages, and they differ")
    before = [_message("system", text) for text in systems]
    history = row.get(HISTORY_KEY) or []
    if not isinstance(history, list):
        raise RowFault(f"'{HISTORY_KEY}' is no list")
    for exchange in history:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise RowFault(f"'{HISTORY_KEY}' holds something else than questions with answers")
        asked, answered = (read_text(said, f"'{HISTORY_KEY}'") for said in exchange)
        before += [_message("user", asked), _message("assistant", answered)]
    return before


def _tools(row: Mapping[str, Json]) -> list[Json]:
    """The functions that may be called, each in OpenAI's form."""
    columns = {key: row.get(key) for key in TOOLS_KEYS}
    full = {k: v for k, v in columns.items() if (v.strip() if isinstance(v, str) else v)}
    given = [tools for key, value in full.items() if (tools := _parsed(value, f"'{key}'"))]
    if len(given) > 1:
        raise RowFault(f"it has both {' and '.join(map(repr, TOOLS_KEYS))}")
    tools = given[0] if given else []
    tools = tools if isinstance(tools, list) else [tools]
    return [_function(_parsed(tool, "a tool"), "a tool") for tool in tools]


def _calls(value: Json) -> list[Json]:
    """Calls in OpenAI's form, out of a call or a list of calls in its or a bare form."""
    calls = value if isinstance(value, list) else [value]
    return [_function(_parsed(call, "a call"), "a call") for call in calls]


def _function(value: Json, what: str) -> Json:
    if not isinstance(value, dict):
        raise RowFault(f"{what} is no object")
    inner = value.get("function", value)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowFault(f"{what} has no name")
    if inner is not value:
        return value
    bare = {key: part for key, part in value.items() if key not in ("type", "id")}
    outer = {key: value[key] for key in ("id",) if key in value}
    return {**outer, "type": "function", "function": bare}


def _parsed(value: Json, what: str) -> Any:
    """A value, or what a string says in JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{what} is not JSON: {error}") from error
