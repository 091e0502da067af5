"""Whether weights are quantized is seen in the tensors, whatever the config says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ggufkit.checkpoint import open_checkpoint, open_config
from ggufkit.errors import CheckpointError
from tests import factory
from tests.factory import make_checkpoint

SECTION = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", hidden=64)


def change(path: Path, name: str, tensor: torch.Tensor) -> None:
    file = path / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file, {"format": "pt"})


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_section_over_floats_is_no_obstacle(checkpoint: Path, key: str) -> None:
    factory.edit_config(checkpoint, **{key: SECTION})
    assert open_checkpoint(checkpoint).dtype == "F32"


@pytest.mark.parametrize(
    "name",
    [
        *("q.qweight", "q.weight_packed", "q.weight_scale", "q.weight_scale_inv"),
        *("q.weight.absmax", "q.SCB", "q.weight.quant_state.bitsandbytes__nf4"),
        "mlp.experts.gate_up_proj_blocks",
    ],
)
def test_names_show_packed_weights(checkpoint: Path, name: str) -> None:
    factory.edit_config(checkpoint, quantization_config=SECTION)
    change(checkpoint, f"model.layers.0.{name}", torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"already quantized \(bitsandbytes\)"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_dtypes_show_packed_weights(checkpoint: Path, dtype: torch.dtype) -> None:
    factory.edit_config(checkpoint, quantization_config=SECTION)
    name = "model.layers.0.mlp.up_proj.weight"
    change(checkpoint, name, torch.zeros(512, 64).to(dtype))
    with pytest.raises(CheckpointError, match="up_proj"):
        open_checkpoint(checkpoint)


def test_packed_weights_without_a_section_are_refused_too(checkpoint: Path) -> None:
    change(checkpoint, "model.layers.0.mlp.up_proj.qweight", torch.zeros(4, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="of an unnamed method"):
        open_checkpoint(checkpoint)


def test_an_index_shows_packed_weights_before_they_are_fetched(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny", hidden=64, shards=2)
    factory.edit_config(path, quantization_config=SECTION)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    assert open_config(path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.0.mlp.up_proj.qweight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="already quantized"):
        open_config(path)
