"""Whether a checkpoint that was taken out of a GGUF is the GGUF's model.

Four comparisons, each with something that was not used to make the checkpoint:
token ids with llama.cpp's own tokenizer; metadata, vocabulary and each tensor
with what the vendored converter makes of the checkpoint; and perplexity of that
file with the GGUF's own F16 and F32 forms, written by llama-quantize.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unicodedata import normalize

import numpy as np
from gguf import GGUFReader, ReaderTensor

from bench.processes import checked
from ggufkit import settings
from ggufkit.checkpoint import CheckpointIndex, TensorReader, open_checkpoint
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.batching import Model
from ggufkit.llamacpp.toolchain import NativeBuild

CHUNKS = 4
PROBE = (
    "The cat's 12 o'clock nap wasn't over; they'll say 'TIS 3.14159, WE'RE 1234567890!",
    "def f(x: int) -> str:\n\tif x >= 0x1F:\n        return f'{x!r}'  # done\r\n\r\n\r\n",
    "    four spaces\n\n\n  \t two, a tab \t\t and blanks at the end   ",
    "Größe, naïve, Ångström, İstanbul, Œuvre, ﬁ, ½, x², №, ㎏",
    "e\u0301a\u0308 (to be composed), \u1100\u1161\u11a8 (Jamo), \u212b (the sign of Ångström)",
    "Съешь ещё этих мягких французских булок, да выпей чаю. Ωκεανός, αβγ.",
    "我能吞下玻璃而不伤身体。日本語のテキスト、カタカナ、ひらがな。한국어 문장입니다.",
    "שלום עולם، مرحبا بالعالم ١٢٣٤٥, नमस्ते दुनिया १२३, สวัสดีชาวโลก, Բարեւ, ამინდი, ሰላም",
    "👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 👍🏽 ✈️ ☃ ∑∫√ ≤≥ →⇒ \u200b\u200d\ufeff \u00a0\u2003\u3000 \u2028",
    "\x00\x01\x7f\x85 \ud7ff\ue000\ufffd \U0001f600\U00020000\U000e0041\U0010ffff",
    "https://example.org/a?b=c&d=%20#e <div class=\"x\">&amp;</div> {{ {% %} }} $$\\frac{1}{2}$$",
    "SELECT * FROM t WHERE a <> 'b' AND c IN (1,2,3); -- ok\n" * 3,
    "a" * 300 + "!" * 300 + " " * 300 + "\n" * 300 + "\uff19" * 30,
    "<|im_start|>system\nYou are<|im_end|>\n<|im_start|>user\n<|im_end|><|endoftext|>",
    "<tool_call>\n{\"name\": \"f\"}\n</tool_call><|fim_prefix|>x <|fim_suffix|> y<|fim_middle|>",
    "<|vision_start|><|image_pad|><|vision_end|> <|im_start <|unknown|> |im_end|> [PAD151665]",
)  # fmt: skip


def prove(gguf: Path, checkpoint: Path, scratch: Path) -> None:
    """Print what was compared; end the process at the first difference."""
    build = toolchain.find_build()
    print(f"token ids: {compare_tokens(gguf, checkpoint):,} in {len(PROBE)} texts equal")
    converted, own = scratch / "converted.gguf", scratch / "own-f16.gguf"
    toolchain.convert_checkpoint(
        build, checkpoint, converted, outtype="f16", name="proof", log=scratch / "convert.log"
    )
    requantize(build, gguf, own, "F16")
    print(f"metadata: {compare_metadata(gguf, converted)} keys equal")
    print(f"tensors: {compare_tensors(own, converted)} equal, bit for bit")
    print(f"in the checkpoint: {compare_vectors(gguf, checkpoint)} vectors equal in float32")
    print_perplexity(build, gguf, own, converted, scratch)


def require(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"not the same: {what}")


def compare_tokens(gguf: Path, checkpoint: Path) -> int:
    """Ids of the probe by llama.cpp, by transformers and by tokenizers.

    llama.cpp does not compose characters (NFC), which the tokenizer begins with;
    it is given the text composed.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    model = Model(gguf)
    count = 0
    for text in (*PROBE, "".join(PROBE)):
        expected = model.vocabulary.tokenize(normalize("NFC", text))
        require(ours.encode(text).ids == expected, f"tokens of {text[:60]!r}, tokenizers")
        require(theirs(text).input_ids == expected, f"tokens of {text[:60]!r}, transformers")
        count += len(expected)
    model.close()
    return count


def compare_metadata(gguf: Path, converted: Path) -> int:
    """Hyperparameters, vocabulary, merges, special tokens and template.

    Left out is what the two files are meant to differ in, and what an older or
    newer converter writes besides; of that, no key may change what the model does.
    """
    old, new = (fields(GGUFReader(path)) for path in (gguf, converted))
    other = ("GGUF.", "general.")
    for name in old:
        if not name.startswith(other):
            require(name in new and old[name] == new[name], name)
    added = [name for name in new if name not in old and not name.startswith(other)]
    print(f"  only the converter writes: {', '.join(added) or 'nothing'}")
    return sum(not name.startswith(other) for name in old)


def fields(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def compare_tensors(own: Path, converted: Path) -> int:
    old, new = ({t.name: t for t in GGUFReader(path).tensors} for path in (own, converted))
    require(old.keys() == new.keys(), f"names of tensors: {sorted(old.keys() ^ new.keys())}")
    for name, tensor in old.items():
        require(same(tensor, new[name]), f"tensor {name}")
    return len(old)


def same(one: ReaderTensor, other: ReaderTensor) -> bool:
    alike = (one.tensor_type, tuple(one.shape)) == (other.tensor_type, tuple(other.shape))
    return alike and np.array_equal(one.data.view(np.uint8), other.data.view(np.uint8))


def compare_vectors(gguf: Path, checkpoint: Path) -> int:
    """Norms and biases, which the GGUF has in F32: F16 must have lost nothing."""
    index: CheckpointIndex = open_checkpoint(checkpoint)
    names = [n for n, t in index.tensors.items() if len(t.shape) == 1]
    vectors = [t for t in GGUFReader(gguf).tensors if len(t.shape) == 1]
    require(len(names) == len(vectors), "the number of vectors")
    # Both are in the GGUF's order, shard after shard.
    with TensorReader(index) as reader:
        for name, vector in zip(names, vectors, strict=True):
            require(np.array_equal(reader.load(name).float().numpy(), vector.data), name)
    return len(names)


def requantize(build: NativeBuild, source: Path, out: Path, type: str) -> None:
    threads = str(settings.threads())
    checked([build.tool("llama-quantize"), "--allow-requantize", source, out, type, threads])


def print_perplexity(
    build: NativeBuild, gguf: Path, own: Path, converted: Path, scratch: Path
) -> None:
    text = scratch / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    print(f"perplexity, {CHUNKS} x 512 tokens of Python's documentation:")
    measured = {}
    for name, path in (
        ("the GGUF, Q4_K_M", gguf),
        ("the GGUF as F16", own),
        ("the checkpoint, converted to F16", converted),
    ):
        measured[path] = perplexity(build, path, text, scratch)
        print(f"  {name}: {measured[path]:.4f}", flush=True)
    require(measured[own] == measured[converted], "perplexity")
    own.unlink()
    converted.unlink()
    full = scratch / "own-f32.gguf"
    requantize(build, gguf, full, "F32")
    print(f"  the GGUF as F32: {perplexity(build, full, text, scratch):.4f}", flush=True)


def perplexity(build: NativeBuild, model: Path, text: Path, scratch: Path) -> float:
    measured = toolchain.perplexity(
        build,
        model,
        text,
        chunks=CHUNKS,
        threads=settings.threads(),
        log=scratch / "perplexity.log",
    )
    return measured.perplexity
