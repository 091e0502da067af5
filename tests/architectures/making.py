"""From a row to a checkpoint.

transformers writes it (``save_pretrained``), so names and layouts are those of a
checkpoint that somebody has trained with it; the row's steps then make it a published
one. Every parameter is drawn anew, so that one which gets lost shows.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from tests import factory
from tests.architectures.recipes import RECIPES
from tests.architectures.recipes.shared import VOCAB
from tests.architectures.row import Config, Row
from tests.architectures.vocabularies import SENTENCEPIECE

COMMON: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Given to every config class that knows the key."""

VISION: Config = {
    "hidden_size": 64,
    "embed_dim": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "out_hidden_size": 128,
}
"""The same for the part that sees."""

_STATE_SPACE = ("A_log", "D", "dt_bias", "conv_bias")


def make(name: str, directory: Path, tokenizers: Path) -> Path:
    """Write the checkpoint of a recipe.

    Args:
        name: a row of ``RECIPES``.
        directory: where to; made if missing.
        tokenizers: a directory with one of each kind (``vocabularies.write``).

    Returns:
        ``directory``.
    """
    row = RECIPES[name]
    if row.factory:
        _from_factory(row, directory, tokenizers)
    else:
        model_of(row).save_pretrained(directory)
        special = {key: COMMON[key] for key in ("bos_token_id", "eos_token_id")}
        (directory / "generation_config.json").write_text(json.dumps(special))
        shutil.copytree(tokenizers / row.tokenizer, directory, dirs_exist_ok=True)
    for step in row.steps:
        step(directory)
    return directory


def _from_factory(row: Row, directory: Path, tokenizers: Path) -> None:
    sizes = {
        "hidden": COMMON["hidden_size"],
        "intermediate": COMMON["intermediate_size"],
        "vocab": VOCAB,
        "tokenizer": None if row.tokenizer in SENTENCEPIECE else tokenizers / row.tokenizer,
    }
    factory.make_checkpoint(directory, row.factory, **sizes | row.config)


def model_of(row: Row, seed: int = 0) -> Any:
    """The model of a row in float32, every parameter drawn."""
    import transformers

    torch.manual_seed(seed)
    cls = getattr(transformers, row.class_name)
    model = cls._from_config(
        _config_of(cls, row), attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, generator)
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def _config_of(cls: Any, row: Row) -> Any:
    from transformers import AutoConfig

    config_class = cls.config_class
    if row.parts is None:
        return config_class(**_known(config_class, COMMON, row.config))
    whole = config_class()

    def class_of(part: str, config: Config) -> Any:
        model_type = config.get("model_type")
        own = AutoConfig.for_model(model_type) if model_type else getattr(whole, part)
        return type(own)

    parts = {"text_config": (COMMON, row.config)}
    parts |= {part: (VISION, config) for part, config in row.parts.items()}
    configs = {}
    for part, (common, config) in parts.items():
        own = {key: value for key, value in config.items() if key != "model_type"}
        part_class = class_of(part, config)
        configs[part] = part_class(**_known(part_class, common, own))
    # Tokens for images stand somewhere behind the vocabulary's end by default.
    tokens = [key for key in whole.to_dict() if key.endswith(("token_id", "token_index"))]
    ids = {key: 8 + number for number, key in enumerate(tokens)}
    return config_class(**configs, **ids | row.top)


def _known(cls: Any, common: Config, own: Config) -> Config:
    """``own``, and what is common and not said in other words by it."""
    other_names = getattr(cls, "attribute_map", {})
    known = cls().to_dict().keys() | other_names.keys()
    said = {other_names.get(key, key) for key in own} | own.keys()
    given = {
        key: value
        for key, value in common.items()
        if key in known and other_names.get(key, key) not in said and key not in said
    }
    return given | own


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Move vectors around where the class lets them start; draw matrices by their inputs."""
    numbers = torch.randn(parameter.shape, generator=generator)
    *modules, last = name.split(".")
    module = modules[-1] if last == "weight" else last
    if parameter.ndim < 2 or last in _STATE_SPACE or "norm" in module:
        parameter.add_((0.3 if "norm" in name or "ln" in name else 0.1) * numbers)
        return
    inputs = parameter[0].numel() if "conv" in name else parameter.shape[-1]
    parameter.copy_(numbers / math.sqrt(inputs))
