"""The search for scales: what the real quantizer does to the outputs.

For linear maps W with a shared input x of second moment G = E[x xᵀ], scales s
change the expected squared error of the outputs to the diagonal of ΔW G ΔWᵀ with
ΔW = W - Q(W·s)/s, where Q stores and reads back rows in the ggml type that will
be written. One pass over the text gives G; no forward pass is repeated.

The objective is the sum of these errors, each relative to the output's own power
(W G Wᵀ) plus the mean power of all outputs of the map. Without that a few large
outputs, or queries and keys beside values, decide alone; wholly relative, outputs
that hardly matter would.

Candidates are those of AWQ (Lin et al., 2023): s = E|x|^a / max|w|^b, with
b = 0 or b = 1 - a, from a coarse grid and then finer around the best. They are
told apart on a sample of rows, and the best have to hold on all of them.
Identity is always a candidate and wins ties, so no group ends worse on the
objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggufkit.llamacpp.ggml import Ggml, GgmlType
from ggufkit.scaling.groups import BlockGroup
from ggufkit.scaling.statistics import GroupStatistics

if TYPE_CHECKING:
    import torch

COARSE = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Exponents of the first round, for both kinds of candidates."""
FINE_STEPS = (0.1, 0.05)
"""Half-widths of the following rounds around the best so far."""
SHIFTS = (0.25, 0.5, 0.75)
"""Where between two powers of two to round, as an exponent of two."""
CLIP_RATIOS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a row's largest weight to clip at, where clipping is asked for."""
SAMPLE_ROWS = 192
"""Rows of a matrix on which candidates are told apart."""
FINALISTS = 3
"""How many of the best by sample are then tried on all rows."""
_TINY = 1e-8
_SMALLEST = 1e-30
"""Keeps the power of outputs that are always zero from dividing by zero."""


@dataclass(frozen=True)
class Found:
    """Scales of a group and what they are worth.

    Attributes:
        scales: float32, shape (scales,); all ones if nothing was better.
        loss_plain: the objective with identity, on all rows.
        loss: the objective with ``scales``, on all rows.
        exponent: the a of the candidate; 0 for identity.
        duo: whether it divides by max|w|^(1-a).
    """

    scales: "torch.Tensor"
    loss_plain: float
    loss: float
    exponent: float
    duo: bool


@dataclass(frozen=True)
class _Part:
    """Some rows of one consumer (by its position).

    Attributes:
        counts: how much the squared error of each row counts, shape (rows,).
        sampled: whether each row stands for several.
    """

    consumer: int
    weight: "torch.Tensor"
    kind: GgmlType
    counts: "torch.Tensor"
    sampled: bool = False


class GroupObjective:
    """Relative squared error of the outputs, summed over the consumers of a group.

    Args:
        ggml: the quantizer.
        weights: float32 matrices of shape (outputs, inputs).
        kinds: the type that each of them will be stored in.
        gram: E[x xᵀ], float32, shape (inputs, inputs).
        importance: whether they will be quantized with an importance matrix,
            which is then E[x²] of the scaled input: diag(G) / s².
    """

    def __init__(
        self,
        ggml: Ggml,
        weights: Sequence["torch.Tensor"],
        kinds: Sequence[GgmlType],
        gram: "torch.Tensor",
        *,
        importance: bool = False,
    ) -> None:
        self._ggml = ggml
        self._gram = gram
        self._squares = gram.diagonal().clone() if importance else None
        self._all = [
            _Part(number, weight.contiguous(), kind, _counts(weight, gram))
            for number, (weight, kind) in enumerate(zip(weights, kinds, strict=True))
            if kind.is_quantized
        ]
        errors = [self._row_errors(part, None) for part in self._all]
        self._sample = [
            _sampled(part, error) for part, error in zip(self._all, errors, strict=True)
        ]
        self.plain = float(sum(e.sum(dtype=e.double().dtype) for e in errors))
        """The objective of identity."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to win: nothing quantized, or no error."""
        return not self.plain > 0

    @property
    def sampled(self) -> bool:
        """Whether estimates come from some of the rows only."""
        return any(part.sampled for part in self._sample)

    def estimate(self, scales: "torch.Tensor | None") -> float:
        """The objective for scales of each input, from the sampled rows."""
        return self._sum(self._sample, scales)

    def __call__(self, scales: "torch.Tensor | None") -> float:
        """The objective for scales of each input, shape (inputs,), or for none."""
        return self._sum(self._all, scales)

    def _sum(self, parts: Sequence[_Part], scales: "torch.Tensor | None") -> float:
        return sum(float(self._row_errors(part, scales).double().sum()) for part in parts)

    def clip_limits(self, scales: "torch.Tensor") -> "dict[int, torch.Tensor]":
        """Limits on the scaled weights of each row that lower its error.

        Args:
            scales: of each input, shape (inputs,).

        Returns:
            By position of the consumer: float32, shape (rows,), infinite where
            nothing is gained. Consumers without any gain are left out.
        """
        import torch

        limits = {}
        for part in self._all:
            peak = (part.weight * scales).abs().amax(1)
            best = self._row_errors(part, scales)
            chosen = torch.full_like(peak, torch.inf)
            for ratio in CLIP_RATIOS:
                errors = self._row_errors(part, scales, ratio * peak)
                chosen = torch.where(errors < best, ratio * peak, chosen)
                best = torch.minimum(errors, best)
            if bool(chosen.isfinite().any()):
                limits[part.consumer] = chosen
        return limits

    def _row_errors(
        self,
        part: _Part,
        scales: "torch.Tensor | None",
        limit: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """What each row adds to the objective, shape (rows,)."""
        import torch

        weight = part.weight
        scaled = weight if scales is None else weight * scales
        if limit is not None:
            scaled = scaled.clamp(-limit[:, None], limit[:, None])
        squares = self._squares
        if squares is not None and scales is not None:
            squares = squares / scales.square()
        stored = torch.from_numpy(
            self._ggml.round_trip(
                part.kind, scaled.numpy(), None if squares is None else squares.numpy()
            )
        )
        error = (stored if scales is None else stored / scales) - weight
        return (error @ self._gram).mul_(error).sum(1) * part.counts


def _sampled(part: _Part, errors: "torch.Tensor") -> _Part:
    """Rows drawn in proportion to their error under plain rounding, half of it evenly.

    A few rows often make most of the error; they are always in. Systematic
    sampling without chance, so that the same model gives the same scales.
    """
    import torch

    rows = len(errors)
    if rows <= SAMPLE_ROWS:
        return part
    share = 0.5 + 0.5 * errors.double() / errors.double().mean().clamp(min=_TINY)
    chance = share * (SAMPLE_ROWS / rows)
    for _ in range(8):  # those that are always in leave less for the others
        certain = chance >= 1
        left = SAMPLE_ROWS - int(certain.sum())
        chance = torch.where(certain, 1.0, share * (left / share[~certain].sum()))
    chance = chance.clamp(max=1.0)
    steps = (chance.cumsum(0) + 0.5).floor()
    taken = (steps.diff(prepend=torch.zeros(1, dtype=steps.dtype)) > 0).nonzero()[:, 0]
    return _Part(
        part.consumer,
        part.weight[taken].contiguous(),
        part.kind,
        part.counts[taken] / chance[taken].float(),
        sampled=True,
    )


def _counts(weight: "torch.Tensor", gram: "torch.Tensor") -> "torch.Tensor":
    """1 / (power of each output + mean power), shape (outputs,)."""
    power = (weight @ gram).mul_(weight).sum(1)
    return 1 / (power + power.mean()).clamp(min=_SMALLEST)


def search_group(
    objective: GroupObjective,
    weights: Sequence["torch.Tensor"],
    statistics: GroupStatistics,
    group: BlockGroup,
    *,
    exact: bool = False,
) -> Found:
    """Find the scales of one group.

    Args:
        objective: judges the candidates.
        weights: the consumers' weights, float32, shape (outputs, inputs).
        statistics: of their input.
        group: whose scales they are; inputs may share them.
        exact: take powers of two only.
    """
    import torch

    plain = objective.plain
    best = Found(torch.ones(group.width), plain, plain, 0.0, False)
    if objective.idle:
        return best
    activation = group.from_inputs(statistics.mean_abs).clamp(min=_TINY).log2()
    magnitude = group.from_inputs(torch.stack([_row_share(w) for w in weights]).mean(0))
    magnitude = magnitude.clamp(min=_TINY).log2()

    def candidate(exponent: float, duo: bool, shift: float) -> "torch.Tensor":
        logs = exponent * activation - ((1 - exponent) * magnitude if duo else 0)
        logs = logs - (logs.max() + logs.min()) / 2 + shift
        return (logs.round() if exact else logs).exp2()

    tried: dict[tuple[float, bool, float], float] = {}

    def consider(exponent: float, duo: bool, shift: float = 0.0) -> None:
        key = (round(exponent, 4), duo, shift)
        if key not in tried:
            tried[key] = objective.estimate(group.to_inputs(candidate(*key)))

    for exponent in COARSE:
        consider(exponent, duo=False)
        consider(exponent, duo=True)
    for step in FINE_STEPS:
        exponent, duo, _ = min(tried, key=lambda key: tried[key])
        consider(exponent - step, duo)
        consider(exponent + step, duo)
    for shift in SHIFTS if exact else ():
        exponent, duo, _ = min(tried, key=lambda key: tried[key])
        consider(exponent, duo, shift)
    finalists = sorted(tried, key=lambda key: tried[key])
    for key in finalists[: FINALISTS if objective.sampled else 1]:
        scales = candidate(*key)
        loss = objective(group.to_inputs(scales)) if objective.sampled else tried[key]
        if loss < best.loss:
            best = Found(scales, plain, loss, key[0], key[1])
    return best


def _row_share(weight: "torch.Tensor") -> "torch.Tensor":
    """Mean magnitude of each column relative to the largest of its row."""
    largest = weight.abs().amax(1, keepdim=True).clamp(min=_TINY)
    return (weight.abs() / largest).mean(0)
