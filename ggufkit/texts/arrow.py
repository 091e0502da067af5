"""Rows in parquet, Arrow and Feather files; only here pyarrow is used."""

import datetime
import decimal
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggufkit.errors import IntegrityError, SourceError
from ggufkit.texts.files import CHAT_KEYS, CONTENT_KEYS, ROLE_KEYS, Kind, Table, turns_in
from ggufkit.values import Json

_NOT_IN_JSON = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)


def read_arrow(path: Path) -> Table:
    """The rows of a file of one of pyarrow's formats.

    A field that is null in an object does not exist there: Arrow gives every
    object of a column the fields of all, so nobody can tell one from the other.

    Raises:
        SourceError: pyarrow is not installed.
        IntegrityError: the file is damaged.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise SourceError(
            f"Reading {path.name} needs the package pyarrow", 'pip install "ggufkit[texts]"'
        ) from error
    try:
        table = _read(path, pa)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    names = list(table.column_names)
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise SourceError(
            f"{path} has several columns called {', '.join(doubled)}", "Rename all but one"
        )
    kinds = {f.name: _kind(f.name, f.type, pa.types) for f in table.schema}
    for name in CHAT_KEYS:
        if kinds.get(name) == "text" and _first_is_turns(path, table, name):
            kinds[name] = "turns"

    def select(columns: Sequence[str]) -> list[dict[str, Json]]:
        values = [_values(path, table, name, turns=kinds[name] == "turns") for name in columns]
        rows = zip(*values, strict=True) if values else ((),) * table.num_rows
        return [dict(zip(columns, row, strict=True)) for row in rows]

    return Table(path, kinds, range(1, table.num_rows + 1), "row", select)


def _read(path: Path, pa: Any) -> Any:
    from pyarrow import feather, ipc, parquet

    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"PAR1"):
        with parquet.ParquetFile(path) as opened:
            return opened.read()
    if head.startswith(b"\xff\xff\xff\xff"):
        with pa.OSFile(str(path)) as file:
            return ipc.open_stream(file).read_all()
    if head.startswith(b"ARROW1"):
        with pa.OSFile(str(path)) as file:
            return ipc.open_file(file).read_all()
    return feather.read_table(str(path))


def _unreadable(path: Path, error: Exception) -> IntegrityError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return IntegrityError(f"{path} cannot be read: {reason[0]}", "Fetch the file again")


def _plain_type(type: Any, types: Any) -> Any:
    """A type without what says how its values are stored or what they are called."""
    while True:
        if types.is_dictionary(type) or types.is_run_end_encoded(type):
            type = type.value_type
        elif hasattr(type, "storage_type"):
            type = type.storage_type
        else:
            return type


def _kind(name: str, type: Any, types: Any) -> Kind:
    type = _plain_type(type, types)
    if types.is_null(type):
        return "empty"
    if _is_string(type, types):
        return "text"
    if types.is_binary(type) or types.is_large_binary(type) or types.is_fixed_size_binary(type):
        return "binary"
    if types.is_binary_view(type):
        return "binary"
    if (item := _item(type, types)) is not None:
        fields = {f.name for f in item.fields} if types.is_struct(item) else set()
        chat = fields.intersection(ROLE_KEYS) and fields.intersection(CONTENT_KEYS)
        if chat or name in CHAT_KEYS:
            return "turns"
    return "nested" if _holds_text(type, types) else "other"


def _is_string(type: Any, types: Any) -> bool:
    return bool(types.is_string(type) or types.is_large_string(type) or types.is_string_view(type))


def _item(type: Any, types: Any) -> Any:
    """The type of a list's values; None if it is no list."""
    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    views = (types.is_list_view, types.is_large_list_view)
    if any(is_kind(type) for is_kind in (*kinds, *views)):
        return _plain_type(type.value_type, types)
    return None


def _holds_text(type: Any, types: Any) -> bool:
    type = _plain_type(type, types)
    if (item := _item(type, types)) is not None:
        return _holds_text(item, types)
    if types.is_map(type):
        return _holds_text(type.key_type, types) or _holds_text(type.item_type, types)
    if types.is_nested(type):
        return any(_holds_text(type.field(i).type, types) for i in range(type.num_fields))
    return _is_string(type, types)


def _first_is_turns(path: Path, table: Any, name: str) -> bool:
    """Whether a column of strings holds chats as JSON."""
    for start in range(table.num_rows):
        (value,) = _values(path, table.slice(start, 1), name)
        if value:
            return turns_in(value) is not None
    return False


def _values(path: Path, table: Any, name: str, *, turns: bool = False) -> list[Json]:
    import pyarrow as pa

    try:
        column = table.column(name)
        # pyarrow checks neither UTF-8 nor offsets while it reads.
        column.validate(full=True)
        # Only newer versions know the argument, and only maps need it.
        options = {"maps_as_pydicts": "strict"} if "map<" in str(column.type) else {}
        values: list[Json] = column.to_pylist(**options)
    except (pa.ArrowException, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise _unreadable(path, error) from error
    if not pa.types.is_nested(_plain_type(column.type, pa.types)):
        return values
    return [_without_nulls(value, "content" if turns else "") for value in values]


def _without_nulls(value: Json, but: str = "") -> Json:
    """A value without the fields that are null, but one of those of the outermost objects.

    What JSON has no form for, such as the time of a turn, becomes text.
    """
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k == but}
    if isinstance(value, list):
        return [_without_nulls(item, but) for item in value]
    return str(value) if isinstance(value, _NOT_IN_JSON) else value
