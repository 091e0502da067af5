"""The grid of a ggml type in torch: what a few rows of one sub-block can become.

Everything has the columns first, shape (columns, rows). The scales of a sub-block
are a tensor of shape (parts, rows): the step, and in types with minima the offset
below it. In types with sub-blocks both are integers times the block's units, the
halves ``d`` and ``dmin``, of the same shape; elsewhere they are halves themselves.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ggufkit.llamacpp.packing import Fields, Format

if TYPE_CHECKING:
    import torch


class Grid:
    """Rounding to a format's grid, and the scales that it can store.

    Args:
        format: the layout of the type's blocks.
    """

    def __init__(self, format: Format) -> None:
        import torch

        self.format = format
        self._levels = torch.from_numpy(format.levels)
        self._between = (self._levels[1:] + self._levels[:-1]) / 2
        self._centre = float(self._levels.mean())
        self._limits = float(self._levels[format.unused]), float(self._levels[-1])
        # In Q4_1 and Q5_1 the minimum is added.
        self._signs = torch.tensor([1.0, format.sign])[: 2 if format.has_min else 1]

    def round(
        self,
        asked: "torch.Tensor",
        scales: "torch.Tensor",
        inverse: "torch.Tensor",
        level: "torch.Tensor",
        value: "torch.Tensor",
    ) -> "torch.Tensor":
        """Round one column of some rows.

        Args:
            asked: what to come near to, shape (rows,).
            scales: of each row, shape (parts, rows).
            inverse: :func:`inverse_of` the steps.
            level: takes the levels, shape (rows,).
            value: takes the floats that they stand for; it is returned.
        """
        import torch

        has_min = len(scales) == 2
        scaled = torch.add(asked, scales[1], out=value) if has_min else asked
        torch.mul(scaled, inverse, out=level)
        if self.format.is_even:
            level.round_().clamp_(*self._limits)
        else:
            level.copy_(self._levels[torch.bucketize(level, self._between)])
        torch.mul(level, scales[0], out=value)
        return value.sub_(scales[1]) if has_min else value

    def floats(self, levels: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
        """The floats of levels, shape (columns, rows)."""
        values = levels * scales[0]
        return values.sub_(scales[1]) if len(scales) == 2 else values

    def stretched(self, scales: "torch.Tensor", shares: Sequence[float]) -> "torch.Tensor":
        """Scales times each share, the middle of the grid held; all rows of one, then the next."""
        import torch

        factors = torch.tensor(shares)[:, None]
        many = torch.empty(len(scales), len(shares), scales.shape[1])
        many[0] = scales[0] * factors
        if len(scales) == 2:
            many[1] = scales[1] + (many[0] - scales[0]) * self._centre
        return many.view(len(scales), -1)

    def allowed(self, scales: "torch.Tensor", units: "torch.Tensor | None") -> "torch.Tensor":
        """What can be stored next to some scales.

        Args:
            scales: shape (parts, rows), or several of them one after the other.
            units: of the block, shape (parts, rows); None if it has no sub-blocks.
        """
        if units is None:
            return scales.half().float()
        several = scales.view(len(scales), -1, units.shape[1])
        return (self.integers(several, units[:, None]) * units[:, None]).view_as(scales)

    def integers(self, scales: "torch.Tensor", units: "torch.Tensor") -> "torch.Tensor":
        """The integer scales that give about what is wanted."""
        assert self.format.scale_limits is not None
        return (scales * inverse_of(units)).round_().clamp_(*self.format.scale_limits)

    def unpacked(self, packed: "Fields") -> "tuple[list[torch.Tensor], torch.Tensor | None]":
        """Scales of each sub-block, and units, of one block of each row."""
        import torch

        steps, offsets = self.format.steps(packed)[:, 0], self.format.offsets(packed)
        parts = [steps] if offsets is None else [steps, offsets[:, 0]]
        scales = torch.stack([torch.from_numpy(part.T.copy()) for part in parts], 1)
        if self.format.scale_limits is None:
            return list(scales), None
        halves = [packed.d] if packed.dmin is None else [packed.d, packed.dmin]
        units = torch.stack([torch.from_numpy(half[:, 0]).float() for half in halves])
        return list(scales), units

    def fields(
        self,
        levels: "torch.Tensor",
        scales: "torch.Tensor",
        units: "torch.Tensor | None",
    ) -> Fields:
        """Blocks to pack.

        Args:
            levels: shape (columns, rows).
            scales: shape (sub-blocks, parts, rows).
            units: shape (blocks, parts, rows), if blocks have sub-blocks.
        """
        import torch

        format, rows = self.format, levels.shape[1]
        codes = torch.bucketize(levels, self._between).to(torch.int16)
        codes = codes.T.reshape(rows, -1, format.block)
        halves = (scales if units is None else units) * self._signs[:, None]
        d, *dmin = halves.permute(1, 2, 0).half().numpy()
        stored = []
        if units is not None:
            split = scales.view(len(units), format.subs, *scales.shape[1:])
            integers = self.integers(split, units[:, None]).to(torch.int16)
            stored = list(integers.permute(2, 3, 0, 1).numpy())
        return Fields(
            codes.numpy(),
            d,
            dmin=dmin[0] if dmin else None,
            scales=stored[0] if stored else None,
            mins=stored[1] if len(stored) == 2 else None,
        )


def inverse_of(values: "torch.Tensor") -> "torch.Tensor":
    """1/x, and 0 for what is too small to have one."""
    import torch

    inverse = values.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))


def fit_scales(
    up: "torch.Tensor",
    down: "torch.Tensor | None",
    cost: "torch.Tensor",
    wanted: "torch.Tensor",
    otherwise: "torch.Tensor",
) -> "torch.Tensor":
    """Least squares for scales, codes held.

    Finds the a and b that bring ``a * up - b * down`` nearest to a target t when
    errors e cost eᵀHe.

    Args:
        up: what the step multiplies, shape (columns, rows).
        down: what the offset multiplies, shape (columns, rows); None without one.
        cost: H, shape (columns, columns).
        wanted: H t, shape (columns, rows).
        otherwise: the answer where none is best, shape (parts, rows).

    Returns:
        Shape (parts, rows).
    """
    import torch

    pushed = cost @ up
    squares, along = (pushed * up).sum(0), (up * wanted).sum(0)
    if down is None:
        found = along[None] * inverse_of(squares)
        return torch.where(squares > 0, found, otherwise)
    against, mixed = (down * wanted).sum(0), (pushed * down).sum(0)
    others = ((cost @ down) * down).sum(0)
    determinant = squares * others - mixed.square()
    found = torch.stack([along * others - against * mixed, along * mixed - against * squares])
    # Codes that are all alike leave step and offset undecided.
    sound = determinant > _SOUND * squares * others
    return torch.where(sound, found * inverse_of(determinant), otherwise)


_SOUND = 1e-5
