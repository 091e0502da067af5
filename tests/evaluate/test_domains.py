"""Texts of several domains: found, refused by name, and the worst of them said."""

import math
from pathlib import Path

import pytest

from ggufkit.errors import GgufkitError, SourceError
from ggufkit.evaluate.domains import (
    check_length,
    load_domains,
    worst_by_divergence,
    worst_by_perplexity,
)
from ggufkit.texts.load import keep_text
from ggufkit.values import EvalResult, Text
from tests.evaluate.reporting import comparison

LONG = "Once there was a river that ran through a town of stone. " * 20


def load(directory: Path, tmp_path: Path, **options: str) -> tuple[Text, ...]:
    return load_domains(directory, context=64, cache=tmp_path / "cache", **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "domains"
    place.mkdir()
    return place


def test_each_file_is_a_domain_called_as_the_file(folder: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import feather, parquet

    rows = {"text": [LONG, "The end."]}
    (folder / "prose.txt").write_text(LONG)
    (folder / "chinese.txt").write_text("天地玄黄宇宙洪荒" * 40)
    (folder / "chat.jsonl").write_text(f'{{"text": "{LONG}"}}\n{{"text": "The end."}}\n')
    parquet.write_table(pyarrow.table(rows), folder / "code.parquet")
    feather.write_feather(pyarrow.table(rows), folder / "maths.arrow")
    (folder / ".hidden").write_bytes(b"\x00")
    texts = load(folder, tmp_path)
    assert [t.name for t in texts] == ["chat", "chinese", "code", "maths", "prose"]
    chat, chinese, code, maths, prose = texts
    assert chat.digest == code.digest == maths.digest != prose.digest
    assert chinese.path.read_text() == "天地玄黄宇宙洪荒" * 40


def test_a_column_is_asked_of_those_that_have_columns(folder: Path, tmp_path: Path) -> None:
    (folder / "prose.txt").write_text(LONG)
    (folder / "chat.jsonl").write_text(f'{{"said": "{LONG}", "by": "me"}}\n')
    assert [t.path.read_text() for t in load(folder, tmp_path, column="said")] == [LONG, LONG]


def test_a_file_called_as_a_built_in_text_is_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "pydoc").write_text(LONG)
    monkeypatch.chdir(folder)
    (text,) = load(Path(), tmp_path)
    assert (text.name, text.path.read_text()) == ("pydoc", LONG)


BAD = {
    "empty.txt": (b"", "has no text in it"),
    "binary.txt": (b"text\x00" * 400, "NUL byte at offset 4"),
    "latin.txt": ("déjà vu ".encode("latin-1") * 99, "not UTF-8: byte 0xe9 at offset 1"),
    "short.txt": (b"Only a few words.", "too short: its 17 bytes"),
    "wide.txt": ("text ".encode("utf-16") * 99, "UTF-16"),
    "broken.parquet": (b"PAR1" + bytes(300), "cannot be read"),
    "model.gguf": (b"GGUF" + bytes(300), "GGUF model"),
    "chat.jsonl": (b'{"text": "one"}\nnothing\n', "line 2"),
    "prose.md": (LONG.encode(), "another text called prose"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    content, message = BAD[name]
    (folder / "prose.txt" if name == "prose.md" else folder / "good.txt").write_text(LONG)
    (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=r"1 of 2 texts in .* cannot be used") as caught:
        load(folder, tmp_path)
    assert message in caught.value.message
    assert Path(name).stem in caught.value.message


def test_all_that_cannot_be_used_is_named_at_once(folder: Path, tmp_path: Path) -> None:
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    (folder / "deeper").mkdir()
    (folder / "prose.txt").write_text(LONG)
    with pytest.raises(SourceError, match="10 of 11 texts") as caught:
        load(folder, tmp_path)
    told = caught.value.message
    assert "deeper is a directory" in told
    assert all(message in told for name, (_, message) in BAD.items() if name != "prose.md")


def test_a_folder_that_is_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no text in"):
        load(folder, tmp_path)
    with pytest.raises(SourceError, match="is not a directory"):
        load(folder / "nothing", tmp_path)


def test_two_contexts_of_bytes_are_the_least(tmp_path: Path) -> None:
    enough = keep_text("enough", "x" * 127, "", tmp_path)
    check_length(enough, 64)
    with pytest.raises(GgufkitError, match="too short"):
        check_length(keep_text("less", "x" * 126, "", tmp_path), 64)


# --- the worst domain --------------------------------------------------------


def measured(model: str, text: str, perplexity: float) -> EvalResult:
    return EvalResult(
        model=Path(model),
        text=text,
        perplexity=perplexity,
        error=0.1,
        tokens=100,
        chunks=1,
        context=100,
        tokens_per_second=1.0,
        peak_rss_nbytes=1,
        file_nbytes=1,
        seconds=1.0,
    )


def test_the_worst_is_where_perplexity_rises_most_not_where_it_is_highest() -> None:
    rows = [
        measured("f32", "prose", 20.0),
        measured("q4", "prose", 22.0),
        measured("f32", "chinese", 90.0),
        measured("q4", "chinese", 91.0),
        measured("f32", "code", 4.0),
        measured("q4", "code", 5.0),
    ]
    (worst,) = worst_by_perplexity(rows)
    assert (worst.model, worst.text, worst.measure) == (Path("q4"), "code", "log_perplexity")
    assert worst.loss == pytest.approx(math.log(5 / 4))
    assert worst.elsewhere == pytest.approx((math.log(1.1) + math.log(91 / 90)) / 2)


def test_one_text_or_one_model_has_no_worst() -> None:
    assert worst_by_perplexity([measured("f32", "prose", 2), measured("q4", "prose", 3)]) == ()
    assert worst_by_perplexity([measured("f32", "prose", 2), measured("f32", "code", 3)]) == ()
    assert worst_by_perplexity([]) == ()


def test_the_worst_is_the_farthest_from_the_reference(tmp_path: Path) -> None:
    f32, q4, q8 = (tmp_path / name for name in ("f32", "q4", "q8"))
    for file in (f32, q4, q8):
        file.touch()
    rows = [
        comparison(q4, f32, divergence=0.10, text="prose"),
        comparison(q8, f32, divergence=0.02, text="prose"),
        comparison(q4, f32, divergence=0.30, text="code"),
        comparison(q8, f32, divergence=0.01, text="code"),
    ]
    told = {w.model: (w.text, w.loss, w.elsewhere) for w in worst_by_divergence(rows)}
    assert told == {q4: ("code", 0.30, 0.10), q8: ("prose", 0.02, 0.01)}
    assert worst_by_divergence(rows[:2]) == ()
