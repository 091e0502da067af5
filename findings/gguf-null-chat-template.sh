#!/bin/sh
# gguf 0.19.0 (llama.cpp's converter reads with it) takes another chat template than
# transformers 5.23.0.
#
# One would guess: chat_template.jinja is the template if it is there; a null in
# tokenizer_config.json says nothing.
# What happens: transformers reads chat_template.jinja first, always. gguf takes
# "chat_template" of tokenizer_config.json if there is such a key, and it counts as there
# when it is null: then the GGUF gets no template at all, and programs fall back on one
# that the model was not trained with. An old template in tokenizer_config.json beats the
# new file that save_pretrained has put beside it.
#
#> no key: gguf jinja-file, transformers jinja-file
#> null: gguf None, transformers jinja-file
#> another template: gguf from-config, transformers jinja-file
. "$(dirname "$0")/environment.sh"
need gguf==0.19.0 transformers==5.23.0 tokenizers==0.23.3
"$python" - "$work" <<'END' | compare
import json
import sys
from pathlib import Path

from gguf import SpecialVocab
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

folder = Path(sys.argv[1]) / "model"
folder.mkdir()
Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
(folder / "chat_template.jinja").write_text("jinja-file")
for what, keys in (
    ("no key", {}),
    ("null", {"chat_template": None}),
    ("another template", {"chat_template": "from-config"}),
):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **keys}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    converted = SpecialVocab(folder).chat_template
    original = AutoTokenizer.from_pretrained(folder).chat_template
    print(f"{what}: gguf {converted}, transformers {original}")
END
