import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufkit.checkpoint import TensorReader, open_checkpoint, write_checkpoint
from ggufkit.checkpoint.index import read_safetensors_header
from ggufkit.checkpoint.write import safetensors_header
from ggufkit.errors import CheckpointError
from tests import factory
from tests.factory import make_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_without_changes_the_copy_is_the_original(tmp_path: Path, dtype: str, shards: int) -> None:
    path = make_checkpoint(tmp_path / "a", hidden=64, dtype=dtype, shards=shards)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    write_checkpoint(open_checkpoint(path), tmp_path / "b", {})
    assert sorted(p.name for p in path.iterdir()) == sorted(
        p.name for p in (tmp_path / "b").iterdir()
    )
    for file in path.iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_replaced_tensors_change_and_nothing_else(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", "qwen2", hidden=64, dtype="bfloat16", shards=2)
    original = open_checkpoint(path)
    write_checkpoint(original, tmp_path / "b", {NAME: lambda t: t.double() * 2})
    written = open_checkpoint(tmp_path / "b")
    assert written.tensors == original.tensors
    with TensorReader(original) as old, TensorReader(written) as new:
        for name in old.names():
            factor = 2 if name == NAME else 1
            assert torch.equal(new.load(name), old.load(name) * factor), name


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("shards", [1, 2])
def test_transformers_loads_what_is_written(tmp_path: Path, arch: str, shards: int) -> None:
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(tmp_path / "a", arch, hidden=64, intermediate=96, shards=shards)
    factory.edit_config(path, quantization_config={})
    index = open_checkpoint(path)
    write_checkpoint(index, tmp_path / "b", {NAME: torch.zeros_like})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    state = model.state_dict()
    assert not state[NAME].any()
    with TensorReader(index) as reader:
        for name in set(reader.names()) - {NAME}:
            assert torch.equal(state[name], reader.load(name)), name


def test_added_tensors_and_config_changes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", hidden=64, shards=2)
    index = open_checkpoint(path)
    head = torch.arange(512 * 64, dtype=torch.float32).reshape(512, 64)
    write_checkpoint(
        index,
        tmp_path / "b",
        {},
        add={"lm_head.weight": head},
        config_changes={"tie_word_embeddings": False},
    )
    written = open_checkpoint(tmp_path / "b")
    assert written.config == index.config | {"tie_word_embeddings": False}
    assert written.tensors["lm_head.weight"].shard == index.shards[-1]
    content = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert content["weight_map"]["lm_head.weight"] == index.shards[-1]
    assert content["metadata"]["total_size"] == written.nbytes
    with TensorReader(written) as reader:
        assert torch.equal(reader.load("lm_head.weight"), head)


def test_dropped_config_key(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", hidden=64)
    write_checkpoint(open_checkpoint(path), tmp_path / "b", {}, drop_config_keys=["rope_theta"])
    assert "rope_theta" not in open_checkpoint(tmp_path / "b").config


def test_values_that_do_not_fit_the_dtype(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", hidden=64, dtype="float16")
    with pytest.raises(CheckpointError, match=f"'{NAME}'.*not finite in F16") as caught:
        write_checkpoint(open_checkpoint(path), tmp_path / "b", {NAME: lambda t: t.float() * 1e6})
    assert "BF16" in caught.value.hint


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", hidden=64)
    factory.break_pickle_only(path)
    with pytest.raises(CheckpointError, match="tensor by tensor"):
        write_checkpoint(open_checkpoint(path, allow_pickle=True), tmp_path / "b", {})
    assert not (tmp_path / "b").exists()


def test_wrong_requests(tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "a", hidden=64))
    with pytest.raises(ValueError, match="no such tensor"):
        write_checkpoint(index, tmp_path / "b", {"ghost": torch.neg})
    with pytest.raises(ValueError, match="is there already"):
        write_checkpoint(index, tmp_path / "b", {}, add={NAME: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"was \(512, 64\), is \(64, 512\)"):
        write_checkpoint(index, tmp_path / "b", {NAME: torch.t})


class Recorder:
    """Progress that remembers the highest amount."""

    def __init__(self) -> None:
        self.total = self.done = 0.0

    def task(self, title: str, total: float | None = None, unit: str = "") -> "Recorder":
        self.total = total or 0
        return self

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: float, note: str = "") -> None:
        assert done >= self.done
        self.done = done


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "a", hidden=64, shards=2))
    recorder = Recorder()
    write_checkpoint(index, tmp_path / "b", {NAME: torch.neg}, progress=recorder)
    assert recorder.done == recorder.total == index.nbytes


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
tensors = st.dictionaries(
    names,
    st.tuples(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1)]), st.lists(st.integers(0, 3))),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(tensors, st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]))))
def test_header_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    wanted: dict[str, tuple[tuple[str, int], list[int]]],
    metadata: dict[str, str],
) -> None:
    from math import prod

    rows = [(n, d, tuple(s), prod(s) * width) for n, ((d, width), s) in wanted.items()]
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    head = safetensors_header(rows, metadata)
    assert len(head) % 8 == 0
    path.write_bytes(head + bytes(sum(row[3] for row in rows)))
    entries, found = read_safetensors_header(path)
    assert {e.name: (e.dtype, e.shape, e.nbytes) for e in entries} == {r[0]: r[1:] for r in rows}
    assert found == metadata
