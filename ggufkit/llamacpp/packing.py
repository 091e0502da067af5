"""Blocks of the ggml types, taken apart into scales and codes and put together again.

A block stores one value per weight as ``step * level - offset``: the level is
looked up by the weight's code, the step is the block's half ``d``, times the
small integer of its sub-block in the K types, and the offset is made of ``dmin``
and ``mins`` likewise. Each format is one row of data: which bits of which field
lie where. The layouts are those of ggml's ggml-common.h and the dequantizers
of ggml-quants.c; every product of the formula is exact in float32, so the floats
are ggml's own, bit for bit, whatever its compiler made of it.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ggufkit.errors import IntegrityError, UsageError
from ggufkit.llamacpp.blocks import TYPE_SIZES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Halves = npt.NDArray[np.float16]
    Bytes = npt.NDArray[np.uint8]
    Small = npt.NDArray[np.int16]
    _Arrays = dict[str, npt.NDArray[Any]]

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""``kvalues_iq4nl`` of ggml-common.h."""


@dataclass(frozen=True)
class Fields:
    """Blocks taken apart; leading dimensions are (rows, blocks).

    Attributes:
        codes: one per weight, int16, shape (rows, blocks, weights), from 0 on.
        d: scale of each block, float16, shape (rows, blocks).
        dmin: scale of the minima (K types), or the minimum itself; else None.
        scales: integer scale of each sub-block, int16, shape (rows, blocks, subs).
        mins: integer minimum of each sub-block, the same.
    """

    codes: "Small"
    d: "Halves"
    dmin: "Halves | None" = None
    scales: "Small | None" = None
    mins: "Small | None" = None


class _Part(Protocol):
    """Some bytes of a block."""

    @property
    def nbytes(self) -> int: ...

    def read(self, data: "Bytes", fields: "_Arrays") -> None: ...

    def write(self, fields: "_Arrays") -> "Bytes": ...


@dataclass(frozen=True)
class _Half:
    """A float16."""

    field: str
    nbytes: int = 2

    def read(self, data: "Bytes", fields: "_Arrays") -> None:
        import numpy as np

        fields[self.field] = np.ascontiguousarray(data).view("<f2")[..., 0]

    def write(self, fields: "_Arrays") -> "Bytes":
        import numpy as np

        return np.ascontiguousarray(fields[self.field][..., None], "<f2").view(np.uint8)


@dataclass(frozen=True)
class _Bits:
    """Some bits of each of ``count`` values.

    Values come in groups: the lowest bits of a group's bytes belong to its first
    values, one per byte, the bits above to those that follow.

    Attributes:
        field: whose bits.
        count: values in a block.
        bits: how many of each.
        group: values in a group.
        shift: which bit of the value is the lowest of them.
    """

    field: str
    count: int
    bits: int
    group: int
    shift: int = 0

    @property
    def nbytes(self) -> int:
        return self.count * self.bits // 8

    def read(self, data: "Bytes", fields: "_Arrays") -> None:
        import numpy as np

        grouped = data.reshape(*data.shape[:-1], self.count // self.group, 1, -1)
        taken = (grouped >> self._shifts()) & ((1 << self.bits) - 1)
        values = taken.reshape(*data.shape[:-1], self.count).astype(np.int16) << self.shift
        fields[self.field] = fields[self.field] | values if self.field in fields else values

    def write(self, fields: "_Arrays") -> "Bytes":
        import numpy as np

        values = (fields[self.field] >> self.shift) & ((1 << self.bits) - 1)
        per_byte = 8 // self.bits
        grouped = values.reshape(*values.shape[:-1], self.count // self.group, per_byte, -1)
        joined = np.bitwise_or.reduce(grouped.astype(np.uint8) << self._shifts(), axis=-2)
        packed: Bytes = joined.reshape(*values.shape[:-1], self.nbytes)
        return packed

    def _shifts(self) -> "Bytes":
        import numpy as np

        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


@dataclass(frozen=True)
class _Signed:
    """A signed byte for each of ``count`` values, which are counted from the lowest on."""

    field: str
    nbytes: int

    def read(self, data: "Bytes", fields: "_Arrays") -> None:
        import numpy as np

        fields[self.field] = (data ^ 128).astype(np.int16)

    def write(self, fields: "_Arrays") -> "Bytes":
        import numpy as np

        signed: Bytes = fields[self.field].astype(np.uint8) ^ np.uint8(128)
        return signed


@dataclass(frozen=True)
class _ScalesAndMins:
    """Eight scales and eight minima of six bits in twelve bytes (Q4_K, Q5_K).

    The first eight bytes hold the first four of each; their two upper bits are
    those of the last four, whose lower ones share the last four bytes.
    """

    nbytes: int = 12

    def read(self, data: "Bytes", fields: "_Arrays") -> None:
        import numpy as np

        data = data.astype(np.int16)
        first, upper, lower = data[..., :8] & 63, (data[..., :8] >> 6) << 4, data[..., 8:]
        fields["scales"] = np.concatenate((first[..., :4], upper[..., :4] | (lower & 15)), axis=-1)
        fields["mins"] = np.concatenate((first[..., 4:], upper[..., 4:] | (lower >> 4)), axis=-1)

    def write(self, fields: "_Arrays") -> "Bytes":
        import numpy as np

        scales, mins = fields["scales"], fields["mins"]
        first = np.concatenate((scales[..., :4], mins[..., :4]), axis=-1)
        last = np.concatenate((scales[..., 4:], mins[..., 4:]), axis=-1)
        lower = (scales[..., 4:] & 15) | ((mins[..., 4:] & 15) << 4)
        joined = np.concatenate((first | ((last >> 4) << 6), lower), axis=-1)
        return joined.astype(np.uint8)


@dataclass(frozen=True)
class _ScaleBesideMin:
    """A scale and a minimum of four bits in each byte (Q2_K)."""

    nbytes: int = 16

    def read(self, data: "Bytes", fields: "_Arrays") -> None:
        import numpy as np

        fields["scales"] = (data & 15).astype(np.int16)
        fields["mins"] = (data >> 4).astype(np.int16)

    def write(self, fields: "_Arrays") -> "Bytes":
        import numpy as np

        joined: Bytes = (fields["scales"] | (fields["mins"] << 4)).astype(np.uint8)
        return joined


class Format:
    """How blocks of one ggml type are laid out; making one enters it in the table.

    Args:
        name: the type's name, in capitals.
        parts: the parts of a block, in order.
        levels: what each code stands for, ascending.
        sub: weights of a sub-block; None if the block has one scale.
        scales: smallest and largest integer scale of a sub-block, if it has one.
        added: whether minima are added, not taken away.
        unused: how many codes, from the lowest on, ggml never writes.

    Attributes:
        block: weights of a block.
        block_nbytes: bytes of a block.
        subs: sub-blocks in a block; 1 if it has none.
        has_min: whether blocks have minima.
        is_even: whether levels lie one apart.
        sign: of what ``dmin`` takes away; -1 where it is added.
    """

    def __init__(
        self,
        name: str,
        parts: tuple[_Part, ...],
        levels: tuple[int, ...],
        *,
        sub: int | None = None,
        scales: tuple[int, int] | None = None,
        added: bool = False,
        unused: int = 0,
    ) -> None:
        self.name = name
        self.block, self.block_nbytes = TYPE_SIZES[name]
        self.sub = sub or self.block
        self.subs = self.block // self.sub
        self.scale_limits = scales
        self.unused = unused
        self.has_min = _DMIN in parts
        self.is_even = levels[-1] - levels[0] == len(levels) - 1
        self._parts = parts
        self._levels = levels
        self.sign = -1 if added else 1
        # Integer scales are stored counted from the smallest on.
        self._zero = -scales[0] if scales else 0
        assert sum(part.nbytes for part in parts) == self.block_nbytes, name
        assert name not in FORMATS, name
        FORMATS[name] = self

    @cached_property
    def levels(self) -> "Floats":
        """What each code stands for; float32, ascending, shape (codes,)."""
        import numpy as np

        return np.array(self._levels, np.float32)

    def unpack(self, packed: "Bytes") -> Fields:
        """Take rows of blocks apart.

        Args:
            packed: uint8, shape (rows, bytes of a row).

        Raises:
            IntegrityError: if a scale is NaN or infinite.
            ValueError: if rows are not made of whole blocks.
        """
        if packed.dtype.name != "uint8" or packed.ndim != 2 or packed.shape[1] % self.block_nbytes:
            raise ValueError(f"these are no rows of {self.name} blocks: {packed.shape}")
        blocks = packed.reshape(len(packed), -1, self.block_nbytes)
        found: _Arrays = {}
        start = 0
        for part in self._parts:
            part.read(blocks[..., start : start + part.nbytes], found)
            start += part.nbytes
        if self._zero:
            found["scales"] = found["scales"] - self._zero
        fields = Fields(**found)
        self._check_finite(fields)
        return fields

    def pack(self, fields: Fields) -> "Bytes":
        """Put blocks together; uint8, shape (rows, bytes of a row).

        Raises:
            IntegrityError: if a scale is NaN or infinite.
            ValueError: if a code or an integer scale is out of its range.
        """
        import numpy as np

        self._check_finite(fields)
        self._check_range("codes", fields.codes, (0, len(self._levels) - 1))
        given: _Arrays = {k: v for k, v in vars(fields).items() if v is not None}
        if self.scale_limits and fields.scales is not None:
            self._check_range("scales", fields.scales, self.scale_limits)
            given["scales"] = fields.scales + self._zero
        if self.scale_limits and fields.mins is not None:
            self._check_range("mins", fields.mins, self.scale_limits)
        joined = np.concatenate([part.write(given) for part in self._parts], axis=-1)
        return joined.reshape(len(joined), -1)

    def steps(self, fields: Fields) -> "Floats":
        """The step of each sub-block; float32, shape (rows, blocks, subs)."""
        import numpy as np

        d = fields.d.astype(np.float32)[..., None]
        return d if fields.scales is None else d * fields.scales.astype(np.float32)

    def offsets(self, fields: Fields) -> "Floats | None":
        """What is taken away from each weight of a sub-block, as :meth:`steps`."""
        import numpy as np

        if fields.dmin is None:
            return None
        dmin = self.sign * fields.dmin.astype(np.float32)[..., None]
        return dmin if fields.mins is None else dmin * fields.mins.astype(np.float32)

    def dequantize(self, fields: Fields) -> "Floats":
        """The floats that ggml reads; float32, shape (rows, columns)."""
        rows, blocks, _ = fields.codes.shape
        levels = self.levels[fields.codes].reshape(rows, blocks, self.subs, self.sub)
        values = levels * self.steps(fields)[..., None]
        offsets = self.offsets(fields)
        if offsets is not None:
            values -= offsets[..., None]
        return values.reshape(rows, -1)

    def _check_finite(self, fields: Fields) -> None:
        import numpy as np

        for name, values in (("d", fields.d), ("dmin", fields.dmin)):
            if values is not None and not np.isfinite(values).all():
                raise IntegrityError(
                    f"a {self.name} block has a '{name}' that is NaN or infinite",
                    "The weights it was made of are damaged, or too large for this type",
                )

    def _check_range(self, what: str, values: "Small", limits: tuple[int, int]) -> None:
        if values.size and not limits[0] <= values.min() <= values.max() <= limits[1]:
            raise ValueError(f"{what} of {self.name} lie outside {limits[0]} to {limits[1]}")


FORMATS: dict[str, Format] = {}
"""The formats by their type's name in capitals; making one adds it."""


def format_of(type: str) -> Format:
    """The format of a ggml type, whatever the case of its name.

    Raises:
        UsageError: if it is not known here; names those that are.
    """
    found = FORMATS.get(type.upper())
    if found is None:
        raise UsageError(
            f"blocks of type '{type}' cannot be packed", f"Known: {', '.join(FORMATS)}"
        )
    return found


def require_packable(type: str) -> None:
    """Refuse a quantization type, such as ``Q4_K_M``, whose blocks cannot be packed.

    The types of a mixture are looked at one by one when they are known.

    Raises:
        UsageError: names those that can.
    """
    name = type.upper()
    if name in FORMATS or re.sub(r"_[SML]$", "", name) in FORMATS:
        return
    raise UsageError(
        f"blocks of type '{type}' cannot be packed",
        f"Known: {', '.join(FORMATS)}, and mixtures of them such as Q4_K_M",
    )


def _even(bits: int, zero: int = 0) -> tuple[int, ...]:
    return tuple(range(-zero, (1 << bits) - zero))


_D, _DMIN = _Half("d"), _Half("dmin")
_NIBBLES_32 = _Bits("codes", 32, 4, 32)
_FIFTH_32 = _Bits("codes", 32, 1, 8, shift=4)
_NIBBLES_64 = _Bits("codes", 256, 4, 64)
_FIFTH_256 = _Bits("codes", 256, 1, 256, shift=4)
_PAIRS = _Bits("codes", 256, 2, 128)

Format("Q4_0", (_D, _NIBBLES_32), _even(4, 8))
Format("Q4_1", (_D, _DMIN, _NIBBLES_32), _even(4), added=True)
Format("Q5_0", (_D, _FIFTH_32, _NIBBLES_32), _even(5, 16))
Format("Q5_1", (_D, _DMIN, _FIFTH_32, _NIBBLES_32), _even(5), added=True)
Format("Q8_0", (_D, _Signed("codes", 32)), _even(8, 128), unused=1)
Format("IQ4_NL", (_D, _NIBBLES_32), IQ4_LEVELS)
Format("Q2_K", (_ScaleBesideMin(), _PAIRS, _D, _DMIN), _even(2), sub=16, scales=(0, 15))
Format(
    "Q3_K",
    (
        _Bits("codes", 256, 1, 256, shift=2),
        _PAIRS,
        _Bits("scales", 16, 4, 16),
        _Bits("scales", 16, 2, 16, shift=4),
        _D,
    ),
    _even(3, 4),
    sub=16,
    scales=(-32, 31),
)
Format("Q4_K", (_D, _DMIN, _ScalesAndMins(), _NIBBLES_64), _even(4), sub=32, scales=(0, 63))
Format(
    "Q5_K",
    (_D, _DMIN, _ScalesAndMins(), _FIFTH_256, _NIBBLES_64),
    _even(5),
    sub=32,
    scales=(0, 63),
)
Format(
    "Q6_K",
    (
        _Bits("codes", 256, 4, 128),
        _Bits("codes", 256, 2, 128, shift=4),
        _Signed("scales", 16),
        _D,
    ),
    _even(6, 32),
    sub=16,
    scales=(-128, 127),
)
Format(
    "IQ4_XS",
    (
        _D,
        _Bits("scales", 8, 2, 4, shift=4),
        _Bits("scales", 8, 4, 2),
        _Bits("codes", 256, 4, 32),
    ),
    IQ4_LEVELS,
    sub=32,
    scales=(-32, 31),
)
