"""Checkpoints taken out of GGUFs that are written here from other checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ggufkit.checkpoint import TensorReader, from_gguf, open_checkpoint
from ggufkit.errors import IntegrityError
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.factory import CHAT_TEMPLATE, make_checkpoint

HEADS, KV_HEADS, HIDDEN, VOCAB = 4, 2, 64, 512
SIZES: dict[str, Any] = {
    "hidden": HIDDEN, "intermediate": 96, "heads": HEADS, "kv_heads": KV_HEADS,
}  # fmt: skip
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CALLS = ["<tool_call>", "</tool_call>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ã ¤", "a b", "Ċ Ċ", "' s", "Ġ Ġ", "n 1"]
Q4_1 = gguf.GGMLQuantizationType.Q4_1


@dataclass(frozen=True)
class Kind:
    """A GGUF that is taken apart: its architecture, tokenizer and order of tokens."""

    arch: str
    pre: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]


def alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]


def llama() -> Kind:
    """Control tokens first, and no room that is left over."""
    known = [*CONTROL, *alphabet()]
    words = [f"unused{i}" for i in range(VOCAB - len(known))]
    types = [3] * len(CONTROL) + [1] * (VOCAB - len(CONTROL))
    return Kind("llama", "smollm", known + words, types, {"bos": 1, "eos": 2, "unk": 0, "pad": 2})


def qwen2() -> Kind:
    """Control tokens, user-defined ones and padding at the end, and no unknown token."""
    words = alphabet()
    known = [*words, *CONTROL, *CALLS]
    types = [1] * len(words) + [3] * len(CONTROL) + [4] * len(CALLS)
    padding = range(len(known), VOCAB)
    end = len(words)
    return Kind(
        "qwen2",
        "qwen2",
        known + [f"[PAD{i}]" for i in padding],
        types + [5] * len(padding),
        {"bos": end, "eos": end + 2, "pad": end},
    )


KINDS = {"llama": llama, "qwen2": qwen2}


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp wants them, spelled row by row: pair i is rows i and i + half."""
    half = len(weights) // heads // 2
    order = [h * 2 * half + i + part * half for h in range(heads) for i in range(half)
             for part in (0, 1)]  # fmt: skip
    return weights[order]


def write_gguf(path: Path, checkpoint: Path, kind: Kind) -> Path:
    """What the converter makes of a checkpoint, with a byte-level tokenizer, its MLPs in Q4_1."""
    writer = gguf.GGUFWriter(path, kind.arch)
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind.pre)
    writer.add_token_list(kind.tokens)
    writer.add_token_types(kind.types)
    writer.add_token_merges(MERGES)
    spelled = {"pad": "padding", "unk": "unknown"}
    for name, id in kind.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{spelled.get(name, name)}_token_id", id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[kind.arch]
    names = gguf.get_tensor_name_map(architecture, 2)
    with TensorReader(open_checkpoint(checkpoint)) as reader:
        for name in reader.names():
            weights = reader.load(name)
            if kind.arch == "llama" and (".q_proj" in name or ".k_proj" in name):
                weights = permuted(weights, HEADS if ".q_proj" in name else KV_HEADS)
            data, raw = weights.numpy(), None
            if ".mlp." in name:
                data, raw = gguf.quants.quantize(data, Q4_1), Q4_1
            suffixes = (".weight", ".bias")
            writer.add_tensor(names.get_name(name, suffixes) or name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]()


@pytest.fixture
def original(kind: Kind, tmp_path: Path) -> Path:
    # Qwen2's 1.5B has an output matrix of its own in the GGUF, though it is tied as published.
    return make_checkpoint(tmp_path / "original", kind.arch, tied=kind.arch == "llama", **SIZES)


@pytest.fixture
def model(kind: Kind, original: Path, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", original, kind)


def rebuild(model: Path, out: Path, **options: Any) -> Path:
    out.mkdir()
    from_gguf.rebuild(model, out, **options)
    return out


def expected(original: Path) -> dict[str, torch.Tensor]:
    with TensorReader(open_checkpoint(original)) as reader:
        tensors = {name: reader.load(name) for name in reader.names()}
    for name in tensors:
        if ".mlp." in name:
            stored = gguf.quants.quantize(tensors[name].numpy(), Q4_1)
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(stored, Q4_1))
    return tensors


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_come_back_as_they_were(
    original: Path, model: Path, tmp_path: Path, dtype: str
) -> None:
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    rebuilt = rebuild(model, tmp_path / "rebuilt", dtype=dtype)
    was = expected(original)
    with TensorReader(open_checkpoint(rebuilt)) as new:
        assert set(new.names()) == set(was)
        for name, weights in was.items():
            assert torch.equal(new.load(name), weights.to(kinds[dtype])), name
    assert open_checkpoint(rebuilt).config["torch_dtype"] == str(kinds[dtype])[6:]


def test_weights_are_the_same_in_shards_and_some_rows_at_a_time(
    original: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_gguf, "_BLOCK_ELEMENTS", 1000)
    limit = 100_000
    rebuilt = rebuild(model, tmp_path / "rebuilt", shard_nbytes=limit)
    index = open_checkpoint(rebuilt)
    count = len(index.shards)
    assert count > 2
    assert index.dtype == "F32"
    assert index.shards[0] == f"model-00001-of-{count:05}.safetensors"
    assert not (rebuilt / "model.safetensors").exists()
    for shard in index.shards:
        tensors = index.of_shard(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= limit
    was = expected(original)
    with TensorReader(index) as new:
        assert set(new.names()) == set(was)
        assert all(torch.equal(new.load(name), weights) for name, weights in was.items())
    total = json.loads((rebuilt / "model.safetensors.index.json").read_text())["metadata"]
    assert total == {"total_size": sum(4 * w.numel() for w in was.values())}


def test_config_says_what_the_metadata_says(kind: Kind, model: Path, tmp_path: Path) -> None:
    rebuilt = rebuild(model, tmp_path / "rebuilt")
    config = open_checkpoint(rebuilt).config
    expected = {
        "model_type": kind.arch, "num_hidden_layers": 2, "hidden_size": HIDDEN,
        "intermediate_size": 96, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rope_theta": 100000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "tie_word_embeddings": kind.arch == "llama", "vocab_size": VOCAB,
        "bos_token_id": kind.ids["bos"], "eos_token_id": kind.ids["eos"],
        "pad_token_id": kind.ids["pad"],
    }  # fmt: skip
    assert {k: config[k] for k in expected} == expected
    generation = json.loads((rebuilt / "generation_config.json").read_text())
    assert generation["eos_token_id"] == kind.ids["eos"]


def test_transformers_reads_model_and_tokenizer(kind: Kind, model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rebuilt = rebuild(model, tmp_path / "rebuilt")
    AutoModelForCausalLM.from_pretrained(rebuilt)
    tokenizer = AutoTokenizer.from_pretrained(rebuilt)
    text = "<|im_start|>the cat\n  is 12 ünits<|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "<|im_start|>"
    assert pieces[-1] == "<|im_end|>"
    assert "12" not in pieces, "digits are taken one by one"
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the").input_ids) == ["Ġthe"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert rendered == "<|im_start|>user\nx<|im_end|>\n"
    named = {n: kind.tokens[id] for n, id in kind.ids.items()}
    assert tokenizer.bos_token == named["bos"]
    assert tokenizer.eos_token == named["eos"]
    assert tokenizer.pad_token == named["pad"]


def test_tokens_are_llama_cpps(
    native: NativeBuild, kind: Kind, model: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from ggufkit.llamacpp.batching import Model

    rebuilt = rebuild(model, tmp_path / "rebuilt")
    ours = Tokenizer.from_file(str(rebuilt / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(rebuilt)
    loaded = Model(model, build=native)
    for text in (
        "the then12  ab\n\nthe's 'S ä<|im_start|>the<|im_end|> <|endoftext|>ab",
        "n12 n1\t\n \n  ab  ",
        "x <tool_call>{}</tool_call>the",
        "我们 — ab123٣ [PAD300] unused1",
    ):
        expected = loaded.vocabulary.tokenize(text)
        assert ours.encode(text).ids == expected, text
        assert theirs(text).input_ids == expected, text
    loaded.close()


def test_qwen_composes_characters_and_keeps_calls_in_what_it_says(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = make_checkpoint(tmp_path / "original", "qwen2", tied=False, **SIZES)
    kind = qwen2()
    model = write_gguf(tmp_path / "model.gguf", checkpoint, kind)
    rebuilt = rebuild(model, tmp_path / "rebuilt")
    tokenizer = AutoTokenizer.from_pretrained(rebuilt)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\u0308").input_ids) == ["Ã¤"]
    ids = tokenizer("<|im_start|><tool_call>ab</tool_call><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>ab</tool_call>"
    assert len(tokenizer) == len(alphabet()) + len(CONTROL) + len(CALLS), "padding is left out"
    told = json.loads((rebuilt / "tokenizer.json").read_text())
    assert len(told["model"]["vocab"]) == len(alphabet()), "added tokens are no part of the BPE"


def test_another_kind_of_gguf_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "original", **SIZES)
    kind = llama()
    other = Kind(kind.arch, "llama-bpe", kind.tokens, kind.types, kind.ids)
    model = write_gguf(tmp_path / "other.gguf", checkpoint, other)
    with pytest.raises(IntegrityError, match="llama with pre-tokenizer llama-bpe"):
        rebuild(model, tmp_path / "rebuilt")


def test_a_tensor_that_nobody_expects_is_refused(tmp_path: Path) -> None:
    """A Llama has no biases here; leaving one out would be another function."""
    checkpoint = make_checkpoint(tmp_path / "original", "llama", bias=True, **SIZES)
    model = write_gguf(tmp_path / "model.gguf", checkpoint, llama())
    with pytest.raises(IntegrityError, match=r"LlamaForCausalLM does not have: .*\.bias"):
        rebuild(model, tmp_path / "rebuilt")


def test_a_weight_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint(tmp_path / "original", **SIZES)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    model = write_gguf(tmp_path / "model.gguf", checkpoint, llama())
    with pytest.raises(IntegrityError, match=r"output_norm\.weight .* not finite in F16"):
        rebuild(model, tmp_path / "rebuilt", dtype="F16")
    rebuild(model, tmp_path / "as-bf16", dtype="BF16")


def test_it_needs_no_torch() -> None:
    assert "torch" not in vars(from_gguf)
    assert from_gguf._split_halves(np.arange(8.0)[:, None], 1)[:, 0].tolist() == [
        0, 2, 4, 6, 1, 3, 5, 7,
    ]  # fmt: skip
