"""Calls of functions: read from answers that come in pieces, and forced."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufkit.serve.toolcalls import (
    HERMES,
    LLAMA3,
    MISTRAL,
    Dialect,
    Tool,
    ToolCall,
    ToolCallParser,
    dialect_of,
    forced_grammar,
)

F = ("f", '{"x": "a b"}')
G = ("g", "{}")
ANSWERS = {
    "hermes": (HERMES, '<tool_call>\n{"name": "f", "arguments": {"x": "a b"}}\n</tool_call>', [F]),
    "hermes, two": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"x": "a b"}}</tool_call>'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        [F, G],
    ),
    "hermes, not closed": (HERMES, '<tool_call>{"name": "g", "arguments": {}}', [G]),
    "arguments as text": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": \\"a b\\"}"}</tool_call>',
        [F],
    ),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": "a b"}}, {"name": "g", "arguments": {}}]',
        [F, G],
    ),
    "mistral, newer": (MISTRAL, '[TOOL_CALLS]f[ARGS]{"x": "a b"}', [F]),
    "llama": (LLAMA3, '{"name": "f", "parameters": {"x": "a b"}}', [F]),
    "llama, marked": (LLAMA3, '<|python_tag|>{"name": "g", "parameters": {}}', [G]),
    "llama, two": (
        LLAMA3,
        '{"name": "f", "parameters": {"x": "a b"}}; {"name": "g", "parameters": {}}',
        [F, G],
    ),
}
TEXTS = {
    "no call": (HERMES, "Just <tool text> and {braces}."),
    "an unknown function": (HERMES, '<tool_call>{"name": "h", "arguments": {}}</tool_call>'),
    "broken": (HERMES, '<tool_call>{"name": "f", </tool_call> more'),
    "no object": (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    "half a marker": (HERMES, "so <tool_ca"),
    "an object": (LLAMA3, '{"some": "JSON"}'),
    "braces later": (LLAMA3, 'It is {"name": "f", "parameters": {}}'),
    "nothing": (MISTRAL, ""),
    "deep": (MISTRAL, "[TOOL_CALLS]" + "[" * 10_000),
}


def read(dialect: Dialect, pieces: Sequence[str]) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser(dialect, ("f", "g"))
    found = [*map(parser.push, pieces), parser.finish()]
    return "".join(text for text, _ in found), [call for _, calls in found for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("dialect", "answer", "calls"), ANSWERS.values(), ids=ANSWERS)
def test_calls_are_read(
    dialect: Dialect, answer: str, calls: list[tuple[str, str]], size: int
) -> None:
    pieces = [answer[n : n + size] for n in range(0, len(answer), size)]
    text, found = read(dialect, pieces)
    assert [(c.name, c.arguments) for c in found] == calls
    assert text == ""
    assert len({c.id for c in found}) == len(found)


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize(("dialect", "answer"), TEXTS.values(), ids=TEXTS)
def test_what_is_no_call_stays_text(dialect: Dialect, answer: str, size: int) -> None:
    pieces = [answer[n : n + size] for n in range(0, len(answer), size)]
    assert read(dialect, pieces) == (answer, [])


def test_text_around_calls_is_kept_and_comes_early() -> None:
    call = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    assert read(HERMES, [f"Let me see. {call} Done."])[0] == "Let me see.  Done."
    parser = ToolCallParser(HERMES, ("g",))
    assert parser.push("Let me <") == ("Let me ", [])
    assert parser.push("b") == ("<b", [])


@given(st.lists(st.text(alphabet='<tool_cal>/{}"[]; ', max_size=12), max_size=8))
def test_nothing_is_lost(pieces: list[str]) -> None:
    for dialect in (HERMES, MISTRAL, LLAMA3):
        text, calls = read(dialect, pieces)
        assert calls or text == "".join(pieces)


def test_templates_tell_the_dialect() -> None:
    assert dialect_of("{{ '<tool_call>' }}") is HERMES
    assert dialect_of("{{ '[TOOL_CALLS]' }}") is MISTRAL
    assert dialect_of("{{ '<|python_tag|>' }}") is LLAMA3
    assert dialect_of("nothing") is HERMES


def test_references_in_schemas_hold_where_they_are_put() -> None:
    asked: list[object] = []

    def grammar(schema: object) -> str:
        asked.append(schema)
        return "root ::= object\nobject ::= root-part"

    parameters = {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"$ref": "#"}}}
    tools = [Tool("f"), Tool("g", parameters=parameters)]
    made = forced_grammar(HERMES, tools, several=False, grammar=grammar)
    assert made == (
        'root ::= "<tool_call>" "\\n" tool-call "\\n" "</tool_call>"\n'
        "tool-call ::= object\nobject ::= root-part"
    )
    told = json.loads(json.dumps(asked[0]))
    moved = told["$defs"]["arguments1"]
    assert moved["properties"]["a"]["$ref"] == "#/$defs/arguments1/$defs/b"
    assert moved["$defs"]["b"]["$ref"] == "#/$defs/arguments1"
    several = forced_grammar(LLAMA3, tools, several=True, grammar=grammar)
    assert several.startswith('root ::= tool-call ("; " tool-call){0,7}\n')
    listed = forced_grammar(MISTRAL, tools, several=True, grammar=grammar)
    assert listed.startswith('root ::= "[TOOL_CALLS]" tool-call\n')
    assert asked[-1]["maxItems"] == 8  # type: ignore[index]
