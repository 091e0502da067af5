#!/bin/sh
# compressed-tensors 0.20.1 reads 3-bit weights written by 0.17.1 as other weights.
#
# One would guess: "pack-quantized" is a file format, so what one version writes another
# reads, or refuses.
# What happens: 0.17.1 puts ten 3-bit codes into a word of 32 bits and leaves two bits
# over; 0.20.1 (since 0.18.0) lets codes run across words. The format's name is the same.
# The new version reads an old tensor without a word, and 84 % of the codes are others;
# the old one stops at a new tensor. 5, 6 and 7 bits changed likewise; 2, 4 and 8 did not.
# Which it is can be told by the number of words alone: 26 or 24 for 256 columns.
#
#> 3 bits, written by 0.17.1 as 4 x 26 words, read by 0.20.1: 84 % of codes wrong
#> 3 bits, written by 0.20.1 as 4 x 24 words, read by 0.17.1: RuntimeError
#> 4 bits, written by 0.17.1 as 4 x 32 words, read by 0.20.1: 0 % of codes wrong
#> 4 bits, written by 0.20.1 as 4 x 32 words, read by 0.17.1: 0 % of codes wrong
. "$(dirname "$0")/environment.sh"
need torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.1
beside old compressed-tensors==0.17.1
cat >"$work/pack.py" <<'END'
import sys

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

action, bits, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
arguments = QuantizationArgs(num_bits=bits, strategy="group", group_size=32)
scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
torch.manual_seed(0)
codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (4, 256)).float()
if action == "write":
    tensors = {"weight": codes, "weight_scale": torch.ones(4, 8)}
    packed = PackedQuantizationCompressor.compress(tensors, scheme)
    torch.save(packed, path)
    rows, words = packed["weight_packed"].shape
    version = compressed_tensors.__version__
    print(f"{bits} bits, written by {version} as {rows} x {words} words, ", end="")
else:
    try:
        weight = PackedQuantizationCompressor.decompress(torch.load(path), scheme)["weight"]
        told = f"{100 * (weight != codes).float().mean():.0f} % of codes wrong"
    except RuntimeError as error:
        told = type(error).__name__
    print(f"read by {compressed_tensors.__version__}: {told}")
END
{
    for bits in 3 4; do
        PYTHONPATH=$work/old "$python" "$work/pack.py" write $bits "$work/weight.pt"
        "$python" "$work/pack.py" read $bits "$work/weight.pt"
        "$python" "$work/pack.py" write $bits "$work/weight.pt"
        PYTHONPATH=$work/old "$python" "$work/pack.py" read $bits "$work/weight.pt"
    done
} 2>"$work/stderr" | compare
