"""Config and tensors are compared before any work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ggufkit.checkpoint import open_checkpoint
from ggufkit.checkpoint.consistency import check_tensors, predicts_further
from ggufkit.errors import CheckpointError
from tests.factory import ARCHITECTURES, edit_config, make_checkpoint, make_seeing_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", hidden=64, tied=False)


def tensors_of(path: Path) -> Tensors:
    return load_file(path / "model.safetensors")


def save(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(open_checkpoint(path))
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_architectures_pass(tmp_path: Path, arch: str) -> None:
    path = make_checkpoint(tmp_path / arch, arch, hidden=64, intermediate=64, vocab=384)
    check_tensors(open_checkpoint(path, trust_remote_code=True))


def test_a_model_that_sees_passes(tmp_path: Path) -> None:
    check_tensors(open_checkpoint(make_seeing_checkpoint(tmp_path / "seeing")))


def test_an_output_matrix_with_more_rows_than_the_embedding(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    tensors["lm_head.weight"] = torch.zeros(576, 64)
    save(checkpoint, tensors)
    message = refused(checkpoint)
    assert "lm_head.weight has the shape [576, 64]" in message
    assert "vocab_size is 512" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 500}, "embed_tokens.weight has the shape [512, 64], but vocab_size is 500"),
        ({"hidden_size": 128}, "hidden_size is 128"),
        ({"num_hidden_layers": 3}, "no tensors of model.layers.2, but num_hidden_layers is 3"),
        ({"num_hidden_layers": 1}, "tensors of model.layers.1, but num_hidden_layers is 1"),
        ({"num_attention_heads": 8}, "q_proj.weight has the shape"),
        ({"num_key_value_heads": 4}, "num_key_value_heads and head_dim ask for [64, 64]"),
        ({"intermediate_size": 100}, "hidden_size and intermediate_size ask for [100, 64]"),
    ],
)
def test_a_key_that_differs_is_named(
    checkpoint: Path, changes: dict[str, object], named: str
) -> None:
    if "num_attention_heads" in changes:
        changes |= {"head_dim": 16}
    edit_config(checkpoint, **changes)
    assert named in refused(checkpoint)


@pytest.mark.parametrize("value", ["two", [2], -1, 2.5, True])
def test_a_number_that_is_none(checkpoint: Path, value: object) -> None:
    edit_config(checkpoint, num_hidden_layers=value)
    assert "num_hidden_layers of config.json is" in refused(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.1.self_attn.k_proj", "model.layers.0.input_layernorm"),
        *("model.norm", "model.embed_tokens", "lm_head"),
    ],
)
def test_a_missing_tensor(checkpoint: Path, name: str) -> None:
    tensors = tensors_of(checkpoint)
    del tensors[f"{name}.weight"]
    save(checkpoint, tensors)
    assert f"no tensor {name}.weight" in refused(checkpoint)


def test_heads_of_a_width_that_only_the_class_knows_are_not_judged(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "gemma", "gemma", hidden=64)
    config = json.loads((path / "config.json").read_text())
    del config["head_dim"]
    (path / "config.json").write_text(json.dumps(config))
    check_tensors(open_checkpoint(path))


def test_layers_for_multi_token_prediction_are_no_surplus(checkpoint: Path) -> None:
    assert not predicts_further(open_checkpoint(checkpoint))
    tensors = tensors_of(checkpoint)
    further = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    save(checkpoint, tensors | further)
    edit_config(checkpoint, num_nextn_predict_layers=1)
    index = open_checkpoint(checkpoint)
    check_tensors(index)
    assert predicts_further(index)
    edit_config(checkpoint, num_nextn_predict_layers=None)
    save(checkpoint, tensors | further | {"model.layers.2.enorm.weight": torch.ones(64)})
    check_tensors(open_checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("part", "saved", "published"),
    [
        ("gate_up_proj", (4, 256, 64), (4, 64, 256)),
        # Square ones look alike, so the others have to show it.
        ("down_proj", (4, 64, 32), (4, 32, 64)),
    ],
)
def test_experts_that_transformers_transposed(
    checkpoint: Path, part: str, saved: tuple[int, ...], published: tuple[int, ...]
) -> None:
    edit_config(checkpoint, architectures=["Qwen3VLMoeForConditionalGeneration"])
    tensors = tensors_of(checkpoint)
    name = f"model.language_model.layers.0.mlp.experts.{part}"
    save(checkpoint, tensors | {name: torch.zeros(saved)})
    assert f"{list(saved)}: its experts are transposed" in refused(checkpoint)
    save(checkpoint, tensors | {name: torch.zeros(published)})
    check_tensors(open_checkpoint(checkpoint))
