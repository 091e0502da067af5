"""Which columns of a file of rows are read.

Within a kind nothing is guessed: where two columns could be meant, both are
named and none is taken. Between kinds there is an order that the docs state: for
calibration chats come before pairs, and pairs before text; for measuring, only
text is text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ggufkit.errors import SourceError, UsageError
from ggufkit.texts.files import CHAT_KEYS, Kind, Table

ASKED_KEYS = ("instruction", "question", "prompt", "query")
"""What columns of questions are called."""
ANSWERED_KEYS = ("output", "answer", "completion", "response")
"""What columns of answers to them are called."""
CONTEXT_KEYS = ("input", "context")
"""What columns are called that belong to the question."""
SYSTEM_KEYS = ("system", "system_prompt")
"""What columns are called that hold a system message beside the turns."""
TOOLS_KEYS = ("tools", "functions")
"""What columns are called that hold the functions a model may call."""
HISTORY_KEY = "history"
"""What the column of earlier questions and answers is called."""

_KNOWN = (*CHAT_KEYS, *ASKED_KEYS, *ANSWERED_KEYS)


@dataclass(frozen=True)
class Chosen:
    """The columns to read.

    Attributes:
        kind: ``text``, ``chats`` or ``pairs``.
        columns: the text, the chat, or the question and its answer.
        beside: columns that belong to them, such as a system message.
        left_aside: columns that could have been meant as well, of a kind that
            comes later in the order.
    """

    kind: str
    columns: tuple[str, ...]
    beside: tuple[str, ...] = ()
    left_aside: tuple[str, ...] = ()


def choose_text(table: Table, asked: str | None) -> Chosen:
    """The column to measure on.

    Args:
        table: the rows.
        asked: the column that somebody names; by default ``text``, else the only
            one that text could be meant by.

    Raises:
        UsageError: the column is missing, or not to be guessed; names all columns.
        SourceError: there are no rows.
    """
    _require_rows(table)
    if asked:
        return _asked(table, asked)
    turns = tuple(_of(table, "turns"))
    if "text" in _of(table, "text"):
        return Chosen("text", ("text",), left_aside=turns)
    if turns:
        raise UsageError(
            f"{table.path} holds chats ({', '.join(turns)}), which become a text only through "
            "the chat template of a model",
            f"For the bare text of the turns: --column {turns[0]}. {_readable(table)}",
        )
    return _only_text(table)


def choose_for_calibration(table: Table, asked: str | None) -> Chosen:
    """The columns to calibrate on: as :func:`choose_text`, but chats and pairs are taken too.

    Raises:
        UsageError, SourceError: as :func:`choose_text`.
    """
    _require_rows(table)
    if asked:
        return _asked(table, asked)
    turns = _of(table, "turns")
    pair = _pair(table)
    # A column that only looks like turns does not come before columns with a known name.
    named = [name for name in turns if name in CHAT_KEYS]
    plain = ["text"] if "text" in _of(table, "text") else []
    chats = named or [name for name in turns if name not in pair]
    if len(chats) > 1 or (chats and not named and (pair or plain)):
        raise _ambiguous(table, [*chats, *(() if named else (*pair, *plain))])
    if chats:
        return _chats(table, chats[0], (*pair, *plain))
    if pair:
        return Chosen("pairs", pair, _beside(table, *CONTEXT_KEYS), tuple(plain))
    return _only_text(table)


def _asked(table: Table, asked: str) -> Chosen:
    kind = table.kinds.get(asked)
    if kind in ("text", "mixed"):
        return Chosen("text", (asked,))
    if kind == "turns":
        return _chats(table, asked, ())
    what = "is not there" if kind is None else "holds no strings"
    raise UsageError(f"Column '{asked}' of {table.path} {what}", _readable(table))


def _chats(table: Table, column: str, others: Sequence[str]) -> Chosen:
    return Chosen("chats", (column,), _beside(table), tuple(others))


def _beside(table: Table, *more: str) -> tuple[str, ...]:
    known = (*more, *SYSTEM_KEYS, *TOOLS_KEYS, HISTORY_KEY)
    return tuple(name for name in known if table.kinds.get(name, "empty") != "empty")


def _pair(table: Table) -> tuple[str, ...]:
    """The columns of question and answer; none if it lacks one.

    Raises:
        UsageError: there are several of either.
    """
    usable = _of(table, "text", "mixed", "turns")
    asked = [name for name in ASKED_KEYS if name in usable]
    answered = [name for name in ANSWERED_KEYS if name in usable]
    if not asked or not answered:
        return ()
    if len(asked) > 1 or len(answered) > 1:
        if _of(table, "turns"):
            return ()  # chats are taken before pairs
        raise _ambiguous(table, [*asked, *answered])
    return (*asked, *answered)


def _only_text(table: Table) -> Chosen:
    """The column ``text``, or the only one that a text could be in."""
    kind = table.kinds.get("text")
    if kind == "text":
        return Chosen("text", ("text",))
    if kind is not None:
        raise UsageError(
            f"Column 'text' of {table.path} {_described(kind)}", _readable(table, but="text")
        )
    possible = _of(table, "text", "mixed", "nested", "binary", "turns")
    # Not that questions become the text because all answers are null.
    possible += [name for name in _of(table, "empty", "other") if name in _KNOWN]
    if len(possible) == 1 and table.kinds[possible[0]] == "text":
        return Chosen("text", tuple(possible))
    raise _ambiguous(table, possible)


def _ambiguous(table: Table, names: Sequence[str]) -> UsageError:
    strings = [name for name in names if table.kinds[name] == "text"]
    if len(strings) == len(names):
        return UsageError(
            f"{table.path} has {len(names)} columns with text, and none is called 'text'",
            _readable(table) if names else "Give another file",
        )
    listed = ", ".join(f"{name} ({_described(table.kinds[name])})" for name in names)
    return UsageError(
        f"{table.path} has no column that is meant without doubt: {listed}", _readable(table)
    )


def _described(kind: Kind) -> str:
    return {
        "text": "holds strings",
        "turns": "holds chats",
        "mixed": "holds strings and other values",
        "nested": "holds lists or objects",
        "binary": "holds bytes, not strings",
        "other": "holds no strings",
        "empty": "is empty",
    }[kind]


def _readable(table: Table, but: str = "") -> str:
    names = [name for name in _of(table, "text", "turns", "mixed") if name != but]
    return f"Name one with --column: {', '.join(names)}" if names else "Give another file"


def _of(table: Table, *kinds: Kind) -> list[str]:
    return [name for name, kind in table.kinds.items() if kind in kinds]


def _require_rows(table: Table) -> None:
    if not table.numbers:
        raise SourceError(f"{table.path} has no text in it: it has no rows", "Give another file")
