"""Files of text and files of rows: UTF-8, JSON Lines, JSON, parquet, Arrow and Feather.

What a file is, its first bytes say, not its name alone. A file of rows becomes
a :class:`Table`, whatever its container, so that nothing behind this module
knows containers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ggufkit.errors import IntegrityError, SourceError, UsageError
from ggufkit.values import Json

Kind = Literal["text", "turns", "mixed", "nested", "binary", "other", "empty"]
"""What a column holds: strings; lists of a chat's turns; strings and other values;
lists or objects with strings somewhere inside; bytes; other values; nothing."""

CHAT_KEYS = (
    *("messages", "conversations", "conversation", "chat", "chats"),
    *("dialog", "dialogs", "dialogue", "turns"),
)
"""What columns of chats are called, by OpenAI, ShareGPT and others."""
ROLE_KEYS = ("role", "from")
"""What the field is called that says who speaks in a turn."""
CONTENT_KEYS = ("content", "value")
"""What the field is called that says what is spoken in a turn."""
ARROW_MAGIC = (b"PAR1", b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")
"""How files of pyarrow begin: parquet, Arrow files, Feather 1, Arrow streams."""
_OTHER_MAGIC = {
    b"GGUF": "a GGUF model",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data",
    b"\xfd7zXZ": "xz data",
    b"BZh": "bzip2 data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ARROW_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
CONTAINER_SUFFIXES = (*_JSON_SUFFIXES, *_ARROW_SUFFIXES)
"""Endings of files whose rows have columns."""


@dataclass(frozen=True)
class Table:
    """Rows with columns.

    Attributes:
        path: the file.
        kinds: what each column holds, in the file's order.
        numbers: for each row its number, from 1.
        unit: what the numbers count: ``line`` or ``row``.
        select: gives the rows, each with these columns alone; a key that a row
            does not have may be missing or None.
    """

    path: Path
    kinds: Mapping[str, Kind]
    numbers: Sequence[int]
    unit: str
    select: Callable[[Sequence[str]], list[dict[str, Json]]]

    def place(self, index: int) -> str:
        """Where a row stands, in words.

        Args:
            index: of the row, from 0.
        """
        return f"{self.unit} {self.numbers[index]} of {self.path.name}"


def read_table(path: Path) -> Table | None:
    """The rows of a file; None if it is not a file of rows.

    Raises:
        SourceError: there is no such file, or it cannot be read.
        IntegrityError: the file is damaged, or not what its name says.
    """
    head = _head(path)
    suffix = path.suffix.lower()
    if head.startswith(ARROW_MAGIC):
        from ggufkit.texts.arrow import read_arrow

        return read_arrow(path)
    if suffix in _ARROW_SUFFIXES:
        raise IntegrityError(
            f"{path} is called {suffix} but begins with {head[:6]!r}", "Fetch the file again"
        )
    return _json_table(path) if suffix in _JSON_SUFFIXES else None


def read_plain(path: Path, column: str | None = None) -> str:
    """The text of a UTF-8 file.

    Raises:
        SourceError: it is something else.
        UsageError: a column is asked for.
    """
    if column:
        raise UsageError(f"{path} is plain text, which has no column '{column}'", "Drop --column")
    raw = _bytes(path)
    for magic, kind in _OTHER_MAGIC.items():
        if raw.startswith(magic):
            raise SourceError(f"{path} is {kind}, not UTF-8 text", _how_to_turn(kind, path))
    if (place := raw.find(0)) >= 0:
        raise SourceError(
            f"{path} is binary, not text: it has a NUL byte at offset {place:,}",
            "Give a UTF-8 text file",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark.
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise SourceError(
            f"{path} is not UTF-8: byte 0x{raw[offset]:02x} at offset {offset:,}",
            f"If it is Latin-1: iconv -f LATIN1 -t UTF-8 '{path}' > text.txt",
        ) from error


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise SourceError(f"{path} is a directory, not a text", "Name a file in it")
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise _unreadable(path, error) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path} cannot be read: {error.strerror or error}", "Give another file")


def _how_to_turn(kind: str, path: Path) -> str:
    if kind.startswith("UTF-16"):
        return f"iconv -f UTF-16 -t UTF-8 '{path}' > text.txt"
    return "Unpack or convert it to a plain text file first"


# --- JSON --------------------------------------------------------------------


def _json_table(path: Path) -> Table:
    """JSON Lines, an array of objects, or an object that holds one array of objects."""
    raw = _bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"line {line} of {path.name} is not JSON: byte 0x{raw[error.start]:02x} at offset "
            f"{error.start:,} is not UTF-8",
            "Convert the file with iconv",
        ) from error
    rows, unit = _array(text, path), "row"
    if rows is None:
        numbers, rows = _lines(text, path)
        unit = "line"
    else:
        numbers = list(range(1, len(rows) + 1))
    for number, row in zip(numbers, rows, strict=True):
        if not isinstance(row, dict):
            raise SourceError(
                f"{unit} {number} of {path.name} is no JSON object",
                'Each row needs to be an object, such as {"text": "..."}',
            )
    return Table(path, _json_kinds(rows), numbers, unit, lambda columns: rows)


def _array(text: str, path: Path) -> list[Json] | None:
    """The rows of a file that is one JSON value and no JSON Lines; else None."""
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        first_line = text.lstrip().partition("\n")[0].strip()
        if start == "[" and not _is_json(first_line):
            raise IntegrityError(
                f"line {getattr(error, 'lineno', 1)} of {path.name} is not JSON: {error}",
                "One array of objects is needed, or one object on each line",
            ) from error
        return None
    if isinstance(value, list):
        return value
    return _only_array(value) if path.suffix.lower() == ".json" else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _only_array(value: dict[str, Json]) -> list[Json] | None:
    """The rows of an object around them, such as ``{"version": 1, "data": [...]}``.

    None if the object is a row itself: a chat, or something with a text.
    """
    arrays = {k: v for k, v in value.items() if isinstance(v, list)}
    if len(arrays) == 1 and "text" not in value:
        ((key, rows),) = arrays.items()
        if key not in CHAT_KEYS and not is_turns(rows) and all(isinstance(r, dict) for r in rows):
            return rows
    # Pretty-printed, it is no JSON Lines, but one row all the same.
    return [value]


def _lines(text: str, path: Path) -> tuple[list[int], list[Json]]:
    numbers: list[int] = []
    rows: list[Json] = []
    # Not splitlines, which takes more than newlines for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise IntegrityError(
                f"line {number} of {path.name} is not JSON: {error}",
                "One JSON object on each line is needed (JSON Lines), in UTF-8",
            ) from error
        numbers.append(number)
    return numbers, rows


def _json_kinds(rows: Sequence[dict[str, Json]]) -> dict[str, Kind]:
    found: dict[str, set[Kind]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, set()).add(_kind(name, value))
    return {name: _together(kinds) for name, kinds in found.items()}


def _kind(name: str, value: Json) -> Kind:
    if value is None:
        return "empty"
    if isinstance(value, str):
        return "turns" if name in CHAT_KEYS and turns_in(value) else "text"
    if isinstance(value, list) and (name in CHAT_KEYS or is_turns(value)):
        return "turns"
    return "nested" if _holds_text(value) else "other"


def _together(kinds: set[Kind]) -> Kind:
    """What a column holds, from what its values are."""
    kinds = kinds - {"empty"} or {"empty"}
    if len(kinds) == 1:
        return next(iter(kinds))
    if "turns" in kinds:
        return "turns"
    if "text" in kinds:
        return "mixed"
    return "nested" if "nested" in kinds else "other"


def _holds_text(value: Json) -> bool:
    if isinstance(value, str):
        return True
    if isinstance(value, dict):
        return any(map(_holds_text, value.values()))
    return isinstance(value, list) and any(map(_holds_text, value))


def is_turns(value: Json) -> bool:
    """Whether a value is a list of a chat's turns."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return False
    fields = {key for turn in value for key in turn}
    return not fields.isdisjoint(ROLE_KEYS) and not fields.isdisjoint(CONTENT_KEYS)


def turns_in(text: str) -> list[Json] | None:
    """The turns in a string of JSON, as some parquet files keep them; None if there are none."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if is_turns(value) else None
