"""Files as they are found, good and bad: right by a plain reference, or an error by name.

The reference reads each generated file again with nothing but json and pyarrow,
and knows which columns its family of files is about.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from ggufkit.errors import GgufkitError
from ggufkit.texts.documents import Conversations, read_file, read_for_calibration
from ggufkit.texts.load import load_calibration, load_text
from tests.texts.tables import ARROW, CONTAINERS, Log, Row, write

MANY = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FAULT, EMPTY = "fault", "empty"
"""What the reference says of rows that are nothing to read."""
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "developer": "system"}


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def attempt(read: Callable[[], Any]) -> tuple[Any, GgufkitError | None]:
    """What is read, or the error that says why it is not; any other exception is a bug."""
    try:
        return read(), None
    except GgufkitError as error:
        return None, error


# --- rows ---

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
odd = st.sampled_from([None, "", "  ", 7, 1.5, True, [], ["x"], {}, {"a": "b"}, [[1]], "\ud800"])
names = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "observation"])


def mostly(usual: st.SearchStrategy[Any], seldom: st.SearchStrategy[Any], times: int = 20) -> Any:
    return st.integers(1, times).flatmap(lambda n: seldom if n == times else usual)


SELDOM = 100
"""Odd values in so many, of which a file of chats has some dozens."""


@st.composite
def turns(draw: st.DrawFn, role: str, content: str) -> Any:
    turn: Row = {role: draw(mostly(names, st.sampled_from(["wizard", None, 3]), SELDOM))}
    turn[content] = draw(mostly(words, odd, SELDOM))
    if content == "content" and draw(st.integers(1, SELDOM)) == SELDOM:
        turn[content] = [{"type": "text", "text": draw(words)}]
    if draw(st.integers(0, 9)) == 9:
        turn["tool_calls"] = [{"function": {"name": "f", "arguments": '{"x": 1}'}}]
    for key in [k for k in turn if draw(st.integers(1, SELDOM)) == SELDOM]:
        del turn[key]
    return draw(mostly(st.just(turn), odd, SELDOM))


def chats(column: str, role: str, content: str) -> st.SearchStrategy[Row]:
    return st.fixed_dictionaries(
        {column: mostly(st.lists(turns(role, content), min_size=1, max_size=3), odd)},
        optional={"source": words, "system": mostly(words, odd)},
    )


def pairs(asked: str, answered: str) -> st.SearchStrategy[Row]:
    return st.fixed_dictionaries(
        {asked: mostly(words, odd), answered: mostly(words, odd)},
        optional={"input": words, "n": st.integers(0, 9)},
    )


FAMILIES: dict[str, st.SearchStrategy[Row]] = {
    "text": st.fixed_dictionaries({"text": mostly(words, odd)}, optional={"id": words}),
    "body": st.fixed_dictionaries({"body": mostly(words, odd)}, optional={"n": st.integers(0, 9)}),
    "two": st.fixed_dictionaries({"title": st.just("a"), "body": st.just("b")}),
    "messages": chats("messages", "role", "content"),
    "conversations": chats("conversations", "from", "value"),
    "question": pairs("question", "answer"),
    "instruction": pairs("instruction", "output"),
}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, list[Row]]:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    other = draw(st.sampled_from(sorted(FAMILIES)))
    row = mostly(FAMILIES[family], FAMILIES[other] if draw(st.booleans()) else st.just({}))
    rows = draw(st.lists(row, max_size=8))
    rows[:1] = [draw(FAMILIES[family]) for _ in rows[:1]]
    return family, draw(st.sampled_from(CONTAINERS)), rows


# --- the reference ---


def plainly_read(path: Path) -> list[Row]:
    if path.suffix in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        value = json.loads(text)
        return value["data"] if isinstance(value, dict) else value
    if path.suffix == ".parquet":
        return parquet.ParquetFile(path).read().to_pylist()
    if path.suffix == ".feather":
        return feather.read_table(path).to_pylist()
    with pa.OSFile(str(path)) as file:
        is_file = path.name.endswith("file.arrow")
        return (ipc.open_file if is_file else ipc.open_stream)(file).read_all().to_pylist()


def full(value: Any) -> Any:
    """A value without fields that are null, deep down."""
    if isinstance(value, dict):
        return {k: full(v) for k, v in value.items() if v is not None}
    return [full(v) for v in value] if isinstance(value, list) else value


def is_text(value: Any) -> bool:
    return isinstance(value, str) and "\ud800" not in value


def text_expected(row: Row, column: str) -> Any:
    value = row.get(column)
    return EMPTY if value is None else [value] if is_text(value) else FAULT


def pair_expected(row: Row, asked: str, answered: str) -> Any:
    values = [row.get(asked), row.get(answered)]
    if any(value is None or value == [] for value in values):
        return EMPTY
    if not all(map(is_text, values)) or not isinstance(row.get("input") or "", str):
        return FAULT
    question = "\n\n".join(text for text in (values[0], row.get("input") or "") if text.strip())
    if not question.strip() or not values[1].strip():
        return EMPTY
    return [("user", question), ("assistant", values[1])]


def chat_expected(row: Row, column: str) -> Any:
    value = row.get(column)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return EMPTY
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return FAULT
    system = row.get("system")
    if system is not None and not is_text(system):
        return FAULT
    said: list[Any] = []
    for turn in full(value):
        role = turn.get("from", turn.get("role"))
        content = turn.get("value", turn.get("content"))
        calls = turn.get("tool_calls")
        if isinstance(content, list) and content and all(isinstance(p, dict) for p in content):
            texts = [part.get("text") for part in content if part.get("type") == "text"]
            if len(texts) < len(content) or not all(map(is_text, texts)):
                return FAULT
        elif not is_text(content) and content is not None and content != []:
            return FAULT
        if content is None and not calls:
            return FAULT
        role = ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ("user", "assistant", "system", "tool"):
            return FAULT
        said.append((role, content, calls))
    if not any(_speaks(content) or calls for _, content, calls in said):
        return EMPTY
    if system is None or not system.strip():
        return said
    if said[0][0] != "system":
        return [("system", system, None), *said]
    return said if _joined(said[0][1]) == system else FAULT


def _joined(content: Any) -> str:
    return "\n".join(p["text"] for p in content) if isinstance(content, list) else content or ""


def _speaks(content: Any) -> bool:
    return bool(_joined(content).strip())


def _seen(found: str | Conversations, pair: bool) -> Any:
    """What the reader gives, in the reference's form."""
    if isinstance(found, str):
        return found
    given = []
    for _, conversation in found.rows:
        said = []
        for message in conversation.messages:
            calls = [{"function": c["function"]} for c in message.get("tool_calls", [])] or None
            triple = (message["role"], message.get("content"), calls)
            said.append(triple[:2] if pair else triple)
        given.append(said)
    return given


def expected_of(family: str, rows: list[Row]) -> Any:
    of: dict[str, Callable[[Row], Any]] = {
        "text": lambda row: text_expected(row, "text"),
        "body": lambda row: text_expected(row, "body"),
        "two": lambda row: FAULT,
        "messages": lambda row: chat_expected(row, "messages"),
        "conversations": lambda row: chat_expected(row, "conversations"),
        "question": lambda row: pair_expected(row, "question", "answer"),
        "instruction": lambda row: pair_expected(row, "instruction", "output"),
    }
    return [of[family](row) for row in rows]


# --- the tests ---


def _write(directory: Path, container: str, rows: list[Row]) -> Path:
    try:
        return write(directory, container, rows)
    except (pa.ArrowException, TypeError, UnicodeEncodeError):
        return write(directory, "jsonl", rows)  # no table can hold them


@MANY
@given(files())
def test_odd_files_are_read_right_or_refused(made: tuple[str, str, list[Row]]) -> None:
    family, container, rows = made
    with scratch() as directory:
        path = _write(directory, container, rows)
        plain = plainly_read(path)
        assert len(plain) == len(rows)
        expected = expected_of(family, plain)
        right = [row for row in expected if row not in (FAULT, EMPTY)]
        lost = len(expected) - len(right)
        log = Log()
        found, error = attempt(lambda: read_for_calibration(path, None, log))
        note(f"{container} {family} {plain} {expected} {error or found}")
        if error:
            event(f"{family}: refused")
            assert error.hint
            # What is whole, and of one kind, is read.
            assert lost or not rows or _more_columns(family, plain)
            return
        event(f"{family}: read")
        if _more_columns(family, plain):  # of another kind, which may come first
            count = len(found.rows) if isinstance(found, Conversations) else len(right)
            _check_the_count(len(rows) - count, len(rows), log)
            return
        assert FAULT not in expected
        assert 2 * lost < len(rows)
        _check_the_count(lost, len(rows), log)
        if family in ("text", "body"):
            texts = [text for (text,) in right]
            lines = any(texts) and all(text.endswith("\n") for text in texts if text)
            joined = "\n\n".join(text for text in texts if text)
            assert found == joined or (lines and isinstance(found, str))
        else:
            assert _seen(found, pair=len(right[0][0]) == 2) == right
        _check_the_kept_copy(path, found, directory)


def _more_columns(family: str, rows: list[Row]) -> bool:
    """Whether other columns than the family's own make it ambiguous, or another kind."""
    own = {"text": {"text", "id"}, "body": {"body", "n"}, "two": set()}
    usual = {"source", "system", "messages", "conversations", "input", "n"}
    known = own.get(family, {"question", "answer", "instruction", "output"} & set(rows[0]) | usual)
    names = {name for row in rows for name in row}
    return family == "two" or not names <= known or {"messages", "conversations"} <= names


def _check_the_count(lost: int, total: int, log: Log) -> None:
    assert not lost or any(f"{lost} of {total} rows" in warning for warning in log.warnings)


def _check_the_kept_copy(path: Path, found: str | Conversations, directory: Path) -> None:
    """What is kept for calibration reads back as the same."""
    try:
        kept = load_calibration(str(path), cache=directory / "cache")
    except GgufkitError:
        assert isinstance(found, str)  # blank
        assert not found.strip()
        return
    again = read_for_calibration(kept.path)
    if isinstance(found, str):
        assert again == found.removeprefix("\ufeff")
    else:
        assert isinstance(again, Conversations)
        assert again.rows == found.rows
        assert again.kind == found.kind


@MANY
@given(files())
def test_measuring_takes_text_alone(made: tuple[str, str, list[Row]]) -> None:
    family, container, rows = made
    with scratch() as directory:
        path = _write(directory, container, rows)
        plain = plainly_read(path)
        log = Log()
        found, error = attempt(lambda: read_file(path, None, log))
        if error:
            assert error.hint
            return
        columns = {name for row in plain for name in row if row[name] is not None}
        column = "text" if "text" in columns else family
        values = [row.get(column) for row in plain]
        if column not in ("text", "body"):  # no chats, but strings under such a name
            assert columns == {column}
        assert all(value is None or isinstance(value, str) for value in values)
        assert sum(map(len, filter(None, values))) <= len(found)
        assert all(value in found for value in values if value)
        _check_the_count(values.count(None), len(rows), log)


damages = st.tuples(
    st.sampled_from(["cut", "flip", "insert", "bom", "repeat", "crlf"]),
    st.integers(0, 2000),
    st.integers(0, 255),
)


def _damaged(raw: bytes, kind: str, place: int, byte: int) -> bytes:
    place %= len(raw) + 1
    changed = {
        "cut": raw[:place],
        "flip": raw[:place] + bytes([byte]) + raw[place + 1 :],
        "insert": raw[:place] + bytes([byte]) + raw[place:],
        "bom": b"\xef\xbb\xbf" + raw,
        "repeat": raw + raw,
        "crlf": raw.replace(b"\n", b"\r\n"),
    }
    return changed[kind]


@MANY
@given(files(), damages, st.sampled_from([".txt", ".jsonl", ".json", ".parquet", ".arrow"]))
def test_damaged_files_are_read_right_or_refused(
    made: tuple[str, str, list[Row]], damage: tuple[str, int, int], suffix: str
) -> None:
    _, container, rows = made
    kind, place, byte = damage
    with scratch() as directory:
        written = _write(directory, container, rows)
        # pyarrow reads whatever bytes come out of a column; only cuts are sure to be noticed.
        kind = "cut" if written.suffix not in (".jsonl", ".json") else kind
        raw = _damaged(written.read_bytes(), kind, place, byte)
        path = directory / f"damaged{suffix}"
        path.write_bytes(raw)
        for load in (load_text, load_calibration):
            text, error = attempt(lambda: load(str(path), cache=directory / "cache"))  # noqa: B023
            if error:
                assert error.hint
                continue
            content = text.path.read_bytes().decode()
            assert content.strip()
            if suffix == ".txt" and written.suffix in (".jsonl", ".json"):
                assert content == raw.decode("utf-8-sig")


@pytest.mark.parametrize("container", ARROW)
def test_every_cut_of_a_table_is_noticed(container: str, tmp_path: Path) -> None:
    path = write(tmp_path, container, [{"text": "some words"}] * 3)
    raw = path.read_bytes()
    whole = read_file(path)
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        found, error = attempt(lambda: read_file(path))
        # A stream may end without its end mark.
        assert error or found == whole
