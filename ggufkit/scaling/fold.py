"""Scales as a file, and their fold into a checkpoint.

``scales.safetensors`` holds one float32 vector per block and group, named
``<blocks>.<number>.<group>``, with one value per output of the producer. Folding
divides the producer's outputs and multiplies the consumers' columns, so the
function of the model in real numbers is unchanged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import IntegrityError
from ggufkit.scaling.families import Family, Group
from ggufkit.scaling.search import kv_head_sharing

if TYPE_CHECKING:
    import torch

Scales = Mapping[str, "torch.Tensor"]
Replacement = Callable[["torch.Tensor"], "torch.Tensor"]


def scale_name(family: Family, block: int, group: Group) -> str:
    """The name of a group's scales in the file."""
    return f"{family.blocks}.{block}.{group.name}"


def block_count(index: CheckpointIndex) -> int:
    """Number of blocks of the model."""
    return int(index.config["num_hidden_layers"])


def sharing(index: CheckpointIndex, group: Group) -> "torch.Tensor | None":
    """Which scale each input of the group's consumers takes; None if its own.

    Returns:
        int64, shape (inputs,), or None.
    """
    if not group.per_kv_head:
        return None
    config = index.config
    query_heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or query_heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // query_heads)
    return kv_head_sharing(query_heads, kv_heads, head_dim)


def replacements(index: CheckpointIndex, family: Family, scales: Scales) -> dict[str, Replacement]:
    """What the fold does to each tensor, by tensor name.

    Tensors that no scale touches, or only ones, are left out: their bytes stay.

    Raises:
        IntegrityError: if the scales do not belong to this checkpoint.
    """
    divide: dict[str, torch.Tensor] = {}
    multiply: dict[str, torch.Tensor] = {}
    names = {scale_name(family, b, g) for b in range(block_count(index)) for g in family.groups}
    if names != set(scales):
        raise IntegrityError("the scales are not for this checkpoint: other blocks or groups")
    for block in range(block_count(index)):
        for group in family.groups:
            scale = scales[scale_name(family, block, group)]
            if bool((scale == 1).all()):
                continue
            shared = sharing(index, group)
            for parameter in ("weight", "bias"):
                name = family.tensor(block, group.producer, parameter)
                if name in index.tensors:
                    _check_length(index, name, 0, scale)
                    divide[name] = scale
            spread = scale if shared is None else scale[shared]
            for consumer in group.consumers:
                name = family.tensor(block, consumer)
                _check_length(index, name, 1, spread)
                multiply[name] = spread
    return {
        name: _replacement(divide.get(name), multiply.get(name)) for name in {*divide, *multiply}
    }


def _check_length(index: CheckpointIndex, name: str, dimension: int, scale: "torch.Tensor") -> None:
    shape = index.tensors[name].shape
    if shape[dimension] != scale.shape[0]:
        raise IntegrityError(
            f"the scales are not for this checkpoint: {name} has shape {list(shape)}, "
            f"its scales have length {scale.shape[0]}"
        )


def _replacement(divide: "torch.Tensor | None", multiply: "torch.Tensor | None") -> Replacement:
    def fold(tensor: "torch.Tensor") -> "torch.Tensor":
        # In float64, so that the only rounding is that to the tensor's dtype.
        folded = tensor.double()
        if divide is not None:
            rows = divide.double()
            folded = folded / (rows[:, None] if folded.ndim == 2 else rows)
        if multiply is not None:
            folded = folded * multiply.double()
        return folded.to(tensor.dtype)

    return fold


def write_scales(path: Path, scales: Scales) -> None:
    """Write a scales file; the same scales give the same bytes."""
    from safetensors.torch import save_file

    ordered = {name: scales[name].contiguous() for name in sorted(scales)}
    save_file(ordered, path, metadata={"format": "ggufkit-scales-1"})


def read_scales(path: Path) -> dict[str, "torch.Tensor"]:
    """Read a scales file.

    Raises:
        IntegrityError: if it is not one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != "ggufkit-scales-1":
                raise IntegrityError(f"{path} is not a scales file of ggufkit")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read as scales: {error}") from error
