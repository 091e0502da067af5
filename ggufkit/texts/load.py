"""Texts to calibrate on and to measure with: built-in ones and files.

Whatever a text comes from, the tools get a UTF-8 file. llama-perplexity reads
raw bytes, so a parquet file given to it would be scored as compressed bytes;
containers are therefore read properly here, or refused.
"""

import difflib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggufkit import settings
from ggufkit.errors import SourceError, UsageError
from ggufkit.progress import SILENT, Progress
from ggufkit.texts import datasets, stdlib
from ggufkit.texts.documents import read_file, read_for_calibration
from ggufkit.values import Text


@dataclass(frozen=True)
class BuiltIn:
    """A text with a name.

    Attributes:
        about: what it is, in a few words.
        make: gives the text and where it came from, out of text directory,
            cache and progress.
        pairs: whether what it gives are JSON lines of questions and answers.
    """

    about: str
    make: Callable[[Path | None, Path, Progress], tuple[str, str]]
    pairs: bool = False


def load_text(
    spec: str,
    *,
    column: str | None = None,
    text_dir: Path | None = None,
    cache: Path,
    progress: Progress = SILENT,
) -> Text:
    """Get a text as a UTF-8 file.

    Args:
        spec: the name of a built-in text, or a file: UTF-8 text, JSON Lines, JSON,
            parquet, arrow or feather.
        column: column (or key) that holds the text; by default ``text``, else
            the only one with strings. Rows that all end in a newline are taken
            for lines of one file, others for documents with a blank line between.
            Of a column of chats, which is never chosen by itself, the bare text of
            the turns is taken.
        text_dir: where offline copies of built-in texts are looked up first
            (default: the environment's setting).
        cache: the result is written to ``texts/<digest16>.txt`` in it.
        progress: told of columns that were left aside, warned of rows that were.

    Raises:
        SourceError: no such text, no text in it, most rows have none, or a kind
            that cannot be read.
        IntegrityError: the file is damaged, or not what its name says.
        UsageError: the column is missing or not to be guessed.
    """
    texts = cache / "texts"
    if built_in := BUILT_IN.get(spec):
        content, source = _make(spec, column, text_dir, texts, progress)
        if built_in.pairs:
            content = datasets.pairs_as_text(content)
    else:
        content, source = read_file(_existing(spec), column, progress), spec
    return _write(spec, _not_blank(spec, content), source, texts)


def load_calibration(
    spec: str,
    *,
    column: str | None = None,
    text_dir: Path | None = None,
    cache: Path,
    progress: Progress = SILENT,
) -> Text:
    """Get a text to calibrate on: as :func:`load_text`, but chats are left as they are.

    Chats, or questions and answers, in whatever container become JSON Lines of
    one form, because only the model's own template can make a text of them;
    :func:`ggufkit.scaling.calibration.read_documents` reads them.

    Args:
        spec: as for :func:`load_text`.
        column: column that holds the text or the chat; by default chats come
            before questions and answers, and those before text.
        text_dir: as for :func:`load_text`.
        cache: the result is written to ``texts/<digest16>.txt`` or ``.jsonl`` in it.
        progress: told of columns that were left aside, warned of rows that were.

    Raises:
        SourceError: as :func:`load_text`; or a row is no chat, or no question with an
            answer, and is named.
        IntegrityError, UsageError: as :func:`load_text`.
    """
    texts = cache / "texts"
    if built_in := BUILT_IN.get(spec):
        content, source = _make(spec, column, text_dir, texts, progress)
        if built_in.pairs:
            return _write(spec, content, source, texts, ".jsonl")
        return _write(spec, _not_blank(spec, content), source, texts)
    found = read_for_calibration(_existing(spec), column, progress)
    if isinstance(found, str):
        return _write(spec, _not_blank(spec, found), spec, texts)
    return _write(spec, found.to_json_lines(), spec, texts, ".jsonl")


def _not_blank(spec: str, content: str) -> str:
    if not content.strip():
        raise SourceError(f"{spec} has no text in it", "Give a text of some thousand words")
    return content


def _make(
    name: str, column: str | None, text_dir: Path | None, texts: Path, progress: Progress
) -> tuple[str, str]:
    if column:
        raise UsageError(f"'{name}' is a built-in text and has no columns", "Drop --column")
    return BUILT_IN[name].make(text_dir or settings.text_dir(), texts, progress)


def keep_text(name: str, content: str, source: str, cache: Path) -> Text:
    """Make a text file of something said in memory.

    Args:
        name: what to call it.
        content: the text.
        source: where it came from, in words.
        cache: it is written to ``texts/<digest16>.txt`` in it.
    """
    return _write(name, content, source, cache / "texts")


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.exists():
        return path
    near = difflib.get_close_matches(str(path), BUILT_IN, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise SourceError(
        f"There is no text {path}", f"{hint}Give a file, or one of: {', '.join(BUILT_IN)}"
    )


def _write(name: str, content: str, source: str, texts: Path, suffix: str = ".txt") -> Text:
    try:
        raw = content.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{name} holds half a surrogate pair at character {error.start:,}", "Repair the text"
        ) from error
    digest = hashlib.sha256(raw).hexdigest()
    path = texts / f"{digest[:16]}{suffix}"
    if not path.is_file() or path.stat().st_size != len(raw):
        texts.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            scratch.write_bytes(raw)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    return Text(name, digest, path, len(raw), source)


BUILT_IN: dict[str, BuiltIn] = {
    "wikitext": BuiltIn("test part of wikitext-2-raw-v1", datasets.wikitext),
    "c4": BuiltIn("start of the English validation part of C4", datasets.C4),
    "pileval": BuiltIn("start of the validation part of the Pile", datasets.PILEVAL),
    "ptb": BuiltIn("test part of the Penn Treebank", datasets.PTB),
    "alpaca": BuiltIn("instructions and answers", datasets.ALPACA, pairs=True),
    "pydoc": BuiltIn("Python's language reference", stdlib.pydoc),
    "pydoc-calibration": BuiltIn("every other topic of pydoc", stdlib.pydoc_calibration),
    "pydoc-measure": BuiltIn("the topics of pydoc that are left", stdlib.pydoc_measure),
    "stdlib-docstrings": BuiltIn("docstrings of Python's library", stdlib.stdlib_docstrings),
}
"""All built-in texts by name; a new one is one row."""
