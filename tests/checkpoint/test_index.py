import json
from pathlib import Path

import pytest

from ggufkit.checkpoint import (
    checkpoint_files,
    digest_checkpoint,
    open_checkpoint,
)
from ggufkit.errors import CheckpointError, GgufkitError, IntegrityError, SourceError
from tests import factory
from tests.factory import make_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", hidden=64, intermediate=96, shards=2)


def refused(path: Path, kind: type[GgufkitError], **options: bool) -> GgufkitError:
    with pytest.raises(kind) as caught:
        open_checkpoint(path, **options)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_index_says_what_is_there(checkpoint: Path) -> None:
    index = open_checkpoint(checkpoint)
    assert index.architectures == ("LlamaForCausalLM",)
    assert index.dtype == "F32"
    assert index.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    entry = index.tensors["model.layers.0.mlp.down_proj.weight"]
    assert entry.shape == (64, 96)
    assert entry.nbytes == 64 * 96 * 4
    total = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert index.nbytes == total["metadata"]["total_size"] == 4 * index.parameters
    assert index.metadata[index.shards[0]] == {"format": "pt"}


def test_byte_ranges_are_those_of_the_values(checkpoint: Path) -> None:
    import numpy as np
    from safetensors import safe_open

    entry = open_checkpoint(checkpoint).tensors["model.norm.weight"]
    raw = (checkpoint / entry.shard).read_bytes()[entry.start : entry.start + entry.nbytes]
    with safe_open(checkpoint / entry.shard, framework="np") as file:
        expected = file.get_tensor(entry.name)
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), expected)


def test_missing_directory(tmp_path: Path) -> None:
    error = refused(tmp_path / "nothing", SourceError)
    assert "nothing" in error.message
    assert "hf:ORG/NAME" in error.hint


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file", SourceError).message


def test_empty_directory(tmp_path: Path) -> None:
    assert "is empty" in refused(tmp_path, CheckpointError).message


def test_no_config(checkpoint: Path) -> None:
    factory.break_no_config(checkpoint)
    assert "no config.json" in refused(checkpoint, CheckpointError).message


def test_no_config_beside_a_gguf_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert str(tmp_path / "model.gguf") in refused(tmp_path, CheckpointError).hint


def test_lora_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refused(tmp_path, CheckpointError)
    assert "LoRA adapter" in error.message
    assert "Merge" in error.hint


@pytest.mark.parametrize("text", ["{", "", "{]}", "[" * 100_000])
def test_config_that_is_not_json(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert "not valid JSON" in refused(checkpoint, CheckpointError).message


def test_config_that_is_no_object(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[]")
    assert "not a JSON object" in refused(checkpoint, CheckpointError).message


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [1]])
def test_config_without_architectures(checkpoint: Path, names: object) -> None:
    factory.edit_config(checkpoint, architectures=names)
    error = refused(checkpoint, CheckpointError)
    assert "names no architectures" in error.message
    assert "LlamaForCausalLM" in error.hint


def test_missing_shard_is_named(checkpoint: Path) -> None:
    factory.break_missing_shard(checkpoint)
    error = refused(checkpoint, CheckpointError)
    assert "lacks 1 of its 2 shards: model-00002-of-00002.safetensors" in error.message


def test_tensor_in_no_shard(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(content))
    assert "'model.ghost.weight'" in refused(checkpoint, CheckpointError).message


def test_tensor_in_two_shards(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()
    first = checkpoint / "model-00001-of-00002.safetensors"
    (checkpoint / "model-00003.safetensors").write_bytes(first.read_bytes())
    assert "is in two shards" in refused(checkpoint, CheckpointError).message


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/x.safetensors", "a\\b.safetensors"]
)
def test_index_that_points_outside(checkpoint: Path, name: str) -> None:
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": name}}))
    assert name in refused(checkpoint, IntegrityError).message


def test_index_without_weight_map(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in refused(checkpoint, CheckpointError).message


def test_truncated_shard_says_needed_and_found(checkpoint: Path) -> None:
    shard = checkpoint / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    factory.break_truncated(checkpoint)
    message = refused(checkpoint, IntegrityError).message
    assert f"needs {size:,} bytes and has {size - 1024:,}" in message


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_truncated_in_the_header(checkpoint: Path, size: int) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.truncate(size)
    assert f"has {size:,}" in refused(checkpoint, IntegrityError).message


def test_absurd_header_length(checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    shard.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "claims a header of 4,611,686,018,427,387,904 bytes" in (
        refused(checkpoint, IntegrityError).message
    )


def header(path: Path, text: str, data: bytes = b"") -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not json", "Expecting value"),
        ("[]", "pop"),
        ('{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype 'F99'"),
        ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "which is not F32 [2]"),
        ('{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "natural number"),
        ('{"x": {"dtype": "F32", "shape": [1]}}', "data_offsets"),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "gap or overlap at 'x'"),
    ],
)
def test_malformed_header(checkpoint: Path, text: str, reason: str) -> None:
    header(checkpoint / "model-00001-of-00002.safetensors", text, b"\0" * 8)
    message = refused(checkpoint, IntegrityError).message
    assert "malformed safetensors header" in message
    assert reason in message


def test_bytes_after_the_last_tensor(checkpoint: Path) -> None:
    with (checkpoint / "model-00001-of-00002.safetensors").open("ab") as file:
        file.write(b"12345")
    assert "5 bytes more" in refused(checkpoint, IntegrityError).message


def test_pickle_only_is_refused_unless_asked(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny", hidden=64)
    factory.break_pickle_only(path)
    error = refused(path, CheckpointError)
    assert "pytorch_model.bin" in error.message
    assert "can run any code" in error.message
    assert "--allow-pickle" in error.hint
    index = open_checkpoint(path, allow_pickle=True)
    assert index.pickles == ("pytorch_model.bin",)
    assert index.nbytes == (path / "pytorch_model.bin").stat().st_size


def test_no_weights_at_all(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    assert "has no weights" in refused(checkpoint, CheckpointError).message


def test_code_of_its_own_is_named_and_refused(checkpoint: Path) -> None:
    factory.break_auto_map(checkpoint)
    error = refused(checkpoint, CheckpointError)
    assert "config.json (auto_map) would run modeling_evil.py" in error.message
    assert "--trust-remote-code" in error.hint
    assert open_checkpoint(checkpoint, trust_remote_code=True).tensors


def test_code_of_another_repository_in_the_tokenizer(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": ["ORG/OTHER--tok.Slow", None]}
    path.write_text(json.dumps(config))
    assert "would run tok.py of ORG/OTHER" in refused(checkpoint, CheckpointError).message


def test_quantized_already(checkpoint: Path) -> None:
    factory.break_quantized(checkpoint)
    error = refused(checkpoint, CheckpointError)
    assert "already quantized (awq, 4 bits)" in error.message
    assert "original model" in error.hint


def test_no_tokenizer(checkpoint: Path) -> None:
    factory.break_no_tokenizer(checkpoint)
    error = refused(checkpoint, CheckpointError)
    assert "no tokenizer files" in error.message
    assert "original model" in error.hint


def test_digest_follows_content_and_not_bystanders(checkpoint: Path) -> None:
    def fake(path: Path) -> str:
        return path.read_bytes().hex()

    before = digest_checkpoint(checkpoint, fake)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / ".hidden.json").write_text("{}")
    (checkpoint / "photo.png").write_bytes(b"")
    (checkpoint / "optimizer.pt").write_bytes(b"")
    assert digest_checkpoint(checkpoint, fake) == before
    factory.edit_config(checkpoint, rope_theta=20000.0)
    assert digest_checkpoint(checkpoint, fake) != before


def test_files_are_weights_and_companions(checkpoint: Path) -> None:
    assert [p.name for p in checkpoint_files(checkpoint)] == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
