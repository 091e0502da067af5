"""The figures of each token, held against plain float64 arithmetic."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufkit.evaluate.divergence import CompactReference, Meter, TokenScores
from ggufkit.evaluate.reference_cache import Identity

Rows = npt.NDArray[np.float32]


def drawn(rows: int, vocabulary: int, seed: int, scale: float = 4.0) -> tuple[Rows, Rows]:
    """Logits of two models that are alike, as those of quantized ones are."""
    random = np.random.default_rng(seed)
    reference = random.normal(0, scale, (rows, vocabulary)).astype(np.float32)
    noise = random.normal(0, 0.3, reference.shape)
    return reference, (reference + noise).astype(np.float32)


def targets_of(rows: int, vocabulary: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(9).integers(0, vocabulary, rows).astype(np.int32)


def log_softmax(logits: Rows) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 5), (7, 300), (255, 1000), (9, 50_000), (3, 150_000)]
)
def test_the_figures_are_those_of_the_definitions(rows: int, vocabulary: int) -> None:
    reference, candidate = drawn(rows, vocabulary, seed=1)
    targets = targets_of(rows, vocabulary)
    with Meter(vocabulary, threads=3) as meter:
        (scores,) = meter.score(reference, [candidate], targets)
        alone = meter.negative_log_likelihood(candidate, targets)
    p, q = log_softmax(reference), log_softmax(candidate)
    count = np.arange(rows)
    assert np.allclose(scores.nll_reference, -p[count, targets], rtol=1e-6)
    assert np.allclose(scores.nll, -q[count, targets], rtol=1e-6)
    assert np.allclose(alone, scores.nll, rtol=1e-6)
    assert np.allclose(scores.divergence, (np.exp(p) * (p - q)).sum(axis=1), 1e-4, 1e-6)
    expected = np.exp(q[count, targets]) - np.exp(p[count, targets])
    assert np.allclose(scores.delta_p, expected, atol=1e-7)
    assert np.array_equal(scores.same_top, p.argmax(axis=1) == q.argmax(axis=1))


def test_a_tiny_divergence_is_not_lost_in_rounding() -> None:
    reference, _ = drawn(64, 50_000, seed=2)
    noise = np.random.default_rng(3).normal(0, 0.003, reference.shape)
    candidate = (reference + noise).astype(np.float32)
    with Meter(50_000, threads=2) as meter:
        (scores,) = meter.score(reference, [candidate], targets_of(64, 50_000))
    p, q = log_softmax(reference), log_softmax(candidate)
    exact = (np.exp(p) * (p - q)).sum(axis=1)
    assert 1e-6 < exact.mean() < 1e-5
    assert scores.divergence.mean() == pytest.approx(exact.mean(), rel=0.01)


def test_a_model_does_not_diverge_from_itself() -> None:
    reference, _ = drawn(20, 700, seed=3)
    with Meter(700, threads=2) as meter:
        (scores,) = meter.score(reference, [reference.copy()], targets_of(20, 700))
    assert not scores.divergence.any()
    assert not scores.delta_p.any()
    assert scores.same_top.all()


def test_neither_threads_nor_company_change_a_bit() -> None:
    reference, candidate = drawn(100, 3000, seed=4)
    targets = targets_of(100, 3000)
    with Meter(3000, threads=1) as one, Meter(3000, threads=4) as four:
        (alone,) = one.score(reference, [candidate], targets)
        both = four.score(reference, [reference[::-1], candidate], targets)
    assert alone.divergence.tobytes() == both[1].divergence.tobytes()
    assert alone.nll.tobytes() == both[1].nll.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whose", ["reference", "candidate"])
def test_what_is_no_number_does_not_stay_hidden(bad: float, whose: str) -> None:
    reference, candidate = drawn(30, 400, seed=5)
    (reference if whose == "reference" else candidate)[17, 3] = bad
    with Meter(400, threads=2) as meter:
        (part,) = meter.score(reference, [candidate], np.zeros(30, np.int32))
    scores = TokenScores.empty(3, 10)
    for chunk in range(3):
        rows = slice(10 * chunk, 10 * chunk + 10)
        scores.put(chunk, 0, TokenScores(*(getattr(part, n)[rows] for n in vars(part))))
    assert scores.are_finite().tolist() == [True, False, True]


def test_scores_survive_bytes() -> None:
    reference, candidate = drawn(24, 100, seed=6)
    with Meter(100, threads=2) as meter:
        (flat,) = meter.score(reference, [candidate], targets_of(24, 100))
    scores = TokenScores(*(getattr(flat, name).reshape(4, 6) for name in vars(flat)))
    raw = scores.to_bytes()
    assert len(raw) == 4 * TokenScores.nbytes(6)
    back = TokenScores.from_bytes(raw, 4)
    for name in vars(scores):
        assert np.array_equal(getattr(back, name), getattr(scores, name))
    # A chunk's bytes stand together, so that files can grow and be cut chunk by chunk.
    first = TokenScores.from_bytes(raw[: 2 * TokenScores.nbytes(6)], 2)
    assert np.array_equal(first.divergence, scores.divergence[:2])


# Compact references.


def compacted(reference: Rows, targets: npt.NDArray[np.int32], kept: int) -> CompactReference:
    with Meter(reference.shape[1], threads=2) as meter:
        return meter.compact(reference, targets, kept)


def test_a_compact_reference_keeps_the_likeliest_tokens() -> None:
    reference, _ = drawn(12, 2000, seed=7)
    targets = targets_of(12, 2000)
    compact = compacted(reference, targets, 50)
    p = log_softmax(reference)
    assert compact.tokens.dtype == np.uint16
    for row in range(12):
        likeliest = np.sort(np.argsort(p[row])[-50:])
        assert np.array_equal(compact.tokens[row], likeliest)
        others = np.delete(np.exp(p[row]), likeliest)
        assert np.exp(compact.rest[row]) == pytest.approx(others.sum(), rel=1e-5)
    assert np.allclose(compact.log_p, np.take_along_axis(p, compact.tokens.astype(int), 1))
    assert np.array_equal(compact.top, p.argmax(axis=1))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(3, 400),
    share=st.floats(0.01, 0.9),
    scale=st.floats(0.1, 20),
)
def test_a_compact_reference_gives_a_lower_bound(
    seed: int, vocabulary: int, share: float, scale: float
) -> None:
    reference, candidate = drawn(8, vocabulary, seed, scale)
    targets = targets_of(8, vocabulary)
    kept = max(1, int(share * vocabulary))
    with Meter(vocabulary, threads=2) as meter:
        (exact,) = meter.score(reference, [candidate], targets)
        compact = meter.compact(reference, targets, kept)
        (bound,) = meter.score(compact, [candidate], targets)
    rounding = 2e-6
    assert (bound.divergence <= exact.divergence * (1 + 1e-5) + rounding).all()
    assert (bound.divergence >= -rounding).all()
    assert np.allclose(bound.nll, exact.nll)
    assert np.allclose(bound.delta_p, exact.delta_p, atol=1e-6)
    assert np.array_equal(bound.same_top, exact.same_top)


def test_a_bound_that_keeps_all_but_one_token_is_exact() -> None:
    reference, candidate = drawn(8, 40, seed=8)
    targets = targets_of(8, 40)
    with Meter(40, threads=1) as meter:
        (exact,) = meter.score(reference, [candidate], targets)
        (bound,) = meter.score(meter.compact(reference, targets, 39), [candidate], targets)
    assert np.allclose(bound.divergence, exact.divergence, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [5000, 49_152, 65_536, 65_537, 151_936, 262_144])
def test_a_cache_is_less_than_an_eighth_of_llama_cpps_file(vocabulary: int) -> None:
    identity = Identity("", "", 512, vocabulary, 0, "", "")
    base = identity.scored * 2 * (2 * ((vocabulary + 1) // 2) + 4)
    assert base / 10 < identity.record_nbytes < base / 8
