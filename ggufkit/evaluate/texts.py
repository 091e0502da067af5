"""Texts to calibrate on and to measure with: built-in ones and files.

Whatever a text comes from, the tools get a UTF-8 file. llama-perplexity reads
raw bytes, so a parquet file given to it would be scored as compressed bytes;
containers are therefore read properly here, or refused.
"""

import ast
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufkit import settings
from ggufkit.errors import IntegrityError, SourceError, UsageError
from ggufkit.progress import SILENT, Progress
from ggufkit.values import Text, row_kind

_ARROW_MAGIC = (b"PAR1", b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")
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
_ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")
CONTAINER_SUFFIXES = (*_JSON_SUFFIXES, *_ARROW_SUFFIXES)
"""Endings of files whose rows have columns."""
_MIN_DOCSTRING = 80
"""Shorter docstrings say little more than the name they stand under."""
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}


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
        spec: the name of a built-in text, or a file: UTF-8 text, parquet,
            arrow, feather, or JSON lines.
        column: column (or key) that holds the text; by default ``text``, else
            the only one with strings. Rows that all end in a newline are taken
            for lines of one file, others for documents with a blank line between.
        text_dir: where offline copies of built-in texts are looked up first
            (default: the environment's setting).
        cache: the result is written to ``texts/<digest16>.txt`` in it.
        progress: who to tell.

    Raises:
        SourceError: no such text, no text in it, or a kind that cannot be read.
        IntegrityError: the file is damaged, or not what its name says.
        UsageError: the column is missing or not to be guessed.
    """
    texts = cache / "texts"
    if built_in := BUILT_IN.get(spec):
        content, source = _make(spec, column, text_dir, texts, progress)
        if built_in.pairs:
            content = _pairs_as_text(content)
    else:
        content, source = read_file(Path(spec).expanduser(), column), spec
    if not content.strip():
        raise SourceError(f"{spec} has no text in it", "Give a text of some thousand words")
    return _write(spec, content, source, texts)


def load_calibration(
    spec: str,
    *,
    column: str | None = None,
    text_dir: Path | None = None,
    cache: Path,
    progress: Progress = SILENT,
) -> Text:
    """Get a text to calibrate on: as :func:`load_text`, but chats are left as they are.

    JSON lines of chats, or of questions and answers, keep their rows, because
    only the model's own template can make a text of them. A file of such rows
    is given as it is, unless a column is asked for.

    Raises:
        SourceError, IntegrityError, UsageError: as :func:`load_text`.
    """
    built_in, path = BUILT_IN.get(spec), Path(spec).expanduser()
    if built_in and built_in.pairs:
        content, source = _make(spec, column, text_dir, cache / "texts", progress)
        return _write(spec, content, source, cache / "texts", ".jsonl")
    if not built_in and not column and _kind_of(path) != "text":
        raw = path.read_bytes()
        return Text(spec, hashlib.sha256(raw).hexdigest(), path, len(raw), spec)
    return load_text(spec, column=column, text_dir=text_dir, cache=cache, progress=progress)


def _make(
    name: str, column: str | None, text_dir: Path | None, texts: Path, progress: Progress
) -> tuple[str, str]:
    if column:
        raise UsageError(f"'{name}' is a built-in text and has no columns", "Drop --column")
    return BUILT_IN[name].make(text_dir or settings.text_dir(), texts, progress)


def _kind_of(path: Path) -> str:
    """What the first row of a file is, see :func:`row_kind`; errors are left to others."""
    if path.suffix.lower() not in _JSON_SUFFIXES or not path.is_file():
        return "text"
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        return row_kind(json.loads(first))
    except (ValueError, RecursionError):
        return "text"


def keep_text(name: str, content: str, source: str, cache: Path) -> Text:
    """Make a text file of something said in memory.

    Args:
        name: what to call it.
        content: the text.
        source: where it came from, in words.
        cache: it is written to ``texts/<digest16>.txt`` in it.
    """
    return _write(name, content, source, cache / "texts")


def read_file(path: Path, column: str | None = None) -> str:
    """The text in a file; see :func:`load_text`."""
    if not path.exists():
        raise _unknown(path)
    if path.is_dir():
        raise SourceError(f"{path} is a directory, not a text", "Name a file in it")
    with path.open("rb") as file:
        head = file.read(16)
    suffix = path.suffix.lower()
    if head.startswith(_ARROW_MAGIC):
        return _join(_arrow_rows(path, column))
    if suffix in _ARROW_SUFFIXES:
        raise IntegrityError(
            f"{path} is called {suffix} but begins with {head[:6]!r}", "Fetch the file again"
        )
    if suffix in _JSON_SUFFIXES:
        return _join(_json_rows(path, column))
    if column:
        raise UsageError(f"{path} is plain text, which has no column '{column}'", "Drop --column")
    for magic, kind in _OTHER_MAGIC.items():
        if head.startswith(magic):
            raise SourceError(f"{path} is {kind}, not UTF-8 text", _how_to_turn(kind, path))
    return _plain(path)


def _how_to_turn(kind: str, path: Path) -> str:
    if kind.startswith("UTF-16"):
        return f"iconv -f UTF-16 -t UTF-8 '{path}' > text.txt"
    return "Unpack or convert it to a plain text file first"


def _unknown(path: Path) -> SourceError:
    near = difflib.get_close_matches(str(path), BUILT_IN, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return SourceError(
        f"There is no text {path}", f"{hint}Give a file, or one of: {', '.join(BUILT_IN)}"
    )


def _plain(path: Path) -> str:
    raw = path.read_bytes()
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


def _choose_column(path: Path, asked: str | None, strings: Sequence[str], all_: list[str]) -> str:
    if asked:
        if asked in strings:
            return asked
        what = "holds no strings" if asked in all_ else "is not there"
        raise UsageError(
            f"Column '{asked}' of {path} {what}",
            f"Columns with text: {', '.join(strings) or 'none'}",
        )
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise UsageError(
        f"{path} has {len(strings)} columns with text, and none is called 'text'",
        f"Name one with --column: {', '.join(strings)}" if strings else "Give another file",
    )


def _json_rows(path: Path, column: str | None) -> list[str]:
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path} is not UTF-8: offset {error.start:,}", "Convert it with iconv"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise IntegrityError(
                f"{path}, line {number}: not a JSON value ({error})",
                "One JSON object on each line is needed (JSON lines)",
            ) from error
        if not isinstance(row, dict):
            raise SourceError(
                f"{path}, line {number}: not a JSON object",
                'One object on each line is needed, such as {"text": "..."}',
            )
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    strings = [n for n in names if all(isinstance(row.get(n, ""), str | None) for row in rows)]
    chosen = _choose_column(path, column, strings, names)
    return [row.get(chosen) or "" for row in rows]


def _arrow_rows(path: Path, column: str | None) -> list[str]:
    try:
        import pyarrow as pa
        from pyarrow import feather, ipc, parquet
    except ImportError as error:
        raise SourceError(
            f"Reading {path.name} needs the package pyarrow", 'pip install "ggufkit[texts]"'
        ) from error
    with path.open("rb") as file:
        head = file.read(6)
    try:
        if head.startswith(b"PAR1"):
            table = parquet.read_table(path)
        elif head.startswith(b"\xff\xff\xff\xff"):
            with pa.OSFile(str(path)) as file:
                table = ipc.open_stream(file).read_all()
        else:
            table = feather.read_table(str(path))
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{path} cannot be read: {str(error).splitlines()[0]}", "Fetch the file again"
        ) from error
    kinds = (pa.types.is_string, pa.types.is_large_string)
    strings = [f.name for f in table.schema if any(is_kind(f.type) for is_kind in kinds)]
    chosen = _choose_column(path, column, strings, list(table.column_names))
    return [row or "" for row in table.column(chosen).to_pylist()]


def _join(rows: Iterable[str]) -> str:
    """One text out of rows.

    Rows that end in a newline are the lines of one file, as in the wikitext
    data sets, whose loader turned the original's blank lines (a space and a
    newline) into empty rows; they get their space and newline back, which
    gives the bytes of the original ``wiki.test.raw``. Other rows are documents.
    """
    rows = list(rows)
    full = [row for row in rows if row]
    if full and all(row.endswith("\n") for row in full):
        blank = " \n" if all(row.startswith(" ") for row in full) else "\n"
        return "".join(row or blank for row in rows)
    return "\n\n".join(full)


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


# --- data sets of the hubs ---------------------------------------------------


@dataclass(frozen=True)
class _DataSet:
    """A text that is one file of a data set.

    Calling it gives the text and where it came from, out of text directory,
    cache and progress.

    Attributes:
        name: the text's.
        offline: where a copy may lie in the text directory.
        online: hub, data set (a revision may follow after ``@``) and file.
        read: gives the text in any of these files.
    """

    name: str
    offline: tuple[str, ...]
    online: tuple[tuple[str, str, str], ...]
    read: Callable[[Path], str]

    def __call__(self, text_dir: Path | None, texts: Path, _: Progress) -> tuple[str, str]:
        for name in self.offline if text_dir else ():
            path = Path(text_dir or "", name)
            if path.is_file():
                return self.read(path), str(path)
        failures = []
        first = settings.hub()
        for hub, repository, file in sorted(self.online, key=lambda row: row[0] != first):
            origin = f"{hub} {repository} {file}"
            try:
                path = _download(hub, repository, file, texts / self.name)
            except SourceError as error:
                failures.append(f"{origin}: {error.message}")
                continue
            return self.read(path), origin
        raise SourceError(
            f"{self.name} cannot be fetched:\n  " + "\n  ".join(failures),
            f"Put {self.offline[0]} into a directory and name that in GGUFKIT_TEXT_DIR "
            "(ppl also takes --text-dir), or use another text",
        )


def _damaged(path: Path, error: object) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: {error}", f"Remove {path} and try again")


def _download(hub: str, repository: str, file: str, into: Path) -> Path:
    """One file of a data set, kept for the next time."""
    target = into / hub / repository.replace("/", "--")
    repository, _, revision = repository.partition("@")
    if (target / file).is_file():
        return target / file
    try:
        if hub == "huggingface":
            from huggingface_hub import hf_hub_download

            hf_hub_download(
                repository,
                file,
                repo_type="dataset",
                revision=revision or None,
                local_dir=target,
            )
        else:
            from modelscope import snapshot_download

            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision or None,
                local_dir=str(target),
                allow_patterns=[file],
            )
    except Exception as error:
        # Both hubs raise dozens of kinds, of several HTTP libraries; all mean the same here.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(reason[0]) from error
    if not (target / file).is_file():
        raise SourceError("the file is not there")
    return target / file


# --- wikitext ---------------------------------------------------------------

_WIKITEXT_NBYTES = 1_290_590
_WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


def _read_wikitext(path: Path) -> str:
    if path.suffix != ".zip":
        return read_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read("wikitext-2-raw/wiki.test.raw").decode()
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


_WIKITEXT = _DataSet(
    "wikitext",
    offline=(
        "wiki.test.raw",
        "wikitext-2-raw/wiki.test.raw",
        "wikitext.txt",
        "wikitext-2/wiki.test.raw",
        "wikitext-2/test.txt",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        "test-00000-of-00001.parquet",
        "wikitext.parquet",
    ),
    # The zip is the one that llama.cpp's get-wikitext-2.sh takes.
    online=(
        ("huggingface", "ggml-org/ci", "wikitext-2-raw-v1.zip"),
        ("huggingface", "Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        ("modelscope", "modelscope/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    ),
    read=_read_wikitext,
)


def _wikitext(text_dir: Path | None, texts: Path, progress: Progress) -> tuple[str, str]:
    """The test part of wikitext-2-raw-v1, byte for byte ``wiki.test.raw``.

    That file, which llama.cpp's script fetches, is what published perplexities
    of GGUFs are measured on. transformers' recipe joins rows with blank lines
    instead and gives other numbers.
    """
    content, source = _WIKITEXT(text_dir, texts, progress)
    raw = content.encode()
    if hashlib.sha256(raw).hexdigest() != _WIKITEXT_SHA256:
        progress.warn(
            f"{source} is not the test part of wikitext-2-raw-v1: {len(raw):,} bytes instead of "
            f"{_WIKITEXT_NBYTES:,}, or others; compare perplexities on it only with each other"
        )
    return content, source


# --- large collections: C4 and the Pile -------------------------------------

HEAD_CHARACTERS = 4_000_000
"""What is taken of a collection that is far larger than any text that is needed."""


def _read_head(path: Path) -> str:
    """The first documents of JSON lines, packed or not, with a blank line between."""
    if path.suffix == ".txt":
        return read_file(path)
    documents: list[str] = []
    length = 0
    for document in _documents(path):
        if length >= HEAD_CHARACTERS:
            break
        documents.append(document)
        length += len(document) + 2
    return "\n\n".join(documents)[:HEAD_CHARACTERS]


def _documents(path: Path) -> Iterator[str]:
    """The ``text`` of each row, read no further than asked for."""
    damage = (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError)
    try:
        for line in _unpacked_lines(path):
            if document := json.loads(line)["text"].strip():
                yield document
    except damage as error:
        raise _damaged(path, error) from error


def _unpacked_lines(path: Path) -> Iterator[str]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from file
    elif path.suffix == ".zst":
        yield from _zstd_lines(path)
    else:
        with path.open(encoding="utf-8") as file:
            yield from file


def _zstd_lines(path: Path) -> Iterator[str]:
    try:
        import zstandard
    except ImportError as error:
        raise SourceError(
            f"Reading {path.name} needs the package zstandard", 'pip install "ggufkit[texts]"'
        ) from error
    unpacker = zstandard.ZstdDecompressor()
    try:
        with path.open("rb") as raw, unpacker.stream_reader(raw, read_across_frames=True) as file:
            yield from io.TextIOWrapper(file, "utf-8")
    except zstandard.ZstdError as error:
        raise _damaged(path, error) from error


_C4 = _DataSet(
    "c4",
    offline=(
        "c4-validation.00000-of-00008.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
        "c4-validation.00000-of-00008.json",
        "c4.jsonl",
        "c4.txt",
    ),
    online=(
        ("huggingface", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
        ("modelscope", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
    ),
    read=_read_head,
)
_PILEVAL = _DataSet(
    "pileval",
    offline=("val.jsonl.zst", "pile-val-backup/val.jsonl.zst", "pileval.jsonl", "pileval.txt"),
    online=(
        ("huggingface", "mit-han-lab/pile-val-backup", "val.jsonl.zst"),
        ("modelscope", "swift/pile-val-backup", "val.jsonl.zst"),
    ),
    read=_read_head,
)


# --- Penn Treebank ----------------------------------------------------------


def _read_ptb(path: Path) -> str:
    if path.suffix == ".txt":
        return read_file(path)
    # The data set's loader stripped the lines of ptb.test.txt.
    return "".join(f" {sentence} \n" for sentence in _arrow_rows(path, "sentence"))


_PTB = _DataSet(
    "ptb",
    offline=("ptb.test.txt", "ptb/ptb.test.txt", "penn_treebank/test/0000.parquet", "ptb.txt"),
    # Of the first there are only a script, which nothing should run, and what the hub made of it.
    online=(
        (
            "huggingface",
            "ptb-text-only/ptb_text_only@refs/convert/parquet",
            "penn_treebank/test/0000.parquet",
        ),
        ("huggingface", "FALcon6/ptb_text_only", "penn_treebank/test/0000.parquet"),
    ),
    read=_read_ptb,
)


# --- Alpaca -----------------------------------------------------------------

_ALPACA_KEYS = ("instruction", "input", "output")
_ALPACA_FILE = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"


def _read_alpaca(path: Path) -> str:
    """JSON lines of the first instructions and outputs."""
    lines: list[str] = []
    length = 0
    for row in _alpaca_rows(path):
        if length >= HEAD_CHARACTERS:
            break
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        length += len(lines[-1])
    return "".join(lines)


def _alpaca_rows(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".parquet":
        columns = [_arrow_rows(path, key) for key in _ALPACA_KEYS]
        return [dict(zip(_ALPACA_KEYS, row, strict=True)) for row in zip(*columns, strict=True)]
    try:
        rows = json.loads(path.read_bytes())
        return [{key: row[key] or "" for key in _ALPACA_KEYS} for row in rows]
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error


def _pairs_as_text(lines: str) -> str:
    # Not splitlines, which takes more than newlines for the end of a line.
    rows = [json.loads(line) for line in lines.split("\n") if line]
    return "\n\n".join("\n".join(row[k] for k in _ALPACA_KEYS if row[k]) for row in rows)


_ALPACA = _DataSet(
    "alpaca",
    offline=(_ALPACA_FILE, f"data/{_ALPACA_FILE}", "alpaca_data.json"),
    online=(
        ("huggingface", "tatsu-lab/alpaca", f"data/{_ALPACA_FILE}"),
        ("modelscope", "angelala00/tatsu-lab-alpaca", _ALPACA_FILE),
    ),
    read=_read_alpaca,
)


# --- Python's own documentation ---------------------------------------------


def _topics() -> dict[str, str]:
    """The language reference that ``help()`` shows, by topic, sorted."""
    from pydoc_data.topics import topics

    return {k: v.replace("\r\n", "\n").replace("\r", "\n") for k, v in sorted(topics.items())}


def _pydoc(*_: object) -> tuple[str, str]:
    return "\n".join(_topics().values()), "Python's own pydoc_data.topics"


def _pydoc_calibration(*_: object) -> tuple[str, str]:
    topics = list(_topics().values())
    return "\n".join(topics[::2]), "Python's own pydoc_data.topics, every other topic"


def _pydoc_measure(*_: object) -> tuple[str, str]:
    """The other topics, without paragraphs that stand in the calibration half as well."""
    topics = list(_topics().values())
    seen = {_words(p) for p in _paragraphs("\n".join(topics[::2]))}
    kept = ["\n\n".join(p for p in _paragraphs(t) if _words(p) not in seen) for t in topics[1::2]]
    source = "Python's own pydoc_data.topics, the topics that pydoc-calibration leaves out"
    return "\n\n".join(t for t in kept if t) + "\n", source


def _paragraphs(text: str) -> list[str]:
    return [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]


def _words(text: str) -> str:
    """The text without regard to how it is indented and wrapped."""
    return " ".join(text.split())


def _stdlib_docstrings(*_: object) -> tuple[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = dict.fromkeys(
        doc for path in _library_files(root) for doc in _docstrings(path) if doc.isascii()
    )
    long = [doc for doc in found if len(doc) >= _MIN_DOCSTRING]
    return "\n\n".join(long) + "\n", "docstrings of Python's own standard library"


def _library_files(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts[:-1])
    )


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings in a file's source, which is not run."""
    raw = path.read_bytes()
    if b'"""' not in raw and b"'''" not in raw:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(raw)
    except (SyntaxError, ValueError):
        return  # templates and deliberately broken samples; nothing to read there
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (doc := ast.get_docstring(node)):
            yield doc


BUILT_IN: dict[str, BuiltIn] = {
    "wikitext": BuiltIn("test part of wikitext-2-raw-v1", _wikitext),
    "c4": BuiltIn("start of the English validation part of C4", _C4),
    "pileval": BuiltIn("start of the validation part of the Pile", _PILEVAL),
    "ptb": BuiltIn("test part of the Penn Treebank", _PTB),
    "alpaca": BuiltIn("instructions and answers", _ALPACA, pairs=True),
    "pydoc": BuiltIn("Python's language reference", _pydoc),
    "pydoc-calibration": BuiltIn("every other topic of pydoc", _pydoc_calibration),
    "pydoc-measure": BuiltIn("the topics of pydoc that are left", _pydoc_measure),
    "stdlib-docstrings": BuiltIn("docstrings of Python's library", _stdlib_docstrings),
}
"""All built-in texts by name; a new one is one row."""
