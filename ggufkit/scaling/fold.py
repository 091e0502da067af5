"""Scales as a file, and their fold into a checkpoint.

``scales.safetensors`` holds one float32 vector per block and group, named
``<blocks>.<block>.<group>``, with one value per scaled output of the producer.
Folding divides the producer's outputs and multiplies the consumers' columns, so
the function of the model in real numbers is unchanged.

Where clipping was asked for, ``<tensor>:clip`` holds the largest magnitude that
each row of the folded tensor may have; that does change the function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.checkpoint.tensors import torch_dtypes
from ggufkit.errors import IntegrityError
from ggufkit.foreign import writing
from ggufkit.scaling.families import Family
from ggufkit.scaling.groups import BlockGroup, all_groups

if TYPE_CHECKING:
    import torch

CLIP = ":clip"
"""Ends the names of limits on weights, which stand beside the scales."""

Scales = Mapping[str, "torch.Tensor"]
_HINT = "Give the scales of this very checkpoint, or leave out --scales to search for some"


@dataclass
class Change:
    """What happens to one tensor: its outputs divided, its inputs multiplied.

    Attributes:
        dtype: what the result is stored in, by safetensors' name.
        divide: one value per output, or None.
        multiply: one value per input, or None.
        transposed: whether the tensor is (inputs, outputs).
        offset: what the model adds to it before use.
        limit: largest magnitude of each row of the result, or None.
    """

    dtype: str
    divide: "torch.Tensor | None" = None
    multiply: "torch.Tensor | None" = None
    transposed: bool = False
    offset: float = 0.0
    limit: "torch.Tensor | None" = None

    def __call__(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The tensor with its scales folded in, in ``dtype``."""
        # In float64, so that the only rounding is that to the tensor's dtype.
        folded = tensor.double() + self.offset
        if self.divide is not None:
            across = folded.ndim == 2 and not self.transposed
            folded = folded / (self.divide[:, None] if across else self.divide)
        if self.multiply is not None:
            folded = folded * (self.multiply[:, None] if self.transposed else self.multiply)
        if self.limit is not None:
            limit = self.limit if self.transposed else self.limit[:, None]
            folded = folded.clamp(-limit, limit)
        return (folded - self.offset).to(torch_dtypes()[self.dtype])


def changes_of(
    index: CheckpointIndex, family: Family, scales: Scales, dtype: str | None = None
) -> dict[str, Change]:
    """What the fold does to each tensor, by tensor name.

    Tensors that no scale touches, or only ones, are left out: their bytes stay.

    Args:
        index: the checkpoint.
        family: its family.
        scales: what to fold in.
        dtype: store changed tensors in this, such as ``F32``; None for their own.

    Raises:
        IntegrityError: if the scales do not belong to this checkpoint.
    """
    groups = all_groups(index, family)
    limits = {n.removesuffix(CLIP): s for n, s in scales.items() if n.endswith(CLIP)}
    if {g.name for g in groups} != {n for n in scales if not n.endswith(CLIP)}:
        raise IntegrityError(
            "the scales are not for this checkpoint: other blocks or groups", _HINT
        )
    changes: dict[str, Change] = {}
    for group in groups:
        scale = scales[group.name].double()
        _check(group, scale)
        if not bool((scale == 1).all()):
            _add(changes, index, family, group, scale)
    for name, limit in limits.items():
        if name not in index.tensors:
            raise IntegrityError(f"the scales are not for this checkpoint: it has no {name}", _HINT)
        change = changes.setdefault(name, Change(index.tensors[name].dtype))
        change.transposed = family.transposed
        change.limit = limit.double()
    for change in changes.values():
        # A norm that is kept as w - 1 loses digits when 1 + w is divided.
        change.dtype = dtype or ("F32" if change.offset else change.dtype)
    return changes


def _add(
    changes: dict[str, Change],
    index: CheckpointIndex,
    family: Family,
    group: BlockGroup,
    scale: "torch.Tensor",
) -> None:
    import torch

    for name in (f"{group.producer}.weight", f"{group.producer}.bias"):
        if name not in index.tensors:
            continue
        is_norm = len(index.tensors[f"{group.producer}.weight"].shape) == 1
        change = changes.setdefault(name, Change(index.tensors[name].dtype))
        change.transposed = family.transposed and len(index.tensors[name].shape) == 2
        change.offset = family.norm_offset if is_norm else 0.0
        if change.divide is None:
            change.divide = torch.ones(group.outputs, dtype=torch.float64)
        change.divide[slice(None) if group.rows is None else group.rows] *= scale
    for name in group.consumers:
        change = changes.setdefault(name, Change(index.tensors[name].dtype))
        change.transposed = family.transposed
        change.multiply = group.to_inputs(scale)


def _check(group: BlockGroup, scale: "torch.Tensor") -> None:
    if scale.shape != (group.width,):
        raise IntegrityError(
            f"the scales are not for this checkpoint: {group.name} has {group.width} scales, "
            f"the file {scale.shape[0] if scale.ndim else 1}",
            _HINT,
        )
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise IntegrityError(f"the scales of {group.name} are not all positive numbers", _HINT)


def powers_of_two(scales: Scales) -> "dict[str, torch.Tensor]":
    """The nearest powers of two, which fold into 16-bit floats without rounding."""
    return {
        name: scale if name.endswith(CLIP) else scale.log2().round().exp2()
        for name, scale in scales.items()
    }


def write_scales(path: Path, scales: Scales) -> None:
    """Write a scales file; the same scales give the same bytes."""
    from safetensors.torch import save_file

    ordered = {name: scales[name].contiguous() for name in sorted(scales)}
    with writing(path):
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
