"""Intervals that hold what they say, counted over simulated texts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ggufkit.errors import GgufkitError, UsageError
from ggufkit.evaluate.significance import (
    MAX_CHUNKS,
    MIN_CHUNKS,
    POWER,
    paired,
    standard_error,
)
from ggufkit.values import Difference

Series = npt.NDArray[np.float64]

A, B = Path("a.gguf"), Path("b.gguf")
SIMULATIONS = 500
TOLERANCE = 0.03
"""Three standard errors of a share of 95 % that is counted over 500 simulations."""
WARM_UP = 40
"""Steps after which an autoregression has forgotten how it began."""


def judge(differences: Any, **options: Any) -> Difference:
    return paired("log_perplexity", A, B, np.asarray(differences), **options)


def simulate(
    seed: int, chunks: int, *, autocorrelation: float = 0.0, skewed: bool = False
) -> Series:
    """Chunks of many texts, of mean 0 and variance 1; shape (simulations, chunks)."""
    rng = np.random.default_rng(10_000 + seed)
    shape = (SIMULATIONS, WARM_UP + chunks)
    series = rng.standard_exponential(shape) - 1 if skewed else rng.standard_normal(shape)
    for i in range(1, shape[1]):
        series[:, i] += autocorrelation * series[:, i - 1]
    told: Series = series[:, WARM_UP:] * (1 - autocorrelation**2) ** 0.5
    return told


def judge_all(series: Series, truth: float, **options: Any) -> list[Difference]:
    return [judge(row + truth, seed=i, resamples=399, **options) for i, row in enumerate(series)]


def coverage(judged: list[Difference], truth: float) -> float:
    return float(np.mean([d.low <= truth <= d.high for d in judged]))


@pytest.mark.parametrize("chunks", [20, 40, 100])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_interval_holds_as_often_as_it_says(chunks: int, skewed: bool) -> None:
    judged = judge_all(simulate(chunks, chunks, skewed=skewed), truth=0.4)
    assert coverage(judged, 0.4) == pytest.approx(0.95, abs=TOLERANCE)


@pytest.mark.parametrize("chunks", [20, 40, 100])
@pytest.mark.parametrize("skewed", [False, True])
def test_it_holds_for_chunks_that_are_like_their_neighbours(chunks: int, skewed: bool) -> None:
    series = simulate(chunks, chunks, autocorrelation=0.4, skewed=skewed)
    judged = judge_all(series, truth=0.4)
    # Of what is both skewed and alike, 20 chunks tell too little to do better.
    lacking = TOLERANCE + (0.02 if skewed else 0.0)
    assert 0.95 - lacking <= coverage(judged, 0.4) <= 0.95 + TOLERANCE


def test_neighbours_taken_for_independent_would_be_told_apart_too_often() -> None:
    """Why there are blocks: the plain standard error is far too small."""
    series = simulate(4, 100, autocorrelation=0.5)
    true = series.mean(axis=1).std()
    assert np.mean(series.std(axis=1, ddof=1) / 10) < 0.65 * true
    assert np.mean([standard_error(row) for row in series]) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_other_confidences_hold_too(confidence: float) -> None:
    judged = judge_all(simulate(1, 40), truth=0.4, confidence=confidence)
    assert {d.confidence for d in judged} == {confidence}
    assert coverage(judged, 0.4) == pytest.approx(confidence, abs=2 * TOLERANCE)


def test_the_fewest_chunks_hold() -> None:
    judged = judge_all(simulate(2, MIN_CHUNKS), truth=0.4)
    assert coverage(judged, 0.4) >= 0.95 - TOLERANCE


@pytest.mark.parametrize("autocorrelation", [0.0, 0.4])
def test_models_alike_are_rarely_told_apart(autocorrelation: float) -> None:
    judged = judge_all(simulate(3, 40, autocorrelation=autocorrelation), truth=0.0)
    verdicts = [d.verdict for d in judged]
    assert verdicts.count("indistinguishable") >= (0.95 - TOLERANCE) * SIMULATIONS
    sides = verdicts.count("better"), verdicts.count("worse")
    assert min(sides) > 0  # chance has no side


@pytest.mark.parametrize(("truth", "verdict"), [(1.0, "worse"), (-1.0, "better")])
def test_a_large_difference_is_seen(truth: float, verdict: str) -> None:
    judged = judge_all(simulate(5, 40), truth)  # six standard errors
    seen = [d for d in judged if d.verdict == verdict]
    assert len(seen) > 0.99 * SIMULATIONS
    assert {d.chunks_to_decide for d in seen} == {None}
    assert {d.verdict for d in judged} <= {verdict, "indistinguishable"}


def test_the_chunks_to_decide_do_decide() -> None:
    """What 40 chunks with a difference of just this size tell holds for that many chunks."""
    truth = 0.3
    centred = simulate(7, 40)
    centred -= centred.mean(axis=1, keepdims=True)
    told = [d.chunks_to_decide for d in judge_all(centred, truth) if d.chunks_to_decide]
    needed = int(np.median(told))
    assert len(told) > 0.5 * SIMULATIONS
    assert min(told) > 40
    decided = [d.verdict == "worse" for d in judge_all(simulate(8, needed), truth)]
    assert np.mean(decided) == pytest.approx(POWER, abs=0.06)


def test_the_same_seed_gives_the_same_interval() -> None:
    series = simulate(9, 30)[0]
    assert judge(series, seed=7) == judge(series, seed=7)
    assert judge(series, seed=7).seed == 7
    assert judge(series, seed=7).low != judge(series, seed=8).low


def test_the_models_change_sides_together() -> None:
    series = simulate(10, 30)[0] + 0.5
    one, other = judge(series), judge(-series)
    assert (one.difference, one.low, one.high) == (-other.difference, -other.high, -other.low)


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e12])
def test_the_unit_does_not_matter(scale: float) -> None:
    series = simulate(11, 30)[0] + 0.2
    one, other = judge(series), judge(scale * series)
    assert (other.low, other.high) == pytest.approx((scale * one.low, scale * one.high), rel=1e-9)
    assert (other.verdict, other.chunks_to_decide) == (one.verdict, one.chunks_to_decide)


def test_identical_models_are_indistinguishable() -> None:
    told = judge(np.zeros(20))
    assert (told.difference, told.low, told.high) == (0, 0, 0)
    assert told.verdict == "indistinguishable"
    assert told.chunks_to_decide is None


def test_a_difference_that_never_varies_is_certain() -> None:
    told = judge(np.full(20, 0.25))
    assert (told.low, told.high, told.verdict) == (0.25, 0.25, "worse")


def test_one_chunk_apart_decides_nothing() -> None:
    """Most draws miss it; the interval stays finite nevertheless."""
    told = judge(np.eye(1, 20, 4)[0])
    assert told.low < 0 < told.high < 1
    assert told.verdict == "indistinguishable"


def test_no_text_is_long_enough_for_next_to_nothing() -> None:
    series = simulate(12, 40)[0]
    series -= series.mean()
    assert judge(series + 1e-5).chunks_to_decide is None
    needed = judge(series + 4e-3).chunks_to_decide
    assert needed is not None
    assert 40 < needed <= MAX_CHUNKS


def test_it_says_what_was_compared() -> None:
    told = paired("divergence", A, B, np.arange(8.0), confidence=0.9, seed=3)
    expected = dict(measure="divergence", model=A, other=B, confidence=0.9, seed=3, chunks=8)
    assert dataclasses.asdict(told).items() >= expected.items()
    assert told.difference == 3.5


def test_too_few_chunks_are_refused() -> None:
    with pytest.raises(UsageError, match="4 chunks are too few") as caught:
        judge(np.ones(MIN_CHUNKS - 1))
    assert str(MIN_CHUNKS) in caught.value.hint


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_no_number_is_refused(broken: float) -> None:
    with pytest.raises(GgufkitError, match=r"a\.gguf .* 1 of 6 chunks.* chunk 3,"):
        judge([0.1, 0.2, broken, 0.1, 0.0, 0.3])
