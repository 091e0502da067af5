"""Tiny checkpoints of architectures as transformers 5 saves them, and as they were published.

``save_pretrained`` of transformers 5 writes other keys than the checkpoints that
people published: some are renamed, some left out.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Config = dict[str, Any]
LEFT_OUT = object()
"""Stands for a key that is taken away."""


@dataclass(frozen=True)
class Odd:
    """One architecture.

    Attributes:
        class_name: transformers' class.
        config: what its config has beside the common keys that it knows.
        published: keys of published configs; those that are ``LEFT_OUT`` go.
    """

    class_name: str
    config: Config
    published: Config = field(default_factory=dict)


_COMMON: Config = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_EXPERTS: Config = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GROUPS: Config = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
_LATENT: Config = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_MAMBA: Config = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_NEMOTRON: Config = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
    "num_hidden_layers": 4,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
}
_MIXTURE_KEYS = (
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "moe_intermediate_size"),
    *("moe_shared_expert_intermediate_size", "routed_scaling_factor", "n_group", "topk_group"),
    *("norm_topk_prob", "moe_latent_size"),
)
_FALCON: Config = {
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "ffn_hidden_size": 256,
}
_MIMO: Config = {
    **_EXPERTS,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", *["sliding_attention"] * 2],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "sliding_window": 32,
    "head_dim": 24,
    "v_head_dim": 16,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.334}
        for kind, theta in (("full_attention", 5e6), ("sliding_attention", 1e4))
    },
}
_LINEAR: Config = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
        **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
}

ODD = {
    "gpt_neox": Odd("GPTNeoXForCausalLM", {}),
    "gpt_neox_published": Odd(
        "GPTNeoXForCausalLM",
        {},
        {"rotary_pct": 0.25, "rotary_emb_base": 10000, "rope_parameters": LEFT_OUT},
    ),
    "falcon": Odd("FalconForCausalLM", _FALCON),
    "falcon_published": Odd("FalconForCausalLM", _FALCON, {"num_kv_heads": LEFT_OUT}),
    "nemotron_h": Odd("NemotronHForCausalLM", _NEMOTRON),
    "nemotron_h_published": Odd(
        "NemotronHForCausalLM",
        _NEMOTRON,
        {
            **dict.fromkeys(_MIXTURE_KEYS, LEFT_OUT),
            **{"hybrid_override_pattern": "M-*-", "layers_block_type": LEFT_OUT},
            "num_hidden_layers": 4,
        },
    ),
    "mimo_v2_flash": Odd("MiMoV2FlashForCausalLM", _MIMO),
    "deepseek_v3": Odd(
        "DeepseekV3ForCausalLM",
        {**_LATENT, **_EXPERTS, **_GROUPS, "first_k_dense_replace": 1, "n_group": 2},
    ),
    "dots1": Odd(
        "Dots1ForCausalLM",
        {**_EXPERTS, **_GROUPS, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "afmoe": Odd(
        "AfmoeForCausalLM",
        {
            "num_experts": 4,
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_shared_experts": 1},
            **{"num_dense_layers": 1, "route_scale": 2.5, "mup_enabled": True},
            "num_hidden_layers": 4,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "sliding_window": 32,
        },
    ),
    "granitemoehybrid": Odd(
        "GraniteMoeHybridForCausalLM",
        {
            **_MAMBA,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
        },
    ),
    "falcon_h1": Odd("FalconH1ForCausalLM", {**_MAMBA, "mamba_d_ssm": 128}),
    "qwen3_5_without_mtp": Odd("Qwen3_5ForCausalLM", _LINEAR, {"mtp_num_hidden_layers": 1}),
    "gpt2": Odd("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
}


def write_odd(name: str, directory: Path, tokenizer: Path) -> Path:
    """Write one of them, seeded.

    Args:
        name: a row of ``ODD``.
        directory: where to; must not exist.
        tokenizer: a checkpoint with a tokenizer that the converter knows.

    Returns:
        ``directory``.
    """
    import torch
    import transformers

    from tests import factory

    row = ODD[name]
    cls = getattr(transformers, row.class_name)
    known = cls.config_class().to_dict()
    directory.mkdir(parents=True)
    ids = factory._copy_tokenizer(tokenizer, directory)
    common = {key: value for key, value in {**_COMMON, **ids}.items() if key in known}
    config = cls.config_class(**{**common, **row.config})
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
    model.save_pretrained(directory)
    path = directory / "config.json"
    changed = json.loads(path.read_text()) | row.published
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not LEFT_OUT}, indent=1))
    return directory
