"""The rows: every architecture that transformers and the pinned converter share.

A class appears as transformers' own config class makes it; ``_pub`` marks variants with
the keys, names and layouts that publishers use, where they matter. What is named
``tests.factory`` there is made here too.
"""

from tests import factory
from tests.architectures.recipes.dense import DENSE
from tests.architectures.recipes.mixtures import MIXTURES
from tests.architectures.recipes.recurrent import RECURRENT
from tests.architectures.recipes.seeing import SEEING
from tests.architectures.recipes.shared import SPM, UNKNOWN, layers
from tests.architectures.row import Row, refused, resolved

FACTORY = {
    name: Row(factory=name, tokenizer="bpe" if row.byte_level else "spm")
    for name, row in factory.ARCHITECTURES.items()
} | {
    "gemma3": Row(factory="gemma3", config={"layers": 6}, **SPM),
    "smollm3": Row(factory="smollm3", config={"layers": 4}, **SPM),
    "cohere2": Row(factory="cohere2", config={"layers": 4}),
    # transformers takes its own rule for it, whatever tokenizer.json says.
    "qwen2": Row(factory="qwen2", tokenizer="qwen2"),
    # llama.cpp knows it by 26, 27 or 48 blocks.
    "deepseek_v2_lite": Row(factory="deepseek_v2_lite", config={"layers": 27}),
    "qwen2_moe_dense_layer": Row(
        factory="qwen2_moe_dense_layer", expected=refused("model.layers.1.mlp")
    ),
    # The converter drops the return value of a generator.
    "stablelm_qk_norm": Row(factory="stablelm_qk_norm", expected=refused("Unprocessed norms")),
}

NOT_KNOWN = {
    "nanochat": Row("NanoChat", {"num_key_value_heads": 4}, expected=UNKNOWN),
    "lfm3": Row("Lfm3", layers("ccfs"), expected=UNKNOWN),
    "opt": Row("OPT", {"ffn_dim": 256, "word_embed_proj_dim": 128}, expected=UNKNOWN),
    "gptj": Row(
        "GPTJ", {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16}, expected=UNKNOWN
    ),
    "helium": Row("Helium", expected=UNKNOWN),
    "ministral": Row("Ministral", layers("sf"), expected=UNKNOWN),
    "olmo_hybrid": Row("OlmoHybrid", expected=UNKNOWN),
    "vaultgemma": Row("VaultGemma", expected=UNKNOWN),
}

RECIPES = resolved(FACTORY | DENSE | MIXTURES | RECURRENT | SEEING | NOT_KNOWN)
