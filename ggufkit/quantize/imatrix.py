"""An importance matrix: llama.cpp's GGUF format, and the older one, which is only read.

llama-imatrix stores, for each tensor, the sum over tokens of the square of each
input and the number of tokens; llama-quantize divides one by the other (source:
tools/imatrix, tools/quantize and common/imatrix-loader.cpp of llama.cpp at the
pinned commit). Experts lie one after the other in one tensor, each with a count
of its own; the older format has one count of calls for all of them.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.errors import IntegrityError, UsageError
from ggufkit.llamacpp.gguf import MAGIC, read_gguf
from ggufkit.values import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


def write_imatrix(
    path: Path,
    entries: "Mapping[str, Sequence[tuple[Floats, int]]]",
    *,
    dataset: str,
    chunk_tokens: int,
    chunks: int,
) -> None:
    """Write an importance matrix.

    Args:
        path: the file.
        entries: by GGUF tensor name, for each of its matrices (one, or one per
            expert): the mean square of each input, float32, shape (inputs,),
            and the number of tokens that it is the mean of.
        dataset: name of the text.
        chunk_tokens: tokens of a sequence.
        chunks: number of sequences.
    """
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name in sorted(entries):
        sums = np.stack([mean * np.float32(tokens) for mean, tokens in entries[name]])
        counts = np.array([[tokens] for _, tokens in entries[name]], np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
"""Without these llama-quantize takes no GGUF for an importance matrix."""


@dataclass(frozen=True)
class ImatrixEntry:
    """What an importance matrix has for one tensor.

    Attributes:
        values: number of means: inputs, times experts.
        counts: tokens that each expert's (or the one matrix's) means are of; None
            where the file does not say, as in the older format.
    """

    values: int
    counts: tuple[float, ...] | None

    @property
    def width(self) -> int | None:
        """Inputs of one matrix; None where the file does not say how many there are."""
        return self.values // len(self.counts) if self.counts else None

    @property
    def unused(self) -> tuple[int, ...]:
        """Numbers of the matrices that no token ever came to."""
        return tuple(n for n, count in enumerate(self.counts or ()) if not count > 0)


def read_imatrix(path: Path) -> dict[str, ImatrixEntry]:
    """Entries of an importance matrix by the name of their tensor.

    Raises:
        UsageError: if there is no such file.
        IntegrityError: if llama-quantize would not take it, or its values are no
            finite numbers.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise UsageError(
            f"There is no importance matrix {path}: {error.strerror}",
            "Name a file; for a checkpoint, --imatrix auto makes one",
        ) from error
    return _read_from_gguf(path) if start == MAGIC else _read_older(path)


def _unfit(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is no importance matrix: {why}",
        "llama-imatrix writes one, as a GGUF or in its older format; "
        "for a checkpoint, --imatrix auto makes one",
    )


def _read_from_gguf(path: Path) -> dict[str, ImatrixEntry]:
    header = read_gguf(path, arrays=False)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    named = {name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)}
    if not named:
        kind = header.metadata.get("general.architecture")
        raise _unfit(path, f"it is a model ({kind})" if kind else "it has no entries")
    if lacking := [key for key in _KEYS if key not in header.metadata]:
        raise _unfit(path, f"it lacks the key {lacking[0]}")
    entries = {}
    for name in sorted(named):
        sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
        if counts is None or {sums.type, counts.type} != {"F32"}:
            raise _unfit(path, f"{name} has no counts, or not as F32")
        if sums.parameters % max(1, counts.parameters):
            raise _unfit(path, f"{name} has {sums.parameters} sums for {counts.parameters} counts")
        _require_finite(path, name, sums)
        entries[name] = ImatrixEntry(sums.parameters, tuple(_floats(path, counts).tolist()))
    return entries


def _floats(path: Path, tensor: TensorInfo) -> "Floats":
    import numpy as np

    return np.memmap(path, "<f4", "r", tensor.offset, (prod(tensor.shape),))


def _require_finite(path: Path, name: str, sums: TensorInfo) -> None:
    import numpy as np

    if not np.isfinite(_floats(path, sums)).all():
        raise IntegrityError(
            f"{path} holds NaN or infinity for {name}",
            "The model computed them on its text: make the matrix again, in float32",
        )


def _read_older(path: Path) -> dict[str, ImatrixEntry]:
    """The format before GGUF: number of entries; of each its name, calls, values."""
    import numpy as np

    data = path.read_bytes()
    at = 0

    def number() -> int:
        nonlocal at
        if at + 4 > len(data):
            raise _unfit(path, "it is neither a GGUF nor of the older format, or it is truncated")
        at += 4
        return int(struct.unpack_from("<i", data, at - 4)[0])

    def span(nbytes: int) -> slice:
        nonlocal at
        if not 0 < nbytes <= len(data) - at:
            raise _unfit(path, "it is neither a GGUF nor of the older format, or it is truncated")
        at += nbytes
        return slice(at - nbytes, at)

    entries = {}
    count = number()
    if count < 1:
        raise _unfit(path, "it has no entries, or is of another kind")
    for _ in range(count):
        name = data[span(number())].decode("utf-8", "replace")
        number()  # calls
        values = np.frombuffer(data[span(4 * number())], "<f4")
        if not np.isfinite(values).all():
            raise IntegrityError(f"{path} holds NaN or infinity for {name}", "Make it again")
        entries[name] = ImatrixEntry(len(values), None)
    return entries
