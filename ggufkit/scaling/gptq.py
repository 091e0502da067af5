"""One weight matrix rounded onto the real grid of a ggml type, never worse than ggml.

:mod:`ggufkit.scaling.feedback` does the rounding. Rows are independent of each
other given the second moment of the inputs: they are shared out over threads, and
of each row the best of three is taken: rounded with error feedback, by ggml with
an importance matrix, by ggml alone.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.packing import format_of
from ggufkit.scaling.feedback import Feedback

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Bytes = npt.NDArray[np.uint8]

DAMPING = 0.3
"""Share of each diagonal entry of the second moment that is added to it.

The text it is from is a sample, and what is fitted to it too closely is worth less
on another. A share of each entry and not of their mean: the first token's massive
activations outweigh all others.
"""
SWEEPS = 1
"""Rounds of coordinate descent after the first pass."""
ROWS_AT_ONCE = 512
"""Rows of a part: enough to make each step worth its call, few enough for the caches."""


@dataclass(frozen=True)
class Rounded:
    """A matrix rounded onto a grid.

    Attributes:
        packed: the blocks, uint8, shape (rows, bytes of a row).
        values: the floats that ggml reads from them, float32, shape (rows, columns).
        loss: what they add to the squared error of the outputs, tr(ΔW H ΔWᵀ).
        loss_plain: what ggml's own rounding adds.
        loss_importance: what it adds with an importance matrix.
        rows_kept: rows where ggml's own rounding was no worse, and was kept.
        reason: why it was kept everywhere, without a look; else empty. Losses are
            then NaN.
    """

    packed: "Bytes"
    values: "torch.Tensor"
    loss: float
    loss_plain: float
    loss_importance: float
    rows_kept: int
    reason: str = ""


def round_matrix(
    ggml: Ggml,
    type: str,
    weight: "torch.Tensor",
    moment: "torch.Tensor",
    *,
    target: "torch.Tensor | None" = None,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    threads: int = 1,
) -> Rounded:
    """Round a matrix onto the grid of a ggml type.

    Args:
        ggml: the quantizer.
        type: name of the type.
        weight: what ggml would round, float32, shape (rows, columns).
        moment: H = E[x xᵀ] of the inputs, float64, shape (columns, columns).
        target: what to come near to, if that is not ``weight``.
        damping: share of each diagonal entry of ``moment`` that is added to it.
        sweeps: rounds of coordinate descent.
        threads: how many parts of the rows to work on at a time.

    Raises:
        UsageError: if blocks of the type cannot be packed (names those that can), or
            rows do not divide into them.
    """
    import numpy as np

    format = format_of(type)
    kind = ggml.type(type)
    weight = weight.contiguous()
    target = weight if target is None else target.contiguous()
    plain = ggml.quantize(kind, weight.numpy())
    best = _Best(ggml, type, target, moment, plain)
    reason = _degenerate(moment)
    if not bool(best.values.isfinite().all() & target.isfinite().all()):
        reason = f"its weights do not fit into {format.name}"
    if reason:
        nothing = float("nan")
        return Rounded(plain, best.values, nothing, nothing, nothing, len(weight), reason)
    loss_plain = best.loss
    weights = moment.diagonal().float().numpy()
    loss_importance = best.offer(ggml.quantize(kind, weight.numpy(), weights))
    before = best.losses.clone()
    with _single_threaded_products(), ThreadPoolExecutor(threads) as pool:
        feedback = Feedback(ggml, format, moment, damping, sweeps)
        best.offer(np.concatenate(list(pool.map(feedback, _parts(target)))))
    kept = int((best.losses == before).sum())
    return Rounded(best.packed, best.values, best.loss, loss_plain, loss_importance, kept)


def _degenerate(moment: "torch.Tensor") -> str:
    """Why nothing can be learned from a second moment; empty if something can."""
    if not bool(moment.isfinite().all()):
        return "the second moment of its inputs is not finite"
    if not bool((moment.diagonal() > 0).any()):
        return "its inputs are always zero"
    return ""


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Keep torch from sharing out small products: rows are shared out already."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parts(weight: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
    """The rows in parts of about one size.

    However many threads there are: sums come out a little differently in parts of
    another size, and the same model shall give the same bytes.
    """
    import torch

    return torch.tensor_split(weight, -(-len(weight) // ROWS_AT_ONCE))


class _Best:
    """The best rounding so far, row by row."""

    def __init__(
        self,
        ggml: Ggml,
        type: str,
        target: "torch.Tensor",
        moment: "torch.Tensor",
        packed: "Bytes",
    ) -> None:
        self._ggml = ggml
        self._kind = ggml.type(type)
        self._target = target
        self._moment = moment.float()
        self.packed = packed.copy()
        self.values, self.losses = self._look(packed)

    @property
    def loss(self) -> float:
        """The sum over all rows."""
        return float(self.losses.sum())

    def offer(self, packed: "Bytes") -> float:
        """Take the rows that are better than those before; the loss of all of what is offered."""
        import torch

        values, losses = self._look(packed)
        better = losses < self.losses
        self.losses = torch.where(better, losses, self.losses)
        self.values[better] = values[better]
        self.packed[better.numpy()] = packed[better.numpy()]
        return float(losses.sum())

    def _look(self, packed: "Bytes") -> "tuple[torch.Tensor, torch.Tensor]":
        """The floats of a rounding, and what each row loses."""
        import torch

        columns = self._target.shape[1]
        values = torch.from_numpy(self._ggml.dequantize(self._kind, packed, columns))
        error = self._target - values
        return values, (error @ self._moment).mul_(error).sum(1, dtype=torch.float64)
