import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from ggufkit.errors import GgufkitError, IntegrityError, SourceError, UsageError
from ggufkit.evaluate import texts
from ggufkit.evaluate.texts import BUILT_IN, load_text
from tests.sources.hubs import serving

# Rows as the wikitext data sets have them, and the file that they were made from.
WIKI_ROWS = ["", " = Title = \n", "", " Some words . \n"]
WIKI_FILE = " \n = Title = \n \n Some words . \n"


class Warnings:
    """Progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def content(spec: object, tmp_path: Path, **options: object) -> str:
    text = load_text(str(spec), cache=tmp_path / "cache", **options)  # type: ignore[arg-type]
    raw = text.path.read_bytes()
    assert text.path == tmp_path / "cache/texts" / f"{text.digest[:16]}.txt"
    assert hashlib.sha256(raw).hexdigest() == text.digest
    assert len(raw) == text.nbytes
    assert not list(text.path.parent.glob(".*"))
    return raw.decode()


def refused(
    spec: object, tmp_path: Path, kind: type[GgufkitError] = SourceError, **options: object
) -> GgufkitError:
    with pytest.raises(kind) as caught:
        content(spec, tmp_path, **options)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert not list(tmp_path.glob("cache/texts/*"))
    return caught.value


def file(tmp_path: Path, name: str, data: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# --- plain files ---


def test_plain_text_stays_as_it_is(tmp_path: Path) -> None:
    text = "Grüße,\r\n 世界\n\n"
    assert content(file(tmp_path, "a.txt", text), tmp_path) == text


def test_byte_order_mark_goes(tmp_path: Path) -> None:
    assert content(file(tmp_path, "a.txt", b"\xef\xbb\xbfhello"), tmp_path) == "hello"


def test_the_same_text_is_one_file(tmp_path: Path) -> None:
    first = load_text(str(file(tmp_path, "a.txt", "hello")), cache=tmp_path)
    before = first.path.stat().st_mtime_ns
    second = load_text(str(file(tmp_path, "b.txt", "hello")), cache=tmp_path)
    assert second.path == first.path
    assert first.path.stat().st_mtime_ns == before
    assert (first.name, first.source) == (str(tmp_path / "a.txt"), str(tmp_path / "a.txt"))


def test_a_damaged_copy_in_the_cache_is_replaced(tmp_path: Path) -> None:
    text = load_text(str(file(tmp_path, "a.txt", "hello")), cache=tmp_path)
    text.path.write_text("he")
    assert load_text(text.name, cache=tmp_path).path.read_text() == "hello"


@pytest.mark.parametrize(
    ("data", "offset"), [(b"abc\xfcd", 3), (b"\xef\xbb\xbfabc\xfcd", 6), (b"\xe4\xb8", 0)]
)
def test_not_utf8_says_where(tmp_path: Path, data: bytes, offset: int) -> None:
    error = refused(file(tmp_path, "a.txt", data), tmp_path)
    assert f"byte 0x{data[offset]:02x} at offset {offset}" in error.message
    assert "iconv -f LATIN1" in error.hint


def test_nul_bytes(tmp_path: Path) -> None:
    error = refused(file(tmp_path, "a.txt", b"abc\0def"), tmp_path)
    assert "NUL byte at offset 3" in error.message


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"GGUF\3\0\0\0", "a GGUF model"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x1f\x8b\x08", "gzip data"),
        (b"\xfd7zXZ\0", "xz data"),
        (b"%PDF-1.7", "a PDF"),
        ("hello".encode("utf-16"), "UTF-16 text"),
    ],
)
def test_containers_are_never_taken_for_text(tmp_path: Path, head: bytes, kind: str) -> None:
    error = refused(file(tmp_path, "a.txt", head + b"x" * 50), tmp_path)
    assert kind in error.message


@pytest.mark.parametrize("data", ["", " \n\n\t", b"\xef\xbb\xbf"])
def test_no_text(tmp_path: Path, data: bytes | str) -> None:
    assert "has no text" in refused(file(tmp_path, "a.txt", data), tmp_path).message


def test_unknown_text_suggests(tmp_path: Path) -> None:
    error = refused("wikitxt", tmp_path)
    assert "There is no text wikitxt" in error.message
    assert "Did you mean wikitext?" in error.hint
    assert "stdlib-docstrings" in error.hint


def test_directory(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path, tmp_path).message


def test_column_of_plain_text(tmp_path: Path) -> None:
    error = refused(file(tmp_path, "a.txt", "hello"), tmp_path, UsageError, column="text")
    assert "no column 'text'" in error.message
    error = refused("pydoc", tmp_path, UsageError, column="text")
    assert "built-in" in error.message


# --- tables ---


def table(path: Path, columns: dict[str, list[object]]) -> Path:
    """Write columns in the format that the suffix says."""
    import pyarrow as pa
    from pyarrow import feather, ipc, parquet

    data = pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(data, path)
    elif path.suffix == ".feather":
        feather.write_feather(data, str(path))
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as out, ipc.new_stream(out, data.schema) as writer:
            writer.write_table(data)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FORMATS = [".parquet", ".feather", ".arrow", ".jsonl"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_documents_are_joined_with_a_blank_line(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"a{suffix}", {"id": [1, 2, 3], "text": ["one", None, "two"]})
    assert content(path, tmp_path) == "one\n\ntwo"


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_that_are_lines_give_the_original_file(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"a{suffix}", {"text": WIKI_ROWS})
    assert content(path, tmp_path) == WIKI_FILE
    path = table(tmp_path / f"b{suffix}", {"text": ["one\n", "", "two\n"]})
    assert content(path, tmp_path) == "one\n\ntwo\n"


@pytest.mark.parametrize("suffix", FORMATS)
def test_columns(tmp_path: Path, suffix: str) -> None:
    two = table(tmp_path / f"a{suffix}", {"n": [1], "question": ["why"], "answer": ["so"]})
    error = refused(two, tmp_path, UsageError)
    assert "2 columns with text, and none is called 'text'" in error.message
    assert "--column: question, answer" in error.hint
    error = refused(two, tmp_path, UsageError, column="title")
    assert "'title'" in error.message
    assert "is not there" in error.message
    assert "question, answer" in error.hint
    error = refused(two, tmp_path, UsageError, column="n")
    assert "holds no strings" in error.message
    assert content(two, tmp_path, column="answer") == "so"
    one = table(tmp_path / f"b{suffix}", {"n": [1], "body": ["only"]})
    assert content(one, tmp_path) == "only"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_table_by_name_only(tmp_path: Path, suffix: str) -> None:
    error = refused(file(tmp_path, f"a{suffix}", "<html>"), tmp_path, IntegrityError)
    assert "begins with b'<html>'" in error.message


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_truncated_table(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"a{suffix}", {"text": ["word " * 5000]})
    path.write_bytes(path.read_bytes()[:-200])
    assert "cannot be read" in refused(path, tmp_path, IntegrityError).message


def test_a_table_with_a_wrong_name_is_still_no_text(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"text": ["hello"]}).rename(tmp_path / "a.txt")
    assert content(path, tmp_path) == "hello"


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", {"text": ["hello"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = refused(path, tmp_path)
    assert "needs the package pyarrow" in error.message
    assert 'pip install "ggufkit[texts]"' in error.hint


def test_json_lines_that_are_not(tmp_path: Path) -> None:
    error = refused(file(tmp_path, "a.jsonl", '{"text": "x"}\n{"te'), tmp_path, IntegrityError)
    assert "line 2: not a JSON value" in error.message
    error = refused(file(tmp_path, "b.json", '["one", "two"]'), tmp_path)
    assert "line 1: not a JSON object" in error.message
    error = refused(file(tmp_path, "c.jsonl", b'{"text": "\xff"}'), tmp_path)
    assert "not UTF-8" in error.message
    error = refused(file(tmp_path, "d.jsonl", '{"text": "\\ud800"}'), tmp_path)
    assert "half a surrogate pair" in error.message


# --- built-in ones ---


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"wikitext"}))
def test_built_in_texts_need_nothing(name: str, tmp_path: Path) -> None:
    first = content(name, tmp_path)
    assert len(first) > 100_000
    assert "\r" not in first
    assert first == content(name, tmp_path / "again")


def test_calibration_and_measuring_share_no_paragraph(tmp_path: Path) -> None:
    halves = [
        {" ".join(p.split()) for p in re.split(r"\n\s*\n", content(name, tmp_path)) if p.strip()}
        for name in ("pydoc-calibration", "pydoc-measure")
    ]
    assert all(len(half) > 500 for half in halves)
    assert not halves[0] & halves[1]


def test_docstrings_come_from_source_that_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "It says what it is for, at some length, so that there is something to read here."
    library = tmp_path / "lib"
    (library / "test").mkdir(parents=True)
    (library / "b.py").write_text(f'"""Second. {long}"""\nraise SystemExit("it has run")\n')
    (library / "a.py").write_text(f'def f():\n    """First. {long}"""\n    """Other. {long}"""\n')
    (library / "c.py").write_text(f'"""Second. {long}"""\nclass C:\n    """Short."""\n')
    (library / "bad.py").write_text('"""\n')
    (library / "test/d.py").write_text(f'"""Test. {long}"""\n')
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    expected = f"First. {long}\n\nSecond. {long}\n"
    assert content("stdlib-docstrings", tmp_path) == expected


@pytest.mark.parametrize(
    "name", ["wiki.test.raw", "wikitext-2-raw/wiki.test.raw", "wikitext.txt", "wikitext-2/test.txt"]
)
def test_wikitext_from_an_offline_copy(tmp_path: Path, name: str) -> None:
    path = tmp_path / "offline" / name
    path.parent.mkdir(parents=True)
    path.write_text(WIKI_FILE)
    progress = Warnings()
    found = content("wikitext", tmp_path, text_dir=tmp_path / "offline", progress=progress)
    assert found == WIKI_FILE
    (warning,) = progress.warnings
    assert f"{len(WIKI_FILE)} bytes instead of 1,290,590" in warning


def test_wikitext_from_an_offline_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offline").mkdir()
    table(tmp_path / "offline/test-00000-of-00001.parquet", {"text": WIKI_ROWS})
    monkeypatch.setenv("GGUFKIT_TEXT_DIR", str(tmp_path / "offline"))
    assert content("wikitext", tmp_path, progress=Warnings()) == WIKI_FILE


def test_the_true_wikitext_gives_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(WIKI_FILE.encode()).hexdigest()
    monkeypatch.setattr(texts, "_WIKITEXT_SHA256", digest)
    progress = Warnings()
    file(tmp_path, "wiki.test.raw", WIKI_FILE)
    content("wikitext", tmp_path, text_dir=tmp_path, progress=progress)
    assert progress.warnings == []


def test_wikitext_from_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(hub: str, repository: str, name: str, into: Path) -> Path:
        asked.append(hub)
        if hub == "modelscope":
            raise SourceError("it is closed")
        into.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(into / "w.zip", "w") as archive:
            archive.writestr("wikitext-2-raw/wiki.test.raw", WIKI_FILE)
        return into / "w.zip"

    monkeypatch.setattr(texts, "_download", download)
    monkeypatch.setenv("GGUFKIT_HUB", "modelscope")
    progress = Warnings()
    text = load_text("wikitext", cache=tmp_path, progress=progress)
    assert text.path.read_text() == WIKI_FILE
    assert text.source == "huggingface ggml-org/ci wikitext-2-raw-v1.zip"
    assert asked == ["modelscope", "huggingface"]


def test_wikitext_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served").mkdir()
    with zipfile.ZipFile(tmp_path / "served/wikitext-2-raw-v1.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", WIKI_FILE)
    with serving("huggingface") as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.repositories["ggml-org/ci"] = tmp_path / "served"
        assert content("wikitext", tmp_path, progress=Warnings()) == WIKI_FILE
        assert hub.fetched() == ["wikitext-2-raw-v1.zip"]
        assert content("wikitext", tmp_path, progress=Warnings()) == WIKI_FILE
        assert hub.fetched() == ["wikitext-2-raw-v1.zip"]


def test_wikitext_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub: str, *_: object) -> Path:
        raise SourceError(f"{hub} does not answer")

    monkeypatch.setattr(texts, "_download", download)
    error = refused("wikitext", tmp_path)
    assert "huggingface does not answer" in error.message
    assert "modelscope does not answer" in error.message
    assert "--text-dir" in error.hint


def test_a_damaged_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = file(tmp_path, "w.zip", b"PK")
    monkeypatch.setattr(texts, "_download", lambda *_: broken)
    error = refused("wikitext", tmp_path, IntegrityError)
    assert f"Remove {broken}" in error.hint
