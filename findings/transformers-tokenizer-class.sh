#!/bin/sh
# transformers 5.23.0: a tokenizer_class can replace the pre-tokenizer of tokenizer.json.
#
# One would guess: tokenizer.json is the tokenizer, and tokenizer_class only names a
# Python class around it, as in transformers 4.
# What happens: for GPT2Tokenizer(Fast) and GPTNeoXTokenizer(Fast) the pipeline is built
# anew from vocabulary and merges. A Digits step of tokenizer.json is gone without a
# word, so that a number that was trained digit by digit is read in pieces of several.
# PreTrainedTokenizerFast keeps the file's. A LlamaTokenizer that does not fit is noticed
# and told; these are not.
# Who meets it: models that are published with such a class and a tokenizer.json that
# does more than GPT-2's.
#
#> tokenizers: x Ġ 1 2 3
#> PreTrainedTokenizerFast: x Ġ 1 2 3
#> Qwen2Tokenizer: x Ġ 1 2 3
#> GPT2Tokenizer: x Ġ 123
#> GPT2TokenizerFast: x Ġ 123
#> GPTNeoXTokenizerFast: x Ġ 123
. "$(dirname "$0")/environment.sh"
need transformers==5.23.0 tokenizers==0.23.3
"$python" - "$work" <<'END' | compare
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1]) / "tokenizer"
folder.mkdir()
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123"]
own = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("1", "2"), ("12", "3")]))
own.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
own.decoder = decoders.ByteLevel()
own.save(str(folder / "tokenizer.json"))
text = "x 123"
print("tokenizers:", *own.encode(text).tokens)
for name in (
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "GPTNeoXTokenizerFast",
):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    print(f"{name}:", *AutoTokenizer.from_pretrained(folder).tokenize(text))
END
