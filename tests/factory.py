"""Seeded tiny checkpoints for tests, whole and broken.

They are real: transformers loads them, the converter accepts them unmodified,
and llama.cpp runs what comes out. Names and shapes are those that transformers
itself would write for the architecture; the numbers are drawn here.

The tokenizer is a SentencePiece model trained on the spot, because the
converter knows byte-level BPE only by a hash over a published vocabulary, while
it takes any ``tokenizer.model``. For some architectures it looks for byte-level
BPE alone (``Architecture.byte_level``); to be converted, those need a published
tokenizer, such as the demo model's (``write_demo_tokenizer``).

A further architecture is one row in ``ARCHITECTURES``.
"""

import functools
import io
import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<|im_start|>", "<|im_end|>")
IMAGE_CONTROL = ("\n\n", "<fake_token_around_image>", "<global-img>")
"""What Idefics 3 wants around an image."""
REMOTE_CODE = Path(__file__).parent / "remote_code"
"""Models that transformers does not have; their checkpoints bring the code along."""

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What tells one architecture's checkpoints from another's.

    Attributes:
        class_name: as in ``architectures`` of the config.
        model_type: transformers' name of it.
        config: turns the common config into its own.
        tied: whether the embedding serves as output matrix unless asked otherwise.
        bias: key of the config that gives the attention maps biases, if there is one.
        norm_offset: what the model adds to a norm's weight.
        code: module in ``remote_code`` that the checkpoint brings along, if any.
        prefix_space: whether its tokenizer puts a space before a text.
        control: further control tokens, which llama.cpp takes for granted.
        byte_level: whether the converter takes nothing but byte-level BPE for it.
    """

    class_name: str
    model_type: str
    config: Callable[[Config], Config] = lambda c: c
    tied: bool = True
    bias: str | None = "attention_bias"
    norm_offset: float = 0.0
    code: str | None = None
    prefix_space: bool = True
    control: tuple[str, ...] = ()
    byte_level: bool = False


def _without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def _wide_heads(c: Config) -> Config:
    """Heads that together are wider than the residual stream."""
    return c | {"head_dim": 2 * c["hidden_size"] // c["num_attention_heads"]}


def _gemma(c: Config) -> Config:
    gelu = dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    return c | gelu | {"head_dim": head_dim, "pad_token_id": 0, "rms_norm_eps": 1e-6}


def _gemma2(c: Config) -> Config:
    c = _wide_heads(_gemma(c))
    return c | {
        "query_pre_attn_scalar": c["head_dim"],
        "sliding_window": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }


def _gemma3(c: Config) -> Config:
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
    return _without(_gemma2(c), *softcaps) | {
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    }


def _phi3(c: Config) -> Config:
    return c | {
        "pad_token_id": 0,
        "original_max_position_embeddings": c["max_position_embeddings"],
        "rope_scaling": None,
        "sliding_window": None,
    }


def _gpt2(c: Config) -> Config:
    shared = ("architectures", "model_type", "vocab_size", "tie_word_embeddings", "torch_dtype")
    return {key: c[key] for key in (*shared, "bos_token_id", "eos_token_id")} | {
        "activation_function": "gelu_new",
        "n_ctx": c["max_position_embeddings"],
        "n_positions": c["max_position_embeddings"],
        "n_embd": c["hidden_size"],
        "n_head": c["num_attention_heads"],
        "n_layer": c["num_hidden_layers"],
        "layer_norm_epsilon": 1e-5,
    }


def _layer_norm(**own: Any) -> Callable[[Config], Config]:
    return lambda c: _without(c, "rms_norm_eps") | {"layer_norm_eps": 1e-5} | own


def _stablelm(**own: Any) -> Callable[[Config], Config]:
    return _layer_norm(partial_rotary_factor=0.25, **own)


_COHERE_2 = {"rotary_pct": 1.0, "sliding_window": 32, "sliding_window_pattern": 4}


def _granite(c: Config) -> Config:
    return c | {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": c["num_attention_heads"] / c["hidden_size"],
        "logits_scaling": 2.0,
    }


def _mixtral(c: Config) -> Config:
    return c | {"num_local_experts": 4, "num_experts_per_tok": 2}


def _mixture(c: Config) -> Config:
    """Qwen's: four experts of half the width, of which a token takes two."""
    half = c["intermediate_size"] // 2
    return c | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": half}


def _qwen2_moe(c: Config) -> Config:
    shared = {"shared_expert_intermediate_size": c["intermediate_size"]}
    return _mixture(c) | shared | {"decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen2_moe_dense_layer(c: Config) -> Config:
    return _qwen2_moe(c) | {"mlp_only_layers": [1]}


def _qwen3_moe(c: Config) -> Config:
    return _wide_heads(_mixture(c)) | {"decoder_sparse_step": 1, "norm_topk_prob": True}


def _deepseek(**own: Any) -> Callable[[Config], Config]:
    """Latent attention; a dense first layer, then shared and routed experts."""

    def config(c: Config) -> Config:
        head_dim = c["hidden_size"] // c["num_attention_heads"]
        return c | {
            "num_key_value_heads": c["num_attention_heads"],
            "q_lora_rank": c["hidden_size"] // 2,
            "kv_lora_rank": c["hidden_size"] // 2,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": head_dim // 2,
            "v_head_dim": head_dim,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "moe_intermediate_size": c["intermediate_size"] // 2,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            **own,
        }

    return config


_DEEPSEEK_V3 = {
    "routed_scaling_factor": 2.5,
    "n_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
}


def _minicpm(c: Config) -> Config:
    return c | {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": c["hidden_size"] // 2}


_A = Architecture
_GEMMA: Config = {"norm_offset": 1.0, "prefix_space": False}
_UNTIED: Config = {"tied": False}
_BPE: Config = {"byte_level": True}
_UNTIED_BPE = _UNTIED | _BPE
_STABLELM = _UNTIED_BPE | {"bias": "use_qkv_bias"}
_QWEN2_MOE = _UNTIED_BPE | {"bias": None}

ARCHITECTURES = {
    "llama": _A("LlamaForCausalLM", "llama", lambda c: c | {"mlp_bias": False}),
    "mistral": _A("MistralForCausalLM", "mistral", bias=None),
    "qwen2": _A("Qwen2ForCausalLM", "qwen2", bias=None),
    "qwen3": _A("Qwen3ForCausalLM", "qwen3", _wide_heads),
    "gemma": _A("GemmaForCausalLM", "gemma", _gemma, **_GEMMA),
    "gemma2": _A("Gemma2ForCausalLM", "gemma2", _gemma2, **_GEMMA),
    "gemma3": _A("Gemma3ForCausalLM", "gemma3_text", _gemma3, **_GEMMA),
    "phi3": _A("Phi3ForCausalLM", "phi3", _phi3, bias=None, control=("<|endoftext|>",)),
    "smollm3": _A("SmolLM3ForCausalLM", "smollm3", lambda c: c | {"pad_token_id": 0}),
    "granite": _A("GraniteForCausalLM", "granite", _granite),
    "minicpm": _A("MiniCPMForCausalLM", "minicpm", _minicpm, code="modeling_minicpm"),
    "internlm2": _A(
        "InternLM2ForCausalLM", "internlm2", code="modeling_internlm2", bias="bias", **_UNTIED
    ),
    "mixtral": _A("MixtralForCausalLM", "mixtral", _mixtral, bias=None, **_UNTIED),
    "olmo2": _A("Olmo2ForCausalLM", "olmo2", **_UNTIED_BPE),
    "gpt2": _A("GPT2LMHeadModel", "gpt2", _gpt2, bias=None, **_BPE),
    "stablelm": _A("StableLmForCausalLM", "stablelm", _stablelm(), **_STABLELM),
    "stablelm_parallel": _A(
        "StableLmForCausalLM", "stablelm", _stablelm(use_parallel_residual=True), **_STABLELM
    ),
    "stablelm_qk_norm": _A(
        "StableLmForCausalLM", "stablelm", _stablelm(qk_layernorm=True), **_STABLELM
    ),
    "cohere": _A("CohereForCausalLM", "cohere", _layer_norm(logit_scale=0.5), **_BPE),
    "cohere2": _A(
        "Cohere2ForCausalLM", "cohere2", _layer_norm(logit_scale=0.5, **_COHERE_2), **_BPE
    ),
    "qwen2_moe": _A("Qwen2MoeForCausalLM", "qwen2_moe", _qwen2_moe, **_QWEN2_MOE),
    "qwen2_moe_dense_layer": _A(
        "Qwen2MoeForCausalLM", "qwen2_moe", _qwen2_moe_dense_layer, **_QWEN2_MOE
    ),
    "qwen3_moe": _A("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe, **_UNTIED_BPE),
    "deepseek_v2": _A("DeepseekV2ForCausalLM", "deepseek_v2", _deepseek(), **_UNTIED_BPE),
    "deepseek_v2_lite": _A(
        "DeepseekV2ForCausalLM", "deepseek_v2", _deepseek(q_lora_rank=None), **_UNTIED_BPE
    ),
    "deepseek_v3": _A(
        "DeepseekV3ForCausalLM", "deepseek_v3", _deepseek(**_DEEPSEEK_V3), **_UNTIED_BPE
    ),
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
    tied: bool | None = None,
    dtype: str = "float32",
    bias: bool = False,
    shards: int = 1,
    tokenizer: Path | None = None,
) -> Path:
    """Write a checkpoint; ``hidden`` of 256 suits K-quants, of 192 does not.

    Args:
        directory: where to; made if missing.
        arch: a row of ``ARCHITECTURES``.
        layers: number of blocks.
        hidden: width of the residual stream, divisible by ``heads``.
        intermediate: width of the MLP (GPT-2 has none to choose: four times ``hidden``).
        heads: query heads.
        kv_heads: key/value heads (GPT-2 and DeepSeek have one for each query head).
        vocab: size of the vocabulary, at least 300.
        seed: of the weights.
        tied: whether the embedding serves as output matrix; None: as llama.cpp
            expects of the architecture.
        dtype: torch's name of the weights' dtype.
        bias: biases in the attention maps (Qwen2's and GPT-2's are always there).
        shards: number of safetensors files.
        tokenizer: a directory whose tokenizer to take instead, and its size.

    Returns:
        ``directory``.

    Raises:
        ValueError: biases were asked of an architecture that has no such option.
    """
    directory.mkdir(parents=True, exist_ok=True)
    row = ARCHITECTURES[arch]
    if bias and row.bias is None:
        raise ValueError(f"whether attention has biases cannot be chosen for {arch}")
    ids = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2}
    if tokenizer:
        ids = _copy_tokenizer(tokenizer, directory)
    else:
        _write_tokenizer(directory, vocab, row.prefix_space, row.control)
    config: Config = {
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
        "vocab_size": ids["vocab_size"],
        "tie_word_embeddings": row.tied if tied is None else tied,
        "bos_token_id": ids["bos_token_id"],
        "eos_token_id": ids["eos_token_id"],
        "torch_dtype": dtype,
        **({row.bias: bias} if row.bias else {}),
        **(_bring_code(directory, row) if row.code else {}),
    }
    _write_json(directory / "config.json", row.config(config))
    special = {key: ids[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(directory / "generation_config.json", special)
    (directory / "LICENSE").write_text("Do with these random numbers what you like.\n")
    _write_weights(directory, _tensors(directory, row, seed), getattr(torch, dtype), shards)
    return directory


def make_seeing_checkpoint(
    directory: Path,
    *,
    hidden: int = 64,
    vocab: int = 384,
    size: int = 32,
    patch: int = 8,
    seed: int = 0,
    **text: Any,
) -> Path:
    """Write a checkpoint that reads images too, as SmolVLM's: Idefics 3 over a Llama.

    Args:
        directory: where to; made if missing.
        hidden: width of both its parts.
        vocab: size of the vocabulary.
        size: of an image in pixels, on each side.
        patch: of the squares that it is cut into.
        seed: of the weights.
        text: as for :func:`make_checkpoint`.

    Returns:
        ``directory``.
    """
    make_checkpoint(directory, "llama", hidden=hidden, vocab=vocab, seed=seed, **text)
    _write_tokenizer(directory, vocab, control=IMAGE_CONTROL)
    config = json.loads((directory / "config.json").read_text())
    vision = {
        "model_type": "idefics3_vision",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
    }
    config = config | {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "text_config": config,
        "vision_config": vision,
        "scale_factor": 2,
    }
    _write_json(directory / "config.json", config)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"longest_edge": size}}
    _write_json(directory / "preprocessor_config.json", pixels)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {
        name.replace("model.", "model.text_model.", 1): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    for name, shape in _vision_shapes(vision).items():
        tensors[name] = _values(name, torch.Size(shape), 0.0, generator)
    _write_weights(directory, tensors, torch.float32, 1)
    return directory


def _vision_shapes(vision: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the part that sees."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patch, patches = vision["patch_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    maps = {
        "layer_norm1": (width,),
        "layer_norm2": (width,),
        **{f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")},
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    named = {f"encoder.layers.0.{name}": shape for name, shape in maps.items()}
    named |= {"embeddings.patch_embedding": (width, 3, patch, patch), "post_layernorm": (width,)}
    shapes = {f"{name}.weight": shape for name, shape in named.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in named.items()}
    shapes["embeddings.position_embedding.weight"] = (patches, width)
    shapes = {f"model.vision_model.{name}": shape for name, shape in shapes.items()}
    shapes["model.connector.modality_projection.proj.weight"] = (width, 4 * width)
    return shapes


def _bring_code(directory: Path, row: Architecture) -> Config:
    shutil.copyfile(REMOTE_CODE / f"{row.code}.py", directory / f"{row.code}.py")
    config_class = row.class_name.replace("ForCausalLM", "Config")
    return {
        "auto_map": {
            "AutoConfig": f"{row.code}.{config_class}",
            "AutoModelForCausalLM": f"{row.code}.{row.class_name}",
        }
    }


def _tensors(directory: Path, row: Architecture, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _values(name, shape, row.norm_offset, generator)
        for name, shape in _shapes(directory, trust_remote_code=row.code is not None).items()
    }


def _shapes(directory: Path, *, trust_remote_code: bool) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a checkpoint with this ``config.json``.

    In the order of the modules; experts, which transformers keeps fused in
    memory and apart in files, come last.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    state = model.state_dict()
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    in_files = revert_weight_conversion(model, state)
    names = [n for n in state if n in in_files] + sorted(in_files.keys() - state.keys())
    return {name: in_files[name].shape for name in names if name not in tied}


def _values(
    name: str, shape: torch.Size, norm_offset: float, generator: torch.Generator
) -> torch.Tensor:
    """Random numbers; norms have a few large channels, so that scaling has something to do."""
    numbers = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * numbers
    if "norm" in name or ".ln_" in name:
        return torch.exp(0.7 * numbers) - norm_offset
    transposed = name.endswith(_TRANSPOSED)
    return numbers / math.sqrt(shape[0] if transposed else shape[1])


_TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
"""GPT-2's linear maps, which have a column for each output."""


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


def _write_tokenizer(
    directory: Path, vocab: int, prefix_space: bool = True, control: tuple[str, ...] = ()
) -> None:
    control = (*CONTROL, *control)
    model = _sentencepiece_model(vocab, prefix_space, control)
    (directory / "tokenizer.model").write_bytes(model)
    converted = _tokenizer_json(model, prefix_space, control)
    (directory / "tokenizer.json").write_text(converted, encoding="utf-8")
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


def _copy_tokenizer(source: Path, directory: Path) -> Config:
    """What the config has to say about it."""
    from tokenizers import Tokenizer

    for path in source.glob("*token*"):
        shutil.copyfile(path, directory / path.name)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    named = json.loads((directory / "tokenizer_config.json").read_text())
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": tokenizer.token_to_id(named["bos_token"]),
        "eos_token_id": tokenizer.token_to_id(named["eos_token"]),
    }


def write_demo_tokenizer(gguf: Path, directory: Path) -> Path:
    """Write the tokenizer of the demo model, which the converter knows; ``gguf`` is its GGUF."""
    from gguf import GGUFReader

    from ggufkit.checkpoint.from_gguf import write_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(GGUFReader(gguf), directory)
    return directory


@functools.cache
def _sentencepiece_model(vocab: int, prefix_space: bool, control: tuple[str, ...]) -> bytes:
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
        control_symbols=list(control),
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **({} if prefix_space else {"add_dummy_prefix": False}),
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


@functools.cache
def _tokenizer_json(model: bytes, prefix_space: bool, control: tuple[str, ...]) -> str:
    """The same tokenizer for transformers, which would guess its class by architecture."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [
        (piece[:i], piece[i:])
        for piece in vocab  # in the order in which training merged them
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab and piece not in control
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    prefix = [normalizers.Prepend("\u2581")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = ["<unk>", "<s>", "</s>", *control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
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
    """Pack its linear maps as AWQ's files have them, and say so."""
    edit_config(directory, quantization_config={"quant_method": "awq", "bits": 4})
    for path in sorted(directory.glob("*.safetensors")):
        packed = {}
        for name, tensor in load_file(path).items():
            if name.endswith("_proj.weight"):
                stem = name.removesuffix(".weight")
                rows, columns = tensor.shape
                packed[f"{stem}.qweight"] = torch.zeros(columns, rows // 8, dtype=torch.int32)
                packed[f"{stem}.scales"] = torch.ones(columns // 32, rows, dtype=torch.float16)
            else:
                packed[name] = tensor
        save_file(packed, path, {"format": "pt"})
        index = directory / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            others = {n: f for n, f in content["weight_map"].items() if f != path.name}
            content["weight_map"] = others | dict.fromkeys(packed, path.name)
            _write_json(index, content)


def break_architecture(directory: Path) -> None:
    """Name an architecture that nobody knows."""
    edit_config(directory, architectures=["NobodyForCausalLM"], model_type="nobody")


BREAKERS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("break_"): function
    for name, function in list(globals().items())
    if name.startswith("break_")
}


def break_gguf(gguf: Path, out: Path, tensor: str) -> Path:
    """Copy a GGUF, with an F32 tensor that holds a NaN."""
    from ggufkit.llamacpp.gguf import read_gguf

    found = next(t for t in read_gguf(gguf).tensors if t.name == tensor)
    assert found.type == "F32"
    raw = bytearray(gguf.read_bytes())
    raw[found.offset : found.offset + 4] = struct.pack("<f", math.nan)
    out.write_bytes(raw)
    return out
