"""Models of several parts, of which the converter writes the one for text."""

from tests.architectures.recipes.shared import (
    DEEPSTACK,
    EXPERTS,
    GEMMA4,
    GEMMA_SPM,
    INDEXER,
    KIMI_LINEAR,
    LOCAL,
    MINISTRAL,
    MLA,
    MROPE,
    MROPE_APART,
    QWEN3_5,
    ROUTED,
    SEES,
    SHARED,
    SPM,
    dense_first,
    layers,
    rope,
)
from tests.architectures.row import Row, nearly, refused
from tests.architectures.steps import text_keys, transposed

SEEING = {
    "mistral3": Row(
        "Mistral3",
        {"model_type": "ministral3", **MINISTRAL},
        parts={"vision_config": {"model_type": "pixtral", "head_dim": 32}},
    ),
    "qwen3_vl": Row("Qwen3VL", MROPE_APART, parts=DEEPSTACK),
    # Publishers store experts transposed, and transformers 5 does not.
    "qwen3_vl_moe": Row(
        "Qwen3VLMoe",
        # Experts that are not square: transformers tells the layouts apart by shape.
        EXPERTS | {"num_local_experts": 4, "moe_intermediate_size": 96} | MROPE_APART,
        parts=DEEPSTACK,
        expected=refused("its experts are transposed"),
    ),
    "qwen3_vl_moe_pub": Row(of="qwen3_vl_moe", steps=(transposed("experts"),)),
    "qwen3_5_cg": Row("Qwen3_5", QWEN3_5, tokenizer="qwen35", parts=SEES),
    "qwen3_5_moe_cg": Row("Qwen3_5Moe", EXPERTS | SHARED | QWEN3_5, tokenizer="qwen35", parts=SEES),
    # llama.cpp does not read the epsilon of the norms.
    "qwen2_vl": Row("Qwen2VL", MROPE, parts=SEES, expected=nearly("rms_norm_eps")),
    "qwen2_5_vl": Row("Qwen2_5_VL", MROPE, parts=SEES, expected=nearly("rms_norm_eps")),
    "gemma3_cg": Row(
        "Gemma3",
        layers("sssssf") | {"query_pre_attn_scalar": 32},
        parts={"vision_config": {"model_type": "siglip_vision_model"}},
        top={"mm_tokens_per_image": 4},
        **GEMMA_SPM,
    ),
    "gemma4_cg": Row("Gemma4", GEMMA4, parts={}, **GEMMA_SPM),
    "glm5_next": Row(
        "Glm5Next",
        MLA
        | ROUTED
        | INDEXER
        | layers("llli")
        | dense_first(3)
        | {
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "linear_head_dim": 32,
            "linear_num_heads": 4,
            "hc_mult": 4,
            "index_kpool": 16,
        },
        parts=SEES,
        expected=refused("linear_attn_config"),
    ),
    "glm5_next_pub": Row(
        of="glm5_next",
        steps=(
            text_keys(
                linear_attn_config=KIMI_LINEAR | {"gate_lower_bound": -5.0},
                mla_use_nope=True,
                first_k_dense_replace=1,
                scoring_func="sigmoid",
            ),
        ),
    ),
    "glm4v": Row("Glm4v", rope(partial_rotary_factor=0.5, mrope_section=[2, 3, 3]), parts=SEES),
    "glm_ocr": Row("GlmOcr", rope(partial_rotary_factor=1.0, mrope_section=[4, 6, 6]), parts=SEES),
    "exaone4_5": Row(
        "Exaone4_5_",
        layers("sssf" * 16)
        | {"model_type": "exaone4", "sliding_window_pattern": 4, "intermediate_size": 64},
        parts=SEES,
    ),
    "minimax_m3": Row(
        "MiniMaxM3Sparse",
        LOCAL
        | {
            "intermediate_size": 64,
            "dense_intermediate_size": 256,
            "shared_intermediate_size": 64,
            "rotary_dim": 16,
        }
        | dense_first(1)
        | rope(5e6, partial_rotary_factor=0.5),
        parts=SEES,
        expected=refused("n_shared_experts"),
    ),
    "step3p7": Row(
        "Step3p7",
        layers("fsss")
        | dense_first(3)
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "share_expert_dim": 64,
            "num_sliding_attention_heads": 4,
            "query_pre_attn_scalar": 32,
        },
        parts=SEES,
        expected=refused("AssertionError"),
    ),
    "minicpmv4_6": Row(
        "MiniCPMV4_6",
        QWEN3_5 | {"model_type": "qwen3_5_text"},
        parts=SEES,
        top={"insert_layer_id": 0},
    ),
    "muse_glimmer": Row(
        "MuseGlimmer", layers("sssf") | {"layer_rope_theta": [1e4, 1e4, 1e4, 0]}, parts=SEES
    ),
    "paddleocr_vl": Row("PaddleOCRVL", MROPE | {"use_bias": False}, parts=SEES, **SPM),
    "smolvlm": Row(
        "SmolVLM",
        {"model_type": "llama"},
        parts=SEES,
        top={"scale_factor": 2},
        steps=(text_keys(architectures=["VLlama3ForCausalLM"]),),
        tokenizer="images",
    ),
    "lfm2_vl": Row(
        "Lfm2Vl",
        layers("ccf") | {"model_type": "lfm2", "block_auto_adjust_ff_dim": False},
        parts={"vision_config": {"model_type": "siglip2_vision_model"}},
        steps=(text_keys(architectures=["Lfm2ForCausalLM"]),),
    ),
}
