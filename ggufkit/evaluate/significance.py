"""Whether two models that read the same chunks really differ.

The chunks of a text are not independent: neighbours share their topic. So whole
blocks of neighbours are drawn, and the interval is studentized, because with a
few dozen chunks the percentiles of the resampled means are too narrow. How well
the stated confidence holds is counted in ``tests/evaluate/test_significance.py``.

Sources: circular blocks: Politis and Romano, "A circular block-resampling
procedure for stationary data" (1992). Their length, the cube root of the number of
chunks: Hall, Horowitz and Jing, "On blocking rules for the bootstrap with
dependent data" (1995). Studentizing with blocks: Götze and Künsch,
"Second-order correctness of the blockwise bootstrap for stationary
observations" (1996). Dependence that outlasts a block, by a first-order
autoregression: after Andrews and Monahan, "An improved heteroskedasticity and
autocorrelation consistent covariance matrix estimator" (1992).
"""

from math import cbrt
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from ggufkit.errors import GgufkitError, UsageError
from ggufkit.values import Difference

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Doubles = npt.NDArray[np.float64]

MIN_CHUNKS = 5
"""Fewer make no three blocks, and no interval that holds what it says."""
POWER = 0.8
"""Chance to tell a difference from none that ``chunks_to_decide`` gives."""
MAX_CHUNKS = 1_000_000
"""More to decide is as good as never: no text is that long."""
_MAX_AUTOCORRELATION = 0.8
"""Cap of the estimate, which is noise when there are few chunks."""


def paired(
    measure: str,
    model: Path,
    other: Path,
    differences: "Doubles",
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 1999,
) -> Difference:
    """Judge ``model`` against ``other`` by what they differ by on each chunk.

    The interval is the mean difference ± a standard error times the quantile of
    its studentized absolute deviation over ``resamples`` draws of blocks.

    Args:
        measure: what was measured; less of it is better.
        model: the model judged.
        other: the model that it is judged against.
        differences: ``model`` minus ``other``, mean over each chunk, in the
            order of the text; shape (chunks,), in the unit of ``measure``.
        confidence: of the interval, between 0 and 1.
        seed: of the draws; the same one gives the same interval.
        resamples: number of draws.

    Raises:
        UsageError: if there are fewer than :data:`MIN_CHUNKS` chunks.
        GgufkitError: if a difference is not a finite number.
    """
    import numpy as np

    values = np.asarray(differences, np.float64)
    _check(values, model, other)
    mean = float(values.mean())
    error = half = 0.0
    if (scale := float(np.ptp(values))) > 0:
        scaled = values / scale  # squares of what is tiny would be nothing
        error = scale * standard_error(scaled)
        half = error * _critical_value(scaled, confidence, seed, resamples)
    low, high = mean - half, mean + half
    verdict = "better" if high < 0 else "worse" if low > 0 else "indistinguishable"
    decided = verdict != "indistinguishable" or mean == 0
    return Difference(
        measure=measure,
        model=model,
        other=other,
        difference=mean,
        low=low,
        high=high,
        confidence=confidence,
        chunks=len(values),
        seed=seed,
        verdict=verdict,
        chunks_to_decide=(
            None if decided else _chunks_to_decide(mean, error, len(values), confidence)
        ),
    )


def _check(values: "Doubles", model: Path, other: Path) -> None:
    import numpy as np

    if len(values) < MIN_CHUNKS:
        raise UsageError(
            f"{len(values)} chunks are too few to tell a difference from chance",
            f"Give a longer text or a smaller --context: at least {MIN_CHUNKS} chunks are needed",
        )
    if broken := int(np.count_nonzero(~np.isfinite(values))):
        first = int(np.argmin(np.isfinite(values))) + 1
        raise GgufkitError(
            f"{model.name} and {other.name} cannot be compared: {broken} of {len(values)} chunks, "
            f"the first of them chunk {first}, gave no finite number",
            "One of the files is broken; quantize it again, or leave it out",
        )


def standard_error(values: "Doubles") -> float:
    """Standard error of the mean of a series whose neighbours may be alike.

    The variance of the means of circular blocks, free of the bias that comes of
    taking deviations from the series' own mean, and raised for dependence that
    outlasts a block.

    Args:
        values: the series, shape (chunks,); at least :data:`MIN_CHUNKS`, not all alike.
    """
    length, count = _block_length(len(values)), len(values)
    variance = _block_means(values, length).var() * length / count / (1 - length / count)
    return float((variance * _beyond_blocks(values, length)) ** 0.5)


def _block_length(count: int) -> int:
    return round(cbrt(count))


def _block_means(values: "Doubles", length: int) -> "Doubles":
    """The mean of the block that starts at each chunk; the end joins the beginning."""
    import numpy as np

    circle = np.concatenate([values, values[: length - 1]])
    means: Doubles = np.lib.stride_tricks.sliding_window_view(circle, length).mean(axis=1)
    return means


def _beyond_blocks(values: "Doubles", length: int) -> float:
    """The variance of a mean over what blocks see of it, for a first-order autoregression.

    Blocks see the correlation at each lag k with the weight 1 - k/length. The
    estimate of the first is too small by (1 + 3r)/n (Marriott and Pope, 1954).
    Negative correlation changes nothing: it may be chance, and wide is safe.
    """
    import numpy as np

    centred = values - values.mean()
    raw = float(centred[1:] @ centred[:-1] / (centred @ centred))
    r = min(max(raw + (1 + 3 * raw) / len(values), 0.0), _MAX_AUTOCORRELATION)
    lags = np.arange(1, length)
    seen = 1 + 2 * float(((1 - lags / length) * r**lags).sum())
    return (1 + r) / (1 - r) / seen


def _critical_value(values: "Doubles", confidence: float, seed: int, resamples: int) -> float:
    """How many standard errors the mean is off at most, at this confidence.

    A draw of equal blocks has no spread and says nothing, so it is left out.
    """
    import numpy as np

    count, length = len(values), _block_length(len(values))
    blocks = -(-count // length)
    means = _block_means(values, length)
    starts = np.random.default_rng(seed).integers(0, count, (resamples, blocks))
    drawn = means[starts]
    spread = drawn.std(axis=1, ddof=1) / blocks**0.5
    useful = np.ptp(drawn, axis=1) > 0
    deviations = np.abs(drawn.mean(axis=1) - values.mean())[useful] / spread[useful]
    return float(np.quantile(deviations, confidence))


def _chunks_to_decide(mean: float, error: float, count: int, confidence: float) -> int | None:
    """Chunks in all after which a true difference of ``mean`` is told from none.

    The standard error falls with the root of the number of chunks; a test of
    this confidence has the power :data:`POWER` when the difference is as large
    as the sum of both normal quantiles times the standard error.
    """
    normal = NormalDist()
    quantiles = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(POWER)
    needed = count * (quantiles * error / abs(mean)) ** 2
    return max(round(needed), count + 1) if needed <= MAX_CHUNKS else None
