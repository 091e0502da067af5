import json
from typing import Any

import pytest

from ggufkit.errors import UsageError
from ggufkit.serve.chat import Style
from ggufkit.serve.model import Sampling
from ggufkit.serve.rows import Row, read_rows


def read(
    *rows: object,
    style: Style | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
) -> list[Row]:
    text = b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    return read_rows(
        text,
        name="file",
        sampling=sampling or Sampling(),
        style=style or Style(),
        system=system,
        grammar=lambda schema: f"grammar of {schema}",
    )


def contents(row: Row) -> list[tuple[str, str]]:
    assert row.messages is not None
    return [(m["role"], m["content"]) for m in row.messages]


def test_prompts_and_conversations() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    one, two, three = read(
        {"prompt": "Hi", "id": 7},
        b"  ",
        {"messages": talk, "system": "Be brief"},
        {"prompt": "Hi", "id": "a"},
        system="Be long",
        style=Style(prefix="<", suffix=">"),
    )
    assert contents(one) == [("system", "Be long"), ("user", "<Hi>")]
    assert contents(two) == [("system", "Be brief"), ("user", "Hi"), ("assistant", "Ho")]
    assert (one.line, two.line, three.line) == (1, 3, 4)
    assert (one.id, three.id) == (7, "a")


def test_a_completion_is_bare_text() -> None:
    (row,) = read({"prompt": "Once"}, style=Style(completion=True, suffix="..."), system="Tale: ")
    assert (row.prompt, row.messages) == ("Tale: Once...", None)


def test_a_conversation_s_own_system_message_wins() -> None:
    talk = [{"role": "system", "content": "Mine"}, {"role": "user", "content": "Hi"}]
    (row,) = read({"messages": talk}, system="Theirs")
    assert contents(row) == [("system", "Mine"), ("user", "Hi")]


def test_rows_say_how_they_are_answered() -> None:
    own = {"temperature": 0, "top_k": 3, "max_tokens": 9, "seed": 1, "min_p": 0.1}
    plain, changed, schema = read(
        {"prompt": "a"},
        {"prompt": "b", **own, "stop": "x", "grammar": "root ::= any"},
        {"prompt": "c", "stop": ["x", "y"], "json_schema": {"type": "string"}, "top_p": None},
        sampling=Sampling(temperature=0.5, top_p=0.9),
    )
    assert plain.sampling == Sampling(temperature=0.5, top_p=0.9)
    assert changed.sampling == Sampling(**own, top_p=0.9, stop=("x",), grammar="root ::= any")
    assert schema.sampling.grammar == "grammar of {'type': 'string'}"
    assert (schema.sampling.stop, schema.sampling.top_p) == (("x", "y"), 0.9)


def test_made_ids_do_not_depend_on_the_order() -> None:
    rows: list[dict[str, Any]] = [{"prompt": p, "top_k": 1} for p in "abba"]
    ids = [row.id for row in read(*rows)]
    assert len(set(ids)) == 4
    assert {row.id for row in read(*reversed(rows))} == set(ids)
    turned = {"top_k": 1, "prompt": "a"}
    assert read(turned)[0].id == ids[0]


def test_messages_may_have_parts_calls_and_reasoning() -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]},
        {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f"},
        {"role": "assistant", "content": "Ho", "reasoning_content": "because"},
        {"role": "user", "content": "And then?"},
    ]
    (row,) = read({"messages": talk})
    assert row.messages is not None
    assert list(row.messages) == talk


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number"),
        (b'{"prompt": "\\ud83d"}', "it is not JSON"),
        (3, "it is not an object"),
        ({}, "either 'prompt' or 'messages'"),
        ({"prompt": "a", "messages": []}, "either 'prompt' or 'messages'"),
        ({"prompt": 3}, "prompt is not text"),
        ({"prompt": None}, "prompt is not text"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["Hi"]}, "a message is not a role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "a message is not a role"),
        ({"messages": [{"role": "user", "content": 5}]}, "neither text nor a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part of type 'None'"),
        ({"messages": [{"role": "user", "content": "x", "images": []}]}, "no field 'images'"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "name of a message is not"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            "tool_calls of a message is no list",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "a message is not a role"),
        ({"messages": [{"role": "user"}]}, "a message is not a role"),
        ({"prompt": "a", "temprature": 1}, "no field 'temprature'"),
        ({"prompt": "a", "temperature": "1"}, "temperature is '1'"),
        ({"prompt": "a", "temperature": True}, "temperature is True"),
        ({"prompt": "a", "top_k": 1.5}, "top_k is 1.5"),
        ({"prompt": "a", "top_p": 1.5}, "top_p is 1.5"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "a", "stop": [""]}, "stop is neither"),
        ({"prompt": "a", "stop": 3}, "stop is neither"),
        ({"prompt": "a", "grammar": 3}, "grammar is not text"),
        ({"prompt": "a", "grammar": 'root ::= (((("x"?){99}){99}){99}){99}'}, "ways to go on"),
        ({"prompt": "a", "grammar": "g", "json_schema": {}}, "both a grammar and a JSON schema"),
        ({"prompt": "a", "system": 3}, "system is not text"),
        (
            {"messages": [{"role": "system", "content": "a"}], "system": "b"},
            "two system messages",
        ),
        ({"prompt": "a", "id": 1.5}, "its id 1.5 is neither"),
        ({"prompt": "a", "id": True}, "its id True is neither"),
    ],
)
def test_a_bad_row_is_named(row: object, message: str) -> None:
    with pytest.raises(UsageError, match="nothing was begun") as caught:
        read({"prompt": "good"}, b"", row)
    assert "\n  line 3: " in caught.value.message
    assert message in caught.value.message


def test_all_bad_rows_are_named_but_not_without_end() -> None:
    with pytest.raises(UsageError) as caught:
        read(*[{}] * 15)
    assert "line 10: " in caught.value.message
    assert "line 11: " not in caught.value.message
    assert caught.value.message.endswith("and 5 more")


def test_ids_must_differ() -> None:
    with pytest.raises(UsageError, match="several rows have id 'a'"):
        read({"prompt": "1", "id": "a"}, {"prompt": "2", "id": "a"})


def test_a_file_without_rows() -> None:
    with pytest.raises(UsageError, match="has no rows"):
        read(b"\n \n")


def test_a_completion_has_no_messages() -> None:
    with pytest.raises(UsageError, match="need a chat template"):
        read({"messages": [{"role": "user", "content": "x"}]}, style=Style(completion=True))
