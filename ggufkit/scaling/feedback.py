"""Rounding of rows onto a grid so that errors make up for each other.

For a linear map whose inputs have the second moment H = E[x xᵀ], rounding a row w
to q adds eᵀHe to the squared error of its output, with e = w - q. Rounding to
nearest looks at each weight alone; here a row is rounded as a whole.

**First pass** (GPTQ, Frantar et al. 2022, in the form of LDLQ, Chee et al. 2023).
With H = U D Uᵀ, U unit upper triangular, the cost is Σ D_j (e_j + Σ_{k<j} U_kj e_k)²:
columns are rounded in order, each to the grid point next to itself plus what the
errors before it ask of it. Blocks whose inputs are strongest come first, while most
columns are left to make up for them. When a block begins, ggml's own search picks
scales for the columns as they then are; scales of each sub-block are chosen among
several near those by what the codes that they lead to really cost, and then by
least squares with the codes held.

**Sweeps** (coordinate descent, as in QuantEase, Behdin et al. 2023, and CDQuant,
Nair and Suggala 2024). Sub-block by sub-block, all others held, scales are chosen
again in the same way, and each code moves to its best place; then the units of
blocks, by least squares. Each step lowers the cost or changes nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.packing import Format
from ggufkit.scaling.grid import Grid, fit_scales, inverse_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Bytes = npt.NDArray[np.uint8]

TRIALS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
"""Scales to try in the first pass, as shares of what ggml's search found."""
FINE_TRIALS = (0.96, 0.98, 1.0, 1.02)
"""The same for types of more than 16 codes, which gain little from clipping."""
NEAR_TRIALS = (0.93, 1.0, 1.07)
"""Scales to try in a sweep, as shares of the present ones."""
REFITS = 2
"""How often scales are fitted to codes, and codes chosen anew, in the first pass."""
_FLOOR = 1e-6
"""Least diagonal entry, as a share of their mean: inputs never seen cost next to nothing."""


class _Costs(NamedTuple):
    """What errors in some columns cost: H = U D Uᵀ, in float32.

    Attributes:
        whole: H.
        upper: U, unit upper triangular.
        pivots: the diagonal of D.
    """

    whole: "torch.Tensor"
    upper: "torch.Tensor"
    pivots: "torch.Tensor"


class _Codes(NamedTuple):
    """The codes of a sub-block of each row.

    Attributes:
        levels: what they stand for, shape (columns, rows).
        values: the floats that they give with their scales, shape (columns, rows).
        cost: shape (rows,).
    """

    levels: "torch.Tensor"
    values: "torch.Tensor"
    cost: "torch.Tensor"


class Feedback:
    """Rounds rows of a matrix; call it with some of them.

    Args:
        ggml: the quantizer.
        format: of the type.
        moment: H, float64, shape (columns, columns), finite and not all zero.
        damping: share of each diagonal entry that is added to it.
        sweeps: rounds of coordinate descent after the first pass.
    """

    def __init__(
        self, ggml: Ggml, format: Format, moment: "torch.Tensor", damping: float, sweeps: int
    ) -> None:
        damped = _damped(moment, damping)
        self.quantize = ggml.quantize
        self.kind = ggml.type(format.name)
        self.grid = Grid(format)
        self.order = _order(damped.diagonal(), format)
        self._sweeps = sweeps
        ordered = damped[self.order][:, self.order]
        upper, pivots = _factor(ordered)
        self.all = _Costs(ordered.float(), upper.float(), pivots.float())
        subs = [slice(c, c + format.sub) for c in range(0, len(damped), format.sub)]
        self.held = [_costs(ordered[at, at]) for at in subs]
        """What errors in a sub-block cost with all others held."""
        self.inverses = [ordered[at, at].inverse().float() for at in subs]
        self.open = [_costs((upper[at, at] * pivots[at]) @ upper[at, at].T) for at in subs]
        """What they cost when the columns that come after make up for them."""

    def __call__(self, wanted: "torch.Tensor") -> "Bytes":
        """Round rows, float32, shape (rows, columns); gives uint8, shape (rows, bytes)."""
        import torch

        with torch.inference_mode():
            rows = _Rows(self, wanted.T[self.order])
            rows.first_pass()
            for _ in range(self._sweeps):
                rows.sweep()
            return rows.packed()


def _damped(moment: "torch.Tensor", share: float) -> "torch.Tensor":
    damped = (moment + moment.T).double() / 2
    diagonal = damped.diagonal()
    diagonal.clamp_(min=_FLOOR * float(diagonal.mean()))
    diagonal.mul_(1 + share)
    return damped


def _factor(matrix: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """U and the diagonal of D, with H = U D Uᵀ and U unit upper triangular."""
    import torch

    # The lower factor of the matrix turned round is the upper one, turned round.
    root = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    pivots = root.diagonal()
    return root / pivots, pivots.square()


def _costs(matrix: "torch.Tensor") -> _Costs:
    return _Costs(matrix.float(), *(part.float() for part in _factor(matrix)))


def _order(strength: "torch.Tensor", format: Format) -> "torch.Tensor":
    """In which order to round columns: strong blocks first, and strong sub-blocks in each.

    A block's columns stay together, since its scales are chosen when it begins.
    """
    import torch

    subs = strength.view(-1, format.subs, format.sub).sum(2)
    columns = torch.arange(len(strength)).view(-1, format.subs, format.sub)
    blocks = subs.sum(1).argsort(descending=True, stable=True)
    within = subs[blocks].argsort(dim=1, descending=True, stable=True)
    return columns[blocks[:, None], within].reshape(-1)


class _Rows:
    """Some rows on their way to the grid, in the order of rounding, columns first."""

    def __init__(self, common: Feedback, wanted: "torch.Tensor") -> None:
        import torch

        self._common = common
        self._grid = common.grid
        self._format = common.grid.format
        self._trials = TRIALS if len(self._format.levels) <= 16 else FINE_TRIALS
        self._wanted = wanted
        self._levels = torch.empty_like(wanted)
        self._values = torch.empty_like(wanted)
        self._errors = torch.zeros_like(wanted)
        self._units: list[torch.Tensor | None] = []
        self._scales: list[torch.Tensor] = []

    def _block(self, number: int) -> slice:
        return slice(number * self._format.block, (number + 1) * self._format.block)

    def _sub(self, number: int) -> slice:
        return slice(number * self._format.sub, (number + 1) * self._format.sub)

    def first_pass(self) -> None:
        """Round all columns in order."""
        common, upper = self._common, self._common.all.upper
        for number in range(len(self._wanted) // self._format.block):
            at = self._block(number)
            asked = self._wanted[at] + upper[: at.start, at].T @ self._errors[: at.start]
            weights = common.all.whole.diagonal()[at].numpy()
            packed = common.quantize(common.kind, asked.T.contiguous().numpy(), weights)
            found, units = self._grid.unpacked(self._format.unpack(packed))
            self._units.append(units)
            for scales in found:
                sub = len(self._scales)
                here = self._sub(sub)
                before = slice(at.start, here.start)
                target = asked[here.start - at.start : here.stop - at.start]
                target = target + upper[before, here].T @ self._errors[before]
                tried = self._solve(target, common.open[sub], scales, units, self._trials, REFITS)
                self._scales.append(tried[0])
                self._keep(sub, *tried)

    def _keep(self, sub: int, scales: "torch.Tensor", codes: _Codes) -> None:
        at = self._sub(sub)
        self._scales[sub] = scales
        self._levels[at] = codes.levels
        self._values[at] = codes.values
        self._errors[at] = self._wanted[at] - codes.values

    def _solve(
        self,
        target: "torch.Tensor",
        costs: _Costs,
        start: "torch.Tensor",
        units: "torch.Tensor | None",
        trials: Sequence[float],
        refits: int,
    ) -> "tuple[torch.Tensor, _Codes]":
        """Scales and codes for a sub-block.

        Args:
            target: what to come near to, shape (columns, rows).
            costs: what errors cost.
            start: scales to start from, shape (parts, rows).
            units: those of the block, if it has any.
            trials: shares of the scales to try.
            refits: how often to fit scales to the codes, and choose codes anew.
        """
        import torch

        rows, count = target.shape[1], len(trials)
        many = self._grid.allowed(self._grid.stretched(start, trials), units)
        codes = self._round(target.repeat(1, count), many, costs)
        best = codes.cost.view(count, rows).argmin(0) * rows + torch.arange(rows)
        scales, codes = many[:, best], _Codes(*(part[..., best] for part in codes))
        for _ in range(refits):
            fitted = self._fitted(target, codes, scales, units, costs)
            scales, codes = _better(scales, codes, fitted, self._round(target, fitted, costs))
        return scales, codes

    def _fitted(
        self,
        target: "torch.Tensor",
        codes: _Codes,
        scales: "torch.Tensor",
        units: "torch.Tensor | None",
        costs: _Costs,
    ) -> "torch.Tensor":
        """The scales that are best for the codes."""
        import torch

        down = torch.ones_like(target) if self._format.has_min else None
        found = fit_scales(codes.levels, down, costs.whole, costs.whole @ target, scales)
        return self._grid.allowed(found, units)

    def _round(self, target: "torch.Tensor", scales: "torch.Tensor", costs: _Costs) -> _Codes:
        """Codes column by column, each making up for the errors before it."""
        import torch

        levels, values, errors = (torch.empty_like(target) for _ in range(3))
        cost = torch.zeros_like(scales[0])
        inverse = inverse_of(scales[0])
        for column, pivot in enumerate(costs.pivots.tolist()):
            asked = target[column]
            if column:
                asked = torch.addmv(asked, errors[:column].T, costs.upper[:column, column])
            value = self._grid.round(asked, scales, inverse, levels[column], values[column])
            left = asked - value
            cost.addcmul_(left, left, value=pivot)
            torch.sub(target[column], value, out=errors[column])
        return _Codes(levels, values, cost)

    def sweep(self) -> None:
        """Choose scales and codes again, sub-block by sub-block, all others held."""
        for number, units in enumerate(self._units):
            subs = range(number * self._format.subs, (number + 1) * self._format.subs)
            for sub in subs:
                self._revise(sub, units)
            if units is not None:
                self._revise_units(number, units, subs)

    def _revise(self, sub: int, units: "torch.Tensor | None") -> None:
        common, at = self._common, self._sub(sub)
        costs, scales = common.held[sub], self._scales[sub]
        # Away from where it is by what the errors elsewhere ask of it.
        miss = common.inverses[sub] @ (common.all.whole[at] @ self._errors)
        target = self._values[at] + miss
        codes = _Codes(self._levels[at], self._values[at], _cost(miss, costs))
        other = self._solve(target, costs, scales, units, NEAR_TRIALS, 1)
        scales, codes = _better(scales, codes, *other)
        codes = self._descend(target, scales, codes, costs)
        fitted = self._fitted(target, codes, scales, units, costs)
        values = self._grid.floats(codes.levels, fitted)
        again = _Codes(codes.levels, values, _cost(target - values, costs))
        self._keep(sub, *_better(scales, codes, fitted, again))

    def _descend(
        self, target: "torch.Tensor", scales: "torch.Tensor", codes: _Codes, costs: _Costs
    ) -> _Codes:
        """Move each code to its best place, all others held."""
        import torch

        levels, values = codes.levels.clone(), codes.values.clone()
        errors = target - values
        inverse = inverse_of(scales[0])
        for column, curvature in enumerate(costs.whole.diagonal().tolist()):
            pull = torch.mv(errors.T, costs.whole[column])
            asked = torch.add(values[column], pull, alpha=1 / curvature)
            value = self._grid.round(asked, scales, inverse, levels[column], values[column])
            torch.sub(target[column], value, out=errors[column])
        return _Codes(levels, values, _cost(errors, costs))

    def _revise_units(self, number: int, units: "torch.Tensor", subs: range) -> None:
        """Least squares for the units of a block, integer scales and codes held."""
        import torch

        at = self._block(number)
        whole = self._common.all.whole[at, at]
        pull = self._common.all.whole[at] @ self._errors
        wanted = whole @ self._values[at] + pull
        integers = torch.stack([self._grid.integers(self._scales[s], units) for s in subs])
        step, *mins = integers.repeat_interleave(self._format.sub, 0).unbind(1)
        up, down = self._levels[at] * step, mins[0] if mins else None
        revised = fit_scales(up, down, whole, wanted, units).half().float()
        scales = integers * revised
        values = torch.cat(
            [
                self._grid.floats(self._levels[self._sub(sub)], scale)
                for sub, scale in zip(subs, scales, strict=True)
            ]
        )
        moved = values - self._values[at]
        better = (moved * (whole @ moved - 2 * pull)).sum(0) < 0
        self._units[number] = torch.where(better, revised, units)
        for sub, scale in zip(subs, scales, strict=True):
            self._scales[sub] = torch.where(better, scale, self._scales[sub])
        self._values[at] = torch.where(better, values, self._values[at])
        self._errors[at] = self._wanted[at] - self._values[at]

    def packed(self) -> "Bytes":
        """The blocks, in the matrix' own order; uint8, shape (rows, bytes of a row)."""
        import torch

        format, order = self._format, self._common.order
        levels = torch.empty_like(self._levels)
        levels[order] = self._levels
        scales = torch.stack(self._scales)
        scales[order[:: format.sub] // format.sub] = scales.clone()
        units = None
        if format.scale_limits is not None:
            units = torch.stack([unit for unit in self._units if unit is not None])
            units[order[:: format.block] // format.block] = units.clone()
        return format.pack(self._grid.fields(levels, scales, units))


def _cost(errors: "torch.Tensor", costs: _Costs) -> "torch.Tensor":
    return (costs.whole @ errors).mul_(errors).sum(0)


def _better(
    scales: "torch.Tensor", codes: _Codes, other_scales: "torch.Tensor", other: _Codes
) -> "tuple[torch.Tensor, _Codes]":
    """Of each row what costs less."""
    import torch

    better = other.cost < codes.cost
    chosen = (torch.where(better, b, a) for a, b in zip(codes, other, strict=True))
    return torch.where(better, other_scales, scales), _Codes(*chosen)
