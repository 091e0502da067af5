"""What is mended before the converter sees a checkpoint, and what is told of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ggufkit.checkpoint import TensorReader, open_checkpoint, read_templates, write_checkpoint
from ggufkit.checkpoint.prepare import Prepared, prepare_checkpoint
from ggufkit.errors import CheckpointError
from tests import factory
from tests.factory import edit_config, make_checkpoint

Prepare = Callable[[Path], Prepared]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", hidden=64, vocab=384, tied=False)


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    return lambda path: prepare_checkpoint(open_checkpoint(path), tmp_path / "prepared")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((read(path) if path.exists() else {}) | changes))


def test_a_sound_checkpoint_is_linked_as_it_is(checkpoint: Path, prepare: Prepare) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"1")
    prepared = prepare(checkpoint)
    assert prepared.notes == ()
    assert prepared.end_tokens == (2,)
    assert prepared.no_mtp
    assert {p.name for p in prepared.path.iterdir()} == {
        p.name for p in checkpoint.iterdir() if p.suffix != ".pt"
    }
    assert all(p.is_symlink() for p in prepared.path.iterdir())
    assert prepared.index.path == prepared.path
    assert open_checkpoint(prepared.path).tensors == prepared.index.tensors


def test_a_byte_order_mark_is_left_out(checkpoint: Path, prepare: Prepare) -> None:
    config = (checkpoint / "config.json").read_bytes()
    (checkpoint / "config.json").write_bytes(b"\xef\xbb\xbf" + config)
    prepared = prepare(checkpoint)
    assert (prepared.path / "config.json").read_bytes()[:1] == b"{"
    assert read(prepared.path / "config.json") == json.loads(config)
    assert any("byte order mark" in note for note in prepared.notes)


# --- weights -------------------------------------------------------------------


@pytest.mark.parametrize("others", ["missing", "there"])
def test_all_weights_in_one_file_beside_an_index_of_others(
    tmp_path: Path, prepare: Prepare, others: str
) -> None:
    path = make_checkpoint(tmp_path / "tiny", hidden=64, shards=2)
    whole = make_checkpoint(tmp_path / "whole", hidden=64, seed=1) / "model.safetensors"
    (path / whole.name).write_bytes(whole.read_bytes())
    if others == "missing":
        for shard in path.glob("model-*.safetensors"):
            shard.unlink()
    prepared = prepare(path)
    assert "holds all weights" in prepared.notes[0]
    assert [p.name for p in prepared.path.glob("*.safetensors*")] == ["model.safetensors"]
    with TensorReader(prepared.index) as reader:
        name = "model.norm.weight"
        assert torch.equal(reader.load(name), load_file(whole)[name])


def test_a_section_left_over_floats_is_taken_out(checkpoint: Path, prepare: Prepare) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "bitsandbytes"})
    (checkpoint / "hf_quant_config.json").write_text("{}")
    prepared = prepare(checkpoint)
    assert "bitsandbytes" in prepared.notes[0]
    assert "quantization_config" not in read(prepared.path / "config.json")
    assert "quantization_config" not in prepared.index.config
    assert not (prepared.path / "hf_quant_config.json").exists()


@pytest.mark.parametrize(("arch", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
@pytest.mark.parametrize("shards", [1, 2])
def test_names_without_a_prefix(
    tmp_path: Path, prepare: Prepare, arch: str, prefix: str, shards: int
) -> None:
    path = make_checkpoint(tmp_path / "tiny", arch, hidden=64, shards=shards)
    usual = set(open_checkpoint(path).tensors)
    for file in path.glob("*.safetensors"):
        tensors = {n.removeprefix(prefix): t for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = path / "model.safetensors.index.json"
    if shards > 1:
        weight_map = read(index)["weight_map"]
        edit(index, weight_map={n.removeprefix(prefix): f for n, f in weight_map.items()})
    prepared = prepare(path)
    assert set(prepared.index.tensors) == usual
    assert f"lack '{prefix}'" in prepared.notes[0]
    assert {new: old for old, new in prepared.renamed.items()} == {
        name: name.removeprefix(prefix) for name in usual if name.startswith(prefix)
    }
    write_checkpoint(prepared.index, tmp_path / "written", {})
    assert set(open_checkpoint(tmp_path / "written").tensors) == usual


def test_a_tied_matrix_stored_twice_is_left_out(checkpoint: Path, prepare: Prepare) -> None:
    edit_config(checkpoint, tie_word_embeddings=True)
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    same = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": same}, file, {"format": "pt"})
    prepared = prepare(checkpoint)
    assert prepared.dropped == ("lm_head.weight",)
    assert "lm_head.weight" not in prepared.index.tensors
    assert "repeats the embedding" in prepared.notes[0]
    assert prepared.index.config["tie_word_embeddings"] is True


def test_a_tied_matrix_with_other_weights_is_used(checkpoint: Path, prepare: Prepare) -> None:
    edit_config(checkpoint, tie_word_embeddings=True)
    prepared = prepare(checkpoint)
    assert prepared.dropped == ()
    assert "lm_head.weight" in prepared.index.tensors
    assert prepared.index.config["tie_word_embeddings"] is False
    assert read(prepared.path / "config.json")["tie_word_embeddings"] is False
    assert "holds other weights" in prepared.notes[0]


def test_transformers_does_not_tie_a_matrix_with_other_weights(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit_config(checkpoint, tie_word_embeddings=True)
    stored = load_file(checkpoint / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


def test_layers_for_multi_token_prediction_that_are_not_there(
    checkpoint: Path, prepare: Prepare
) -> None:
    edit_config(checkpoint, mtp_num_hidden_layers=1)
    prepared = prepare(checkpoint)
    assert prepared.no_mtp
    assert "multi-token prediction that are not in the files" in prepared.notes[0]


# --- tokens --------------------------------------------------------------------


def add_token(path: Path, number: int, content: str, special: bool = True) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    row = {"id": number, "content": content, **flags, "special": special}
    tokenizer = read(path / "tokenizer.json")
    tokenizer["added_tokens"].append(row)
    edit(path / "tokenizer.json", **tokenizer)


def test_a_token_past_the_embedding_is_left_out(checkpoint: Path, prepare: Prepare) -> None:
    add_token(checkpoint, 384, "<picture_slot>")
    edit(checkpoint / "added_tokens.json", **{"<picture_slot>": 384})
    edit(
        checkpoint / "tokenizer_config.json",
        image_token="<picture_slot>",
        extra_special_tokens={"image_token": "<picture_slot>"},
        additional_special_tokens=["<picture_slot>", "<s>"],
        added_tokens_decoder={"384": {"content": "<picture_slot>", "special": True}},
    )
    prepared = prepare(checkpoint)
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        assert "<picture_slot>" not in (prepared.path / name).read_text()
    assert read(prepared.path / "tokenizer_config.json")["additional_special_tokens"] == ["<s>"]
    assert prepared.notes[0].startswith("<picture_slot>: added after the last of 384 embeddings")
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(prepared.path)) == 384


@pytest.mark.parametrize("number", [384, 392, 600])
def test_a_token_past_the_embedding_that_text_needs_is_refused(
    checkpoint: Path, prepare: Prepare, number: int
) -> None:
    add_token(checkpoint, number, "<|im_start|>" if number == 384 else "<new>")
    with pytest.raises(CheckpointError, match=f"has {number + 1} tokens"):
        prepare(checkpoint)


def test_another_models_tokenizer_is_refused(checkpoint: Path, prepare: Prepare) -> None:
    factory.break_wrong_tokenizer(checkpoint)
    with pytest.raises(CheckpointError, match="embeddings for 384 only"):
        prepare(checkpoint)


def test_tokens_that_only_tokenizer_json_knows(tmp_path: Path, prepare: Prepare) -> None:
    path = make_checkpoint(tmp_path / "tiny", hidden=64, vocab=384)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = torch.zeros(387, 64)
    save_file(tensors, file, {"format": "pt"})
    edit_config(path, vocab_size=387)
    add_token(path, 384, "<think>", special=False)
    add_token(path, 385, "<|call|>")
    prepared = prepare(path)
    decoder = read(prepared.path / "tokenizer_config.json")["added_tokens_decoder"]
    assert {n: (row["content"], row["special"]) for n, row in decoder.items()} == {
        "384": ("<think>", False),
        "385": ("<|call|>", True),
    }
    assert "2 token(s) that only tokenizer.json knows" in prepared.notes[0]


def test_all_end_tokens_are_found(checkpoint: Path, prepare: Prepare) -> None:
    edit_config(checkpoint, eos_token_id=[4, 2], text_config={"eos_token_id": 5})
    edit(checkpoint / "generation_config.json", eos_token_id=[2, 7, 99999])
    prepared = prepare(checkpoint)
    assert prepared.end_tokens == (4, 2, 5, 7)
    assert "99999" in prepared.notes[0]


@pytest.mark.parametrize("value", ["</s>", [2, "x"], {"id": 2}, True, 2.0])
def test_an_end_token_that_is_no_id(checkpoint: Path, prepare: Prepare, value: object) -> None:
    edit(checkpoint / "generation_config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match=r"eos_token_id of generation_config\.json"):
        prepare(checkpoint)


# --- templates -----------------------------------------------------------------

OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_the_template_file_goes_before_the_config(checkpoint: Path, prepare: Prepare) -> None:
    (checkpoint / "chat_template.jinja").write_text(OTHER)
    prepared = prepare(checkpoint)
    assert read(prepared.path / "tokenizer_config.json")["chat_template"] == OTHER
    assert read_templates(prepared.path).named == read_templates(checkpoint).named
    assert "chat_template.jinja, as transformers takes it" in prepared.notes[0]


def test_a_null_does_not_hide_the_template_file(checkpoint: Path, prepare: Prepare) -> None:
    (checkpoint / "chat_template.jinja").write_text(OTHER)
    edit(checkpoint / "tokenizer_config.json", chat_template=None)
    assert read(prepare(checkpoint).path / "tokenizer_config.json")["chat_template"] == OTHER


def test_named_templates_are_kept(checkpoint: Path, prepare: Prepare) -> None:
    (checkpoint / "chat_template.jinja").write_text(OTHER)
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    prepared = prepare(checkpoint)
    value = read(prepared.path / "tokenizer_config.json")["chat_template"]
    assert value == [
        {"name": "default", "template": OTHER},
        {"name": "tool_use", "template": "T"},
    ]
    assert not (prepared.path / "additional_chat_templates").exists()


def test_a_template_file_alone_needs_no_mending(checkpoint: Path, prepare: Prepare) -> None:
    (checkpoint / "chat_template.jinja").write_text(OTHER)
    config = read(checkpoint / "tokenizer_config.json")
    del config["chat_template"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    assert prepare(checkpoint).notes == ()


# --- adapters ------------------------------------------------------------------


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "model.safetensors"])
def test_an_adapter_is_named_with_the_command_to_merge_it(checkpoint: Path, file: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    edit(checkpoint / "adapter_config.json", base_model_name_or_path="someone/base")
    low = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.rand(4, 64)}
    save_file(low, checkpoint / file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="LoRA adapter of someone/base") as caught:
        open_checkpoint(checkpoint)
    assert "merge_and_unload" in caught.value.hint
