"""The whole AWQ step on tiny models: exact, resumable, loadable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.checkpoint.write import write_checkpoint
from ggufkit.errors import CheckpointError, GgufkitError, IntegrityError
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT
from ggufkit.scaling import awq
from ggufkit.scaling.awq import SCALES_FILE, Job, search_scales
from ggufkit.scaling.families import FAMILIES, family_of
from ggufkit.scaling.fold import read_scales, replacements, scale_name, sharing, write_scales
from ggufkit.scaling.statistics import BlockVisit, sequences_from_text, visit_blocks
from tests.factory import ARCHITECTURES, make_checkpoint

TOKENS = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(0))

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama-biases": {"arch": "llama", "bias": True, "hidden": 192, "tied": False},
    "llama-no-gqa": {"arch": "llama", "kv_heads": 4},
    "qwen2": {"arch": "qwen2"},
}


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


@pytest.fixture(scope="module", params=MODELS)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(request.param)
    return open_checkpoint(make_checkpoint(path, **MODELS[request.param]))


def logits_of(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def random_scales(index: CheckpointIndex, seed: int, spread: float) -> dict[str, torch.Tensor]:
    family = family_of(index.architectures[0])
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    for block in range(int(index.config["num_hidden_layers"])):
        for group in family.groups:
            producer = index.tensors[family.tensor(block, group.producer)]
            noise = torch.randn(producer.shape[0], generator=generator)
            scales[scale_name(family, block, group)] = (spread * noise).exp()
    return scales


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 1.0))
def test_the_fold_keeps_the_function(
    index: CheckpointIndex, tmp_path_factory: pytest.TempPathFactory, seed: int, spread: float
) -> None:
    out = tmp_path_factory.mktemp("folded")
    family = family_of(index.architectures[0])
    scales = random_scales(index, seed, spread)
    write_checkpoint(index, out, replacements(index, family, scales))
    before, after = logits_of(index.path), logits_of(out)
    # Float32 arithmetic on other numbers: the relative error stays near its precision.
    assert float((after - before).abs().max() / before.abs().max()) < 2e-5
    changed = open_checkpoint(out)
    assert changed.config == index.config
    assert {n: (t.dtype, t.shape) for n, t in changed.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in index.tensors.items()
    }


def test_the_statistics_are_those_of_the_whole_model(index: CheckpointIndex) -> None:
    model = AutoModelForCausalLM.from_pretrained(index.path, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    family = family_of(index.architectures[0])
    for block in range(2):
        for group in family.groups:
            name = family.tensor(block, group.consumers[0]).removesuffix(".weight")
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, x, key=(block, group.name): seen.__setitem__(str(key), x[0])
            )
    with torch.inference_mode():
        model(TOKENS)
    visits: list[BlockVisit] = []
    visit_blocks(index, family, TOKENS, visits.append)
    assert [v.number for v in visits] == [0, 1]
    for visit in visits:
        for name, told in visit.statistics.items():
            x = seen[str((visit.number, name))].reshape(-1, told.gram.shape[0]).double()
            assert told.tokens == len(x) == TOKENS.numel()
            torch.testing.assert_close(told.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                told.mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-6
            )


def plan_of(index: CheckpointIndex, type: str) -> dict[str, str]:
    return {name: type for name, entry in index.tensors.items() if len(entry.shape) == 2}


def search(index: CheckpointIndex, directory: Path, ggml: Ggml, *types: str) -> dict[str, Any]:
    jobs = [Job(directory / type, plan_of(index, type)) for type in types]
    return search_scales(index, family_of(index.architectures[0]), TOKENS, jobs, ggml, SILENT)


def test_found_scales_keep_the_function_and_help(
    index: CheckpointIndex, tmp_path: Path, ggml: Ggml
) -> None:
    facts = search(index, tmp_path, ggml, "q4_0")["q4_0"]
    assert facts["objective"] < facts["objective_plain"]
    assert facts["groups"] == 8
    scales = read_scales(tmp_path / "q4_0" / SCALES_FILE)
    family = family_of(index.architectures[0])
    write_checkpoint(index, tmp_path / "out", replacements(index, family, scales))
    before, after = logits_of(index.path), logits_of(tmp_path / "out")
    assert float((after - before).abs().max() / before.abs().max()) < 2e-5


def test_types_searched_together_are_as_if_alone(
    index: CheckpointIndex, tmp_path: Path, ggml: Ggml
) -> None:
    search(index, tmp_path / "both", ggml, "q4_0", "q5_1")
    search(index, tmp_path / "one", ggml, "q5_1")
    both, one = (tmp_path / d / "q5_1" / SCALES_FILE for d in ("both", "one"))
    assert both.read_bytes() == one.read_bytes()


def test_a_killed_search_goes_on_and_ends_with_the_same_bytes(
    index: CheckpointIndex, tmp_path: Path, ggml: Ggml, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(index, tmp_path / "whole", ggml, "q4_0")
    real = write_scales

    def killed(path: Path, scales: dict[str, torch.Tensor]) -> None:
        if "00001" in path.name:
            raise KeyboardInterrupt
        real(path, scales)

    with monkeypatch.context() as patch:
        patch.setattr("ggufkit.scaling.awq.write_scales", killed)
        with pytest.raises(KeyboardInterrupt):
            search(index, tmp_path / "killed", ggml, "q4_0")
    assert not (tmp_path / "killed" / "q4_0" / SCALES_FILE).exists()
    searched: list[int] = []
    real_search = awq._Worker.search

    def spy(worker: awq._Worker, visit: BlockVisit) -> None:
        searched.append(visit.number)
        real_search(worker, visit)

    monkeypatch.setattr(awq._Worker, "search", spy)
    facts = search(index, tmp_path / "killed", ggml, "q4_0")["q4_0"]
    assert searched == [1]
    whole, again = (tmp_path / d / "q4_0" / SCALES_FILE for d in ("whole", "killed"))
    assert whole.read_bytes() == again.read_bytes()
    assert facts["groups"] == 8


def test_scales_of_another_model_are_refused(index: CheckpointIndex) -> None:
    family = family_of(index.architectures[0])
    scales = random_scales(index, 0, 0.1)
    with pytest.raises(IntegrityError, match="other blocks or groups"):
        replacements(index, family, dict(list(scales.items())[1:]))
    name = scale_name(family, 0, family.groups[0])
    with pytest.raises(IntegrityError, match="its scales have length 3"):
        replacements(index, family, {**scales, name: torch.full((3,), 2.0)})


def test_a_file_that_is_no_scales_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scales.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(IntegrityError, match="cannot be read as scales"):
        read_scales(tmp_path / "scales.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(tmp_path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    path = make_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    index = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=name):
        visit_blocks(index, FAMILIES[0], TOKENS, lambda _: None)


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="nearest known: LlamaForCausalLM") as told:
        family_of("LlamaForCausalLMX")
    assert "without --awq" in told.value.hint


def test_every_family_has_a_model_here() -> None:
    tried = {ARCHITECTURES[m["arch"]].class_name for m in MODELS.values()}
    for family in FAMILIES:
        assert set(family.architectures) & tried


def test_sequences_are_spread_over_the_text(tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path))
    text = " ".join(f"word{i}" for i in range(3000))
    sequences = sequences_from_text(text, index, 4, 32)
    assert sequences.shape == (4, 32)
    assert len({tuple(s.tolist()) for s in sequences}) == 4
    few = sequences_from_text(text, index, 10**6, 512)
    assert 2 <= len(few) < 10**6
    with pytest.raises(GgufkitError, match=r"has only \d+ tokens") as told:
        sequences_from_text("too short", index, 4, 32)
    assert "--calibration" in told.value.hint


def test_sharing_follows_the_config(index: CheckpointIndex) -> None:
    family = family_of(index.architectures[0])
    for group in family.groups:
        shared = sharing(index, group)
        assert (shared is not None) == group.per_kv_head
        if shared is not None:
            rows = index.tensors[family.tensor(0, group.producer)].shape[0]
            columns = index.tensors[family.tensor(0, group.consumers[0])].shape[1]
            assert shared.shape == (columns,)
            assert int(shared.max()) + 1 == rows
