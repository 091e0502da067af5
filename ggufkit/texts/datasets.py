"""Data sets of the hubs, each of which is a text with a name."""

import gzip
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ggufkit import settings
from ggufkit.errors import IntegrityError, SourceError
from ggufkit.progress import Progress
from ggufkit.texts.documents import read_column, read_file


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


def wikitext(text_dir: Path | None, texts: Path, progress: Progress) -> tuple[str, str]:
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


C4 = _DataSet(
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
PILEVAL = _DataSet(
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
    return "".join(f" {sentence} \n" for sentence in read_column(path, "sentence"))


PTB = _DataSet(
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
        columns = [read_column(path, key) for key in _ALPACA_KEYS]
        return [dict(zip(_ALPACA_KEYS, row, strict=True)) for row in zip(*columns, strict=True)]
    try:
        rows = json.loads(path.read_bytes())
        return [{key: row[key] or "" for key in _ALPACA_KEYS} for row in rows]
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error


def pairs_as_text(lines: str) -> str:
    """What :data:`ALPACA` gives as one text, with a blank line between the rows."""
    # Not splitlines, which takes more than newlines for the end of a line.
    rows = [json.loads(line) for line in lines.split("\n") if line]
    return "\n\n".join("\n".join(row[k] for k in _ALPACA_KEYS if row[k]) for row in rows)


ALPACA = _DataSet(
    "alpaca",
    offline=(_ALPACA_FILE, f"data/{_ALPACA_FILE}", "alpaca_data.json"),
    online=(
        ("huggingface", "tatsu-lab/alpaca", f"data/{_ALPACA_FILE}"),
        ("modelscope", "angelala00/tatsu-lab-alpaca", _ALPACA_FILE),
    ),
    read=_read_alpaca,
)
