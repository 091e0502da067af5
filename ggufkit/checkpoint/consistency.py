"""Do config and tensors belong together? Asked before any work.

A tensor of another shape than the config says makes a GGUF that llama.cpp
cannot load, or one that computes nonsense.
"""

import re
from collections.abc import Mapping
from typing import Any

from ggufkit.checkpoint.config import text_config, whole_number
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.checkpoint.tokenizer import EMBEDDINGS
from ggufkit.errors import CheckpointError

_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
_LAYER = re.compile(r"(.*?\b(?:layers|h|blocks))\.(\d+)\.")
_TEXT_LAYERS = frozenset(
    (
        *("model.layers", "layers", "transformer.h", "h", "gpt_neox.layers", "backbone.layers"),
        *("transformer.blocks", "model.language_model.layers", "language_model.model.layers"),
        *("model.text_model.layers", "language_model.layers"),
    )
)
_DENSE = frozenset(
    (
        *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GraniteForCausalLM"),
        *("SmolLM3ForCausalLM", "Olmo2ForCausalLM"),
    )
)
"""Models whose every layer has these maps, of the shapes that the config says."""
_OWN_HEAD_DIM = frozenset(
    ("Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
)
"""Those among them whose heads have another width than their share if the config is silent."""
_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_MTP = re.compile(r"(^|\.)(mtp|nextn|mtp_layers|mtp_block)\.|\.(eh_proj|enorm|hnorm)\.")


def check_tensors(index: CheckpointIndex) -> None:
    """Compare names and shapes of tensors with what the config says of them.

    Raises:
        CheckpointError: they differ; names tensor, shape and key of the config.
    """
    if index.pickles:
        return
    config = text_config(index.config)
    _check_vocabulary(index, config)
    _check_layers(index, config)
    _check_experts(index, config)
    if index.architectures[0] in _DENSE and config.get("num_hidden_layers") is not None:
        _check_maps(index, config)


def predicts_further(index: CheckpointIndex) -> bool:
    """Whether the files hold layers for multi-token prediction."""
    if any(_MTP.search(name) for name in index.tensors):
        return True
    layers = whole_number(text_config(index.config), "num_hidden_layers")
    return layers is not None and any(n >= layers for n in _layer_numbers(index)[1])


def names_further_layers(index: CheckpointIndex) -> int:
    """How many layers for multi-token prediction the config names."""
    config = text_config(index.config)
    return max(whole_number(config, key) or 0 for key in _MTP_KEYS)


def _layer_numbers(index: CheckpointIndex) -> tuple[str, set[int]]:
    """Where the layers of the text model are, and which there are."""
    found: dict[str, set[int]] = {}
    for name in index.tensors:
        if (match := _LAYER.match(name)) and match[1] in _TEXT_LAYERS:
            found.setdefault(match[1], set()).add(int(match[2]))
    return next(iter(found.items())) if len(found) == 1 else ("", set())


def _differ(name: str, shape: tuple[int, ...], says: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} has the shape {list(shape)}, but {says}",
        "Config and weights do not belong together: fetch the checkpoint again, "
        "or save it again with the config of its weights",
    )


def _check_vocabulary(index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    size = whole_number(config, "vocab_size")
    text = [
        (name, entry.shape)
        for name, entry in index.tensors.items()
        if len(entry.shape) == 2 and _is_of_text(name)
    ]
    embeddings = [(n, s) for n, s in text if n.endswith(EMBEDDINGS)]
    for name, shape in embeddings if size else ():
        if shape[0] != size:
            raise _differ(name, shape, f"vocab_size is {size}")
    width = whole_number(config, "hidden_size", "n_embd", "d_model")
    for name, shape in embeddings if width else ():
        if shape[1] != width and not config.get("word_embed_proj_dim"):
            raise _differ(name, shape, f"hidden_size is {width}")
    for name, shape in text:
        if name.endswith(_HEADS) and embeddings and shape != embeddings[0][1]:
            other, wanted = embeddings[0]
            raise _differ(name, shape, f"{other} has {list(wanted)} (vocab_size is {size})")


def _is_of_text(name: str) -> bool:
    """Whether a matrix is that of the text model; others have embeddings as well."""
    parts = name.split(".")
    leading = {"model", "language_model", "transformer", "lm_head", "text_model", "backbone"}
    return all(part in leading for part in parts[:-2]) and not name.startswith("model.lm_head")


def _check_layers(index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    count = whole_number(config, "num_hidden_layers", "n_layer", "n_layers")
    path, numbers = _layer_numbers(index)
    if count is None or not numbers:
        return
    if missing := sorted(set(range(count)) - numbers):
        raise CheckpointError(
            f"the checkpoint has no tensors of {path}.{missing[0]}, "
            f"but num_hidden_layers is {count} ({len(missing)} layers are missing)",
            "Fetch the missing files, or the checkpoint again",
        )
    further = names_further_layers(index)
    surplus = sorted(n for n in numbers if n >= count + further)
    # Layers for multi-token prediction come after the others, told by what only they have.
    own = {m[2] for n in index.tensors if _MTP.search(n) and (m := _LAYER.match(n))}
    if surplus and not {str(n) for n in surplus} & own:
        raise CheckpointError(
            f"the checkpoint has tensors of {path}.{surplus[0]}, but num_hidden_layers is {count}",
            "Config and weights do not belong together: fetch the checkpoint again, "
            "or correct num_hidden_layers",
        )


def _check_experts(index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    """Experts of Qwen3-VL that transformers saved the other way round than published ones."""
    if "Qwen3VLMoe" not in index.architectures[0]:
        return
    width = whole_number(config, "hidden_size")
    places = {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 2}
    for name, entry in index.tensors.items():
        place = next((at for end, at in places.items() if name.endswith(end)), None)
        if width and place and len(entry.shape) == 3 and entry.shape[place] != width:
            raise CheckpointError(
                f"tensor {name} has the shape {list(entry.shape)}: its experts are transposed "
                f"(published ones have hidden_size, {width}, as dimension {place + 1})",
                "transformers 5 saves them so, and llama.cpp's converter cannot read that: "
                "take the published files, or turn the last two dimensions",
            )


def _check_maps(index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    maps = _dense_maps(index.architectures[0], config)
    wanted = {
        f"model.layers.{number}.{part}.weight": told
        for number in range(whole_number(config, "num_hidden_layers") or 0)
        for part, told in maps.items()
    }
    width = whole_number(config, "hidden_size")
    wanted["model.norm.weight"] = ((width,) if width else (), "hidden_size")
    wanted["model.embed_tokens.weight"] = ((), "")
    if config.get("tie_word_embeddings") is False:
        wanted["lm_head.weight"] = ((), "")
    for name, (shape, says) in wanted.items():
        entry = index.tensors.get(name)
        if entry is None:
            raise CheckpointError(
                f"the checkpoint has no tensor {name}, which {index.architectures[0]} needs",
                "Fetch the missing files, or the checkpoint again",
            )
        if shape and entry.shape != shape:
            raise _differ(name, entry.shape, f"{says} ask for {list(shape)}")


def _dense_maps(
    architecture: str, config: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Maps of each layer: shape (empty where the config does not say), and the keys."""
    width = whole_number(config, "hidden_size")
    heads = whole_number(config, "num_attention_heads")
    inner = whole_number(config, "intermediate_size")
    pairs = whole_number(config, "num_key_value_heads")
    head = whole_number(config, "head_dim")
    if not head and width and heads and architecture not in _OWN_HEAD_DIM:
        head = width // heads

    def shape(rows: int | None, columns: int | None) -> tuple[int, ...]:
        return (rows, columns) if rows and columns else ()

    queries = heads * head if heads and head else None
    values = pairs * head if pairs and head else None
    of_queries, of_values = "num_attention_heads and head_dim", "num_key_value_heads and head_dim"
    sizes = "hidden_size and intermediate_size"
    norm = ((width,) if width else (), "hidden_size")
    # OLMo 2 norms what its maps give, and not what they get.
    norms = ["post_attention_layernorm"]
    norms += [] if architecture == "Olmo2ForCausalLM" else ["input_layernorm"]
    return {
        **dict.fromkeys(norms, norm),
        "self_attn.q_proj": (shape(queries, width), of_queries),
        "self_attn.k_proj": (shape(values, width), of_values),
        "self_attn.v_proj": (shape(values, width), of_values),
        "self_attn.o_proj": (shape(width, queries), of_queries),
        "mlp.gate_proj": (shape(inner, width), sizes),
        "mlp.up_proj": (shape(inner, width), sizes),
        "mlp.down_proj": (shape(width, inner), sizes),
    }
