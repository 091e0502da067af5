#!/bin/sh
# transformers 4.57.6 reads a checkpoint saved by 5.23.0 with another RoPE base.
#
# One would guess: the config of a Llama can be read by the version before, or it says
# that it cannot.
# What happens: 5.23.0 writes rope_theta only inside "rope_parameters". 4.57.6 does not
# know that key, keeps it as an unknown attribute, and takes its default of 10000 for a
# model that has 500000. It loads without a warning and computes another function.
# Who meets it: everybody who fine-tunes with 5 and serves, converts or quantizes with
# software that is pinned to 4 (llama.cpp's converter is pinned to 4.57.6).
#
#> saved by 5.23.0: rope_theta at the top level: no, in rope_parameters: 500000.0
#> read by 5.23.0: logits differ by less than 1e-4: yes
#> read by 4.57.6: rope_theta: 10000.0, logits differ by more than 1: yes
. "$(dirname "$0")/environment.sh"
need torch==2.13.0 transformers==5.23.0
beside four transformers==4.57.6 'huggingface-hub==0.36.2' 'tokenizers==0.22.2'
export PYTHONDONTWRITEBYTECODE=1
cat >"$work/save.py" <<'END'
import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=256,
    initializer_range=0.2,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(folder)
with torch.no_grad():
    torch.save(model(torch.arange(64)[None]).logits, f"{folder}/logits.pt")
saved = json.load(open(f"{folder}/config.json"))
print(
    f"saved by 5.23.0: rope_theta at the top level: {'yes' if 'rope_theta' in saved else 'no'},",
    f"in rope_parameters: {saved['rope_parameters']['rope_theta']}",
)
END
cat >"$work/read.py" <<'END'
import sys

import torch
import transformers

folder = sys.argv[1]
model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    difference = model(torch.arange(64)[None]).logits - torch.load(f"{folder}/logits.pt")
largest = difference.abs().max()
if transformers.__version__[0] == "5":
    told = f"logits differ by less than 1e-4: {'yes' if largest < 1e-4 else 'no'}"
else:
    told = f"rope_theta: {model.config.rope_theta}, "
    told += f"logits differ by more than 1: {'yes' if largest > 1 else 'no'}"
print(f"read by {transformers.__version__}: {told}")
END
{
    "$python" "$work/save.py" "$work/model"
    "$python" "$work/read.py" "$work/model"
    PYTHONPATH=$work/four "$python" "$work/read.py" "$work/model"
} | compare
