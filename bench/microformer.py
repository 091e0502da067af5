"""KL divergence on a true float32 model: microformer-mgm, a GPT-2 of 8 blocks.

It models sequences of microbes, and there is no text for it; so it calibrates
on sequences that it samples itself and is measured on others. The converter
does not know its tokenizer. For AWQ, weights are therefore rounded by ggml in
place, all maps of the blocks to one type: its 256 columns suit every type. For
llama.cpp, each microbe is spelled as one character.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2LMHeadModel

from bench.processes import PYTHON, checked
from ggufkit import settings
from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.toolchain import NativeBuild, pip_download
from ggufkit.progress import SILENT
from ggufkit.scaling.awq import SCALES_FILE, Job, search_scales
from ggufkit.scaling.families import family_of
from ggufkit.scaling.fold import changes_of, read_scales
from ggufkit.scaling.importance import IMPORTANCE_FILE, after_fold, read_importance

REQUIREMENT = "microformer-mgm==0.5.8"
SHA256 = "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b"
TYPES = ("q4_0", "q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k")
SEQUENCES, LENGTH = 32, 256
FIRST_CHARACTER = 0x4E00
"""Unicode has more than 20,000 characters in a row from here on."""
CONVERT = """
import runpy
import sys

from_script, *sys.argv = sys.argv[1:]
sys.path.insert(0, from_script.rpartition("/")[0])
from conversion.gpt2 import GPT2Model


def set_vocab(self):
    count, writer = self.hparams["vocab_size"], self.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(FIRST_CHARACTER + n) for n in range(count)])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([1] * count)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)


GPT2Model.set_vocab = set_vocab
runpy.run_path(from_script, run_name="__main__")
""".replace("FIRST_CHARACTER", str(FIRST_CHARACTER))
"""Runs llama.cpp's converter, with this vocabulary instead of one of its own."""


def print_microformer(build: NativeBuild, scratch: Path) -> None:
    path = fetch(scratch / "microformer")
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(0)
    looked_at, measured = (sample(model) for _ in range(2))
    with torch.inference_mode():
        reference = model(measured).logits.log_softmax(-1)
    ggml = Ggml(build.bin, settings.threads())
    print(f"\n{REQUIREMENT}, {SEQUENCES} x {LENGTH} tokens sampled from it looked at, as many")
    print("measured; mean KL divergence\n")
    print("| type | plain | AWQ | imatrix | AWQ + imatrix |")
    print("|---|---|---|---|---|")
    for type in TYPES:
        told = [
            divergence(model, reference, measured, weights)
            for weights in rounded(path, type, looked_at, ggml, scratch / type)
        ]
        print(f"| {type.upper()} | " + " | ".join(f"{kl:.5f}" for kl in told) + " |", flush=True)


def fetch(directory: Path) -> Path:
    wheel = pip_download(REQUIREMENT, SHA256, directory / "wheel")
    inside = "mgm/resources/general_model/"
    with zipfile.ZipFile(wheel) as archive:
        config = json.loads(archive.read(f"{inside}config.json"))
        with archive.open(f"{inside}pytorch_model.bin") as file:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    kept = {
        name: tensor.float().contiguous()
        for name, tensor in tensors.items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".masked_bias"))
    }
    config["n_ctx"] = config["n_positions"]  # the converter's name for it
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Nothing is tokenized here, but a checkpoint without a tokenizer is refused.
    words = {f"microbe-{n}": n for n in range(config["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="microbe-0")).save(str(directory / "tokenizer.json"))
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


def as_gguf(build: NativeBuild, checkpoint: Path, out: Path) -> Path:
    """The model for llama.cpp, in F32; :func:`as_text` spells tokens for it."""
    script = build.scripts / "convert_hf_to_gguf.py"
    checked(
        [PYTHON, "-c", CONVERT, script, script, checkpoint, "--outfile", out, "--outtype", "f32"]
    )
    return out


def as_text(tokens: torch.Tensor) -> str:
    return "".join(chr(FIRST_CHARACTER + n) for n in tokens.flatten().tolist())


def sample(model: Any, sequences: int = SEQUENCES, length: int = LENGTH) -> torch.Tensor:
    start = torch.full((sequences, 1), int(model.config.bos_token_id or 0))
    tokens: torch.Tensor = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        min_length=length,
        max_length=length,
        pad_token_id=0,
    )
    return tokens


def rounded(
    path: Path, type: str, looked_at: torch.Tensor, ggml: Ggml, scratch: Path
) -> Iterator[dict[str, torch.Tensor]]:
    """The weights plain, with AWQ, with imatrix and with both, stored and read back."""
    index = open_checkpoint(path)
    family = family_of(index.config)
    maps = [n for n, t in index.tensors.items() if ".h." in n and len(t.shape) == 2]
    plan = dict.fromkeys(maps, type)
    kind = ggml.type(type)
    jobs = [Job(scratch / str(importance), plan, importance) for importance in (False, True)]
    search_scales(index, family, looked_at, jobs, ggml, SILENT)
    original = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).state_dict()
    for importance in (False, True):
        for awq in (False, True):
            directory = jobs[importance].directory
            scales = read_scales(directory / SCALES_FILE)
            squares = read_importance(directory / IMPORTANCE_FILE)
            tensors = dict(original)
            if awq:
                squares = after_fold(squares, index, family, scales)
                for name, change in changes_of(index, family, scales).items():
                    tensors[name] = change(original[name])
            for name in maps:
                rows = tensors[name].T.contiguous().numpy()
                means = squares[name].mean.numpy() if importance else None
                stored = torch.from_numpy(ggml.round_trip(kind, rows, means))
                tensors[name] = stored.T.contiguous()
            yield tensors


def divergence(
    model: Any,
    reference: torch.Tensor,
    tokens: torch.Tensor,
    weights: dict[str, torch.Tensor],
) -> float:
    model.load_state_dict(weights)
    with torch.inference_mode():
        logits = model(tokens).logits.log_softmax(-1)
    return float((reference.exp() * (reference - logits)).sum(-1).mean(dtype=torch.float64))
