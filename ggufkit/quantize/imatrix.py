"""An importance matrix in llama.cpp's GGUF format.

llama-imatrix stores, for each tensor, the sum over tokens of the square of each
input and the number of tokens; llama-quantize divides one by the other (source:
tools/imatrix and tools/quantize of llama.cpp at the pinned commit). Experts lie
one after the other in one tensor, each with a count of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
