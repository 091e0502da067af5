"""How models ask for functions: finding calls in an answer, and making an answer be one.

Each family was taught its own way of writing a call; the template tells which.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_MOST_CALLS = 8
_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9
"""Mistral's templates refuse ids of another length, and no others mind."""
_ONE_MARKED = re.compile(r"\s*([\w.-]+)\[ARGS\]\s*")


@dataclass(frozen=True)
class Dialect:
    """A way of writing calls.

    Attributes:
        name: what it is called.
        opening: text that a call begins with.
        closing: text that it ends with; empty if the answer ends with it.
        arguments: what the object of the arguments is called.
        bare: whether an answer that is an object is a call without the opening.
        special: whether the opening is a control token.
        list: whether calls stand in a list.
    """

    name: Literal["hermes", "mistral", "llama3"]
    opening: str
    closing: str = ""
    arguments: str = "arguments"
    bare: bool = False
    special: bool = True
    list: bool = False


HERMES = Dialect("hermes", "<tool_call>", "</tool_call>", special=False)
MISTRAL = Dialect("mistral", "[TOOL_CALLS]", list=True)
LLAMA3 = Dialect("llama3", "<|python_tag|>", arguments="parameters", bare=True)


def dialect_of(template: str) -> Dialect:
    """The dialect that a chat template speaks; Hermes' if it speaks of no calls."""
    if HERMES.opening in template:
        return HERMES
    if MISTRAL.opening in template:
        return MISTRAL
    if LLAMA3.opening in template or '{"name": function name, "parameters"' in template:
        return LLAMA3
    return HERMES


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask for.

    Attributes:
        name: its name.
        description: what it does.
        parameters: JSON schema of its arguments.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """As templates expect it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters) or {"type": "object", "properties": {}},
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """A function that a model asks for.

    Attributes:
        name: of the function.
        arguments: as JSON.
        id: by which the function's result is told to the model.
    """

    name: str
    arguments: str
    id: str = field(
        default_factory=lambda: "".join(map(secrets.choice, [_ID_LETTERS] * _ID_LENGTH))
    )


class ToolCallParser:
    """Tells calls from text in an answer that comes piece by piece.

    What could not be read as a call of a known function is text: nothing is lost.

    Args:
        dialect: how the model writes calls.
        names: of the functions.
    """

    def __init__(self, dialect: Dialect, names: Iterable[str]) -> None:
        self._dialect = dialect
        self._names = frozenset(names)
        self._held = ""
        self._begun = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take the next piece; give the text that is sure to be none, and whole calls."""
        dialect = self._dialect
        shown, calls = "", list[ToolCall]()
        self._held += text
        while True:
            before, opening, rest = self._held.partition(dialect.opening)
            if not opening:
                if dialect.bare and self._maybe_bare():
                    return shown, calls
                keep = overlap(self._held, dialect.opening)
                cut = len(self._held) - keep
                sure, self._held = self._held[:cut], self._held[cut:]
                self._begun = self._begun or bool(sure.strip())
                return shown + sure, calls
            shown, self._begun = shown + before, True
            self._held = opening + rest
            body, closing, after = (
                rest.partition(dialect.closing) if dialect.closing else (rest, "", "")
            )
            if not closing:
                return shown, calls
            found = self._read(body)
            calls += found
            shown += "" if found else opening + body + closing
            self._held = after

    def _maybe_bare(self) -> bool:
        return not self._begun and self._held.lstrip()[:1] in ("", "{")

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was still held back at the end of the answer."""
        rest, self._held = self._held, ""
        found = self._read(rest.removeprefix(self._dialect.opening))
        return ("" if found else rest), found

    def _read(self, body: str) -> list[ToolCall]:
        if self._dialect.name == "mistral" and (marked := _ONE_MARKED.match(body)):
            values: list[Any] = [{"name": marked[1], "arguments": _json(body[marked.end() :])}]
        else:
            values = _objects(body)
        calls = [self._call(value) for value in values]
        return [c for c in calls if c] if all(calls) else []

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        other = "parameters" if self._dialect.arguments == "arguments" else "arguments"
        arguments = value.get(self._dialect.arguments, value.get(other))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(body: str) -> list[Any]:
    """JSON values one after the other, also between semicolons or in a list."""
    values, decoder = list[Any](), json.JSONDecoder()
    rest = body.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(" \t\r\n;")
    return values


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of a text that a marker begins with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


# Making an answer be a call.


def forced_grammar(
    dialect: Dialect,
    tools: Sequence[Tool],
    *,
    several: bool,
    grammar: Callable[[Any], str],
) -> str:
    """The grammar of answers that are calls and nothing else.

    Args:
        dialect: how the model writes calls.
        tools: the functions that may be called.
        several: whether there may be more than one call.
        grammar: makes a grammar out of a JSON schema.
    """
    most = _MOST_CALLS if several else 1
    call: dict[str, Any] = {"anyOf": [_schema(dialect, n, t.name) for n, t in enumerate(tools)]}
    call["$defs"] = {f"arguments{n}": _hoisted(t.parameters, n) for n, t in enumerate(tools)}
    if dialect.list:
        definitions = call.pop("$defs")
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": most}
        call["$defs"] = definitions
    rules = re.sub(r"^root ::=", "tool-call ::=", grammar(call), count=1, flags=re.MULTILINE)
    one = "tool-call"
    if dialect.closing:
        one = f'{_quoted(dialect.opening)} "\\n" tool-call "\\n" {_quoted(dialect.closing)}'
    if dialect.list:
        return f"root ::= {_quoted(dialect.opening)} tool-call\n{rules}"
    between = '"\\n"' if dialect.closing else '"; "'
    more = f" ({between} {one}){{0,{most - 1}}}" if most > 1 else ""
    return f"root ::= {one}{more}\n{rules}"


def _schema(dialect: Dialect, number: int, name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": name},
            dialect.arguments: {"$ref": f"#/$defs/arguments{number}"},
        },
        "required": ["name", dialect.arguments],
        "additionalProperties": False,
    }


def _hoisted(parameters: Mapping[str, Any], number: int) -> Any:
    """A schema whose references still hold where it stands now."""
    place = f"#/$defs/arguments{number}"

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: place + v[1:] if _is_reference(k, v) else moved(v) for k, v in value.items()}
        return [moved(v) for v in value] if isinstance(value, list) else value

    return moved(parameters) or {"type": "object"}


def _is_reference(key: str, value: Any) -> bool:
    return key == "$ref" and isinstance(value, str) and value.startswith("#")


def _quoted(text: str) -> str:
    return json.dumps(text)
