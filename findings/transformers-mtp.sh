#!/bin/sh
# transformers 5.23.0: save_pretrained drops a model's MTP layer and keeps the config
# that says it is there.
#
# One would guess: what from_pretrained and save_pretrained give is the checkpoint again,
# or the config no longer names what is gone.
# What happens: tensors under "mtp." are ignored on loading on purpose, and so they are
# not saved; mtp_num_hidden_layers stays 1. Software that reads the config looks for
# them: llama.cpp's converter writes a GGUF with one block more than it has tensors for,
# unless it is told --no-mtp.
#
#> before: mtp_num_hidden_layers 1, tensors under mtp.: 1
#> after: mtp_num_hidden_layers 1, tensors under mtp.: 0
. "$(dirname "$0")/environment.sh"
need torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
"$python" - "$work" <<'END' 2>"$work/stderr" | compare
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig


def tell(what, folder):
    layers = json.loads((folder / "config.json").read_text()).get("mtp_num_hidden_layers")
    names = [n for n in load_file(folder / "model.safetensors") if n.startswith("mtp.")]
    print(f"{what}: mtp_num_hidden_layers {layers}, tensors under mtp.: {len(names)}")


before, after = (Path(sys.argv[1]) / name for name in ("before", "after"))
config = Qwen3_5TextConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=64,
    layer_types=["full_attention"] * 2,
)
Qwen3_5ForCausalLM(config).save_pretrained(before)
tensors = load_file(before / "model.safetensors")
tensors["mtp.fc.weight"] = torch.zeros(64, 128)
save_file(tensors, before / "model.safetensors", {"format": "pt"})
saved = json.loads((before / "config.json").read_text())
(before / "config.json").write_text(json.dumps(saved | {"mtp_num_hidden_layers": 1}))
tell("before", before)
AutoModelForCausalLM.from_pretrained(before).save_pretrained(after)
tell("after", after)
END
