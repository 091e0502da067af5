"""Mixtures of experts."""

from tests.architectures.recipes.shared import (
    BOS_NOT_READ,
    DBRX,
    DBRX_ATTENTION,
    DEEPSEEK,
    DENSE_LAYER,
    DSA,
    EXPERTS,
    GEMMA_SPM,
    GRANITE_MOE,
    LOCAL,
    LONGROPE,
    LOUD,
    MIMO,
    MLA,
    NOAUX,
    NOT_CAPPED,
    PHI,
    ROUTED,
    SHARED,
    SIGMOID,
    SPM,
    UNCAPPED,
    YARN,
    dense_first,
    layers,
    rope,
)
from tests.architectures.row import Row, differs, refused
from tests.architectures.steps import architecture, keys, rename, without

MIXTURES = {
    "gpt_oss": Row(
        "GptOss",
        LOCAL
        | layers("sf")
        | {"intermediate_size": 128}
        | rope(**YARN, factor=32.0, truncate=False),
        expected=differs("truncate", "rope_parameters.truncate=False"),
    ),
    "gemma4_moe": Row(
        "Gemma4",
        layers("sssssf")
        | {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
        },
        **GEMMA_SPM,
    ),
    "gemma4_moe_uncapped": Row(
        of="gemma4_moe", config=UNCAPPED, steps=(LOUD,), expected=NOT_CAPPED
    ),
    # RMS norm for LayerNorm, softmax for sparsemixer, mscales computed.
    "phimoe": Row(
        "Phimoe",
        PHI
        | LOCAL
        | {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.0}
        | rope(**LONGROPE, short_mscale=1.2, long_mscale=1.3),
        steps=(architecture("PhiMoEForCausalLM"),),
        **SPM,
        expected=differs("router, norm", "short_mscale=1.2"),
    ),
    "deepseek_v3_built": Row("DeepseekV3", DEEPSEEK),
    "deepseek_v3_yarn": Row(
        of="deepseek_v3_built",
        config=rope(1e4, **YARN, factor=40.0),
    ),
    "deepseek_v3_yarn_pub": Row(of="deepseek_v3_yarn", steps=(NOAUX,)),
    "deepseek_v3_nextn": Row(
        of="deepseek_v3_built", steps=(NOAUX, keys(num_nextn_predict_layers=1))
    ),
    "deepseek_v32": Row("DeepseekV32", DSA | {"n_group": 2}, expected=BOS_NOT_READ),
    "deepseek_v32_pub": Row(of="deepseek_v32", steps=(NOAUX, DENSE_LAYER), expected=BOS_NOT_READ),
    "deepseek_v4": Row(
        "DeepseekV4",
        ROUTED
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "q_lora_rank": 128,
            "sliding_window": 64,
            "o_groups": 2,
            "o_lora_rank": 64,
            "index_n_heads": 4,
            "index_head_dim": 64,
            "index_topk": 512,
            "hc_mult": 4,
            "partial_rotary_factor": 0.5,
            "layer_types": [
                "heavily_compressed_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
        },
        expected=refused("num_hash_layers"),
    ),
    "deepseek_v4_pub": Row(
        of="deepseek_v4",
        steps=(
            keys(
                num_hash_layers=1,
                compress_ratios=[128, 128, 4],
                compress_rope_theta=160000.0,
                scoring_func="sqrtsoftplus",
                qk_rope_head_dim=32,
            ),
            rename(
                (r"^model\.", ""),
                (r"^embed_tokens", "embed"),
                (r"^hc_head\.hc", "hc_head"),
                (r"attn\.norm\.", "attn.kv_norm."),
            ),
        ),
        # It wants experts in FP4, as they were published.
        expected=refused("KeyError: 'Missing"),
    ),
    "glm4_moe": Row(
        "Glm4Moe",
        ROUTED | {"attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 0},
    ),
    "glm4_moe_pub": Row(of="glm4_moe", steps=(SIGMOID,)),
    "glm4_moe_nextn": Row(of="glm4_moe", config={"num_nextn_predict_layers": 1}),
    "glm4_moe_lite": Row("Glm4MoeLite", MLA | ROUTED | dense_first(1)),
    "glm4_moe_lite_pub": Row(of="glm4_moe_lite", steps=(NOAUX, DENSE_LAYER)),
    "glm_moe_dsa": Row("GlmMoeDsa", DSA),
    "glm_moe_dsa_nextn": Row(of="glm_moe_dsa", steps=(keys(num_nextn_predict_layers=1),)),
    "granitemoe": Row("GraniteMoe", GRANITE_MOE),
    "granitemoeshared": Row("GraniteMoeShared", GRANITE_MOE | {"shared_intermediate_size": 128}),
    "granitemoe_swa": Row(
        "GraniteMoeSWA",
        GRANITE_MOE
        | layers("fsss")
        | {"shared_intermediate_size": 128, "layer_rope_theta": [1e4] * 4},
    ),
    "llama4": Row(
        "Llama4",
        LOCAL
        | {
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "moe_layers": [1, 3],
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 256,
            "intermediate_size": 128,
            # llama.cpp takes this one.
            "attention_chunk_size": 8192,
            "layer_types": None,
        },
    ),
    "olmoe": Row("Olmoe", EXPERTS | {"intermediate_size": 64, "num_key_value_heads": 4}),
    "ernie4_5_moe": Row(
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
        **SPM,
    ),
    "exaone_moe": Row(
        "ExaoneMoe",
        layers("sssf") | EXPERTS | dense_first(3) | {"first_k_dense_replace": 1},
    ),
    "exaone_moe_pub": Row(of="exaone_moe", steps=(SIGMOID,)),
    "hunyuan_moe": Row(
        "HunYuanMoEV1",
        {"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1},
        steps=(keys(moe_intermediate_size=[256] * 2, num_shared_expert=[1] * 2, moe_topk=[2] * 2),),
        # It wants the tokenizer class that was published with it.
        expected=refused("mergeable_ranks"),
    ),
    "hy_v3": Row("HYV3", EXPERTS | dense_first(1)),
    "hy_v4": Row(
        "HYV4",
        DSA | {"hc_mult": 4, "indexer_types": ["full", "shared"]},
        expected=refused("hc_head_base"),
    ),
    "hy_v4_pub": Row(
        of="hy_v4",
        steps=(
            DENSE_LAYER,
            rename(
                (r"hc_pre\.hc_head\.", "hc_head."),
                (r"hc_pre\.hc_(attn|mlp)_layer\.", r"hc_\1_layer.hc_pre."),
                (r"(mlp|shared_experts)\.linear_gate", r"\1.gate_proj"),
            ),
        ),
        # transformers rotates halves, llama.cpp pairs.
        expected=differs("rope"),
    ),
    "afmoe": Row(
        "Afmoe",
        layers("sssf")
        | EXPERTS
        | {
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "route_scale": 2.5,
            "mup_enabled": True,
        },
    ),
    "afmoe_pub": Row(of="afmoe", steps=(keys(route_norm=True, score_func="sigmoid"),)),
    "minimax_m2": Row(
        "MiniMaxM2",
        LOCAL | {"intermediate_size": 64} | rope(5e6, partial_rotary_factor=0.5),
        steps=(keys(rotary_dim=16, scoring_func="sigmoid"),),
    ),
    "dots1": Row("Dots1", ROUTED | {"num_key_value_heads": 4}),
    "dots1_pub": Row(of="dots1", steps=(SIGMOID,)),
    "dots3_note": Row(
        "Dots3Note",
        DSA | layers("is") | {"shared_experts_intermediate_size": 64, "head_dim": 48},
        expected=refused("only supports noaux_tc/sigmoid"),
    ),
    "dots3_note_pub": Row(
        of="dots3_note", steps=(NOAUX,), expected=refused("swa_qk_nope_head_dim")
    ),
    # transformers 5.23 takes 10000 whatever the config says.
    "dbrx_10000": Row("Dbrx", DBRX | {"attn_config": DBRX_ATTENTION | {"rope_theta": 1e4}}),
    "dbrx": Row(
        "Dbrx",
        DBRX | {"attn_config": DBRX_ATTENTION | {"rope_theta": 5e5}},
        expected=differs("rope_theta"),
    ),
    "cohere2_moe": Row(
        "Cohere2Moe",
        layers("sssf")
        | dense_first(3)
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "logit_scale": 0.5,
            "prefix_dense_intermediate_size": 256,
            "num_shared_experts": 1,
        },
    ),
    # Without partial_rotary_factor in the config the converter takes a half.
    "solar_open": Row(
        "SolarOpen",
        ROUTED | {"first_k_dense_replace": 0} | rope(1e6, partial_rotary_factor=1.0),
    ),
    "mimo_v2_flash": Row("MiMoV2Flash", MIMO),
    "mimo_v2_flash_pub": Row(
        "MiMoV2Flash",
        MIMO
        | {
            "rope_parameters": {
                f"{kind}_attention": rope(theta, partial_rotary_factor=0.334)["rope_parameters"]
                for kind, theta in (("full", 5e6), ("sliding", 1e4))
            }
        },
        steps=(
            NOAUX,
            keys(
                swa_head_dim=96,
                swa_num_attention_heads=4,
                swa_v_head_dim=64,
                swa_num_key_value_heads=4,
                hybrid_layer_pattern=[0, 1, 1, 1],
                moe_layer_freq=[0, 1, 1, 1],
                partial_rotary_factor=0.334,
                rope_theta=5e6,
                swa_rope_theta=1e4,
                layernorm_epsilon=1e-5,
                add_swa_attention_sink_bias=True,
                add_full_attention_sink_bias=False,
            ),
            without("rope_parameters"),
        ),
    ),
    "laguna": Row(
        "Laguna",
        layers("fsss")
        | EXPERTS
        | SHARED
        | dense_first(3)
        | {"num_attention_heads_per_layer": [4] * 4},
    ),
    # llama.cpp rotates sliding layers with the full layers' base.
    "mellum": Row(
        "Mellum",
        layers("sssf") | EXPERTS | {"num_local_experts": 4, "mlp_layer_types": ["sparse"] * 4},
        expected=differs("rope_parameters"),
    ),
}
