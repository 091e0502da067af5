"""Measuring on what a model was calibrated on is noticed."""

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggufkit import pipeline
from ggufkit.errors import GgufkitError
from ggufkit.evaluate import leaks
from ggufkit.evaluate.leaks import RUN_WORDS, THRESHOLD, Calibrated, overlap
from ggufkit.library import manifest_of
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT
from ggufkit.store import Store
from ggufkit.texts.load import load_calibration, load_text
from ggufkit.values import AwqOptions, Calibration
from tests.factory import make_checkpoint

Run = Callable[..., tuple[int, str, str]]

WORDS = ("the", "a", "model", "text", "river", "stone", "light", "of", "and", "seven", "green")


def prose(seed: int, words: int = 3000) -> str:
    """Sentences that nobody has written before."""
    rng = random.Random(seed)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(words // 9)]
    return " ".join(f"{sentence.capitalize()}." for sentence in sentences)


def file(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


# --- overlaps ----------------------------------------------------------------


def shared(tmp_path: Path, text: str, calibration: str) -> float | None:
    return overlap(file(tmp_path / "text.txt", text), file(tmp_path / "seen.txt", calibration))


def test_the_same_text_is_all_there(tmp_path: Path) -> None:
    assert shared(tmp_path, prose(1), prose(1)) == 1


def test_case_spacing_and_punctuation_hide_nothing(tmp_path: Path) -> None:
    disguised = prose(1).upper().replace(" ", "\n\t ").replace(".", " !\r\n")
    assert disguised != prose(1)
    assert shared(tmp_path, disguised, prose(1)) == 1


def test_half_a_text_is_half_there(tmp_path: Path) -> None:
    text = prose(1)
    assert shared(tmp_path, text, prose(2) + text[: len(text) // 2]) == pytest.approx(0.5, abs=0.02)


def test_the_share_is_of_the_text_that_is_measured(tmp_path: Path) -> None:
    part = prose(1, words=300)
    assert shared(tmp_path, part, prose(2) + part) == 1
    assert shared(tmp_path, prose(2) + part, part) == pytest.approx(0.1, abs=0.02)


def test_other_texts_and_other_words_for_the_same_are_no_leak(tmp_path: Path) -> None:
    assert shared(tmp_path, prose(1), prose(2)) == 0
    said = "The cat that had slept all day on the warm roof woke up when the rain began to fall."
    otherwise = "When rain began falling, a cat woke up: it had slept the whole day on a warm roof."
    assert shared(tmp_path, said, otherwise) == 0


def test_texts_without_spaces_leak_too(tmp_path: Path) -> None:
    chinese = "".join(random.Random(1).choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往", k=500))
    assert shared(tmp_path, chinese, "序言。" + chinese[100:400]) == pytest.approx(0.6, abs=0.05)


def test_a_text_of_a_few_words_tells_nothing(tmp_path: Path) -> None:
    words = " ".join(WORDS[: RUN_WORDS - 1])
    assert shared(tmp_path, words, prose(1)) is None
    assert shared(tmp_path, prose(1), words) == 0


def test_chats_are_read_for_what_they_say(tmp_path: Path) -> None:
    said = [prose(seed, words=300) for seed in range(6)]
    rows = [{"messages": [{"role": "user", "content": f"{turn}\n"}]} for turn in said]
    chats = file(tmp_path / "chats.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    # Only what goes on from one chat into the next is not there.
    assert overlap(file(tmp_path / "text.txt", " ".join(said)), chats) == pytest.approx(1, abs=0.05)


def test_short_turns_are_found_in_the_bare_text_of_chats(tmp_path: Path) -> None:
    """Names of roles do not stand between turns in a text, so they do not in runs."""
    turns = [
        {"role": "user", "content": "Where do hedgehogs sleep in winter, and for how long?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Under leaves, for months."}]},
    ]
    chats = file(tmp_path / "chats.jsonl", json.dumps({"messages": turns * 3}) + "\n")
    cache = tmp_path / "cache"
    said = load_text(str(chats), column="messages", cache=cache)
    assert overlap(said.path, load_calibration(str(chats), cache=cache).path) == 1


def test_runs_go_on_from_block_to_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(1).replace(". ", ".\n")
    whole = shared(tmp_path, text, prose(2) + text[5000:])
    monkeypatch.setattr(leaks, "_BLOCK_CHARACTERS", 100)
    assert shared(tmp_path, text, prose(2) + text[5000:]) == whole
    assert shared(tmp_path, text, text) == 1


def test_of_a_long_text_a_sample_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, seen = prose(1, words=40_000), prose(2, words=20_000)
    seen += text[: len(text) // 3]
    whole = shared(tmp_path, text, seen)
    monkeypatch.setattr(leaks, "_MAX_HASHES", 4_000)
    monkeypatch.setattr(leaks, "_BLOCK_CHARACTERS", 10_000)
    assert shared(tmp_path, text.replace(". ", ".\n"), seen) == pytest.approx(whole, abs=0.05)
    sketch = leaks.Sketch()
    for hashes in leaks._runs(leaks._blocks(tmp_path / "text.txt")):
        sketch.add(hashes)
        assert sum(map(len, sketch._kept)) <= 4_000


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cache = tmp_path_factory.mktemp("cache")
    names = ("pydoc", "pydoc-calibration", "pydoc-measure", "stdlib-docstrings")
    return {name: load_text(name, cache=cache).path for name in names}


@pytest.mark.parametrize(
    ("text", "seen", "leak"),
    [
        ("pydoc-measure", "pydoc-calibration", False),
        ("pydoc-measure", "stdlib-docstrings", False),
        ("pydoc", "stdlib-docstrings", False),
        ("stdlib-docstrings", "pydoc", False),
        ("pydoc", "pydoc-calibration", True),
        ("pydoc-measure", "pydoc", True),
    ],
)
def test_built_in_texts(built_in: dict[str, Path], text: str, seen: str, leak: bool) -> None:
    told = overlap(built_in[text], built_in[seen])
    assert told is not None
    assert (told > 0.5) if leak else (told < THRESHOLD / 2)


# --- what a model was calibrated on ------------------------------------------

LITTLE = {"samples": 4, "length": 64}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``seen.txt`` to calibrate on, ``other.txt`` to measure with."""
    place = tmp_path_factory.mktemp("texts")
    file(place / "seen.txt", prose(1))
    file(place / "other.txt", prose(2))
    file(place / "half.txt", prose(3) + prose(1)[: len(prose(3))].upper())
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def calibration(texts: Path) -> Calibration:
    return Calibration(str(texts / "seen.txt"), **LITTLE)


def convert(checkpoint: Path, texts: Path, models: Path, **options: Any) -> Path:
    (made,) = pipeline.convert(
        str(checkpoint),
        types=options.pop("types", ["q4_0"]),
        calibration=calibration(texts),
        models_dir=models,
        **options,
    )
    return made.path


def measure(model: Path, text: Path, models: Path, **options: Any) -> Any:
    (told,) = pipeline.ppl(str(text), [model], context=64, chunks=2, models_dir=models, **options)
    return told


def records(model: Path, models: Path) -> tuple[Calibrated, ...] | None:
    return leaks.calibrations_of(Store(models), model, manifest_of(model))


WAYS: dict[str, dict[str, Any]] = {
    "awq": {"awq": True},
    "imatrix": {"imatrix": "auto"},
    "both": {"awq": True, "imatrix": "auto"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_not_measured_on_what_it_was_calibrated_on(
    way: str, checkpoint: Path, texts: Path, models: Path, native: NativeBuild
) -> None:
    model = convert(checkpoint, texts, models, **WAYS[way])
    with pytest.raises(GgufkitError, match=r"calibrated .* holds 100 % of .*seen\.txt") as caught:
        measure(model, texts / "seen.txt", models)
    assert "--allow-leak" in caught.value.hint
    with pytest.raises(GgufkitError, match="holds 50 %"):
        measure(model, texts / "half.txt", models)
    told = measure(model, texts / "other.txt", models)
    assert (told.overlap, told.notes) == (0, ())


def test_the_chain_of_manifests_leads_to_the_text(
    checkpoint: Path, texts: Path, models: Path, native: NativeBuild
) -> None:
    """Files that were made before calibrations were noted in their own manifest."""
    model = convert(checkpoint, texts, models, **WAYS["both"])
    manifest = manifest_of(model)
    assert manifest is not None
    noted = leaks.records_of(Store(models), manifest)
    old = dataclasses.replace(manifest, facts={"origin": "somewhere"})
    assert set(leaks.records_of(Store(models), old)) == set(noted)
    assert {r.name for r in noted} == {str(texts / "seen.txt")}
    lost = leaks.records_of(Store(models / "nothing"), old)
    assert lost == (Calibrated("AWQ"), Calibrated("importance matrix"))


def test_a_plain_file_was_calibrated_on_nothing(
    checkpoint: Path, texts: Path, models: Path, native: NativeBuild
) -> None:
    model = convert(checkpoint, texts, models)
    assert records(model, models) == ()
    told = measure(model, texts / "seen.txt", models)
    assert (told.overlap, told.notes) == (None, ())


def test_a_file_put_elsewhere_keeps_its_record(
    checkpoint: Path, texts: Path, models: Path, tmp_path: Path, native: NativeBuild
) -> None:
    model = convert(checkpoint, texts, models, awq=True, out=tmp_path / "out")
    assert model.parent == tmp_path / "out"
    with pytest.raises(GgufkitError, match="100 %"):
        measure(model, texts / "seen.txt", tmp_path / "other models")


def test_scales_folded_in_before_count(
    checkpoint: Path, texts: Path, models: Path, tmp_path: Path, native: NativeBuild
) -> None:
    pipeline.awq(
        str(checkpoint),
        out=tmp_path / "folded",
        type="q4_0",
        imatrix=True,
        calibration=calibration(texts),
        models_dir=models,
    )
    elsewhere = tmp_path / "models"
    other = Calibration(str(texts / "other.txt"), **LITTLE)
    (plain,) = pipeline.convert(str(tmp_path / "folded"), types=["q8_0"], models_dir=elsewhere)
    scales = tmp_path / "folded" / "awq" / "scales.safetensors"
    (given,) = pipeline.convert(
        str(checkpoint),
        types=["q8_0"],
        awq=True,
        awq_options=AwqOptions(scales=scales),
        calibration=other,
        models_dir=elsewhere,
    )
    for made in (plain, given):
        found = records(made.path, elsewhere)
        assert found is not None
        assert {(r.by, r.name) for r in found} == {("AWQ", str(texts / "seen.txt"))}
    bare = tmp_path / "bare.safetensors"
    shutil.copyfile(scales, bare)
    assert leaks.records_of_scales(Store(elsewhere / "none"), bare) == (Calibrated("AWQ"),)


def test_an_importance_matrix_names_its_text_in_the_file(
    checkpoint: Path, texts: Path, models: Path, tmp_path: Path, native: NativeBuild
) -> None:
    """Also in one that left the models directory, and in what others made with it."""
    convert(checkpoint, texts, models, imatrix="auto")
    every = Store(models).artifacts("imatrix")
    made = next(a for a in every if not a.manifest.inputs["scales"])
    matrix = tmp_path / "matrix.gguf"
    shutil.copyfile(made.file(".gguf"), matrix)
    elsewhere = tmp_path / "models"
    floats = convert(checkpoint, texts, elsewhere, types=["f32"])
    (quantized,) = pipeline.quantize(floats, types=["q4_0"], imatrix=matrix, models_dir=elsewhere)
    converted = convert(checkpoint, texts, elsewhere, types=["q4_1"], imatrix=matrix)
    stray = tmp_path / "stray.gguf"
    shutil.copyfile(quantized.path, stray)
    assert manifest_of(stray) is None
    for model in (quantized.path, converted, stray):
        assert records(model, elsewhere) == (
            Calibrated("importance matrix", str(texts / "seen.txt")),
        )
        with pytest.raises(GgufkitError, match="100 %"):
            measure(model, texts / "seen.txt", elsewhere)


def test_what_is_quantized_of_a_calibrated_file_is_calibrated(
    checkpoint: Path, texts: Path, models: Path, native: NativeBuild
) -> None:
    scaled = convert(checkpoint, texts, models, awq=True, types=["q8_0"])
    (again,) = pipeline.quantize(scaled, types=["q4_0"], models_dir=models, allow_requantize=True)
    assert records(again.path, models) == records(scaled, models) != ()


# --- what is said ------------------------------------------------------------


def test_an_allowed_leak_is_marked(
    checkpoint: Path, texts: Path, models: Path, run_cli: Run, native: NativeBuild
) -> None:
    model = convert(checkpoint, texts, models, awq=True)
    ask = ("--models-dir", models, "ppl", texts / "seen.txt", model, "-c", 64, "--chunks", 3)
    code, out, err = run_cli(*ask)
    assert (code, out) == (1, "")
    assert "error: " in err
    assert "--allow-leak" in err
    code, out, err = run_cli(*ask, "--allow-leak")
    assert code == 0
    assert "warning: " in err
    assert "holds 100 %" in err
    assert "[!]" in out
    assert "100 %" in out
    code, out, _ = run_cli(*ask, "--allow-leak", "--json")
    (told,) = json.loads(out)
    assert told["overlap"] == 1
    assert "holds 100 %" in told["notes"][0]
    (kept,) = (
        a.manifest.facts
        for a in Store(models).artifacts("evaluate")
        if a.manifest.facts["overlap"] == 1
    )
    assert (kept["text"], kept["notes"]) == (str(texts / "seen.txt"), told["notes"])


def test_a_text_that_is_gone_is_a_note(
    checkpoint: Path,
    texts: Path,
    models: Path,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    native: NativeBuild,
) -> None:
    model = convert(checkpoint, texts, models, awq=True)
    monkeypatch.setattr(leaks, "find_calibration", lambda *_: None)
    told = measure(model, texts / "other.txt", models)
    assert told.overlap is None
    (note,) = told.notes
    assert "seen.txt" in note
    assert "not to be found" in note


def test_the_text_is_found_by_its_digest_or_its_name(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    text = load_text(str(file(tmp_path / "seen.txt", prose(1))), cache=cache)
    record = Calibrated("AWQ", text.name, text.digest)

    def find(record: Calibrated) -> Path | None:
        return leaks.find_calibration(record, cache, SILENT)

    assert find(record) == text.path
    assert find(Calibrated("AWQ", "", text.digest)) == text.path
    text.path.write_text("damaged")
    assert find(record) == text.path  # made again of the file
    assert text.path.read_text() == prose(1)
    text.path.unlink()
    file(tmp_path / "seen.txt", "another text by now " * 20)
    assert find(record) is None
    assert find(Calibrated("AWQ", "pydoc-calibration")) is not None
    assert find(Calibrated("AWQ")) is None
    assert find(Calibrated("AWQ", "no-such-text")) is None


def test_a_file_of_chats_is_found_by_its_own_digest_too(tmp_path: Path) -> None:
    """Older records have the digest of the file, newer ones that of its rows in one form."""
    chat = {"messages": [{"role": "user", "content": prose(1)}]}
    path = file(tmp_path / "chats.jsonl", json.dumps(chat) + "\n")
    cache = tmp_path / "cache"
    kept = load_calibration(str(path), cache=cache)
    for digest in (hashlib.sha256(path.read_bytes()).hexdigest(), kept.digest):
        record = Calibrated("AWQ", str(path), digest)
        assert leaks.find_calibration(record, cache, SILENT) == kept.path
    assert leaks.find_calibration(Calibrated("AWQ", str(path), "0" * 64), cache, SILENT) is None
    said = file(tmp_path / "said.txt", prose(1))
    assert leaks.overlap(said, kept.path) == 1


def test_of_a_stray_file_nothing_is_known(
    checkpoint: Path, texts: Path, models: Path, tmp_path: Path, run_cli: Run, native: NativeBuild
) -> None:
    stray = tmp_path / "stray.gguf"
    shutil.copyfile(convert(checkpoint, texts, models, awq=True), stray)
    ask = ("--models-dir", tmp_path / "m", "ppl", texts / "seen.txt", stray, "-c", 64)
    code, out, err = run_cli(*ask, "--chunks", 2)
    assert code == 0, err
    assert "record" not in out + err
    code, out, _ = run_cli(*ask, "--chunks", 2, "--json")
    (told,) = json.loads(out)
    assert told["overlap"] is None
    assert "not recorded" in told["notes"][0]


def test_an_overlap_is_counted_once(
    checkpoint: Path,
    texts: Path,
    models: Path,
    native: NativeBuild,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = convert(checkpoint, texts, models, awq=True)
    first = measure(model, texts / "other.txt", models)
    monkeypatch.setattr(leaks, "overlap", None)  # would fail if it were called
    assert measure(model, texts / "other.txt", models).overlap == first.overlap


def test_compare_is_guarded_too(
    checkpoint: Path, texts: Path, models: Path, native: NativeBuild
) -> None:
    scaled = convert(checkpoint, texts, models, awq=True)
    floats = convert(checkpoint, texts, models, types=["f32"])

    def compare(text: str, **options: Any) -> Any:
        names = [str(texts / text)]
        return pipeline.compare(
            floats, [scaled], texts=names, context=64, chunks=5, models_dir=models, **options
        )

    with pytest.raises(GgufkitError, match="holds 100 %"):
        compare("seen.txt")
    report = compare("seen.txt", allow_leak=True)
    assert report.comparisons[0].overlap == 1
    assert any("holds 100 %" in note for note in report.notes)
    report = compare("other.txt")
    assert (report.comparisons[0].overlap, report.comparisons[0].notes) == (0, ())
    kept = [a.manifest.facts["overlap"] for a in Store(models).artifacts("compare")]
    assert sorted(kept) == [0, 1]


def test_compare_prints_a_card_for_each_domain_and_the_worst(
    checkpoint: Path, texts: Path, models: Path, tmp_path: Path, run_cli: Run, native: NativeBuild
) -> None:
    scaled = convert(checkpoint, texts, models, awq=True)
    floats = convert(checkpoint, texts, models, types=["f32"])
    file(tmp_path / "prose.txt", prose(5))
    file(tmp_path / "chinese.txt", "天地玄黄宇宙洪荒日月盈昃辰宿列张" * 200)
    ask = ("--models-dir", models, "compare", floats, scaled, "--domains", tmp_path)
    code, out, err = run_cli(*ask, "-c", 64, "--chunks", 5)
    assert code == 0, err
    assert "chinese: 5 chunks of 64" in out
    assert "prose: 5 chunks of 64" in out
    assert f"{scaled.stem} loses most on " in out
    file(tmp_path / "bad.txt", "")
    code, out, err = run_cli(*ask, "-c", 64, "--chunks", 5)
    assert (code, out) == (1, "")
    assert "bad.txt has no text in it" in err
