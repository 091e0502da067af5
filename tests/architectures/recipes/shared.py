"""What rows have in common. Widths go with ``making.COMMON``."""

from typing import Any

from tests.architectures.row import Config, differs, refused
from tests.architectures.steps import keys, scaled

VOCAB = 512


def rope(theta: float = 10000.0, **own: Any) -> Config:
    """Rotary embedding."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **own}}


_LAYERS = {
    "s": "sliding_attention",
    "f": "full_attention",
    "l": "linear_attention",
    "i": "indexed_attention",
    "c": "conv",
}


def layers(kinds: str) -> Config:
    """One letter for each layer; the window is shorter than the text that is compared."""
    return {
        "layer_types": [_LAYERS[kind] for kind in kinds],
        "sliding_window": 32,
        "num_hidden_layers": len(kinds),
    }


def dense_first(count: int) -> Config:
    """A dense layer, then ``count`` of experts."""
    return {"mlp_layer_types": ["dense"] + ["sparse"] * count}


# What many share. Widths are those of ``making.COMMON``.
SEES: dict[str, Config] = {"vision_config": {}}
DEEPSTACK: dict[str, Config] = {"vision_config": {"deepstack_visual_indexes": [1]}}
TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 64}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
MLA = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
DEEPSEEK = MLA | ROUTED | {"n_group": 2, "rope_interleave": True}
INDEXER = {"index_topk": 2048, "index_head_dim": 64, "index_n_heads": 4}
DSA = MLA | ROUTED | INDEXER | dense_first(1)
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
MAMBA1 = {"state_size": 16, "time_step_rank": 16, "intermediate_size": 256}
DELTA = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 1 / 32,
    "logits_scaling": 2.0,
}
GRANITE_MOE = GRANITE | LOCAL | {"intermediate_size": 64}
MROPE = rope(mrope_section=[4, 6, 6])
MROPE_APART = rope(5e6, mrope_section=[6, 5, 5], mrope_interleaved=True)
QWEN3_5 = (
    DELTA
    | layers("lllf")
    | rope(1e7, partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True)
)
YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
YARN |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 128}
MINISTRAL = rope(1e6, **YARN, factor=16.0, llama_4_scaling_beta=0.1)
_GROWING = [1.0 + i / 16 for i in range(16)]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": _GROWING,
    "long_factor": [4 * factor - 3 for factor in _GROWING],
    "original_max_position_embeddings": 1024,
}
PHI = {"sliding_window": None, "original_max_position_embeddings": 1024}
GEMMA4 = layers("sssssf") | {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 32,
    "final_logit_softcapping": 30.0,
}
HYBRID = layers("lf") | {"shared_intermediate_size": 128}
DENSE_HYBRID = HYBRID | {"num_local_experts": 0, "num_experts_per_tok": 0}
DENSE_HYBRID |= {"position_embedding_type": "rope", "shared_intermediate_size": 256}
NEMOTRON_H = {
    "num_hidden_layers": 4,
    "ssm_state_size": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "chunk_size": 64,
    # transformers clamps the time steps of a prompt, and llama.cpp does not.
    "time_step_min": 1e-9,
}
FALCON_H1 = MAMBA2 | {"mamba_d_ssm": 256, "mamba_norm_before_gate": False}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 2048}
FALCON = {"multi_query": True, "ffn_hidden_size": 512}
DBRX = {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048}
DBRX |= {
    "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
}
DBRX_ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8.0}
KIMI = {"num_experts_per_token": 2, "linear_head_dim": 32, "linear_num_heads": 4}
KIMI_LINEAR = {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}
MIMO = layers("fsss") | dense_first(3)
MIMO |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIMO |= {"head_dim": 96, "v_head_dim": 64}

# Keys that published configs have.
SIGMOID = keys(scoring_func="sigmoid")
NOAUX = keys(scoring_func="sigmoid", topk_method="noaux_tc")
DENSE_LAYER = keys(first_k_dense_replace=1)
MAMBA_LAYERS = keys(layer_types=["mamba", "attention"])
# The converter leaves out a cap that is null, and llama.cpp takes 30.
UNCAPPED = {"final_logit_softcapping": None}
LOUD = scaled("model.norm.weight", 8.0)
NOT_CAPPED = differs("final_logit_softcapping")
# transformers 5 drops add_bos_token of tokenizer_config.json where there is a
# tokenizer.json, and the converter insists on it for DeepSeek 3.2.
BOS_NOT_READ = refused("add_bos_token")
LOST_SCORING = "scoring_func"
UNKNOWN = refused("does not know the architecture")
"""The pinned converter does not know the class."""

SPM: dict[str, Any] = {"tokenizer": "spm"}
GEMMA_SPM: dict[str, Any] = {"tokenizer": "gemma"}
