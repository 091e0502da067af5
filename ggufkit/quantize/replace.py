"""A GGUF as llama-quantize wrote it, with the data of some tensors rounded otherwise.

The converter may put rows in another order (Llama's queries and keys) or take a
matrix apart. Which rows went where is seen from the float GGUF that the quantized one
was made of: it has the very rows of the checkpoint.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.errors import CheckpointError
from ggufkit.llamacpp.gguf import read_gguf, write_replaced
from ggufkit.quantize.types import FLOAT_TYPES
from ggufkit.values import GGUFFile, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]
    Rows = npt.NDArray[np.int64]

NOT_TRIED = "no linear map of a block"


@dataclass(frozen=True)
class RoundedRows:
    """A linear map that was rounded.

    Attributes:
        gguf_names: the tensors of the GGUF that it became.
        type: the ggml type it was rounded to, in any case.
        weight: the map as it went to the converter, float32, shape (rows, columns).
        packed: its blocks, uint8, shape (rows, bytes of a row).
    """

    gguf_names: tuple[str, ...]
    type: str
    weight: "Floats"
    packed: "Bytes"


@dataclass(frozen=True)
class LeftAlone:
    """A quantized tensor that keeps what llama-quantize wrote, and why."""

    name: str
    type: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Replaced:
    """What became of the quantized tensors of a GGUF.

    Attributes:
        names: of those with new data.
        parameters: how many weights these have.
        left_alone: all the others.
    """

    names: tuple[str, ...]
    parameters: int
    left_alone: tuple[LeftAlone, ...]


def replace_rounded(
    quantized: Path,
    intermediate: Path,
    out: Path,
    rounded: Iterable[RoundedRows],
    note: tuple[str, str],
) -> Replaced:
    """Write a copy of a quantized GGUF with rounded maps in it.

    A tensor whose type in the file is not the one that its map was rounded to, or
    that the converter made of other rows than the map's, is left alone.

    Args:
        quantized: as llama-quantize wrote it.
        intermediate: the float GGUF that it was made of.
        out: the file to write.
        rounded: the maps, taken one after the other.
        note: a key for the metadata, and its value.

    Raises:
        CheckpointError: if the files do not belong together, or have nothing of the maps.
    """
    header = read_gguf(quantized, arrays=False)
    types = {tensor.name: tensor.type for tensor in header.tensors}
    floats = {tensor.name: tensor for tensor in read_gguf(intermediate, arrays=False).tensors}
    replaced: list[str] = []
    reasons: dict[str, str] = {}

    def data() -> "Iterator[tuple[str, Bytes]]":
        for map in rounded:
            for name in map.gguf_names:
                if name not in types:
                    continue  # the converter made something else of the map, told below
                if name not in floats:
                    raise CheckpointError(
                        f"{intermediate.name} has no tensor '{name}'",
                        f"{quantized.name} was not made of it",
                    )
                if types[name] != map.type.upper():
                    reasons[name] = f"was rounded to {map.type.upper()}"
                    continue
                order = row_order(_read_floats(intermediate, floats[name]), map.weight)
                if order is None:
                    reasons[name] = "the converter changes its rows"
                    continue
                replaced.append(name)
                yield name, map.packed[order]

    write_replaced(quantized, out, data(), note)
    if not replaced:
        out.unlink()
        told = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise CheckpointError(
            f"{quantized.name} has nothing of the maps that were rounded"
            + (f" ({told})" if told else ""),
            "It was made of another checkpoint",
        )
    return _told(header, set(replaced), reasons)


def _told(header: GGUFFile, replaced: set[str], reasons: dict[str, str]) -> Replaced:
    quantized = [tensor for tensor in header.tensors if tensor.type not in FLOAT_TYPES]
    return Replaced(
        tuple(tensor.name for tensor in quantized if tensor.name in replaced),
        sum(tensor.parameters for tensor in quantized if tensor.name in replaced),
        tuple(
            LeftAlone(t.name, t.type, t.parameters, reasons.get(t.name, NOT_TRIED))
            for t in quantized
            if t.name not in replaced
        ),
    )


def row_order(stored: "_Stored", weight: "Floats") -> "Rows | None":
    """Which row of a map each row of a tensor is, by their bits; None if one is not there."""
    import numpy as np

    kept = stored.rounded(weight)
    places = {row.tobytes(): number for number, row in enumerate(kept)}
    try:
        return np.array([places[row.tobytes()] for row in stored.rows], np.int64)
    except KeyError:
        return None


@dataclass(frozen=True)
class _Stored:
    """A float tensor's elements as they lie in the file, shape (rows, columns)."""

    type: str
    rows: "npt.NDArray[np.generic]"

    def rounded(self, weight: "Floats") -> "npt.NDArray[np.generic]":
        """Some floats as the file would keep them."""
        import numpy as np

        if self.type == "F32":
            return np.ascontiguousarray(weight, "<f4")
        if self.type == "F16":
            with np.errstate(over="ignore"):
                return weight.astype("<f2")
        # To nearest, ties to even; NaN does not get here.
        bits = np.ascontiguousarray(weight, "<f4").view("<u4")
        rounded: npt.NDArray[np.generic] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype("<u2")


def _read_floats(path: Path, tensor: TensorInfo) -> _Stored:
    import numpy as np

    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor.type)
    if dtype is None:
        raise CheckpointError(f"'{tensor.name}' in {path.name} is {tensor.type}, not floats")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(tensor.nbytes), dtype)
    return _Stored(tensor.type, raw.reshape(-1, tensor.shape[0]))
