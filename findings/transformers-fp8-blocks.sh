#!/bin/sh
# transformers 5.23.0 dequantizes FP8 with other blocks than the checkpoint says.
#
# One would guess: weight_block_size of quantization_config says how large a block is,
# and the last block is smaller where 128 does not divide (DeepSeek-V3's own code).
# What happens: where FP8 is dequantized on loading, as on a CPU, a block is the number
# of rows divided by the number of rows of weight_scale_inv. 192 rows have two rows of
# scales (128 + 64), so 96 rows are taken for each: rows 96 to 127 get the wrong scale
# without a word. 576 rows have five rows of scales, and loading stops; the
# kv_a_proj_with_mqa of DeepSeek-V3 has 576 rows.
#
#> 256 rows: all rows right
#> 192 rows: rows 96 to 127 wrong
#> 576 rows: RuntimeError
. "$(dirname "$0")/environment.sh"
need torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
"$python" - "$work" <<'END' 2>"$work/stderr" | compare
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

BLOCK = 128
NAME = "model.layers.0.mlp.up_proj.weight"


def quantized(weight):
    """Values in FP8 and one scale for each block of 128 x 128; and what they mean."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    each = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    codes = (weight / each).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * each


def check(rows, folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=rows,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_parameter(NAME)[BLOCK:] *= 4  # blocks of different scales
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if "_proj" in n]:
        tensors[name], tensors[f"{name}_scale_inv"], meant = quantized(tensors[name])
        if name == NAME:
            expected = meant
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    section = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    saved = json.loads((folder / "config.json").read_text())
    saved["quantization_config"] = section | {"activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(saved))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except RuntimeError as error:
        return type(error).__name__
    wrong = (loaded.get_parameter(NAME) != expected).any(1).nonzero().flatten().tolist()
    if not wrong:
        return "all rows right"
    assert wrong == list(range(wrong[0], wrong[-1] + 1))
    return f"rows {wrong[0]} to {wrong[-1]} wrong"


for rows in (256, 192, 576):
    print(f"{rows} rows:", check(rows, Path(sys.argv[1]) / str(rows)))
END
