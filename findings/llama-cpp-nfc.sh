#!/bin/sh
# llama.cpp (through xllamacpp 2026.10.11549) does not compose characters where the
# tokenizer of the model does.
#
# One would guess: a GGUF with tokenizer.ggml.pre = "qwen2" gives the ids that the model's
# tokenizer.json gives, whose first step is the normalizer NFC.
# What happens: llama.cpp splits and merges the text as it comes. A text in decomposed
# form (names of files on macOS, much Vietnamese, Hangul in Jamo) becomes other and more
# tokens than the model was trained with. Composed text gives the same ids.
#
#> composed: tokenizers [66, 64, 257], llama.cpp [66, 64, 257]
#> decomposed: tokenizers [66, 64, 257], llama.cpp [66, 64, 69, 68, 136, 223]
. "$(dirname "$0")/environment.sh"
need xllamacpp==2026.10.11549 gguf==0.19.0 tokenizers==0.23.3
cat >"$work/compare.py" <<'END'
import json
import os
import socket
import sys
import urllib.request

import gguf
import numpy as np
import xllamacpp
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as pre

WIDTH = 32
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
tokens = [*sorted(pre.ByteLevel.alphabet()), "Ã©", "fÃ©"]
merges = [("Ã", "©"), ("f", "Ã©")]
tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
tokenizer.normalizer = normalizers.NFC()
tokenizer.pre_tokenizer = pre.Sequence(
    [
        pre.Split(Regex(PATTERN), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)

# The smallest model that loads: one block, all weights zero.
path = f"{sys.argv[1]}/model.gguf"
writer = gguf.GGUFWriter(path, "llama")
writer.add_block_count(1)
writer.add_context_length(128)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(WIDTH)
writer.add_head_count(1)
writer.add_head_count_kv(1)
writer.add_rope_dimension_count(WIDTH)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list([*tokens, "<end>"])
writer.add_token_types([1] * len(tokens) + [3])
writer.add_token_merges([" ".join(pair) for pair in merges])
writer.add_bos_token_id(len(tokens))
writer.add_eos_token_id(len(tokens))
writer.add_add_bos_token(False)
shapes = {"token_embd": (len(tokens) + 1, WIDTH), "output_norm": (WIDTH,)}
shapes |= {f"blk.0.{n}_norm": (WIDTH,) for n in ("attn", "ffn")}
maps = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
shapes |= {f"blk.0.{n}": (WIDTH, WIDTH) for n in maps}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx, parameters.port, parameters.warmup = 64, port, False
server = xllamacpp.Server(parameters)


def llama_cpp(text):
    body = json.dumps({"content": text}).encode()
    address = f"{server.listening_address}/tokenize"
    asked = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.load(answer)["tokens"]


with open(sys.argv[2], "w") as out:
    for what, text in (("composed", "caf\u00e9"), ("decomposed", "cafe\u0301")):
        told = f"tokenizers {tokenizer.encode(text).ids}, llama.cpp {llama_cpp(text)}"
        print(f"{what}: {told}", file=out)
os._exit(0)  # the server's threads need not be waited for
END
timeout 120 "$python" "$work/compare.py" "$work" "$work/lines" >"$work/log" 2>&1 || {
    tail "$work/log" >&2
    exit 1
}
compare <"$work/lines"
