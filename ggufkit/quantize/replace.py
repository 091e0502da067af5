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
from ggufkit.values import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]
    Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RoundedRows:
    """A linear map that was rounded.

    Attributes:
        gguf_names: the tensors of the GGUF that it became.
        type: the ggml type it was rounded to, in capitals.
        weight: the map as the float GGUF has it, float32, shape (rows, columns).
        packed: its blocks, uint8, shape (rows, bytes of a row).
    """

    gguf_names: tuple[str, ...]
    type: str
    weight: "Floats"
    packed: "Bytes"


def replace_rounded(
    quantized: Path,
    intermediate: Path,
    out: Path,
    rounded: Iterable[RoundedRows],
    note: tuple[str, str],
) -> list[str]:
    """Write a copy of a quantized GGUF with rounded maps in it.

    Args:
        quantized: as llama-quantize wrote it.
        intermediate: the float GGUF that it was made of.
        out: the file to write.
        rounded: the maps, taken one after the other.
        note: a key for the metadata, and its value.

    Returns:
        Names of the tensors that were replaced. Those whose type in the file is not
        the one they were rounded to are left alone.

    Raises:
        CheckpointError: if the files do not belong to the maps; names the tensor.
    """
    types = {tensor.name: tensor.type for tensor in read_gguf(quantized, arrays=False).tensors}
    floats = {tensor.name: tensor for tensor in read_gguf(intermediate, arrays=False).tensors}
    replaced: list[str] = []

    def data() -> "Iterator[tuple[str, Bytes]]":
        for map in rounded:
            for name in map.gguf_names:
                if name not in types or name not in floats:
                    raise CheckpointError(
                        f"{quantized.name} has no tensor '{name}'",
                        "It was not made of this checkpoint",
                    )
                if types[name] != map.type:
                    continue
                order = row_order(name, _read_floats(intermediate, floats[name]), map.weight)
                replaced.append(name)
                yield name, map.packed[order]

    write_replaced(quantized, out, data(), note)
    return replaced


def row_order(name: str, stored: "Floats", weight: "Floats") -> "Rows":
    """Which row of a map each row of a tensor is, by their bits.

    Raises:
        CheckpointError: if a row is not there; names the tensor.
    """
    import numpy as np

    places = {row.tobytes(): number for number, row in enumerate(weight)}
    try:
        return np.array([places[row.tobytes()] for row in stored], np.int64)
    except KeyError:
        raise CheckpointError(
            f"the rows of '{name}' are not those of the checkpoint",
            "The GGUF was made of another model, or the converter changes this tensor",
        ) from None


def _read_floats(path: Path, tensor: TensorInfo) -> "Floats":
    import numpy as np

    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor.type)
    if dtype is None:
        raise CheckpointError(f"'{tensor.name}' in {path.name} is {tensor.type}, not floats")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(tensor.nbytes), dtype)
    if tensor.type == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False).reshape(-1, tensor.shape[0])
