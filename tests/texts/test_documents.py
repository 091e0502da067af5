"""What is read out of files of rows, whatever their container, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ggufkit.errors import GgufkitError, IntegrityError, SourceError, UsageError
from ggufkit.texts.documents import Conversations, read_file, read_for_calibration
from tests.texts.tables import ARROW, CONTAINERS, Log, write, write_jsonl, write_parquet

TURNS = [{"role": "user", "content": "In barns?"}, {"role": "assistant", "content": "At times."}]
SHARED = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Under leaves."}]


def messages(path: Path, column: str | None = None) -> list[Any]:
    found = read_for_calibration(path, column)
    assert isinstance(found, Conversations)
    return [list(conversation.messages) for _, conversation in found.rows]


# --- which column ---


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_short_string_beside_a_chat_is_not_the_text(container: str, tmp_path: Path) -> None:
    """No perplexity of "forum-a", and no calibration on it."""
    path = write(tmp_path, container, [{"source": "forum-a", "conversations": SHARED}] * 3)
    with pytest.raises(UsageError, match=r"holds chats \(conversations\)") as caught:
        read_file(path)
    assert "--column conversations" in caught.value.hint
    assert "source" in caught.value.hint
    log = Log()
    expected = "\n\n".join(["Where?\nUnder leaves."] * 3)
    assert read_file(path, "conversations", log) == expected
    assert "bare text of the turns" in log.warnings[0]
    assert messages(path)[0][1] == {"role": "assistant", "content": "Under leaves."}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "paragraphs": ["Some words.", "And others."]},
        {"id": "a", "article": {"title": "Hedgehogs", "body": "They sleep."}},
        {"id": "a", "title": "Hedgehogs"},
        {"paragraphs": ["Some words."]},
    ],
    ids=str,
)
def test_no_column_is_guessed_where_two_could_be_meant(
    row: dict[str, Any], container: str, tmp_path: Path
) -> None:
    path = write(tmp_path, container, [row] * 3)
    for read in (read_file, read_for_calibration):
        with pytest.raises(UsageError) as caught:
            read(path)
        named = caught.value.message + caught.value.hint
        assert all(name in named for name in row)


def test_bytes_beside_a_string_may_be_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, pa.table({"id": ["a"], "body": [b"Some words."]}))
    with pytest.raises(UsageError, match=r"body \(holds bytes, not strings\)"):
        read_file(path)
    write_parquet(path, pa.table({"id": ["a"], "text": [b"Some words."]}))
    with pytest.raises(UsageError, match=r"Column 'text' of .* holds bytes, not strings"):
        read_file(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_two_columns_of_chats_are_named(container: str, tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "conversations": SHARED}]
    path = write(tmp_path, container, rows)
    with pytest.raises(UsageError, match=r"messages \(holds chats\), conversations") as caught:
        read_for_calibration(path)
    assert "--column: messages, conversations" in caught.value.hint
    assert messages(path, "conversations")[0][0]["content"] == "Where?"


@pytest.mark.parametrize("container", CONTAINERS)
def test_preferences_are_not_guessed(container: str, tmp_path: Path) -> None:
    path = write(tmp_path, container, [{"prompt": "In barns?", "chosen": TURNS, "rejected": TURNS}])
    with pytest.raises(UsageError, match="chosen") as caught:
        read_for_calibration(path)
    assert "rejected" in caught.value.hint
    assert messages(path, "chosen") == [TURNS]


@pytest.mark.parametrize("container", CONTAINERS)
def test_chats_come_before_pairs_and_these_before_text_and_it_is_said(
    container: str, tmp_path: Path
) -> None:
    pair = {"instruction": "Add.", "output": "3"}
    row = {"text": "rendered", **pair, "messages": TURNS}
    log = Log()
    path = write(tmp_path, container, [row])
    found = read_for_calibration(path, None, log)
    assert isinstance(found, Conversations)
    assert found.kind == "chats"
    assert "instruction, output, text is not" in log.said[0]
    path = write(tmp_path, container, [{"text": "rendered", **pair}])
    found = read_for_calibration(path, None, log)
    assert isinstance(found, Conversations)
    assert found.kind == "pairs"
    assert "text is not" in log.said[1]
    assert read_file(path) == "rendered"


@pytest.mark.parametrize("container", CONTAINERS)
def test_two_questions_are_not_guessed(container: str, tmp_path: Path) -> None:
    path = write(tmp_path, container, [{"question": "a", "prompt": "b", "answer": "c"}])
    with pytest.raises(UsageError, match="3 columns with text"):
        read_for_calibration(path)


# --- how columns are stored ---


STRINGS = ["some words here", None, "and others there"]


@pytest.mark.parametrize("container", ARROW)
@pytest.mark.parametrize(
    "column",
    [
        pa.array(STRINGS),
        pa.array(STRINGS, pa.large_string()),
        pa.array(STRINGS, pa.string_view()),
        pa.array(STRINGS).dictionary_encode(),
        pa.array(STRINGS, pa.large_string()).dictionary_encode(),
        pa.chunked_array([STRINGS[:1], STRINGS[1:]]),
    ],
    ids=lambda column: str(column.type),
)
def test_strings_however_they_are_stored(column: Any, container: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{container}"
    try:
        ARROW[container](path, pa.table({"id": [1, 2, 3], "text": column}))
    except pa.ArrowNotImplementedError:
        pytest.skip("this version of pyarrow cannot write that")
    log = Log()
    assert read_file(path, None, log) == "some words here\n\nand others there"
    assert "1 of 3 rows is left out: it has no 'text' (1)" in log.warnings[0]


def test_runs_of_the_same_string(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    column = pa.RunEndEncodedArray.from_arrays([2, 3], ["same", "other"])
    ARROW["file.arrow"](path, pa.table({"text": column}))
    assert read_file(path) == "same\n\nsame\n\nother"


@pytest.mark.parametrize(
    "wrap", [pa.list_, pa.large_list, lambda item: pa.list_(item, 2), pa.list_view]
)
def test_chats_however_lists_are_stored(wrap: Any, tmp_path: Path) -> None:
    """Fields that Arrow adds to a turn because another has them are not there."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    turn = pa.array([turn for turn in chat]).type
    path = tmp_path / "a.arrow"
    ARROW["file.arrow"](path, pa.table({"messages": pa.array([chat], wrap(turn))}))
    (found,) = messages(path)
    assert found == [chat[0], {"content": None, **chat[1]}]


def test_what_json_has_no_form_for_becomes_text(tmp_path: Path) -> None:
    import datetime

    turn = {"role": "user", "content": "hi", "timestamp": datetime.datetime(2024, 1, 2)}
    path = tmp_path / "a.parquet"
    write_parquet(path, pa.table({"conversation": [[turn]]}))
    assert messages(path)[0][0]["timestamp"] == "2024-01-02 00:00:00"


def test_chats_as_strings_of_json(tmp_path: Path) -> None:
    for container in CONTAINERS:
        path = write(tmp_path, container, [{"id": "a", "messages": json.dumps(TURNS)}])
        assert messages(path) == [TURNS]


def test_a_directory_s_name_is_no_column(tmp_path: Path) -> None:
    """Data sets of several files keep values in names such as KEY=VALUE; one file has its own."""
    (tmp_path / "text=oops").mkdir()
    path = tmp_path / "text=oops/a.parquet"
    write_parquet(path, pa.table({"body": ["Some words."]}))
    assert read_file(path) == "Some words."


def test_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    ARROW["stream.arrow"](path, pa.table([["a"], ["b"]], names=["text", "text"]))
    with pytest.raises(SourceError, match="several columns called text"):
        read_file(path)


def test_strings_that_are_no_utf8(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0")
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    path = tmp_path / "a.arrow"
    ARROW["file.arrow"](path, pa.table({"text": column}))
    with pytest.raises(IntegrityError, match="Invalid UTF8"):
        read_file(path)


# --- JSON ---


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"text": "one"},\n {"text": "two"}]', "one\n\ntwo"),
        ("a.jsonl", '[{"text": "one"}, {"text": "two"}]', "one\n\ntwo"),
        ("a.json", '{"version": 1, "data": [{"text": "one"}, {"text": "two"}]}', "one\n\ntwo"),
        ("a.json", '{\n "text": "one",\n "tags": [{"a": 1}]\n}\n', "one"),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', "one\n\ntwo"),
        ("a.json", '{"text": "one"}', "one"),
        ("a.json", '\ufeff[{"text": "one"}]', "one"),
        ("a.ndjson", '{"text": "one\\u2028"}\r\n\r\n{"text": "two"}\r\n', "one\u2028\n\ntwo"),
    ],
)
def test_forms_of_json(name: str, content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_file(path) == expected


@pytest.mark.parametrize("indent", [None, 2])
def test_one_chat_alone_is_no_list_of_rows(indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for row in ({"messages": TURNS}, {"id": 7, "log": SHARED}):
        path.write_text(json.dumps(row, indent=indent))
        assert len(messages(path)) == 1


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"text": "one"},\n {"te', "line 2"),
        ('[{"text": "one"}, 7]', "row 2"),
        ('[{"text": "one"}]\n[]', "line 1"),
        ("7", "line 1"),
        ('{"text": "one"}\n\n{"te', "line 3"),
    ],
)
def test_broken_json_is_named(content: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(GgufkitError, match=f"^{place} of a.json is no"):
        read_file(path)


# --- rows that are not like others ---


MIXED = [{"text": "first words"}, {"content": "Where do they sleep?"}, {"messages": TURNS}]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_would_lose_most_rows_is_refused(container: str, tmp_path: Path) -> None:
    path = write(tmp_path, container, MIXED * 5)
    with pytest.raises(
        SourceError, match=r"10 of 15 rows are left out: it has no 'text' \(10\)"
    ) as e:
        read_file(path)
    assert all(name in e.value.hint for name in ("text", "content", "messages"))
    with pytest.raises(SourceError, match="10 of 15 rows are left out"):
        read_for_calibration(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_few_rows_without_the_column_are_counted(container: str, tmp_path: Path) -> None:
    rows = [{"text": "words"}] * 7 + [{"text": "  "}] + [{"text": None, "content": "lost"}] * 2
    for read in (read_file, read_for_calibration):
        log = Log()
        assert str(read(write(tmp_path, container, rows), None, log)).count("words") == 7
        left_out, blank = log.warnings
        assert "2 of 10 rows are left out: it has no 'text' (2)" in left_out
        assert " 9 of rows" in left_out
        assert "1 of 10 rows is blank in 'text'" in blank


def test_a_column_that_is_asked_for_may_be_sparse(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"n": 1}] * 9 + [{"text": "words"}])
    log = Log()
    assert read_file(path, "text", log) == "words"
    assert "9 of 10 rows are left out" in log.warnings[0]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_few_chats_without_turns_are_counted(container: str, tmp_path: Path) -> None:
    empty: list[dict[str, Any]] = [
        {"messages": [], "text": "a note"},
        {"messages": None},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]},
    ]
    log = Log()
    path = write(tmp_path, container, [{"messages": TURNS}] * 5 + empty)
    found = read_for_calibration(path, None, log)
    assert isinstance(found, Conversations)
    assert [number for number, _ in found.rows] == [1, 2, 3, 4, 5]
    assert "3 of 8 rows are left out" in log.warnings[0]
    assert "a chat in which nothing is said (1)" in log.warnings[0]


@pytest.mark.parametrize("container", CONTAINERS)
def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(
    container: str, tmp_path: Path
) -> None:
    bad = {"messages": [{"role": "wizard", "content": "x"}]}
    path = write(tmp_path, container, [{"messages": TURNS}, bad, bad])
    with pytest.raises(GgufkitError, match=r"^(line|row) 2 of rows\.") as caught:
        read_for_calibration(path)
    assert "unknown role 'wizard'" in caught.value.message
    assert "(2 of 3 rows cannot be used)" in caught.value.message


def test_lines_of_a_file_are_not_blank_rows(tmp_path: Path) -> None:
    log = Log()
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": text} for text in ("", " = Title = \n", "", " Words . \n")])
    assert read_file(path, None, log) == " \n = Title = \n \n Words . \n"
    assert log.warnings == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_rows(container: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{container}"
    if container in ARROW:
        ARROW[container](path, pa.table({"text": pa.array([], pa.string())}))
    else:
        path.write_text("[]" if container == "json" else "\n")
    for read in (read_file, read_for_calibration):
        with pytest.raises(SourceError, match="has no rows"):
            read(path)
