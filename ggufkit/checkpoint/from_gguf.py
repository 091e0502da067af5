"""A Hugging Face checkpoint out of a GGUF.

For architectures and tokenizers that are written down here, because two things
cannot be read off a GGUF:

* the converter stores the rows of a Llama's q and k permuted from Hugging Face's
  split halves of each head to llama.cpp's interleaved pairs
  (``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``); here the rows
  go back;
* a byte-level BPE tokenizer splits a text before it merges, and a GGUF holds
  only the name of how. transformers would make a SentencePiece-like tokenizer
  out of some of them, and the model would read and write nonsense;
  ``tokenizer.json`` is therefore built from tokens, merges and that name.

A further architecture is one row in ``_ARCHITECTURES``, a further tokenizer one
in ``_TOKENIZERS``.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit.checkpoint.index import SHARD_INDEX
from ggufkit.checkpoint.write import safetensors_header
from ggufkit.errors import IntegrityError
from ggufkit.progress import SILENT, Progress
from ggufkit.values import Json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""``LLAMA_TOKEN_TYPE_...`` of llama.h."""

_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_ELEMENTS = 1 << 23
"""So many weights are dequantized at a time, if rows need not change places."""

_OUTSIDE_BLOCKS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_BLOCKS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Architecture:
    """What a GGUF of an architecture does not say about its checkpoint.

    Attributes:
        class_name: as in ``architectures`` of the config.
        config: keys of ``config.json`` that follow from the architecture alone.
        biases: parts of a block that have a bias.
        permuted: parts whose rows the converter reorders, and the metadata key
            that says how many heads they have.
    """

    class_name: str
    config: dict[str, Json]
    biases: frozenset[str] = frozenset()
    permuted: dict[str, str] = field(default_factory=dict)


_ARCHITECTURES = {
    "llama": _Architecture(
        "LlamaForCausalLM",
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.041666666666666664,
        },
        permuted={"attn_q": "head_count", "attn_k": "head_count_kv"},
    ),
    "qwen2": _Architecture(
        "Qwen2ForCausalLM",
        {"hidden_act": "silu", "use_sliding_window": False, "initializer_range": 0.02},
        biases=frozenset({"attn_q", "attn_k", "attn_v"}),
    ),
}


def rebuild(
    gguf: Path,
    out_dir: Path,
    *,
    dtype: str = "F32",
    shard_nbytes: int | None = None,
    progress: Progress = SILENT,
) -> None:
    """Turn a GGUF back into a checkpoint: config, tokenizer and weights.

    Args:
        gguf: of an architecture and a pre-tokenizer that are known here.
        out_dir: an existing directory; gets the files.
        dtype: what the weights are stored in: F32, F16 or BF16.
        shard_nbytes: how large a file of weights may become; None for one file.
        progress: who to tell.

    Raises:
        IntegrityError: the GGUF is of another kind, has a tensor nobody expects,
            or a weight is not finite in ``dtype``.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    kind = (_value(reader, "general.architecture"), _value(reader, "tokenizer.ggml.pre"))
    if kind[0] not in _ARCHITECTURES or kind[1] not in _TOKENIZERS:
        known = f"{', '.join(_ARCHITECTURES)} with {', '.join(_TOKENIZERS)}"
        raise IntegrityError(f"{gguf} is {kind[0]} with pre-tokenizer {kind[1]}; known are {known}")
    _write_json(out_dir / "config.json", _config(reader, dtype))
    write_tokenizer(reader, out_dir)
    ids = {f"{n}_token_id": i for n in ("bos", "eos", "pad") if (i := _token_id(reader, n)) >= 0}
    _write_json(out_dir / "generation_config.json", ids)
    _write_weights(reader, out_dir, dtype, shard_nbytes, progress)


def _value(reader: "GGUFReader", key: str) -> Any:
    found = reader.get_field(key)
    if found is None:
        raise IntegrityError(f"The GGUF has no {key}")
    return found.contents()


def _hyperparameter(reader: "GGUFReader", key: str) -> Any:
    return _value(reader, f"{_value(reader, 'general.architecture')}.{key}")


def _token_id(reader: "GGUFReader", name: str) -> int:
    """The id of a special token; -1 if the GGUF names none."""
    spelled = {"pad": "padding", "unk": "unknown"}.get(name, name)
    found = reader.get_field(f"tokenizer.ggml.{spelled}_token_id")
    return -1 if found is None else int(found.contents())


def _float(value: float) -> float:
    """The shortest decimal that is the same float32, as a person wrote it."""
    import numpy as np

    return float(str(np.float32(value)))


def _config(reader: "GGUFReader", dtype: str) -> dict[str, Json]:
    name = str(_value(reader, "general.architecture"))
    architecture = _ARCHITECTURES[name]
    ids = {f"{n}_token_id": _token_id(reader, n) for n in ("bos", "eos", "pad")}
    return {
        "architectures": [architecture.class_name],
        "model_type": name,
        "hidden_size": int(_hyperparameter(reader, "embedding_length")),
        "intermediate_size": int(_hyperparameter(reader, "feed_forward_length")),
        "num_hidden_layers": int(_hyperparameter(reader, "block_count")),
        "num_attention_heads": int(_hyperparameter(reader, "attention.head_count")),
        "num_key_value_heads": int(_hyperparameter(reader, "attention.head_count_kv")),
        "max_position_embeddings": int(_hyperparameter(reader, "context_length")),
        "rope_theta": _float(_hyperparameter(reader, "rope.freq_base")),
        "rms_norm_eps": _float(_hyperparameter(reader, "attention.layer_norm_rms_epsilon")),
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        **{key: id for key, id in ids.items() if id >= 0},
        "torch_dtype": _TORCH_DTYPES[dtype],
        "use_cache": True,
        **architecture.config,
    }


# The tokenizer.


@dataclass(frozen=True)
class _Tokenizer:
    """How texts are split before byte-level BPE merges, by the GGUF's name of it.

    Attributes:
        class_name: transformers' class that keeps to ``tokenizer.json``.
        split: sets normalizer, pre-tokenizer and post-processor.
    """

    class_name: str
    split: Callable[[Any], None]


def _split_smollm(tokenizer: Any) -> None:
    """SmolLM2: digits one by one, then GPT-2's pattern."""
    from tokenizers import pre_tokenizers as pre

    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )


QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits; llama.cpp's ``LLAMA_VOCAB_PRE_TYPE_QWEN2`` does the same."""


def _split_qwen2(tokenizer: Any) -> None:
    """Qwen2: NFC, then its own pattern, which takes digits one by one."""
    from tokenizers import Regex, normalizers, processors
    from tokenizers import pre_tokenizers as pre

    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False)


_TOKENIZERS = {
    # Not GPT2TokenizerFast: transformers 5 builds that anew from tokens and
    # merges, without the step that splits digits.
    "smollm": _Tokenizer("PreTrainedTokenizerFast", _split_smollm),
    "qwen2": _Tokenizer("Qwen2Tokenizer", _split_qwen2),
}


def write_tokenizer(reader: "GGUFReader", out_dir: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

    Raises:
        IntegrityError: the pre-tokenizer is not known here, or a token would
            get another id than it has in the GGUF.
    """
    pre = _value(reader, "tokenizer.ggml.pre")
    if pre not in _TOKENIZERS:
        raise IntegrityError(f"The pre-tokenizer {pre} is not one of {', '.join(_TOKENIZERS)}")
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in _value(reader, "tokenizer.ggml.merges")]
    # Control tokens are left out of what a model says; user-defined ones are not.
    special = {
        id: kind == _CONTROL for id, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)
    }
    _byte_level_bpe(tokens, types, merges, special, _TOKENIZERS[pre].split).save(
        str(out_dir / "tokenizer.json")
    )
    ids = {n: _token_id(reader, n) for n in ("bos", "eos", "unk", "pad")}
    named = {f"{n}_token": tokens[id] for n, id in ids.items() if id >= 0}
    additional = [tokens[i] for i, s in special.items() if s and tokens[i] not in named.values()]
    _write_json(
        out_dir / "special_tokens_map.json", named | {"additional_special_tokens": additional}
    )
    add_bos = reader.get_field("tokenizer.ggml.add_bos_token")
    template = reader.get_field("tokenizer.chat_template")
    _write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": _TOKENIZERS[pre].class_name,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(_hyperparameter(reader, "context_length")),
            **({} if add_bos is None else {"add_bos_token": bool(add_bos.contents())}),
            **({} if template is None else {"chat_template": template.contents()}),
            "added_tokens_decoder": {
                str(id): {
                    "content": tokens[id], "lstrip": False, "normalized": False,
                    "rstrip": False, "single_word": False, "special": is_special,
                }
                for id, is_special in special.items()
            },
            **named,
        },
    )  # fmt: skip


def _byte_level_bpe(
    tokens: list[str],
    types: list[int],
    merges: list[Any],
    special: dict[int, bool],
    split: Callable[[Any], None],
) -> Any:
    """The tokenizer; tokens that only fill the vocabulary up are left out.

    Those after the last normal token are not part of the BPE model, as in the
    ``tokenizer.json`` that models are published with.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    count = 1 + max(id for id, kind in enumerate(types) if kind == _NORMAL)
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens[:count])}, merges))
    split(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    for id, is_special in special.items():
        added = AddedToken(tokens[id], special=is_special, normalized=False)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
    wrong = [t for id, t in enumerate(tokens[:count]) if tokenizer.token_to_id(t) != id]
    wrong += [tokens[id] for id in special if tokenizer.token_to_id(tokens[id]) != id]
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} token(s) would get another id, the first is {wrong[0]!r}"
        )
    return tokenizer


# The weights.


@dataclass(frozen=True)
class _Row:
    """A tensor of the checkpoint that is to be written."""

    source: "ReaderTensor"
    name: str
    shape: tuple[int, ...]
    nbytes: int
    heads: int
    """Rows of so many heads go back to two halves; 0 where rows stay."""


def _write_weights(
    reader: "GGUFReader", out_dir: Path, dtype: str, shard_nbytes: int | None, progress: Progress
) -> None:
    rows = [_row(reader, tensor, dtype) for tensor in reader.tensors]
    shards = _shards(rows, shard_nbytes or sum(row.nbytes for row in rows))
    names = ["model.safetensors"]
    if shard_nbytes:
        count = len(shards)
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        weight_map = {r.name: n for n, shard in zip(names, shards, strict=True) for r in shard}
        total = {"total_size": sum(row.nbytes for row in rows)}
        _write_json(out_dir / SHARD_INDEX, {"metadata": total, "weight_map": weight_map})
    done = 0
    with progress.task("dequantize", sum(row.nbytes for row in rows), "bytes") as task:
        for name, shard in zip(names, shards, strict=True):
            with (out_dir / name).open("wb") as out:
                header = ((r.name, dtype, r.shape, r.nbytes) for r in shard)
                out.write(safetensors_header(header, {"format": "pt"}))
                for row in shard:
                    for part in _parts(row, dtype):
                        out.write(part)
                    done += row.nbytes
                    task.update(done, row.name)


def _row(reader: "GGUFReader", tensor: "ReaderTensor", dtype: str) -> _Row:
    name = str(_value(reader, "general.architecture"))
    permuted = _ARCHITECTURES[name].permuted.get(tensor.name.split(".")[-2])
    heads = int(_hyperparameter(reader, f"attention.{permuted}")) if permuted else 0
    shape = tuple(int(n) for n in reversed(tensor.shape))
    nbytes = math.prod(shape) * (4 if dtype == "F32" else 2)
    return _Row(tensor, _checkpoint_name(tensor.name, _ARCHITECTURES[name]), shape, nbytes, heads)


def _checkpoint_name(name: str, architecture: _Architecture) -> str:
    """``blk.3.attn_q.weight`` to ``model.layers.3.self_attn.q_proj.weight``."""
    *block, part, kind = name.split(".")
    known = _IN_BLOCKS if block else _OUTSIDE_BLOCKS
    if part not in known or not (kind == "weight" or (kind, part) in _biases(architecture)):
        raise IntegrityError(
            f"The GGUF has a tensor that a {architecture.class_name} does not have: {name}"
        )
    return ".".join([*(["model", "layers", block[1]] if block else []), known[part], kind])


def _biases(architecture: _Architecture) -> set[tuple[str, str]]:
    return {("bias", part) for part in architecture.biases}


def _shards(rows: list[_Row], limit: int) -> list[list[_Row]]:
    """Rows in order, each list as long as its bytes stay below the limit."""
    shards: list[list[_Row]] = [[]]
    room = limit
    for row in rows:
        if shards[-1] and row.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(row)
        room -= row.nbytes
    return shards


def _parts(row: _Row, dtype: str) -> Iterable[memoryview]:
    """A tensor's bytes, some rows at a time: a large embedding is gigabytes as floats."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    source = row.source
    count = (
        1 if row.heads or len(row.shape) < 2 else math.ceil(math.prod(row.shape) / _BLOCK_ELEMENTS)
    )
    for data in np.array_split(source.data, count) if count > 1 else [source.data]:
        weights = dequantize(data, source.tensor_type)
        if row.heads:
            weights = _split_halves(weights.reshape(row.shape), row.heads)
        # Too large for F16 is found below, by name; numpy need not say it as well.
        with np.errstate(over="ignore"):
            stored = quantize(np.ascontiguousarray(weights), GGMLQuantizationType[dtype])
            back = dequantize(stored, GGMLQuantizationType[dtype])
        if not np.isfinite(back).all():
            raise IntegrityError(f"{source.name} has values that are not finite in {dtype}")
        yield np.ascontiguousarray(stored).data.cast("B")


def _split_halves(weights: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Rows of each head from interleaved pairs back to two halves.

    The converter takes (heads, 2, half, columns) to (heads, half, 2, columns);
    this is the inverse.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_json(path: Path, value: Json) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
