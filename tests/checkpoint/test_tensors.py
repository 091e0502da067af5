from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ggufkit.checkpoint import TensorReader, open_checkpoint
from ggufkit.errors import CheckpointError
from tests import factory
from tests.factory import make_checkpoint


def test_reads_each_tensor_in_its_dtype(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen2", hidden=64, dtype="bfloat16", shards=3)
    expected: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        expected |= load_file(shard)
    with TensorReader(open_checkpoint(path)) as reader:
        assert sorted(reader.names()) == sorted(expected)
        for name, tensor in expected.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.load(name).dtype == torch.bfloat16
            assert torch.equal(reader.load(name), tensor)
        with pytest.raises(KeyError):
            reader.load("model.ghost.weight")


def test_pickles_cannot_be_streamed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, hidden=64)
    factory.break_pickle_only(path)
    index = open_checkpoint(path, allow_pickle=True)
    with pytest.raises(CheckpointError, match="tensor by tensor") as caught:
        TensorReader(index)
    assert "save_pretrained" in caught.value.hint
