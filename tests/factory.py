"""Seeded tiny checkpoints for tests, whole and broken.

They are real: transformers loads them, the converter accepts them unmodified,
and llama.cpp runs what comes out. The tokenizer is a SentencePiece model
trained on the spot, because the converter knows byte-level BPE only by a hash
over a published vocabulary, while it takes any ``tokenizer.model``.

A further architecture is one row in ``ARCHITECTURES``.
"""

import functools
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Architecture:
    """What tells one architecture's checkpoints from another's."""

    class_name: str
    model_type: str
    qkv_bias: bool = False
    config: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", config={"mlp_bias": False}),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
}


def make_checkpoint(
    directory: Path,
    arch: str = "llama",
    *,
    layers: int = 2,
    hidden: int = 256,
    intermediate: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    seed: int = 0,
    tied: bool = True,
    dtype: str = "float32",
    bias: bool = False,
    shards: int = 1,
) -> Path:
    """Write a checkpoint; ``hidden`` of 256 suits K-quants, of 192 does not.

    Args:
        directory: where to; made if missing.
        arch: a row of ``ARCHITECTURES``.
        layers: number of blocks.
        hidden: width of the residual stream, divisible by ``heads``.
        intermediate: width of the MLP.
        heads: query heads.
        kv_heads: key/value heads.
        vocab: size of the vocabulary, at least 300.
        seed: of the weights.
        tied: whether the embedding serves as output matrix.
        dtype: torch's name of the weights' dtype.
        bias: biases in all attention maps (Llama only; Qwen2 has its own).
        shards: number of safetensors files.

    Returns:
        ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    row = ARCHITECTURES[arch]
    config: dict[str, Any] = {
        "architectures": [row.class_name],
        "model_type": row.model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        **({"attention_bias": bias} if arch == "llama" else {}),
        **row.config,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_tokenizer(directory, vocab)
    (directory / "LICENSE").write_text("Do with these random numbers what you like.\n")
    tensors = _tensors(config, qkv_bias=row.qkv_bias or bias, output_bias=bias, seed=seed)
    _write_weights(directory, tensors, getattr(torch, dtype), shards)
    return directory


def _tensors(
    config: dict[str, Any], *, qkv_bias: bool, output_bias: bool, seed: int
) -> dict[str, torch.Tensor]:
    """Random weights; norms have a few large channels, so that scaling has something to do."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def norm() -> torch.Tensor:
        return torch.exp(0.7 * torch.randn(hidden, generator=generator))

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if qkv_bias:
                values = 0.1 * torch.randn(rows, generator=generator)
                tensors[f"{at}self_attn.{name}_proj.bias"] = values
        tensors[f"{at}self_attn.o_proj.weight"] = matrix(hidden, queries)
        if output_bias:
            values = 0.1 * torch.randn(hidden, generator=generator)
            tensors[f"{at}self_attn.o_proj.bias"] = values
        tensors[f"{at}mlp.gate_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{at}mlp.up_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = matrix(hidden, intermediate)
        tensors[f"{at}input_layernorm.weight"] = norm()
        tensors[f"{at}post_attention_layernorm.weight"] = norm()
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def _write_weights(
    directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, shards: int
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    size = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_tokenizer(directory: Path, vocab: int) -> None:
    model = _sentencepiece_model(vocab)
    (directory / "tokenizer.model").write_bytes(model)
    (directory / "tokenizer.json").write_text(_tokenizer_json(model), encoding="utf-8")
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


@functools.cache
def _sentencepiece_model(vocab: int) -> bytes:
    """A BPE model with byte fallback, trained on Python's own documentation."""
    from pydoc_data.topics import topics

    import sentencepiece

    lines = "\n".join(topics[name] for name in sorted(topics))[:60_000].splitlines()
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        control_symbols=CONTROL,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


@functools.cache
def _tokenizer_json(model: bytes) -> str:
    """The same tokenizer for transformers, which would guess its class by architecture."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [
        (piece[:i], piece[i:])
        for piece in vocab  # in the order in which training merged them
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab and piece not in CONTROL
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    control = ["<unk>", "<s>", "</s>", *CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer.to_str()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --- broken ones --------------------------------------------------------------


def edit_config(directory: Path, **changes: Any) -> None:
    """Set keys of ``config.json``; ``None`` removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    _write_json(path, {k: v for k, v in config.items() if v is not None})


def break_missing_shard(directory: Path) -> None:
    """Take away the last shard that the index names (splits a single file first)."""
    if (single := directory / "model.safetensors").exists():
        tensors = load_file(single)
        single.unlink()
        _write_weights(directory, tensors, next(iter(tensors.values())).dtype, 2)
    sorted(directory.glob("model-*.safetensors"))[-1].unlink()


def break_truncated(directory: Path) -> None:
    """Cut the last kilobyte off the last shard."""
    path = sorted(directory.glob("*.safetensors"))[-1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1024)


def break_pickle_only(directory: Path) -> None:
    """Turn the weights into a pickle."""
    path = directory / "model.safetensors"
    torch.save(load_file(path), directory / "pytorch_model.bin")
    path.unlink()


def break_auto_map(directory: Path) -> None:
    """Let the config ask for code, and put some there that must not run."""
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"})
    (directory / "modeling_evil.py").write_text("raise SystemExit('this code has run')\n")


def break_no_config(directory: Path) -> None:
    """Take away ``config.json``."""
    (directory / "config.json").unlink()


def break_no_tokenizer(directory: Path) -> None:
    """Take away the tokenizer."""
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def break_wrong_tokenizer(directory: Path) -> None:
    """Put in a tokenizer of another model, with more tokens than there are embeddings."""
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    _write_tokenizer(directory, vocab + 64)


def break_nan(directory: Path) -> None:
    """Put a NaN into one weight."""
    path = sorted(directory.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][0, 0] = math.nan
    save_file(tensors, path, {"format": "pt"})


def break_quantized(directory: Path) -> None:
    """Mark it as quantized already."""
    edit_config(directory, quantization_config={"quant_method": "awq", "bits": 4})


def break_architecture(directory: Path) -> None:
    """Name an architecture that nobody knows."""
    edit_config(directory, architectures=["NobodyForCausalLM"], model_type="nobody")


BREAKERS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("break_"): function
    for name, function in list(globals().items())
    if name.startswith("break_")
}
