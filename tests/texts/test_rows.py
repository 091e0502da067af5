"""Rows of chats, and of questions with answers, in one form."""

import json
from pathlib import Path
from typing import Any

import pytest

from ggufkit.errors import GgufkitError
from ggufkit.texts.documents import Conversations, read_for_calibration
from ggufkit.texts.rows import Conversation
from tests.texts.tables import CONTAINERS, write, write_jsonl

USER = {"role": "user", "content": "Is it cold?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SYSTEM = {"role": "system", "content": "Speak like a sailor."}
FIRST = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "a"}]
THIRD = [{"role": "user", "content": "third"}, {"role": "assistant", "content": "c"}]


def conversation(row: dict[str, Any], directory: Path, container: str = "jsonl") -> Conversation:
    found = read_for_calibration(write(directory, container, [row]))
    assert isinstance(found, Conversations)
    ((_, read),) = found.rows
    return read


def said(read: Conversation) -> list[dict[str, Any]]:
    return [dict(message) for message in read.messages]


ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "openai": ({"messages": [SYSTEM, *THIRD]}, [SYSTEM, *THIRD]),
    "sharegpt": (
        {
            "system": SYSTEM["content"],
            "conversations": [{"from": "human", "value": "third"}, {"from": "gpt", "value": "c"}],
        },
        [SYSTEM, *THIRD],
    ),
    "lmsys": ({"conversation": THIRD, "model": "some"}, THIRD),
    "unusual name": ({"id": "x", "exchange": THIRD}, THIRD),
    "alpaca": (
        {
            "system": SYSTEM["content"],
            "instruction": "third",
            "input": "",
            "output": "c",
            "history": [["first", "a"]],
        },
        [SYSTEM, *FIRST, *THIRD],
    ),
    "dolly": (
        {"instruction": "third", "context": "It rains.", "response": "c", "category": "qa"},
        [{"role": "user", "content": "third\n\nIt rains."}, THIRD[1]],
    ),
    "openorca": (
        {"id": "1", "system_prompt": SYSTEM["content"], "question": "third", "response": "c"},
        [SYSTEM, *THIRD],
    ),
    "prompt and completion as turns": ({"prompt": THIRD[:1], "completion": THIRD[1:]}, THIRD),
    "system twice, the same": (
        {"system": SYSTEM["content"], "messages": [SYSTEM, *THIRD]},
        [SYSTEM, *THIRD],
    ),
    "two systems in the chat": (
        {"messages": [SYSTEM, SYSTEM, {**SYSTEM, "content": "Be brief."}, *THIRD]},
        [SYSTEM, SYSTEM, {**SYSTEM, "content": "Be brief."}, *THIRD],
    ),
    "history before a system message": (
        {"history": [["first", "a"]], "messages": [SYSTEM, *THIRD]},
        [SYSTEM, *FIRST, *THIRD],
    ),
    "blank system": ({"system": " ", "messages": THIRD}, THIRD),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", ROWS)
def test_forms_of_chats_and_pairs(form: str, container: str, tmp_path: Path) -> None:
    row, expected = ROWS[form]
    assert said(conversation(row, tmp_path, container)) == expected


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *(("human", "user"), ("user", "user"), ("gpt", "assistant"), ("assistant", "assistant")),
        *(("chatgpt", "assistant"), ("model", "assistant"), ("bot", "assistant")),
        *(("system", "system"), ("developer", "system"), ("tool", "tool")),
        *(("function", "tool"), ("observation", "tool"), ("ipython", "tool")),
    ],
)
def test_names_of_roles(name: str, role: str, tmp_path: Path) -> None:
    for turn in ({"from": name, "value": "x"}, {"role": name, "content": "x"}):
        read = conversation({"messages": [USER, turn]}, tmp_path)
        assert said(read) == [USER, {"role": role, "content": "x"}]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "function_call", "value": json.dumps([CALL["function"]])},
    ],
    ids=str,
)
def test_calls_are_kept(calling: dict[str, Any], container: str, tmp_path: Path) -> None:
    answers = {"from": "observation", "value": "-3"} if "from" in calling else None
    turns = [USER, calling, answers or {"role": "tool", "content": "-3", "name": "weather"}]
    if "from" in calling:
        turns[0] = {"from": "human", "value": USER["content"]}
    first, call, answer = said(conversation({"messages": turns}, tmp_path, container))
    assert first == USER
    assert call.pop("content", None) in (None, "")
    assert call == {"role": "assistant", "tool_calls": [CALL]}
    assert (answer["role"], answer["content"]) == ("tool", "-3")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL["function"]]},
        {"tools": TOOL},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [TOOL["function"]]},
        {"functions": json.dumps([TOOL["function"]]), "tools": "[]"},
    ],
    ids=str,
)
def test_definitions_of_functions_are_kept(
    tools: dict[str, Any], container: str, tmp_path: Path
) -> None:
    for row in ({"messages": THIRD}, {"question": "third", "answer": "c"}):
        assert conversation({**row, **tools}, tmp_path, container).tools == (TOOL,)


def test_fields_that_other_tools_have_are_none_of_this_one(tmp_path: Path) -> None:
    """A file of one table has the parameters of all functions in each, null where foreign."""
    functions = [
        {"name": name, "parameters": {"properties": {argument: {"type": "string"}}}}
        for name, argument in (("f", "content"), ("g", "x"))
    ]
    for container in ("parquet", "stream.arrow"):
        row = {"messages": THIRD, "tools": functions}
        found = conversation(row, tmp_path, container).tools
        assert [tool["function"] for tool in found] == functions


@pytest.mark.parametrize("container", CONTAINERS)
def test_parts_and_reasoning_are_kept(container: str, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yo"}], "thinking": "Greet."},
    ]
    assert said(conversation({"messages": turns}, tmp_path, container)) == turns


def test_the_form_of_all_reads_back_as_the_same(tmp_path: Path) -> None:
    for row, _ in ROWS.values():
        read = conversation({**row, "tools": [TOOL]}, tmp_path)
        again = conversation(read.to_row(), tmp_path)
        assert again == read
        assert read.tools == (TOOL,)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [{"role": "user", "content": 7}]}, "content is not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "not text: a part of type image_url",
        ),
        ({"messages": [{"from": "function_call", "value": "no JSON"}]}, "is not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": ["{"]}]}, "a call is not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "a call has no name"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "has no 'content'"),
        ({"messages": [{"from": "gpt", "role": "user", "content": "x"}]}, "both 'from' and 'role'"),
        ({"messages": THIRD, "tools": "a hammer"}, "'tools' is not JSON"),
        ({"messages": THIRD, "tools": ["{}"]}, "a tool has no name"),
        ({"messages": THIRD, "tools": [TOOL], "functions": [TOOL]}, "'tools' and 'functions'"),
        ({"messages": THIRD, "system": 7}, "'system' is not text"),
        ({"messages": [SYSTEM, *THIRD], "system": "Other."}, "two system messages"),
        ({"messages": THIRD, "system": "One.", "system_prompt": "Other."}, "two system messages"),
        ({"question": "q", "answer": "a", "history": "none"}, "'history' is no list"),
        ({"question": "q", "answer": "a", "history": [["q"]]}, "'history' holds something else"),
        ({"question": "q", "answer": "a", "history": [["q", None]]}, "'history' is not text"),
        ({"messages": [{**USER, "weight": float("nan")}]}, "a value that JSON does not have"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_conversation_says_why(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [row])
    with pytest.raises(GgufkitError, match=why) as caught:
        read_for_calibration(path)
    assert "line 1 of a.jsonl" in caught.value.message
    assert caught.value.hint
