#!/bin/sh
# llama.cpp's convert_lora_to_gguf (llama-cpp-python 0.3.36, llama.cpp 0c1e57098) drops
# the scaling of a rank-stabilized LoRA (peft 0.21.2).
#
# One would guess: a converted adapter has the effect that it has in peft, or is refused.
# What happens: with use_rslora peft scales by alpha / sqrt(r). The converter does not
# read that key; the GGUF holds alpha, and llama.cpp divides it by r. At r = 64 the
# adapter is eight times too weak, and nothing says so. alpha_pattern is lost likewise.
#
#> plain, r = 64, alpha = 128: peft scales by 2, llama.cpp by 2
#> use_rslora, r = 64, alpha = 128: peft scales by 16, llama.cpp by 2
. "$(dirname "$0")/environment.sh"
need torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 sentencepiece==0.2.3 \
    requests==2.34.2 pyyaml==6.0.3
llama_cpp_scripts
cat >"$work/save.py" <<'END'
import sys

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

folder, stabilized = sys.argv[1], sys.argv[2] == "True"
config = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=64,
    architectures=["LlamaForCausalLM"],
)
config.save_pretrained(f"{folder}/base")
adapter = LoraConfig(
    task_type="CAUSAL_LM", target_modules=["q_proj"], r=64, lora_alpha=128, use_rslora=stabilized
)
model = get_peft_model(LlamaForCausalLM(config), adapter)
model.save_pretrained(f"{folder}/adapter")
layer = model.base_model.model.model.layers[0].self_attn.q_proj
what = "use_rslora" if stabilized else "plain"
print(f"{what}, r = 64, alpha = 128: peft scales by {layer.scaling['default']:g}, ", end="")
END
cat >"$work/read.py" <<'END'
import sys

from gguf import GGUFReader

reader = GGUFReader(sys.argv[1])
alpha = reader.get_field("adapter.lora.alpha").contents()
# llama_adapter_lora_weight::get_scale in llama.cpp's src/llama-adapter.h: alpha / rank.
rank = next(int(t.shape[1]) for t in reader.tensors if t.name.endswith(".lora_a"))
print(f"llama.cpp by {alpha / rank:g}")
END
for stabilized in False True; do
    folder=$work/$stabilized
    mkdir "$folder"
    "$python" "$work/save.py" "$folder" $stabilized 2>>"$work/stderr"
    "$python" "$llama_cpp/convert_lora_to_gguf.py" "$folder/adapter" --base "$folder/base" \
        --outfile "$folder/adapter.gguf" >>"$work/stderr" 2>&1 || {
        tail "$work/stderr" >&2
        exit 1
    }
    PYTHONPATH=$llama_cpp/gguf-py "$python" "$work/read.py" "$folder/adapter.gguf"
done >"$work/lines"
compare <"$work/lines"
