"""State spaces, linear attention and convolutions, alone or between attention."""

from tests.architectures.recipes.shared import (
    DELTA,
    DENSE_HYBRID,
    DENSE_LAYER,
    EXPERTS,
    FALCON_H1,
    GRANITE,
    GRANITE_MOE,
    HYBRID,
    KIMI,
    KIMI_LINEAR,
    MAMBA1,
    MAMBA2,
    MAMBA_LAYERS,
    MLA,
    NEMOTRON_H,
    QWEN3_5,
    SHARED,
    SPM,
    dense_first,
    layers,
)
from tests.architectures.row import Row, differs, nearly, refused
from tests.architectures.steps import keys, mtp, rename, without

RECURRENT = {
    "qwen3_next": Row(
        "Qwen3Next",
        EXPERTS | DELTA | SHARED | layers("lllf") | {"decoder_sparse_step": 1},
    ),
    "qwen3_next_mtp": Row(of="qwen3_next", steps=(mtp(3),)),
    "qwen3_5": Row("Qwen3_5", QWEN3_5, tokenizer="qwen35"),
    "qwen3_5_mtp": Row(of="qwen3_5", steps=(mtp(3), keys(mtp_num_hidden_layers=1))),
    # As transformers saves what it has loaded.
    "qwen3_5_lost_mtp": Row(of="qwen3_5", steps=(keys(mtp_num_hidden_layers=1),)),
    "qwen3_5_moe": Row("Qwen3_5Moe", EXPERTS | SHARED | QWEN3_5, tokenizer="qwen35"),
    "qwen4_exp": Row(
        "Qwen4Exp",
        QWEN3_5
        | EXPERTS
        | SHARED
        | layers("llli")
        | {
            "hc_count": 2,
            "hc_lowrank": 32,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 64,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 4,
            # null means silu in transformers; llama.cpp takes this one.
            "output_gate_type": "sigmoid",
        },
    ),
    "lfm2": Row("Lfm2", layers("ccf") | {"block_auto_adjust_ff_dim": False}),
    "lfm2_moe": Row("Lfm2Moe", layers("ccf") | EXPERTS | {"num_dense_layers": 1}),
    "granitemoehybrid": Row("GraniteMoeHybrid", GRANITE_MOE | MAMBA2 | HYBRID),
    "granitemoehybrid_pub": Row(of="granitemoehybrid", steps=(MAMBA_LAYERS,)),
    "granite4_dense": Row(
        "GraniteMoeHybrid",
        GRANITE | MAMBA2 | DENSE_HYBRID,
        expected=nearly("position_embedding_type"),
    ),
    # The converter takes every hybrid for one without positions.
    "granite4_dense_pub": Row(
        of="granite4_dense", steps=(MAMBA_LAYERS,), expected=nearly("position_embedding_type")
    ),
    # The converter permutes whole heads, of which a half is rotated.
    "bamba": Row(
        "Bamba",
        MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
        expected=differs("attn_rotary_emb"),
    ),
    "bamba_pub": Row(
        of="bamba", steps=(keys(attn_rotary_emb=16),), expected=differs("attn_rotary_emb")
    ),
    "nemotron_h": Row(
        "NemotronH",
        NEMOTRON_H | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    ),
    "nemotron_h_pub": Row(
        of="nemotron_h",
        steps=(
            keys(hybrid_override_pattern="M-*-"),
            without(
                "layers_block_type",
                "num_experts_per_tok",
                "n_routed_experts",
                "n_shared_experts",
                "moe_intermediate_size",
                "moe_latent_size",
                "moe_shared_expert_intermediate_size",
                "routed_scaling_factor",
                "n_group",
                "topk_group",
                "norm_topk_prob",
            ),
        ),
    ),
    "nemotron_h_moe": Row(
        "NemotronH",
        NEMOTRON_H
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 128,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    "falcon_h1": Row(
        "FalconH1",
        FALCON_H1
        | {
            "key_multiplier": 0.5,
            "lm_head_multiplier": 0.1,
            "embedding_multiplier": 5.0,
            "mlp_multipliers": [0.8, 0.3],
            "attention_out_multiplier": 0.9,
            "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.35],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.23,
            "mamba_rms_norm": False,
        },
    ),
    "falcon_h1_pub": Row(of="falcon_h1", steps=(keys(head_dim=32),)),
    "falcon_h1_norm": Row("FalconH1", FALCON_H1 | {"mamba_rms_norm": True}),
    "falcon_h1_norm_pub": Row(of="falcon_h1_norm", steps=(keys(head_dim=32),)),
    "mamba": Row("Mamba", MAMBA1),
    "mamba2": Row(
        "Mamba2",
        {"num_heads": 8, "head_dim": 32, "state_size": 32, "n_groups": 2, "chunk_size": 64},
    ),
    "falcon_mamba": Row("FalconMamba", MAMBA1),
    "jamba": Row(
        "Jamba",
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
        },
        **SPM,
    ),
    "kimi_linear": Row(
        "KimiLinear",
        MLA
        | EXPERTS
        | KIMI
        | layers("lllf")
        | dense_first(3)
        | {"q_lora_rank": None, "sliding_window": None},
        expected=refused("block_sparse_moe.down_proj"),
    ),
    "kimi_linear_pub": Row(
        of="kimi_linear",
        steps=(
            keys(
                linear_attn_config=KIMI_LINEAR | {"full_attn_layers": [4], "kda_layers": [1, 2, 3]},
                moe_router_activation_func="sigmoid",
            ),
            DENSE_LAYER,
            rename((r"layers\.0\.block_sparse_moe", "layers.0.mlp")),
        ),
    ),
}
