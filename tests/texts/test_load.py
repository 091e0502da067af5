import gzip
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard
from huggingface_hub import constants

from ggufkit.errors import GgufkitError, IntegrityError, SourceError, UsageError
from ggufkit.texts import datasets, stdlib
from ggufkit.texts import load as texts
from ggufkit.texts.datasets import HEAD_CHARACTERS
from ggufkit.texts.load import BUILT_IN, load_calibration, load_text
from tests.sources.hubs import Hub, serving
from tests.sources.test_modelscope import use as use_modelscope

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
    assert "line 2 of a.jsonl is not JSON" in error.message
    error = refused(file(tmp_path, "b.json", '["one", "two"]'), tmp_path)
    assert "row 1 of b.json is no JSON object" in error.message
    error = refused(file(tmp_path, "c.jsonl", b'{"text": "\xff"}'), tmp_path)
    assert "not UTF-8" in error.message
    error = refused(file(tmp_path, "d.jsonl", '{"text": "\\ud800"}'), tmp_path)
    assert "half a surrogate pair" in error.message


# --- built-in ones ---


FROM_HUBS = {"wikitext", "c4", "pileval", "ptb", "alpaca"}


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - FROM_HUBS))
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
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
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
    monkeypatch.setattr(datasets, "_WIKITEXT_SHA256", digest)
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

    monkeypatch.setattr(datasets, "_download", download)
    monkeypatch.setenv("GGUFKIT_HUB", "modelscope")
    progress = Warnings()
    text = load_text("wikitext", cache=tmp_path, progress=progress)
    assert text.path.read_text() == WIKI_FILE
    assert text.source == "huggingface ggml-org/ci wikitext-2-raw-v1.zip"
    assert asked == ["modelscope", "huggingface"]


def use_huggingface(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_wikitext_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served").mkdir()
    with zipfile.ZipFile(tmp_path / "served/wikitext-2-raw-v1.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", WIKI_FILE)
    with serving("huggingface") as hub:
        use_huggingface(hub, monkeypatch)
        hub.repositories["ggml-org/ci"] = tmp_path / "served"
        assert content("wikitext", tmp_path, progress=Warnings()) == WIKI_FILE
        assert hub.fetched() == ["wikitext-2-raw-v1.zip"]
        assert content("wikitext", tmp_path, progress=Warnings()) == WIKI_FILE
        assert hub.fetched() == ["wikitext-2-raw-v1.zip"]


def test_wikitext_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub: str, *_: object) -> Path:
        raise SourceError(f"{hub} does not answer")

    monkeypatch.setattr(datasets, "_download", download)
    error = refused("wikitext", tmp_path)
    assert "huggingface does not answer" in error.message
    assert "modelscope does not answer" in error.message
    assert "--text-dir" in error.hint


def test_a_damaged_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = file(tmp_path, "w.zip", b"PK")
    monkeypatch.setattr(datasets, "_download", lambda *_: broken)
    error = refused("wikitext", tmp_path, IntegrityError)
    assert f"Remove {broken}" in error.hint


# --- data sets ---

DOCUMENTS = ["First one.", "", "Second,\nof two lines.", "Third: Grüße \u2028 世界."]
JOINED = "First one.\n\nSecond,\nof two lines.\n\nThird: Grüße \u2028 世界."
PAIRS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Größer?", "input": "", "output": "No,\u2028\nnever."},
]
PAIRS_JOINED = "Add.\n1 and 2\n3\n\nGrößer?\nNo,\u2028\nnever."


def json_lines(documents: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": d, "meta": {}}) + "\n" for d in documents).encode()


def write_data_set(path: Path, documents: Sequence[str] = DOCUMENTS) -> Path:
    """Write what a data set holds, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(json_lines(documents)))
    elif path.suffix == ".zst":
        # Two frames, as programs that compress in parallel write them.
        half = json_lines(documents)[:30], json_lines(documents)[30:]
        path.write_bytes(b"".join(map(zstandard.compress, half)))
    elif path.suffix == ".parquet" and path.name.startswith("train"):
        columns = {key: [row[key] for row in PAIRS] for key in PAIRS[0]}
        table(path, {**columns, "text": ["made up"] * len(PAIRS)})  # type: ignore[dict-item]
    else:
        table(path, {"sentence": ["no it was n't black monday", "but <unk> did N"]})
    return path


ALPACA_FILE = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
PTB = " no it was n't black monday \n but <unk> did N \n"


@pytest.mark.parametrize(
    ("name", "repository", "file", "expected"),
    [
        ("c4", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz", JOINED),
        ("pileval", "mit-han-lab/pile-val-backup", "val.jsonl.zst", JOINED),
        ("ptb", "FALcon6/ptb_text_only", "penn_treebank/test/0000.parquet", PTB),
        ("alpaca", "tatsu-lab/alpaca", f"data/{ALPACA_FILE}", PAIRS_JOINED),
    ],
)
def test_only_the_needed_file_is_fetched_and_once(
    name: str,
    repository: str,
    file: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = write_data_set(tmp_path / "served" / file).parents[file.count("/")]
    (served / "en.noblocklist.json.gz").write_bytes(b"x")
    with serving("huggingface") as hub:
        use_huggingface(hub, monkeypatch)
        hub.repositories[repository] = served
        for _ in range(2):
            text = load_text(name, cache=tmp_path / "cache")
            assert text.path.read_bytes().decode() == expected
            assert text.source == f"huggingface {repository} {file}"
        assert hub.fetched() == [file]


@pytest.mark.parametrize(
    ("name", "repository", "file", "expected"),
    [
        ("c4", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz", JOINED),
        ("pileval", "swift/pile-val-backup", "val.jsonl.zst", JOINED),
        ("alpaca", "angelala00/tatsu-lab-alpaca", ALPACA_FILE, PAIRS_JOINED),
    ],
)
def test_modelscope_is_asked_first_if_it_is_the_hub(
    name: str,
    repository: str,
    file: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = write_data_set(tmp_path / "served" / file).parents[file.count("/")]
    (served / "other.json.gz").write_bytes(b"x")
    monkeypatch.setenv("GGUFKIT_HUB", "modelscope")
    with serving("modelscope") as hub:
        use_modelscope(hub.url, monkeypatch, tmp_path)
        hub.repositories[repository] = served
        text = load_text(name, cache=tmp_path / "cache")
        assert text.source == f"modelscope {repository} {file}"
        assert text.path.read_bytes().decode() == expected
        assert sum("FilePath=" in asked for asked in hub.asked) == 1


def test_ptb_is_first_looked_for_in_the_hubs_own_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    write_data_set(served / "penn_treebank/test/0000.parquet")
    with serving("huggingface") as hub:
        use_huggingface(hub, monkeypatch)
        hub.repositories = dict.fromkeys(
            ("ptb-text-only/ptb_text_only", "FALcon6/ptb_text_only"), served
        )
        hub.revisions.add("refs/convert/parquet")
        text = load_text("ptb", cache=tmp_path / "cache")
    assert text.path.read_text() == PTB
    assert "ptb-text-only/ptb_text_only@refs/convert/parquet" in text.source


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("c4", "en/c4-validation.00000-of-00008.json.gz", JOINED),
        ("pileval", "val.jsonl.zst", JOINED),
        ("ptb", "penn_treebank/test/0000.parquet", PTB),
        ("alpaca", f"data/{ALPACA_FILE}", PAIRS_JOINED),
    ],
)
def test_offline_copies_of_data_sets(
    name: str, file: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data_set(tmp_path / "offline" / file)
    monkeypatch.setenv("GGUFKIT_TEXT_DIR", str(tmp_path / "offline"))
    assert content(name, tmp_path) == expected


def test_offline_copies_in_other_formats(tmp_path: Path) -> None:
    here = tmp_path / "offline"
    here.mkdir()
    (here / "c4.jsonl").write_bytes(json_lines(DOCUMENTS))
    (here / "pileval.txt").write_text("As it is.\n")
    (here / "ptb.test.txt").write_text(PTB)
    (here / "alpaca_data.json").write_text(json.dumps(PAIRS, indent=2))
    assert content("c4", tmp_path, text_dir=here) == JOINED
    assert content("pileval", tmp_path, text_dir=here) == "As it is.\n"
    assert content("ptb", tmp_path, text_dir=here) == PTB
    assert content("alpaca", tmp_path, text_dir=here) == PAIRS_JOINED


@pytest.mark.parametrize("name", ["c4.jsonl", "c4-validation.00000-of-00008.json.gz"])
def test_only_the_head_of_a_collection_is_read(tmp_path: Path, name: str) -> None:
    word = "word " * 200
    documents = [f"{i} {word}".strip() for i in range(HEAD_CHARACTERS // len(word) + 10)]
    raw = json_lines(documents) + b"what comes after is never looked at\n"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = content("c4", tmp_path, text_dir=tmp_path)
    assert len(found) == HEAD_CHARACTERS
    assert "\n\n".join(documents).startswith(found)


def test_one_enormous_document_is_cut_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "c4.jsonl").write_bytes(json_lines(["a " * HEAD_CHARACTERS]))
    assert content("c4", tmp_path, text_dir=tmp_path) == ("a " * HEAD_CHARACTERS)[:HEAD_CHARACTERS]


@pytest.mark.parametrize(
    ("name", "file", "data"),
    [
        ("c4", "c4-validation.00000-of-00008.json.gz", b"no gzip"),
        ("c4", "c4-validation.00000-of-00008.json.gz", gzip.compress(json_lines(["x"] * 99))[:-20]),
        ("c4", "c4.jsonl", b'{"text": "x"}\n{"te'),
        ("c4", "c4.jsonl", b'{"url": "x"}\n'),
        ("c4", "c4.jsonl", b'{"text": null}\n'),
        ("c4", "c4.jsonl", b'{"text": "\xff"}\n'),
        ("c4", "c4.jsonl", b'["text"]\n'),
        ("pileval", "val.jsonl.zst", b"no zstd"),
        ("pileval", "val.jsonl.zst", zstandard.compress(b'{"text": "x"}\n{"te')),
        ("alpaca", "alpaca_data.json", b"[{"),
        ("alpaca", "alpaca_data.json", b'[{"instruction": "x"}]'),
        ("alpaca", "alpaca_data.json", b"7"),
    ],
    ids=str,
)
def test_damaged_data_sets(name: str, file: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(data)
    error = refused(name, tmp_path, IntegrityError, text_dir=tmp_path)
    assert f"{file} is damaged" in error.message
    assert "Remove" in error.hint


def test_without_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data_set(tmp_path / "val.jsonl.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    error = refused("pileval", tmp_path, text_dir=tmp_path)
    assert "needs the package zstandard" in error.message
    assert 'pip install "ggufkit[texts]"' in error.hint


@pytest.mark.parametrize("name", sorted(FROM_HUBS))
def test_without_network_every_place_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(hub: str, repository: str, *_: object) -> Path:
        raise SourceError(f"{repository} does not answer")

    monkeypatch.setattr(datasets, "_download", download)
    error = refused(name, tmp_path)
    assert f"{name} cannot be fetched" in error.message
    assert error.message.count("does not answer") >= 2
    assert "GGUFKIT_TEXT_DIR" in error.hint


# --- to calibrate on ---

CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
SHARED = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}


@pytest.mark.parametrize(
    "row", [CHAT, SHARED, PAIRS[0], {"question": "Why?", "answer": "So."}], ids=str
)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n"])
def test_chats_and_pairs_become_rows_of_one_form(row: object, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + json.dumps(row).encode() + b"\n")
    text = load_calibration(str(path), cache=tmp_path / "cache")
    raw = text.path.read_bytes()
    assert text.path == tmp_path / "cache/texts" / f"{text.digest[:16]}.jsonl"
    assert text.digest == hashlib.sha256(raw).hexdigest()
    assert (text.name, text.source, text.nbytes) == (str(path), str(path), len(raw))
    again = load_calibration(str(text.path), cache=tmp_path / "cache")
    assert (again.path, again.digest) == (text.path, text.digest)
    # Each row keeps its line, so that errors name it.
    assert raw.count(b"\n", 0, raw.index(b"{")) == start.count(b"\n")


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".feather", ".arrow"])
def test_the_container_does_not_matter(suffix: str, tmp_path: Path) -> None:
    rows = [SHARED, {"conversations": None}, SHARED]
    lines = file(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        table(path, {"conversations": [row["conversations"] for row in rows]})
    expected = load_calibration(str(lines), cache=tmp_path / "cache")
    assert load_calibration(str(path), cache=tmp_path / "cache").digest == expected.digest


@pytest.mark.parametrize(
    ("name", "data", "options", "expected"),
    [
        ("a.txt", "Some words.", {}, "Some words."),
        ("a.txt", json.dumps(CHAT), {}, json.dumps(CHAT)),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', {}, "one\n\ntwo"),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n', {"column": "answer"}, "a"),
    ],
)
def test_other_texts_are_texts(
    name: str, data: str, options: dict[str, str], expected: str, tmp_path: Path
) -> None:
    path = file(tmp_path, name, data)
    text = load_calibration(str(path), cache=tmp_path / "cache", **options)  # type: ignore[arg-type]
    assert text == load_text(str(path), cache=tmp_path / "cache", **options)  # type: ignore[arg-type]
    assert text.path.read_text() == expected


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("missing.jsonl", None, SourceError),
        ("a.jsonl", b"", SourceError),
        ("a.jsonl", b"GGUF\x03\0\0\0", IntegrityError),
        ("a.jsonl", b'{"text": "\xff"}', SourceError),
        ("a.txt", b"GGUF\x03\0\0\0", SourceError),
        ("a.parquet", b"PAR1 but cut", IntegrityError),
    ],
)
def test_what_is_no_calibration_text(
    name: str, data: bytes | None, kind: type[GgufkitError], tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(kind) as caught:
        load_calibration(str(tmp_path / name), cache=tmp_path / "cache")
    assert type(caught.value) is kind
    assert caught.value.hint


def test_alpaca_to_calibrate_on_keeps_its_pairs(tmp_path: Path) -> None:
    table(tmp_path / ALPACA_FILE, {key: [row[key] for row in PAIRS] for key in PAIRS[0]})
    text = load_calibration("alpaca", text_dir=tmp_path, cache=tmp_path / "cache")
    assert text.path.suffix == ".jsonl"
    lines = text.path.read_bytes().decode().rstrip("\n").split("\n")
    assert [json.loads(line) for line in lines] == PAIRS
    assert text.digest == hashlib.sha256(text.path.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match="is a built-in text"):
        load_calibration("alpaca", column="output", text_dir=tmp_path, cache=tmp_path / "cache")


def test_only_the_head_of_alpaca_is_taken(tmp_path: Path) -> None:
    row = {"instruction": "Say it.", "input": "", "output": "word " * 2000}
    rows = [row] * (HEAD_CHARACTERS // 10_000 + 50)
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    text = load_calibration("alpaca", text_dir=tmp_path, cache=tmp_path / "cache")
    kept = text.path.read_text().splitlines()
    assert HEAD_CHARACTERS <= text.nbytes < HEAD_CHARACTERS + 11_000
    assert json.loads(kept[-1]) == row


def test_a_text_can_be_kept(tmp_path: Path) -> None:
    text = texts.keep_text("what was said", "Words.", "somebody", tmp_path)
    assert text.path.read_text() == "Words."
    assert (text.name, text.source, text.nbytes) == ("what was said", "somebody", 6)
    assert text.path.parent == tmp_path / "texts"
