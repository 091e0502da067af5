#!/bin/sh
# bitsandbytes 0.50.2: "FP4" is not the FP4 (E2M1) of MXFP4 and NVFP4.
#
# One would guess: FP4 is E2M1, whose values are 0, 0.5, 1, 1.5, 2, 3, 4, 6, in order of
# their codes, over 6.
# What happens: codes are not in order of values, and the smallest value is not 1/12 of
# the largest but 1/192, so that there is next to nothing between 0 and 1/6. A reader that
# takes the nibbles for E2M1 is wrong in five codes of eight. The map is stored with
# each weight (quant_map); one who reads such files must use it.
#
#> code: 0 1 2 3 4 5 6 7
#> bitsandbytes, x 12: 0 0.0625 8 12 4 6 2 3
#> E2M1, x 12 / 6: 0 1 2 3 4 6 8 12
. "$(dirname "$0")/environment.sh"
need torch==2.13.0 bitsandbytes==0.50.2
"$python" - <<'END' 2>"$work/stderr" | compare
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

_, state = quantize_4bit(torch.linspace(-1, 1, 64), quant_type="fp4", blocksize=64)
# Each byte holds two codes, the high one first: these eight bytes hold 0 to 15.
codes = torch.tensor([16 * (2 * n) + 2 * n + 1 for n in range(8)], dtype=torch.uint8)
state.shape, state.absmax = torch.Size([16]), torch.ones(1)
values = dequantize_4bit(codes[:, None], state).flatten()[:8]
print("code:", *range(8))
print("bitsandbytes, x 12:", *(f"{12 * v:.4g}" for v in values.tolist()))
print("E2M1, x 12 / 6:", *(f"{2 * v:g}" for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)))
END
