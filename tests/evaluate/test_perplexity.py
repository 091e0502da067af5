"""``ggufkit ppl`` on several models and texts, by the real llama-perplexity."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit import pipeline
from ggufkit.evaluate import leaks
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.store import Store
from ggufkit.texts.load import load_text
from tests.factory import make_checkpoint

Run = Callable[..., tuple[int, str, str]]
CONTEXT, CHUNKS = 64, 4


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two texts, ``one.txt`` and ``two.txt``."""
    place = tmp_path_factory.mktemp("texts")
    content = load_text("pydoc", cache=tmp_path_factory.mktemp("cache")).path.read_text()
    (place / "two.txt").write_text(content[:20_000])
    (place / "one.txt").write_text(content[100_000:140_000])
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, native: NativeBuild) -> Path:
    """A models directory with ``tiny-Q4_0`` and ``tiny-Q8_0``."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    place = tmp_path_factory.mktemp("models")
    pipeline.convert(str(checkpoint), types=["q4_0", "q8_0"], models_dir=place)
    return place


def test_copies_of_a_text_in_containers_measure_the_very_same(
    tmp_path: Path, texts: Path, models: Path
) -> None:
    import pyarrow
    from pyarrow import feather, parquet

    paragraphs = (texts / "one.txt").read_text().split("\n\n")
    table = pyarrow.table({"text": paragraphs})
    parquet.write_table(table, tmp_path / "copy.parquet")
    feather.write_feather(table, tmp_path / "copy.arrow")
    lines = "".join(json.dumps({"text": p}) + "\n" for p in paragraphs)
    (tmp_path / "copy.jsonl").write_text(lines)
    model = pipeline.find_model("tiny-Q8_0", models)
    plain, *copies = (
        pipeline.ppl(
            str(path),
            [model],
            context=CONTEXT,
            chunks=CHUNKS,
            models_dir=tmp_path / path.suffix[1:],
        )[0]
        for path in (
            texts / "one.txt",
            *(tmp_path / f"copy.{kind}" for kind in ("parquet", "arrow", "jsonl")),
        )
    )
    assert [c.reused for c in copies] == [False] * 3  # each was measured by itself
    assert {(c.perplexity, c.error) for c in copies} == {(plain.perplexity, plain.error)}
    kept = {
        artifact.manifest.inputs["text"]
        for place in tmp_path.iterdir()
        if place.is_dir()
        for artifact in Store(place).artifacts("evaluate")
    }
    assert kept == {load_text(str(texts / "one.txt"), cache=tmp_path / "cache").digest}


def test_every_model_is_measured_on_every_text(texts: Path, models: Path) -> None:
    files = [pipeline.find_model(name, models) for name in ("tiny-Q4_0", "tiny-Q8_0")]
    names = [str(texts / name) for name in ("one.txt", "two.txt")]

    def ppl(text: str | list[str]) -> list[tuple[str, Path, float, float]]:
        rows = pipeline.ppl(text, files, context=CONTEXT, chunks=CHUNKS, models_dir=models)
        return [(r.text, r.model, r.perplexity, r.error) for r in rows]

    together = ppl(names)
    assert [(text, model) for text, model, *_ in together] == [
        (text, model) for text in names for model in files
    ]
    assert together == ppl(names[0]) + ppl(names[1])
    assert ppl([names[0], names[0]]) == ppl(names[0])


def test_the_number_is_the_tool_s_own(
    texts: Path, models: Path, tmp_path: Path, native: NativeBuild
) -> None:
    model = pipeline.find_model("tiny-Q4_0", models)
    (told,) = pipeline.ppl(
        str(texts / "two.txt"), [model], context=CONTEXT, chunks=CHUNKS, models_dir=models
    )
    printed: list[str] = []
    toolchain.run(
        [
            *(native.tool("llama-perplexity"), "-m", model, "-f", texts / "two.txt"),
            *("-c", str(CONTEXT), "--chunks", str(CHUNKS)),
        ],
        on_text=printed.append,
    )
    found = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", "".join(printed))
    assert found is not None
    assert (told.perplexity, told.error) == (float(found[1]), float(found[2]))


def test_results_say_of_which_text_they_are(texts: Path, models: Path) -> None:
    model = pipeline.find_model("tiny-Q4_0", models)
    text = str(texts / "one.txt")
    pipeline.ppl(text, [model], context=CONTEXT, chunks=CHUNKS, models_dir=models)
    facts = [a.manifest.facts for a in Store(models).artifacts("evaluate")]
    (own,) = (f for f in facts if f["text"] == text and f["model"] == str(model))
    assert own["file_nbytes"] == model.stat().st_size
    assert own["peak_rss_nbytes"] > own["file_nbytes"]


def test_one_table_of_models_and_texts(texts: Path, models: Path, run_cli: Run) -> None:
    code, out, err = run_cli(
        *("--models-dir", models, "ppl", texts / "one.txt", "tiny-Q8_0", "tiny-Q4_0"),
        *("--text", texts / "two.txt", "-c", CONTEXT, "--chunks", CHUNKS),
    )
    assert code == 0, err
    assert out.count(f"{CONTEXT * CHUNKS} tokens, {CHUNKS} chunks of {CONTEXT}") == 2
    number = r" +\d+\.\d{4} ± \d+\.\d{4} +[+-]\d+\.\d{4} +\w+ +\d+\.\d MiB +\d+\.\d [KM]iB"
    for row in (
        rf"one\.txt +tiny-Q8_0{number}",
        rf" +tiny-Q4_0{number}",
        rf"two\.txt +tiny-Q8_0{number}",
    ):
        assert re.search(row, out), row
    assert re.search(
        r"^tiny-Q4_0 loses most on .*: perplexity [+-]\d+\.\d\d % to the first", out, re.M
    )


def test_a_folder_of_domains(texts: Path, models: Path, run_cli: Run) -> None:
    ask = ("--models-dir", models, "ppl", "--domains", texts, "-c", CONTEXT, "--chunks", CHUNKS)
    code, out, err = run_cli(*ask, "tiny-Q8_0", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [(r["text"], Path(r["model"]).stem) for r in told] == [
        ("one", "tiny-Q8_0"),
        ("two", "tiny-Q8_0"),
    ]
    code, out, err = run_cli(*ask)
    assert code == 0, err
    assert "measuring the newest model" in err
    assert re.search(r"^one +tiny-Q", out, re.M)


def test_a_folder_with_a_bad_text_stops_before_any_work(
    models: Path, tmp_path: Path, run_cli: Run
) -> None:
    (tmp_path / "good.txt").write_text("Once there was a river. " * 99)
    (tmp_path / "bad.txt").write_bytes(b"\x00" * 400)
    before = len(list(Store(models).artifacts()))
    code, out, err = run_cli("--models-dir", models, "ppl", "--domains", tmp_path, "-c", CONTEXT)
    assert (code, out) == (1, "")
    assert "bad.txt is binary" in err
    assert len(list(Store(models).artifacts())) == before


def test_a_text_that_the_tool_finds_too_short_is_named(
    models: Path, tmp_path: Path, run_cli: Run
) -> None:
    """It has bytes enough, but not tokens; it is looked at before the longer one."""
    (tmp_path / "long.txt").write_text("Once there was a river. " * 999)
    (tmp_path / "brief.txt").write_text("the " * 2000)
    ask = ("ppl", tmp_path / "long.txt", "--text", tmp_path / "brief.txt", "tiny-Q4_0")
    code, out, err = run_cli("--models-dir", models, *ask, "-c", 2048)
    assert (code, out) == (1, "")
    assert re.search(r"error: .*brief\.txt has only \d+ tokens", err)


def test_no_text_is_wrong_usage(models: Path, run_cli: Run) -> None:
    code, _, err = run_cli("--models-dir", models, "ppl")
    assert code == 2
    assert "TEXT" in err


def test_results_of_before_have_no_marks(
    texts: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older version stored is used as it is."""
    model = pipeline.find_model("tiny-Q4_0", models)
    text = str(texts / "two.txt")

    def ppl() -> tuple[float, bool]:
        (told,) = pipeline.ppl(text, [model], context=CONTEXT, chunks=1, models_dir=tmp_path)
        return told.perplexity, told.reused

    first, _ = ppl()
    (stored,) = Store(tmp_path).artifacts("evaluate")
    path = stored.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for added in ("text", "model", "file_nbytes", "overlap", "notes"):
        del manifest["facts"][added]
    path.write_text(json.dumps(manifest))
    assert ppl() == (first, True)
    assert leaks.is_leak(None) is False
