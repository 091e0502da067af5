"""Streaming access to the tensors of a checkpoint, one at a time."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO, Self

from ggufkit.checkpoint.index import CheckpointIndex, TensorEntry
from ggufkit.errors import CheckpointError, IntegrityError

if TYPE_CHECKING:
    import torch


def torch_dtypes() -> "dict[str, torch.dtype]":
    """Torch's dtypes by safetensors' names."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }


def require_safetensors(index: CheckpointIndex) -> None:
    """Refuse pickled weights, which cannot be read tensor by tensor.

    Raises:
        CheckpointError: the weights are pickled.
    """
    if index.pickles:
        raise CheckpointError(
            f"{index.path} has pickled weights, which cannot be read tensor by tensor",
            "Save the model again with save_pretrained(..., safe_serialization=True)",
        )


def read_tensor(file: BinaryIO, entry: TensorEntry) -> "torch.Tensor":
    """Read one tensor into memory of its own, rather than map the file.

    Pages of a map that were touched stay in a process's resident memory, so
    that going through a whole shard would cost as much as loading it.

    Raises:
        IntegrityError: the file ends before the tensor does.
    """
    import torch

    raw = bytearray(entry.nbytes)
    file.seek(entry.start)
    if file.readinto(raw) != entry.nbytes:  # type: ignore[attr-defined]
        raise IntegrityError(f"{entry.shard} ends within '{entry.name}'", "Fetch the file again")
    dtype = torch_dtypes()[entry.dtype]
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape)


class TensorReader:
    """Reads tensors by name; the shards' files stay open meanwhile.

    Use it as a context manager. Each tensor has memory of its own, which is
    free again when the tensor is.

    Args:
        index: the checkpoint to read.

    Raises:
        CheckpointError: the weights are pickled.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        require_safetensors(index)
        self.index = index
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Give itself; shards are opened when first needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all shards."""
        self.close()

    def close(self) -> None:
        """Close all shards."""
        self._files.clear()
        self._stack.close()

    def names(self) -> list[str]:
        """Names of all tensors, in order of shards."""
        return list(self.index.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, rows first, without reading it."""
        return self.index.tensors[name].shape

    def load(self, name: str) -> "torch.Tensor":
        """One tensor in its original dtype, on the CPU.

        Raises:
            KeyError: there is no tensor of that name.
        """
        entry = self.index.tensors[name]
        if entry.shard not in self._files:
            opened = (self.index.path / entry.shard).open("rb")
            self._files[entry.shard] = self._stack.enter_context(opened)
        return read_tensor(self._files[entry.shard], entry)
