"""What is done to a checkpoint after transformers has written it.

Publishers write keys, names and layouts that transformers 5 reads and does not write.
"""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.architectures.row import Config, Step

WEIGHTS = "model.safetensors"


def keys(**values: Any) -> Step:
    """Set keys of the config."""
    return partial(_edit_config, part=None, values=values, removed=())


def text_keys(**values: Any) -> Step:
    """Set keys of the config of the part that writes."""
    return partial(_edit_config, part="text_config", values=values, removed=())


def without(*names: str) -> Step:
    """Remove keys of the config."""
    return partial(_edit_config, part=None, values={}, removed=names)


def architecture(name: str) -> Step:
    """Name another class than that which computes it."""
    return keys(architectures=[name])


def _edit_config(
    directory: Path, *, part: str | None, values: Config, removed: tuple[str, ...]
) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edited = config[part] if part else config
    edited |= values
    for name in removed:
        edited.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def rename(*pairs: tuple[str, str]) -> Step:
    """Give tensors other names: regular expressions and replacements, applied in order."""
    return partial(_rename, pairs=pairs)


def _rename(directory: Path, *, pairs: tuple[tuple[str, str], ...]) -> None:
    tensors = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    _save(directory, tensors)


def transposed(part: str) -> Step:
    """Turn matrices whose names have ``part`` in them."""
    return partial(_transpose, part=part)


def _transpose(directory: Path, *, part: str) -> None:
    tensors = load_file(directory / WEIGHTS)
    turned = {
        name: tensor.transpose(-1, -2).contiguous()
        for name, tensor in tensors.items()
        if part in name
    }
    _save(directory, tensors | turned)


def scaled(name: str, factor: float) -> Step:
    """Multiply a tensor, so that logits reach where a cap begins."""
    return partial(_scale, name=name, factor=factor)


def _scale(directory: Path, *, name: str, factor: float) -> None:
    tensors = load_file(directory / WEIGHTS)
    _save(directory, tensors | {name: factor * tensors[name]})


def mtp(block: int) -> Step:
    """Add a block for multi-token prediction, shaped as block number ``block``.

    Qwen's, which transformers neither loads nor writes.
    """
    return partial(_add_mtp, block=block)


def _add_mtp(directory: Path, *, block: int) -> None:
    tensors = load_file(directory / WEIGHTS)
    prefix = f"model.layers.{block}."
    norm = tensors["model.norm.weight"]
    shapes = {
        name.replace(prefix, "mtp.layers.0."): tensor.shape
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        shapes[f"mtp.{name}.weight"] = norm.shape
    shapes["mtp.fc.weight"] = torch.Size((len(norm), 2 * len(norm)))
    generator = torch.Generator().manual_seed(1)
    added = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        for name, shape in shapes.items()
    }
    _save(directory, tensors | added)


def _save(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
