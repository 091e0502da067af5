"""Attention and an MLP in every block."""

from tests.architectures.recipes.shared import (
    FALCON,
    GEMMA4,
    GEMMA_SPM,
    GPT2,
    GRANITE,
    LONGROPE,
    LOUD,
    MINISTRAL,
    MLA,
    NOT_CAPPED,
    PHI,
    SPM,
    TIED,
    UNCAPPED,
    VOCAB,
    layers,
    rope,
)
from tests.architectures.row import Expected, Kind, Row, differs, nearly, refused
from tests.architectures.steps import architecture, keys, without

DENSE = {
    "llama31": Row(
        "Llama",
        TIED
        | rope(
            5e5,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "llama_bias": Row("Llama", {"attention_bias": True, "mlp_bias": True}, **SPM),
    "mistral_swa": Row(
        "Mistral",
        {"sliding_window": 32},
        **SPM,
        expected=differs("sliding_window", "sliding_window=32"),
    ),
    "ministral3": Row("Ministral3", MINISTRAL),
    "phi3_longrope": Row("Phi3", PHI | rope(**LONGROPE), **SPM),
    # How far gates spread is over one more number in transformers; little in real widths.
    "gemma3n": Row(
        "Gemma3n",
        layers("sssf")
        | {
            "num_kv_shared_layers": 0,
            "laurel_rank": 64,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 256,
            "intermediate_size": [512] * 4,
            "activation_sparsity_pattern": [0.95] * 4,
        },
        **GEMMA_SPM,
        expected=nearly("activation_sparsity_pattern"),
    ),
    "gemma4": Row("Gemma4", GEMMA4, **GEMMA_SPM),
    "gemma4_shared_kv": Row(
        "Gemma4",
        GEMMA4 | layers("ssfssf") | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True},
        **GEMMA_SPM,
    ),
    "gemma4_shared_kv_uncapped": Row(
        of="gemma4_shared_kv", config=UNCAPPED, steps=(LOUD,), expected=NOT_CAPPED
    ),
    "glm": Row(
        "Glm",
        {"attention_bias": True, "partial_rotary_factor": 0.5},
        # The converter reads layernorm_epsilon, or takes 1e-5.
        expected=nearly("rms_norm_eps"),
    ),
    "glm4": Row("Glm4", {"attention_bias": True, "eos_token_id": [2]}),
    "granite_swa": Row("GraniteSWA", GRANITE | layers("fsss") | {"layer_rope_theta": [1e4] * 4}),
    "granite_swa_nope": Row(
        of="granite_swa",
        config={"layer_rope_theta": [0, 1e4, 1e4, 1e4]},
        expected=nearly("layer_rope_theta"),
    ),
    "granite_swa_thetas": Row(
        of="granite_swa",
        config={"layer_rope_theta": [1e6, 1e4, 1e4, 1e4]},
        expected=nearly("layer_rope_theta"),
    ),
    # The converter takes padding and unknown for 0 and 1 in every tokenizer.
    "nemotron": Row("Nemotron", **SPM, expected=Expected(Kind.DIFFERS, ("the UNK token",))),
    "olmo": Row("Olmo", {"clip_qkv": 8.0}),
    "olmo3": Row("Olmo3", layers("sssf")),
    "ernie4_5": Row("Ernie4_5", {"use_bias": False}, **SPM),
    "exaone4": Row(
        "Exaone4", layers("ff") | {"sliding_window": None, "sliding_window_pattern": None}
    ),
    # llama.cpp knows its sliding layers by the number of blocks.
    "exaone4_64": Row(
        "Exaone4", layers("sssf" * 16) | {"sliding_window_pattern": 4, "intermediate_size": 64}
    ),
    "hunyuan_dense": Row("HunYuanDenseV1", TIED),
    "seed_oss": Row("SeedOss", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "apertus": Row("Apertus"),
    "arcee": Row("Arcee", **SPM),
    # transformers 5.23 zeroes the row of the padding token when it reads one.
    "youtu": Row("Youtu", MLA | {"pad_token_id": None}),
    "starcoder2": Row("Starcoder2"),
    "gpt2_built": Row("GPT2LMHeadModel", GPT2),
    "gpt_bigcode": Row("GPTBigCode", GPT2),
    "gpt_neox": Row("GPTNeoX", {"use_parallel_residual": True}),
    "gpt_neox_serial": Row(of="gpt_neox", config={"use_parallel_residual": False}),
    "gpt_neox_pub": Row(
        of="gpt_neox",
        steps=(keys(rotary_pct=0.25, rotary_emb_base=10000), without("rope_parameters")),
    ),
    "gpt_neox_serial_pub": Row(
        of="gpt_neox_pub",
        config={"use_parallel_residual": False},
    ),
    "bloom": Row("Bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": Row(
        "Falcon",
        FALCON | {"new_decoder_architecture": False, "parallel_attn": True},
    ),
    "falcon_pub": Row(
        of="falcon",
        steps=(without("num_kv_heads"),),
    ),
    "falcon_new": Row(
        "Falcon",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
    ),
    "mpt": Row(
        "Mpt",
        {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048},
        steps=(architecture("MPTForCausalLM"),),
    ),
    "phi": Row("Phi", {"num_key_value_heads": 4, "intermediate_size": 512}),
    # llama.cpp knows its q/k norms by the number of blocks.
    "cohere_qk_norm": Row(
        "Cohere",
        {
            "logit_scale": 0.5,
            "use_qk_norm": True,
            "num_hidden_layers": 64,
            "intermediate_size": 64,
        },
    ),
    "jais2": Row("Jais2", {"num_key_value_heads": 4}),
    "bitnet": Row("BitNet", TIED, **SPM, expected=refused("ffn_sub_norm")),
    # llama.cpp takes 256 for dim_model_base.
    "minicpm3": Row("MiniCPM3", MLA | {"dim_model_base": 256}, **SPM),
    "hrm_text": Row("HrmText", {"num_hidden_layers": 16, "num_layers_per_stack": 2}),
    "internlm3": Row(
        "Llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
        steps=(architecture("InternLM3ForCausalLM"), keys(bias=False, qkv_bias=False)),
        **SPM,
    ),
}
