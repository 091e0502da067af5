"""Streaming access to the tensors of a checkpoint, one at a time."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class TensorReader:
    """Reads tensors by name through memory maps that stay open.

    Use it as a context manager. Only pages that are touched take memory.

    Args:
        index: the checkpoint to read.

    Raises:
        CheckpointError: the weights are pickled, so nothing can be mapped.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        if index.pickles:
            raise CheckpointError(
                f"{index.path} has pickled weights, which cannot be read tensor by tensor",
                "Save the model again with save_pretrained(..., safe_serialization=True)",
            )
        self.index = index
        self._files: dict[str, Any] = {}
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
        from safetensors import safe_open

        shard = self.index.tensors[name].shard
        if shard not in self._files:
            opened = safe_open(self.index.path / shard, framework="pt", device="cpu")
            self._files[shard] = self._stack.enter_context(opened)
        tensor: torch.Tensor = self._files[shard].get_tensor(name)
        return tensor
