#!/bin/sh
# peft 0.21.2: modules_to_save=["norm"] also trains and saves every layer norm.
#
# One would guess: "norm" is the module model.norm, as "lm_head" is lm_head.
# What happens: names are compared by their end, without a dot before it, so
# input_layernorm and post_attention_layernorm of all blocks are meant as well.
# target_modules compares whole components. Who meets it: adapters that are far from
# low-rank, and converters of adapters, which do not expect norms there
# (convert_lora_to_gguf writes them, and llama.cpp does not apply them).
#
#> saved beside the LoRA matrices, in a model of 2 blocks:
#> model.layers.0.input_layernorm.weight
#> model.layers.0.post_attention_layernorm.weight
#> model.layers.1.input_layernorm.weight
#> model.layers.1.post_attention_layernorm.weight
#> model.norm.weight
. "$(dirname "$0")/environment.sh"
need torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0
"$python" - "$work" <<'END' 2>"$work/stderr" | compare
import sys

from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
)
adapter = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
get_peft_model(LlamaForCausalLM(config), adapter).save_pretrained(sys.argv[1])
with safe_open(f"{sys.argv[1]}/adapter_model.safetensors", "pt") as file:
    names = [name for name in file.keys() if "lora" not in name]
print("saved beside the LoRA matrices, in a model of 2 blocks:")
print(*(name.removeprefix("base_model.model.") for name in sorted(names)), sep="\n")
END
