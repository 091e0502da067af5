"""Comparisons as a whole: against llama-perplexity, killed and resumed, from caches."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufkit import pipeline
from ggufkit.errors import GgufkitError, IntegrityError, SourceError, UsageError
from ggufkit.evaluate import by_bytes, comparison
from ggufkit.llamacpp import host, toolchain
from ggufkit.llamacpp.scoring import Scorer
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Silent
from ggufkit.store import Store
from ggufkit.texts.load import load_text
from ggufkit.values import Comparison, ComparisonReport
from tests.factory import break_gguf, make_checkpoint

CONTEXT = 64
STEP = 512 // CONTEXT
"""Chunks that are decoded together."""
SCORED = CONTEXT - 1 - CONTEXT // 2


class Told(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)

    warn = say


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    found = load_text("pydoc", cache=tmp_path_factory.mktemp("texts"))
    path.write_bytes(found.path.read_bytes()[:60_000])
    return path


@pytest.fixture
def compare(tmp_path: Path, text: Path, tiny_types: dict[str, Path]) -> Callable[..., Any]:
    """Compare types of the tiny model, in a models directory of the test's own."""

    def run(*types: str, **options: Any) -> ComparisonReport:
        given = {"texts": [str(text)], "context": CONTEXT, "chunks": 2 * STEP} | options
        given.setdefault("models_dir", tmp_path / "models")
        return pipeline.compare(tiny_types["F32"], [tiny_types[t] for t in types], **given)

    return run


@pytest.fixture
def chunks_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many chunks each model has read, by the name of its file."""
    counts: dict[str, int] = {}
    real = Scorer.read

    def counted(self: Scorer, chunks: Any, first: int | None = None) -> Iterator[Any]:
        counts[self.path.stem] = counts.get(self.path.stem, 0) + len(chunks)
        return real(self, chunks, first)

    monkeypatch.setattr(Scorer, "read", counted)
    return counts


def scores_in(models_dir: Path) -> dict[str, bytes]:
    """The published scores, by model."""
    artifacts = Store(models_dir).artifacts(comparison.STAGE)
    return {a.manifest.model: a.file().read_bytes() for a in artifacts}


# Against llama-perplexity.


def tool_says(
    native: NativeBuild, reference: Path, model: Path, text: Path, chunks: int, scratch: Path
) -> dict[str, float]:
    base = scratch / "base.bin"
    common = ["-f", text, "-c", str(CONTEXT), "-b", str(CONTEXT), "--chunks", str(chunks)]
    tool = native.tool("llama-perplexity")
    first = toolchain.run([tool, "-m", reference, *common, "--save-all-logits", base])
    assert first.returncode == 0
    printed = ""
    while "Same top p:" not in printed:  # it may end before all is printed
        pieces: list[str] = []
        second = toolchain.run(
            [tool, "-m", model, *common, "--kl-divergence-base", base, "--kl-divergence"],
            on_text=pieces.append,
        )
        assert second.returncode == 0
        printed = "".join(pieces)
    found = re.findall(r"^(\S.*?) *: +(-?[\d.]+)(?: ± +([\d.]+))?", printed, re.MULTILINE)
    words = {re.sub(r"\s+", " ", name): float(value) for name, value, _ in found}
    errors = {re.sub(r"\s+", " ", f"± {n}"): float(error) for n, _, error in found if error}
    return words | errors


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0"])
def test_figures_are_llama_perplexitys(
    compare: Callable[..., Any],
    native: NativeBuild,
    tiny_types: dict[str, Path],
    text: Path,
    tmp_path: Path,
    type: str,
) -> None:
    chunks = 3 * STEP + 1
    (row,) = compare(type, chunks=chunks).comparisons
    assert (row.chunks, row.tokens) == (chunks, chunks * SCORED)
    told = tool_says(native, tiny_types["F32"], tiny_types[type], text, chunks, tmp_path)
    assert np.exp(row.log_perplexity) == pytest.approx(told["Mean PPL(Q)"], abs=1e-4)
    # The tool's reference is cut at 16 nats and rounded to 16 bits.
    assert np.exp(row.reference_log_perplexity) == pytest.approx(told["Mean PPL(base)"], rel=1e-4)
    for name, value, error in (
        ("Mean ln(PPL(Q)/PPL(base))", row.delta_log_perplexity, row.delta_log_perplexity_error),
        ("Mean KLD", row.divergence, row.divergence_error),
    ):
        assert value == pytest.approx(told[name], abs=2e-4)
        assert error == pytest.approx(told[f"± {name}"], rel=0.02, abs=2e-6)
    for percent, name in (("100", "Maximum"), ("99", "99.0%"), ("90", "90.0%"), ("50", "Median")):
        expected = told[f"{name} KLD"]
        assert row.divergence_percentiles[percent] == pytest.approx(expected, rel=0.01, abs=3e-4)
        assert 100 * row.delta_p_percentiles[percent] == pytest.approx(
            told[f"{name} Δp"], abs=1.1e-3
        )
    assert 100 * row.delta_p_mean == pytest.approx(told["Mean Δp"], abs=1.1e-3)
    assert 100 * row.delta_p_rms == pytest.approx(told["RMS Δp"], abs=1.1e-3)
    # Where two tokens are as likely, rounding decides which is the likelier.
    assert 100 * row.agreement == pytest.approx(told["Same top p"], abs=100 / row.tokens)
    assert 100 * row.agreement_error == pytest.approx(told["± Same top p"], abs=2e-3)


def test_bits_per_byte_count_the_scored_bytes(
    compare: Callable[..., Any], tiny_types: dict[str, Path], text: Path, native: NativeBuild
) -> None:
    (row,) = compare("Q8_0", chunks=4).comparisons
    with Scorer(tiny_types["F32"], context=CONTEXT, build=native) as scorer:
        tokens = scorer.tokenize(text.read_bytes())[: 4 * CONTEXT].reshape(4, CONTEXT)
        spelled = [scorer.piece(int(t)) for t in tokens[:, CONTEXT // 2 + 1 :].ravel()]
    nats = row.tokens * np.array([row.log_perplexity, row.reference_log_perplexity])
    expected = nats / np.log(2) / len(b"".join(spelled))
    assert [row.bits_per_byte, row.reference_bits_per_byte] == pytest.approx(expected)


# Results are kept.


def test_asking_again_reads_nothing(
    compare: Callable[..., Any], chunks_read: dict[str, int], text: Path
) -> None:
    first = compare("Q4_0", "Q8_0")
    assert chunks_read == {"tiny-F32": 16, "tiny-Q4_0": 16, "tiny-Q8_0": 16}
    assert [(c.computed_chunks, c.reused) for c in first.comparisons] == [(16, False)] * 2
    again = compare("Q4_0", "Q8_0")
    assert sum(chunks_read.values()) == 48
    assert [(c.computed_chunks, c.reused) for c in again.comparisons] == [(0, True)] * 2
    assert again.differences == first.differences
    for old, new in zip(first.comparisons, again.comparisons, strict=True):
        changes = {"computed_chunks": old.computed_chunks, "reused": False}
        assert dataclasses.replace(new, **changes) == old


def test_only_what_is_missing_is_read(
    compare: Callable[..., Any], chunks_read: dict[str, int]
) -> None:
    compare("Q4_0")
    chunks_read.clear()
    report = compare("Q4_0", "Q8_0")
    assert chunks_read == {"tiny-F32": 16, "tiny-Q8_0": 16}
    assert [c.reused for c in report.comparisons] == [True, False]


def test_the_seed_and_the_confidence_are_asked_of_what_is_stored(
    compare: Callable[..., Any],
) -> None:
    (row,) = compare("Q4_0").comparisons
    (other,) = compare("Q4_0", seed=7, confidence=0.99).comparisons
    assert other.reused
    (first,), (second,) = row.verdicts, other.verdicts
    assert (first.measure, first.seed, first.confidence) == ("log_perplexity", 0, 0.95)
    assert (second.seed, second.confidence) == (7, 0.99)
    assert second.difference == first.difference == pytest.approx(row.delta_log_perplexity)
    assert second.high - second.low > first.high - first.low


def test_more_chunks_begin_with_those_that_are_there(
    compare: Callable[..., Any], chunks_read: dict[str, int], tmp_path: Path
) -> None:
    compare("Q4_0", chunks=STEP + 3)
    chunks_read.clear()
    (more,) = compare("Q4_0", chunks=3 * STEP).comparisons
    # The last three were decoded without the company that they have now.
    assert chunks_read == {"tiny-F32": 2 * STEP, "tiny-Q4_0": 2 * STEP}
    assert (more.chunks, more.computed_chunks) == (3 * STEP, 2 * STEP)
    (fewer,) = compare("Q4_0", chunks=STEP).comparisons
    assert (fewer.chunks, fewer.computed_chunks) == (STEP, 0)
    (whole,) = compare("Q4_0", chunks=3 * STEP, models_dir=tmp_path / "other").comparisons
    same = ("log_perplexity", "divergence", "divergence_percentiles", "delta_p_rms")
    assert [getattr(whole, n) for n in same] == [getattr(more, n) for n in same]


def test_a_pass_that_fails_goes_on_at_the_chunk(
    compare: Callable[..., Any],
    chunks_read: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare("Q4_0", "Q8_0", chunks=5 * STEP, models_dir=tmp_path / "unbroken")
    counted = Scorer.read

    def failing(self: Scorer, chunks: Any, first: int | None = None) -> Iterator[Any]:
        if self.path.stem == "tiny-Q8_0" and chunks_read.get("tiny-Q8_0", 0) == 3 * STEP:
            raise OSError("the power is gone")
        return counted(self, chunks, first)

    chunks_read.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "read", failing)
        with pytest.raises(OSError, match="power"):
            compare("Q4_0", "Q8_0", chunks=5 * STEP)
    assert not scores_in(tmp_path / "models")
    # A chunk that was being written.
    for partial in (tmp_path / "models").glob("*/compare-*.partial/scores.bin"):
        with partial.open("ab") as file:
            file.write(b"torn")
    chunks_read.clear()
    report = compare("Q4_0", "Q8_0", chunks=5 * STEP)
    assert chunks_read == {"tiny-F32": 2 * STEP, "tiny-Q4_0": 2 * STEP, "tiny-Q8_0": 2 * STEP}
    assert [c.computed_chunks for c in report.comparisons] == [2 * STEP] * 2
    assert scores_in(tmp_path / "models") == scores_in(tmp_path / "unbroken")


def test_candidates_that_do_not_fit_together_take_turns(
    compare: Callable[..., Any],
    chunks_read: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare("Q4_0", "Q8_0", models_dir=tmp_path / "together")
    chunks_read.clear()
    told = Told()
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 8 << 20)
    compare("Q4_0", "Q8_0", progress=told)
    assert chunks_read == {"tiny-F32": 32, "tiny-Q4_0": 16, "tiny-Q8_0": 16}
    assert "2 groups" in told.messages[0]
    assert scores_in(tmp_path / "models") == scores_in(tmp_path / "together")


def test_texts_are_compared_one_by_one(
    compare: Callable[..., Any], text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[20_000:])
    report = compare("Q4_0", "Q8_0", texts=[str(text), str(other)])
    rows = [(c.text, c.model.stem) for c in report.comparisons]
    assert rows == [(str(t), model) for t in (text, other) for model in ("tiny-Q4_0", "tiny-Q8_0")]
    pairs = [(p.text, p.difference.measure) for p in report.differences]
    assert pairs == [
        (str(t), measure) for t in (text, other) for measure in ("divergence", "log_perplexity")
    ]
    assert report.comparisons[0].divergence != report.comparisons[2].divergence


def test_the_reference_and_a_copy_may_take_part(
    tiny_types: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(tiny_types["F32"], copy)
    report = pipeline.compare(
        tiny_types["F32"],
        [tiny_types["F32"], copy],
        texts=[str(text)],
        context=CONTEXT,
        chunks=STEP,
        models_dir=tmp_path / "models",
    )
    for row in report.comparisons:
        assert (row.divergence, row.agreement, row.delta_log_perplexity) == (0, 1, 0)
        assert row.verdicts[0].verdict == "indistinguishable"
    assert [row.model for row in report.comparisons] == [tiny_types["F32"], copy]


def test_few_chunks_give_figures_but_no_verdict(compare: Callable[..., Any]) -> None:
    report = compare("Q4_0", "Q8_0", chunks=4)
    assert all(c.divergence > 0 and not c.verdicts for c in report.comparisons)
    assert not report.differences
    assert report.notes == (
        "no verdicts: 4 chunks are too few to tell a difference from chance; 5 are needed",
    )


# Reference caches.


def only_cache(directory: Path) -> Path:
    (found,) = directory.glob("*.reference")
    return found


def test_a_cache_stands_in_for_the_reference(
    compare: Callable[..., Any], chunks_read: dict[str, int], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    report = compare("Q4_0", "Q8_0", reference_cache=cache)
    (exact, _) = report.comparisons
    assert exact.divergence_shortfall is None
    assert re.search(r"too low: tiny-Q\d_0: \d+ %, tiny-Q\d_0: \d+ %$", report.notes[0])
    chunks_read.clear()
    other = compare("Q4_0", reference_cache=cache, models_dir=tmp_path / "other")
    (bound,) = other.comparisons
    assert chunks_read == {"tiny-Q4_0": 16}
    assert 0 < bound.divergence < exact.divergence
    assert bound.divergence_shortfall == pytest.approx(
        1 - bound.divergence / exact.divergence, abs=0.1
    )
    assert "lower bounds" in other.notes[0]
    for name in ("agreement", "tokens", "chunks"):
        assert getattr(bound, name) == getattr(exact, name)
    for name in ("log_perplexity", "delta_log_perplexity", "delta_p_rms", "bits_per_byte"):
        assert getattr(bound, name) == pytest.approx(getattr(exact, name), rel=1e-5)
    # A bound is never taken for the exact figure.
    (now_exact,) = compare("Q4_0", models_dir=tmp_path / "other").comparisons
    assert now_exact.divergence == exact.divergence
    (kept,) = compare("Q4_0", reference_cache=cache, models_dir=tmp_path / "other").comparisons
    assert (kept.divergence, kept.reused) == (exact.divergence, True)


def test_a_bound_is_kept_as_well(
    compare: Callable[..., Any], chunks_read: dict[str, int], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    compare("Q4_0", reference_cache=cache)
    (first,) = compare("Q8_0", reference_cache=cache).comparisons
    chunks_read.clear()
    (second,) = compare("Q8_0", reference_cache=cache).comparisons
    assert not chunks_read
    assert second.reused
    assert second.divergence == first.divergence
    assert second.divergence_shortfall == first.divergence_shortfall > 0


def test_a_cache_that_is_too_short_grows(
    compare: Callable[..., Any], chunks_read: dict[str, int], tmp_path: Path
) -> None:
    compare("Q4_0", reference_cache=tmp_path / "cache")
    chunks_read.clear()
    compare("Q4_0", reference_cache=tmp_path / "cache", chunks=3 * STEP)
    assert chunks_read == {"tiny-F32": STEP, "tiny-Q4_0": STEP}
    compare(
        "Q4_0",
        reference_cache=tmp_path / "whole",
        chunks=3 * STEP,
        models_dir=tmp_path / "other",
    )
    grown, whole = (only_cache(tmp_path / name).read_bytes() for name in ("cache", "whole"))
    assert grown[4096:] == whole[4096:]


def test_a_cache_goes_on_after_a_failure(
    compare: Callable[..., Any],
    chunks_read: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare("Q4_0", reference_cache=tmp_path / "unbroken", models_dir=tmp_path / "other")
    counted = Scorer.read

    def failing(self: Scorer, chunks: Any, first: int | None = None) -> Iterator[Any]:
        if chunks_read.get(self.path.stem, 0) == STEP:
            raise KeyboardInterrupt
        return counted(self, chunks, first)

    chunks_read.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "read", failing)
        with pytest.raises(KeyboardInterrupt):
            compare("Q4_0", reference_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.reference"))
    chunks_read.clear()
    compare("Q4_0", reference_cache=tmp_path / "cache")
    assert chunks_read == {"tiny-F32": STEP, "tiny-Q4_0": STEP}
    resumed, unbroken = (only_cache(tmp_path / n).read_bytes() for n in ("cache", "unbroken"))
    assert resumed[4096:] == unbroken[4096:]


@pytest.mark.parametrize(
    ("damage", "error", "told"),
    [
        (lambda raw: raw[:-10], IntegrityError, r"bytes instead of"),
        (lambda raw: b"x" + raw[1:], IntegrityError, "is no reference cache"),
        (lambda raw: raw[:40], IntegrityError, "is no reference cache"),
        (lambda raw: raw[:9000] + b"\0\0\0\0" + raw[9004:], IntegrityError, "damaged in chunk 2"),
        (
            lambda raw: raw.replace(b'"gpu_layers": 0', b'"gpu_layers": 9'),
            UsageError,
            "another number of GPU layers",
        ),
    ],
    ids=["truncated", "no-cache", "header-cut", "damaged", "other-setting"],
)
def test_a_broken_cache_is_refused(
    compare: Callable[..., Any],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    error: type[GgufkitError],
    told: str,
) -> None:
    compare("Q8_0", reference_cache=tmp_path / "cache")
    file = only_cache(tmp_path / "cache")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(error, match=told) as caught:
        compare("Q4_0", reference_cache=tmp_path / "cache")
    assert f"rm '{file}'" in caught.value.hint


def test_a_cache_of_another_reference_is_refused(
    compare: Callable[..., Any], tiny_types: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    pipeline.compare(
        tiny_types["Q8_0"],
        [tiny_types["Q4_0"]],
        texts=[str(text)],
        context=CONTEXT,
        chunks=STEP,
        reference_cache=cache,
        models_dir=tmp_path / "models",
    )
    theirs = only_cache(cache)
    theirs.rename(cache / theirs.name.replace("Q8_0", "F32"))
    with pytest.raises(UsageError, match="of another reference"):
        compare("Q4_0", reference_cache=cache)


def test_a_file_in_the_place_of_the_directory_is_refused(
    compare: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match="is not a directory"):
        compare("Q4_0", reference_cache=tmp_path / "cache")


# What cannot be compared.


@pytest.fixture(scope="module")
def other_vocabulary(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("other")
    checkpoint = make_checkpoint(place / "other", vocab=400)
    (made,) = pipeline.convert(str(checkpoint), types=["q8_0"], models_dir=place / "models")
    return made.path


def test_other_vocabularies_are_compared_by_bytes(
    tiny_types: dict[str, Path], other_vocabulary: Path, text: Path, tmp_path: Path
) -> None:
    told = Told()

    def run() -> ComparisonReport:
        return pipeline.compare(
            tiny_types["F32"],
            [other_vocabulary, tiny_types["Q8_0"]],
            texts=[str(text)],
            context=CONTEXT,
            chunks=6,
            models_dir=tmp_path / "models",
            progress=told,
        )

    report = run()
    assert [c.model for c in report.comparisons] == [tiny_types["Q8_0"]]
    assert any("has another vocabulary than tiny-F32.gguf" in m for m in told.messages)
    (row,) = report.by_bytes
    assert row.model == other_vocabulary
    assert row.vocabulary_difference == "it has 400 tokens, the reference 512"
    assert row.chunks == 6
    (verdict,) = row.verdicts
    assert verdict.measure == "bits_per_byte"
    difference = row.bits_per_byte - row.reference_bits_per_byte
    assert verdict.difference == pytest.approx(difference)
    (again,) = run().by_bytes
    assert again == dataclasses.replace(row, reused=True)


def test_by_bytes_the_same_model_costs_the_same(
    tiny_types: dict[str, Path], text: Path, native: NativeBuild, tmp_path: Path
) -> None:
    model = (tiny_types["F32"], "digest")
    read = load_text(str(text), cache=tmp_path)
    found = by_bytes.measure(
        *(Store(tmp_path / "models"), native, model, model, read),
        context=CONTEXT,
        chunks=5,
        gpu_layers=0,
        progress=Silent(),
    )
    assert not found.differences.any()
    assert found.comparison.bits_per_byte == found.comparison.reference_bits_per_byte


def test_a_text_is_cut_where_both_end_a_token() -> None:
    random = np.random.default_rng(0)
    one, other = (np.cumsum(random.integers(1, 6, 3000)) for _ in range(2))
    cuts = by_bytes.cut(one, other, room=50, chunks=None)
    assert len(cuts.begin) > 20
    assert cuts.begin[0] == 0
    both = {0, *set(one.tolist()) & set(other.tolist())}
    for begin, middle, end in zip(cuts.begin, cuts.middle, cuts.end, strict=True):
        assert {int(begin), int(middle), int(end)} <= both
        assert begin < middle < end
        assert abs(middle - (begin + end) / 2) < (end - begin) / 4
        for ends in (one, other):
            assert np.count_nonzero((ends > begin) & (ends <= end)) <= 50
    assert np.array_equal(cuts.begin[1:], cuts.end[:-1])
    assert len(by_bytes.cut(one, other, room=50, chunks=3).begin) == 3


def test_a_model_that_gives_no_numbers_is_named(
    tiny_types: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    broken = break_gguf(tiny_types["F32"], tmp_path / "broken.gguf", "blk.1.ffn_down.weight")

    def run(reference: Path, *models: Path) -> None:
        pipeline.compare(
            reference,
            models,
            texts=[str(text)],
            context=CONTEXT,
            chunks=STEP,
            models_dir=tmp_path / "models",
        )

    told = r"^broken\.gguf gives logits .* in chunk 1; the first tensor with one is ffn_out-1$"
    with pytest.raises(GgufkitError, match=told) as caught:
        run(tiny_types["Q8_0"], tiny_types["Q4_0"], broken)
    assert "block 1" in caught.value.hint
    with pytest.raises(GgufkitError, match=told):
        run(broken, tiny_types["Q4_0"])
    run(tiny_types["Q8_0"], tiny_types["Q4_0"])  # is none the worse for it


def test_a_short_text_is_an_error(compare: Callable[..., Any], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 12, encoding="utf-8")
    with pytest.raises(GgufkitError, match=r"only \d+ tokens; a context of 64 needs at least 128"):
        compare("Q4_0", texts=[str(short)])


def test_a_context_beyond_training_is_a_warning(
    compare: Callable[..., Any], tmp_path: Path
) -> None:
    told = Told()
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 400, encoding="utf-8")
    with pytest.raises(GgufkitError, match="needs at least 4098"):
        compare("Q4_0", texts=[str(short)], context=2049, progress=told)
    warned = [m for m in told.messages if "was trained with" in m]
    assert warned[1] == (
        "a context of 2049 tokens is more than the 2048 that tiny-Q4_0.gguf was trained with"
    )


def test_wrong_requests_are_errors(
    compare: Callable[..., Any], tiny_types: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    for wrong in ({"context": 4}, {"chunks": 0}, {"confidence": 1.0}):
        with pytest.raises(UsageError):
            compare("Q4_0", **wrong)
    with pytest.raises(UsageError, match="no model to compare"):
        compare()
    with pytest.raises(SourceError):
        pipeline.compare(tmp_path / "gone.gguf", [tiny_types["Q4_0"]], texts=[str(text)])
    for name, content in (("binary", b"\0\1\2" * 900), ("latin1", b"\xe9t\xe9 " * 900)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError):
            compare("Q4_0", texts=[str(tmp_path / name)])


def test_all_figures_are_kept_in_the_manifest(compare: Callable[..., Any], tmp_path: Path) -> None:
    compare("Q4_0")
    (artifact,) = Store(tmp_path / "models").artifacts(comparison.STAGE)
    names = {f.name for f in dataclasses.fields(Comparison)}
    assert names == set(artifact.manifest.facts)
    assert set(artifact.manifest.inputs) == {"model", "reference", "text"}
    assert comparison.scores_of(artifact).nll.shape == (2 * STEP, SCORED)


def test_a_model_in_parts_is_one_model(
    compare: Callable[..., Any],
    tiny_types: dict[str, Path],
    text: Path,
    native: NativeBuild,
    tmp_path: Path,
) -> None:
    tool = native.tool("llama-gguf-split")
    split = [tool, "--split", "--split-max-tensors", "8", tiny_types["F32"], tmp_path / "parts"]
    assert toolchain.run(split).returncode == 0
    first, *others = sorted(tmp_path.glob("parts-*.gguf"))
    (whole,) = compare("Q4_0").comparisons

    def run(reference: Path) -> Comparison:
        (row,) = pipeline.compare(
            reference,
            [tiny_types["Q4_0"]],
            texts=[str(text)],
            context=CONTEXT,
            chunks=2 * STEP,
            models_dir=tmp_path / "models",
        ).comparisons
        return row

    row = run(first)
    assert (row.divergence, row.reused) == (whole.divergence, False)
    assert row.reference_file_nbytes == sum(p.stat().st_size for p in (first, *others))
    assert run(first).reused
    with pytest.raises(UsageError, match="is a later part"):
        run(others[0])
    # Another last part is another model.
    others[-1].write_bytes(others[-1].read_bytes() + b"\0")
    assert not run(first).reused
