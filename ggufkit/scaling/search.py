"""The search for scales: what the real quantizer does to the outputs.

For linear maps W with a shared input x of second moment G = E[x xᵀ], scales s
change the expected squared error of the outputs to tr(ΔW G ΔWᵀ) with
ΔW = W - Q(W·s)/s, where Q stores and reads back rows in the ggml type that will
be written. One pass over the text gives G; no forward pass is repeated.

Candidates are those of AWQ (Lin et al., 2023): s = E|x|^a / max|w|^b, with
b = 0 or b = 1 - a, from a coarse grid and then finer around the best. Identity
is always a candidate and wins ties, so no group ends worse on the objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggufkit.llamacpp.ggml import Ggml, GgmlType
from ggufkit.scaling.statistics import GroupStatistics

if TYPE_CHECKING:
    import torch

COARSE = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Exponents of the first round, for both kinds of candidates."""
FINE_STEPS = (0.1, 0.05)
"""Half-widths of the following rounds around the best so far."""
_TINY = 1e-8


@dataclass(frozen=True)
class Found:
    """Scales of a group and what they are worth.

    Attributes:
        scales: float32, shape (inputs,); all ones if nothing was better.
        loss_plain: objective without scales.
        loss: objective with them; never above ``loss_plain``.
        exponent: a of the winner; 0 for identity.
        duo: whether the winner divides by max|w|^(1-a).
    """

    scales: "torch.Tensor"
    loss_plain: float
    loss: float
    exponent: float
    duo: bool


class GroupObjective:
    """tr(ΔW G ΔWᵀ), summed over the consumers of a group.

    Args:
        ggml: the quantizer.
        weights: float32 matrices of shape (outputs, inputs).
        kinds: the type that each of them will be stored in.
        gram: E[x xᵀ], float32, shape (inputs, inputs).
    """

    def __init__(
        self,
        ggml: Ggml,
        weights: Sequence["torch.Tensor"],
        kinds: Sequence[GgmlType],
        gram: "torch.Tensor",
    ) -> None:
        self._ggml = ggml
        self._parts = [
            (w.contiguous(), kind)
            for w, kind in zip(weights, kinds, strict=True)
            if kind.is_quantized
        ]
        self._gram = gram

    @property
    def idle(self) -> bool:
        """Whether nothing of the group is quantized, so there is nothing to win."""
        return not self._parts

    def __call__(self, scales: "torch.Tensor | None") -> float:
        """The objective for some scales, shape (inputs,), or for none."""
        import torch

        total = 0.0
        for weight, kind in self._parts:
            scaled = weight if scales is None else weight * scales
            stored = torch.from_numpy(self._ggml.round_trip(kind, scaled.numpy()))
            if scales is not None:
                stored /= scales
            error = stored.sub_(weight)
            total += float((error @ self._gram).mul_(error).sum(dtype=torch.float64))
        return total


def search_group(
    objective: GroupObjective,
    weights: Sequence["torch.Tensor"],
    statistics: GroupStatistics,
    shared: "torch.Tensor | None" = None,
) -> Found:
    """Find the scales of one group.

    Args:
        objective: judges the candidates.
        weights: the consumers' weights, float32, shape (outputs, inputs).
        statistics: of their input.
        shared: for tied scales, the index of the scale of each input, int64,
            shape (inputs,); None if each input has its own.
    """
    import torch

    plain = objective(None)
    best = Found(torch.ones_like(statistics.mean_abs), plain, plain, 0.0, False)
    activation = _tie(statistics.mean_abs, shared).clamp(min=_TINY)
    magnitude = _tie(torch.stack([_row_share(w) for w in weights]).mean(0), shared).clamp(min=_TINY)

    def consider(exponent: float, duo: bool) -> None:
        nonlocal best
        scales = activation.pow(exponent)
        if duo:
            scales = scales / magnitude.pow(1 - exponent)
        scales = scales / (scales.max() * scales.min()).sqrt()
        loss = objective(scales)
        if loss < best.loss:
            best = Found(scales, plain, loss, exponent, duo)

    if objective.idle or not plain > 0:
        return best
    for exponent in COARSE:
        consider(exponent, duo=False)
        consider(exponent, duo=True)
    for step in FINE_STEPS:
        centre, duo = best.exponent, best.duo
        consider(centre - step, duo)
        consider(centre + step, duo)
    return best


def _row_share(weight: "torch.Tensor") -> "torch.Tensor":
    """Mean magnitude of each column relative to the largest of its row."""
    largest = weight.abs().amax(1, keepdim=True).clamp(min=_TINY)
    return (weight.abs() / largest).mean(0)


def _tie(values: "torch.Tensor", shared: "torch.Tensor | None") -> "torch.Tensor":
    """Average values over the inputs that share a scale, and spread them again."""
    import torch

    if shared is None:
        return values
    count = int(shared.max()) + 1
    sums = torch.zeros(count).index_add_(0, shared, values)
    uses = torch.zeros(count).index_add_(0, shared, torch.ones_like(values))
    return (sums / uses)[shared]


def kv_head_sharing(query_heads: int, kv_heads: int, head_dim: int) -> "torch.Tensor":
    """Index of the scale of each input of o_proj under grouped-query attention.

    Query head h reads key/value head h // (query_heads / kv_heads), so channel d
    of both has one scale. Returns int64, shape (query_heads * head_dim,).
    """
    import torch

    heads = torch.arange(query_heads) // (query_heads // kv_heads)
    return (heads[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)
