"""What a checkpoint's ``config.json`` says about its text model."""

import re
from collections.abc import Mapping
from typing import Any

from ggufkit.errors import CheckpointError
from ggufkit.values import Json

TEXT_PARTS = ("text_config", "llm_config", "lm_config", "language_config")
"""Keys of the part about text, in the config of a model with several parts."""
_FETCH_CONFIG = "Fetch config.json again, or correct it"


def text_config(config: Mapping[str, Json]) -> dict[str, Any]:
    """A config with the part about text moved up to its top.

    Raises:
        CheckpointError: that part is not an object.
    """
    flat = dict(config)
    for name in TEXT_PARTS:
        part = config.get(name)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise CheckpointError(f"{name} of config.json is not an object", "Fetch it again")
        flat |= part
    return flat


def whole_number(config: Mapping[str, Json], *keys: str) -> int | None:
    """The first of some keys that the config has; None if it has none.

    Raises:
        CheckpointError: the value is no natural number.
    """
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(
                f"{key} of config.json is {value!r}, which is not a natural number",
                _FETCH_CONFIG,
            )
        return value
    return None


def required_size(config: Mapping[str, Json], *keys: str, default: int | None = None) -> int:
    """A size that is computed with: a natural number above 0.

    Args:
        config: content of ``config.json``.
        keys: what architectures call it; the first that is there counts.
        default: if none is there.

    Raises:
        CheckpointError: the value is no such number, or is needed and not there.
    """
    found = whole_number(config, *keys)
    size = default if found is None else found
    if size is None:
        raise CheckpointError(f"config.json does not say {' or '.join(keys)}", _FETCH_CONFIG)
    if size < 1:
        raise CheckpointError(f"{' or '.join(keys)} of config.json is {size}", _FETCH_CONFIG)
    return size


def token_ids(source: str, key: str, value: Json) -> list[int]:
    """Ids of tokens: none, one or a list.

    Args:
        source: file that the value is from.
        key: key that it has there.
        value: the value.

    Raises:
        CheckpointError: the value is something else.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int):
            raise CheckpointError(
                f"{key} of {source} is {value!r}; it must be a token's id or a list of ids",
                f"Correct {source}",
            )
    return values


_WITHOUT_EFFECT = re.compile(
    r".*_token_(id|ids|index)|.*dropout.*|.*_pdrop|.*initializer.*|.*_init_(std|range|scale)|"
    r".*aux_loss.*|output_.*|return_dict.*|_.*|.*_implementation|.*_version|(torch_)?dtype|"
    r"(mamba_)?chunk_size|use_.*kernels?|(id2label|label2id|num_labels|problem_type)"
)
"""Keys that say nothing about what a text model computes from tokens."""
_BOOKKEEPING = frozenset(
    (
        *("architectures", "model_type", "use_cache", "auto_map", "name_or_path", "is_decoder"),
        *("pretraining_tp", "gradient_checkpointing", "tie_word_embeddings", "unsloth_fixed"),
        *("vocab_size", "max_position_embeddings", "model_max_length", "max_length", "n_positions"),
        *("quantization_config", "compression_config", "is_encoder_decoder", "tokenizer_class"),
        *("task_specific_params", "add_cross_attention", "cross_attention_hidden_size"),
        *("output_router_logits", "router_jitter_noise", "torchscript", "prefix", "language"),
    )
)
_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
_COMPUTED_ROPE = frozenset(
    ("default", "linear", "yarn", "longrope", "su", "llama3", "proportional")
)
"""Kinds of RoPE that the converter does more with than read their name."""

_PLAIN: dict[str, tuple[Json, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "num_nextn_predict_layers": (0,),
    "use_sliding_window": (False,),
    "mtp_num_hidden_layers": (0,),
}
"""Values that ask for nothing, whatever a class has."""


def suspicious_keys(report: Mapping[str, Json], config: Mapping[str, Json]) -> dict[str, Json]:
    """Keys of a config that may be why a GGUF computes another function.

    These are keys that the converter never asked for, without those that change
    nothing and those whose value is what transformers' class takes anyway. A
    window is among them whatever its value: classes have one, llama.cpp may not.

    Args:
        report: what was read, as ``llamacpp/converter.py`` writes it.
        config: ``config.json``.
    """
    flat = text_config(config)
    defaults = report.get("class_defaults") or {}
    found: dict[str, Json] = {}
    for key, value in (report.get("unread") or {}).items():
        last = key.rpartition(".")[2]
        if key in _BOOKKEEPING or _WITHOUT_EFFECT.fullmatch(last):
            continue
        if value is not None and value in _PLAIN.get(last, ()):
            continue
        if key == "layer_types" and isinstance(value, list) and set(value) <= {"full_attention"}:
            continue
        if key in _WINDOWS:
            if value and flat.get("use_sliding_window") is not False:
                found[key] = value
        elif key in defaults:
            if value != defaults[key]:
                found[key] = value
        elif value is not None:
            found[key] = value
    for name in ("rope_parameters", "rope_scaling"):
        rope = flat.get(name)
        kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
        if kind and kind not in _COMPUTED_ROPE:
            found[f"{name}.rope_type"] = kind
    return found
