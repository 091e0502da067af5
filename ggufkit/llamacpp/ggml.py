"""ggml's own row quantizers, through ctypes.

``ggml_quantize_chunk`` of libggml-base is what llama-quantize calls for every
tensor, so rows quantized here are the very bytes that it would write, for
every type. The calls release the GIL: rows are shared out over threads.
"""

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp.blocks import TYPE_NUMBERS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]

_F32 = 0
_LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
_ROWS_PER_TASK = 64


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h at the pinned commit."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class GgmlType:
    """One ggml type: its name, block and bytes.

    Attributes:
        id: the number of ``enum ggml_type``.
        name: as ggml spells it, such as ``q4_0`` or ``q4_K``.
        block: elements in a block; a row must hold a whole number of blocks.
        block_nbytes: bytes of a block.
        is_quantized: false for the float types.
    """

    def __init__(self, number: int, traits: _TypeTraits) -> None:
        self.id = number
        self.name = traits.type_name.decode()
        self.block = int(traits.blck_size)
        self.block_nbytes = int(traits.type_size)
        self.is_quantized = bool(traits.is_quantized)
        self.to_float = _ToFloat(traits.to_float) if traits.to_float else None

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per element."""
        return 8 * self.block_nbytes / self.block


def load_library(library_dir: Path) -> ctypes.CDLL:
    """Load libggml-base of a native build.

    Raises:
        ToolError: if it is not there or cannot be loaded.
    """
    path = next((library_dir / n for n in _LIBRARIES if (library_dir / n).exists()), None)
    if path is None:
        raise ToolError(f"there is no libggml-base in {library_dir}", "Run: ggufkit build")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ToolError(
            f"{path} cannot be loaded: {error}", "Run: ggufkit build --force"
        ) from error


class Ggml:
    """libggml-base, loaded.

    Args:
        library_dir: the directory of the shared libraries of a native build.
        threads: how many threads quantize and dequantize rows.

    Raises:
        ToolError: if there is no such library or it cannot be loaded.
    """

    def __init__(self, library_dir: Path, threads: int) -> None:
        self._lib = load_library(library_dir)
        self._lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
        self._lib.ggml_get_type_traits.argtypes = (ctypes.c_int,)
        self._lib.ggml_quantize_init.argtypes = (ctypes.c_int,)
        self._lib.ggml_quantize_init.restype = None
        self._lib.ggml_quantize_requires_imatrix.argtypes = (ctypes.c_int,)
        self._lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self._lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._lib.ggml_quantize_chunk.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        )
        self._pool = ThreadPoolExecutor(max_workers=threads)

    @cached_property
    def types(self) -> dict[str, GgmlType]:
        """All types by their name in lower case."""
        return {t.name.lower(): t for t in self._enumerate()}

    def _enumerate(self) -> Iterator[GgmlType]:
        # ggml's table has holes, where types were removed, and its end is not exported.
        for number in sorted(TYPE_NUMBERS.values()):
            traits = self._lib.ggml_get_type_traits(number).contents
            if traits.type_name and traits.blck_size:
                yield GgmlType(number, traits)

    def type(self, name: str) -> GgmlType:
        """The type of that name, whatever its case.

        Raises:
            UsageError: if ggml has no such type.
        """
        found = self.types.get(name.lower())
        if found is None:
            raise UsageError(f"ggml has no type '{name}'", f"Known: {', '.join(self.types)}")
        return found

    def requires_imatrix(self, kind: GgmlType) -> bool:
        """Whether ggml refuses to quantize to this type without weights."""
        return bool(self._lib.ggml_quantize_requires_imatrix(kind.id))

    def quantize(self, kind: GgmlType, rows: "Floats", weights: "Floats | None" = None) -> "Bytes":
        """Quantize rows as llama-quantize does.

        Args:
            kind: the type.
            rows: float32, C-contiguous, shape (rows, columns).
            weights: importance of each column, float32, shape (columns,).

        Returns:
            uint8, shape (rows, bytes of a row).
        """
        import numpy as np

        _check_rows(kind, rows)
        count, columns = rows.shape
        row_nbytes = columns // kind.block * kind.block_nbytes
        out = np.empty((count, row_nbytes), np.uint8)
        weights_at = None
        if weights is not None:
            weights = np.ascontiguousarray(weights, np.float32)
            if weights.shape != (columns,):
                raise ValueError(f"weights have shape {weights.shape}, not ({columns},)")
            weights_at = weights.ctypes.data
        self._lib.ggml_quantize_init(kind.id)
        source, target = rows.ctypes.data, out.ctypes.data

        def work(first: int) -> None:
            n = min(_ROWS_PER_TASK, count - first)
            self._lib.ggml_quantize_chunk(
                kind.id, source, target, first * columns, n, columns, weights_at
            )

        self._share_out(work, count)
        return out

    def dequantize(self, kind: GgmlType, packed: "Bytes", columns: int) -> "Floats":
        """Turn quantized rows back into floats.

        Args:
            kind: the type.
            packed: uint8, C-contiguous, shape (rows, bytes of a row).
            columns: elements of a row.

        Returns:
            float32, shape (rows, columns).
        """
        import numpy as np

        if kind.to_float is None:
            raise UsageError(f"ggml cannot turn {kind.name} into floats")
        count, row_nbytes = packed.shape
        if row_nbytes * kind.block != columns * kind.block_nbytes:
            raise ValueError(f"{row_nbytes} bytes are not a {kind.name} row of {columns}")
        out = np.empty((count, columns), np.float32)
        source, target, to_float = packed.ctypes.data, out.ctypes.data, kind.to_float

        def work(first: int) -> None:
            n = min(_ROWS_PER_TASK, count - first)
            to_float(source + first * row_nbytes, target + first * columns * 4, n * columns)

        self._share_out(work, count)
        return out

    def round_trip(
        self, kind: GgmlType, rows: "Floats", weights: "Floats | None" = None
    ) -> "Floats":
        """What the rows become when they are stored in this type; float32."""
        if kind.id == _F32:
            return rows
        return self.dequantize(kind, self.quantize(kind, rows, weights), rows.shape[1])

    def _share_out(self, work: Any, count: int) -> None:
        for done in self._pool.map(work, range(0, count, _ROWS_PER_TASK)):
            assert done is None


def _check_rows(kind: GgmlType, rows: "Floats") -> None:
    if rows.ndim != 2 or rows.dtype.name != "float32" or not rows.flags.c_contiguous:
        raise ValueError("rows must be a C-contiguous float32 matrix")
    if rows.shape[1] % kind.block:
        raise UsageError(f"rows of {rows.shape[1]} do not divide into {kind.name} blocks")
