"""The texts and conversations of a file, with every row accounted for."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ggufkit.errors import SourceError
from ggufkit.progress import SILENT, Progress
from ggufkit.texts.columns import Chosen, choose_for_calibration, choose_text
from ggufkit.texts.files import Table, read_plain, read_table
from ggufkit.texts.rows import Conversation, EmptyRow, RowFault, read_chat, read_pair, read_text
from ggufkit.values import Json

_HINTS = {
    "text": "Repair that row, or name another column with --column",
    "chats": "Repair or remove that row: a chat is a list of turns with role and content, or "
    "with from and value",
    "pairs": "Repair or remove that row: question and answer are strings",
}
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Conversations:
    """The chats, or questions and answers, of a file.

    Attributes:
        kind: ``chats`` or ``pairs``.
        rows: the conversations, each with the number of its line or row.
        unit: what the numbers count: ``line`` or ``row``.
    """

    kind: str
    rows: tuple[tuple[int, Conversation], ...]
    unit: str

    def to_json_lines(self) -> str:
        """JSON Lines that read back as the same; each stands on the line of its number."""
        lines: list[str] = []
        for number, conversation in self.rows:
            lines += [""] * (number - 1 - len(lines))
            lines.append(json.dumps(conversation.to_row(), ensure_ascii=False))
        return "".join(f"{line}\n" for line in lines)


def read_file(path: Path, column: str | None = None, progress: Progress = SILENT) -> str:
    """The text of a file to measure on; see :func:`ggufkit.texts.load.load_text`.

    Raises:
        SourceError, IntegrityError, UsageError: as there.
    """
    table = read_table(path)
    if table is None:
        return read_plain(path, column)
    chosen = choose_text(table, column)
    if chosen.kind == "text":
        return _text(table, chosen, asked=bool(column), progress=progress)
    progress.warn(
        f"{path.name}: of the chats in '{chosen.columns[0]}' the bare text of the turns is taken, "
        "without roles, calls, tools and chat template"
    )
    read = _conversations(table, chosen, progress)
    return _join(conversation.bare_text() for _, conversation in read.rows)


def read_for_calibration(
    path: Path, column: str | None = None, progress: Progress = SILENT
) -> str | Conversations:
    """What a file holds to calibrate on: a text, or conversations.

    Args:
        path: UTF-8 text, or a file of rows.
        column: the column that holds the text or the chat; None to choose one by
            the rules of :mod:`ggufkit.texts.columns`.
        progress: warned of rows that are left out.

    Raises:
        SourceError, IntegrityError: the file cannot be read, or rows in it.
        UsageError: the column is missing or not to be guessed.
    """
    table = read_table(path)
    if table is None:
        return read_plain(path, column)
    chosen = choose_for_calibration(table, column)
    if chosen.kind == "text":
        return _text(table, chosen, asked=bool(column), progress=progress)
    return _conversations(table, chosen, progress)


def read_column(path: Path, column: str) -> list[str]:
    """The strings of one column, with an empty one where there is none.

    Raises:
        SourceError, IntegrityError, UsageError: as :func:`read_file`.
    """
    table = read_table(path)
    if table is None:
        raise SourceError(f"{path} is no file with columns", "Give another file")
    choose_text(table, column)
    return [row.get(column) or "" for row in table.select([column])]


def _text(table: Table, chosen: Chosen, *, asked: bool, progress: Progress) -> str:
    (column,) = chosen.columns
    _mention(table, chosen, progress)

    def read(row: dict[str, Json]) -> str:
        value = row.get(column)
        if value is None:
            raise EmptyRow(f"it has no '{column}'")
        return read_text(value, f"'{column}'")

    read_rows = _read_rows(table, chosen, read, progress, most_needed=not asked)
    texts = [text for _, text in read_rows]
    blank = sum(not text.strip() for text in texts)
    if blank and not _are_lines(texts):
        progress.warn(f"{table.path.name}: {_of(blank, table)} blank in '{column}'")
    return _join(texts)


def _conversations(table: Table, chosen: Chosen, progress: Progress) -> Conversations:
    _mention(table, chosen, progress)

    def read(row: dict[str, Json]) -> Conversation:
        if chosen.kind == "chats":
            return read_chat(row, *chosen.columns)
        return read_pair(row, *chosen.columns)

    rows = _read_rows(table, chosen, read, progress, most_needed=True)
    kind = "pairs" if all(conversation.pair for _, conversation in rows) else "chats"
    return Conversations(kind, tuple(rows), table.unit)


def _read_rows(
    table: Table,
    chosen: Chosen,
    read: Callable[[dict[str, Json]], _Read],
    progress: Progress,
    *,
    most_needed: bool,
) -> list[tuple[int, _Read]]:
    """Every row as a value, with its number; empty rows are counted and left out.

    Args:
        table: the rows.
        chosen: the columns to read.
        read: gives a row's value.
        progress: warned of rows that are left out.
        most_needed: whether it is an error to leave out half of the rows or more.

    Raises:
        SourceError: a row cannot be used; or too many are left out, or all.
    """
    found: list[tuple[int, _Read]] = []
    faults: list[tuple[str, str]] = []
    empty: list[tuple[str, str]] = []
    for index, row in enumerate(table.select([*chosen.columns, *chosen.beside])):
        try:
            found.append((table.numbers[index], read(row)))
        except EmptyRow as reason:
            empty.append((table.place(index), str(reason)))
        except RowFault as reason:
            faults.append((table.place(index), str(reason)))
    if faults:
        place, why = faults[0]
        more = f" ({len(faults)} of {len(table.numbers)} rows cannot be used)"
        raise SourceError(
            f"{place} cannot be used: {why}{more if len(faults) > 1 else ''}", _HINTS[chosen.kind]
        )
    if not empty:
        return found
    reasons = "; ".join(f"{why} ({n})" for why, n in Counter(why for _, why in empty).items())
    told = f"{_of(len(empty), table)} left out: {reasons} (the first is {empty[0][0]})"
    if not found or (most_needed and 2 * len(empty) >= len(table.numbers)):
        raise SourceError(
            f"{table.path.name} is not usable as it is, {told}",
            f"{_HINTS[chosen.kind]}; columns are {', '.join(table.kinds)}",
        )
    progress.warn(f"{table.path.name}: {told}")
    return found


def _of(count: int, table: Table) -> str:
    return f"{count} of {len(table.numbers)} rows {'is' if count == 1 else 'are'}"


def _mention(table: Table, chosen: Chosen, progress: Progress) -> None:
    """Say which columns could have been meant as well."""
    if chosen.left_aside:
        progress.say(
            f"{table.path.name}: {', '.join(chosen.columns)} is read and "
            f"{', '.join(chosen.left_aside)} is not; --column chooses"
        )


def _are_lines(texts: list[str]) -> bool:
    """Whether rows are the lines of one file: all end in a newline, but for blank ones."""
    return all(text.endswith("\n") for text in texts if text) and any(texts)


def _join(rows: Iterable[str]) -> str:
    """One text out of rows.

    Rows that end in a newline are the lines of one file, as in the wikitext
    data sets, whose loader turned the original's blank lines (a space and a
    newline) into empty rows; they get their space and newline back, which
    gives the bytes of the original ``wiki.test.raw``. Other rows are documents.
    """
    rows = list(rows)
    full = [row for row in rows if row]
    if _are_lines(rows):
        blank = " \n" if all(row.startswith(" ") for row in full) else "\n"
        return "".join(row or blank for row in rows)
    return "\n\n".join(full)
