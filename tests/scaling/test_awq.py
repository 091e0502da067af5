"""The whole AWQ step on tiny models of every family: exact, resumable, loadable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.checkpoint.tensors import TensorReader
from ggufkit.checkpoint.write import write_checkpoint
from ggufkit.errors import CheckpointError, IntegrityError
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT
from ggufkit.scaling import awq, guard
from ggufkit.scaling.awq import SCALES_FILE, Job, search_scales
from ggufkit.scaling.families import FAMILIES, Family, family_of
from ggufkit.scaling.fold import CLIP, Scales, changes_of, read_scales, write_scales
from ggufkit.scaling.groups import all_groups, groups_of
from ggufkit.scaling.guard import fold_divergence, require_same_function
from ggufkit.scaling.importance import IMPORTANCE_FILE
from ggufkit.scaling.statistics import BlockVisit, visit_blocks
from tests.factory import ARCHITECTURES, make_checkpoint

TOKENS = torch.randint(3, 290, (3, 40), generator=torch.Generator().manual_seed(0))

MODELS: dict[str, dict[str, Any]] = {
    **{arch: {"arch": arch} for arch in ARCHITECTURES},
    "llama-biases": {"arch": "llama", "bias": True, "hidden": 192, "tied": False},
    "llama-no-gqa": {"arch": "llama", "kv_heads": 4},
}
EXACT = 2e-5
"""Float32 arithmetic on other numbers: the relative error stays near its precision."""


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


@pytest.fixture(scope="module", params=MODELS)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(request.param)
    return open_checkpoint(make_checkpoint(path, **MODELS[request.param]), trust_remote_code=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def family(index: CheckpointIndex) -> Family:
    return family_of(index.config)


def logits_of(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


def write_folded(index: CheckpointIndex, out: Path, scales: Scales) -> Path:
    changes = changes_of(index, family_of(index.config), scales)
    write_checkpoint(index, out, changes, dtypes={n: c.dtype for n, c in changes.items()})
    return out


def random_scales(index: CheckpointIndex, seed: int, spread: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: (spread * torch.randn(group.width, generator=generator)).exp()
        for group in all_groups(index, family_of(index.config))
    }


def error_of(index: CheckpointIndex, folded: Path) -> float:
    before, after = logits_of(index.path), logits_of(folded)
    return float((after - before).abs().max() / before.abs().max())


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 1.0))
def test_the_fold_keeps_the_function(
    index: CheckpointIndex, tmp_path_factory: pytest.TempPathFactory, seed: int, spread: float
) -> None:
    scales = random_scales(index, seed, spread)
    out = write_folded(index, tmp_path_factory.mktemp("folded"), scales)
    assert error_of(index, out) < EXACT
    changed = open_checkpoint(out, trust_remote_code=True)
    assert changed.config == index.config
    assert {n: (t.dtype, t.shape) for n, t in changed.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in index.tensors.items()
    }


def test_every_group_changes_something(index: CheckpointIndex, family: Family) -> None:
    """A row that misses its tensors would keep the function by doing nothing."""
    scales = random_scales(index, 1, 0.5)
    changes = changes_of(index, family, scales)
    for group in all_groups(index, family):
        assert f"{group.producer}.weight" in changes
        assert set(group.consumers) <= set(changes)


def test_the_statistics_are_those_of_the_whole_model(
    llama: CheckpointIndex, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    family = family_of(llama.config)
    for group in all_groups(llama, family):
        module = model.get_submodule(group.consumers[0].removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, x, name=group.name: seen.__setitem__(name, x[0]))
    with torch.inference_mode():
        model(TOKENS)
    numbers = []

    def visit(visit: BlockVisit) -> None:
        numbers.append(visit.number)
        for group in visit.groups:
            told = visit.statistics(group)
            x = seen[group.name].reshape(-1, told.gram.shape[0]).double()
            assert told.tokens == len(x) == TOKENS.numel()
            # bfloat16 factors, where the processor multiplies those faster.
            gram = x.T @ x / len(x)
            assert float((told.gram - gram).norm() / gram.norm()) < 3e-2
            torch.testing.assert_close(
                told.mean_abs.double(), x.abs().mean(0), rtol=3e-2, atol=1e-2
            )
            squares = visit.squares()
            for name in group.consumers:
                torch.testing.assert_close(squares[name].mean, told.gram.diagonal())

    visit_blocks(llama, family, TOKENS, visit, scratch=tmp_path)
    assert numbers == [0, 1]


def test_every_linear_map_of_a_block_has_its_importance(
    index: CheckpointIndex, family: Family, tmp_path: Path
) -> None:
    found: set[str] = set()
    visit_blocks(
        index,
        family,
        TOKENS,
        lambda visit: found.update(visit.squares()),
        scratch=tmp_path,
        with_groups=False,
        trust_remote_code=True,
    )
    maps = {
        name
        for name, entry in index.tensors.items()
        if name.startswith(f"{family.blocks}.") and len(entry.shape) == 2
    }
    routers = {name for name in maps if name.endswith(".gate.weight")}
    assert maps - routers <= found


def test_hidden_states_on_disk_change_nothing(
    llama: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(llama.config)
    grams: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for on_disk in grams:
        if on_disk:
            monkeypatch.setattr("ggufkit.scaling.streaming.HIDDEN_NBYTES_IN_MEMORY", 0)

        def visit(visit: BlockVisit, found: list[torch.Tensor] = grams[on_disk]) -> None:
            found += [visit.statistics(group).gram for group in visit.groups]

        visit_blocks(llama, family, TOKENS, visit, scratch=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(grams[False], grams[True], strict=True))
    assert not list(tmp_path.iterdir())


def plan_of(index: CheckpointIndex, type: str) -> dict[str, str]:
    return {
        name: type
        for name, entry in index.tensors.items()
        if len(entry.shape) == 2 and entry.shape[0] % 32 == entry.shape[1] % 32 == 0
    }


def search(
    index: CheckpointIndex, directory: Path, ggml: Ggml, *types: str, importance: bool = False
) -> dict[str, Any]:
    jobs = [Job(directory / t, plan_of(index, t), importance=importance) for t in types]
    family = family_of(index.config)
    return search_scales(index, family, TOKENS, jobs, ggml, SILENT, trust_remote_code=True)


def test_found_scales_keep_the_function_and_help(
    index: CheckpointIndex, tmp_path: Path, ggml: Ggml
) -> None:
    facts = search(index, tmp_path, ggml, "q4_0")["q4_0"]
    assert facts["objective"] < facts["objective_plain"]
    assert facts["groups"] == len(all_groups(index, family_of(index.config)))
    scales = read_scales(tmp_path / "q4_0" / SCALES_FILE)
    assert error_of(index, write_folded(index, tmp_path / "out", scales)) < EXACT


def test_the_guard_measures_what_the_fold_changes(
    index: CheckpointIndex, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = random_scales(index, 2, 0.5)

    def divergence() -> float:
        return fold_divergence(
            index, family, scales, TOKENS[:1], scratch=tmp_path, trust_remote_code=True
        )

    exact = divergence()
    assert exact < 1e-9
    require_same_function(exact, "model")
    # The same fold, but one consumer is forgotten, as a wrong row would.
    whole = changes_of(index, family, scales)
    forgotten = all_groups(index, family)[0].consumers[0]
    monkeypatch.setattr(
        guard, "changes_of", lambda *_: {n: c for n, c in whole.items() if n != forgotten}
    )
    wrong = divergence()
    assert wrong > guard.LIMIT
    with pytest.raises(IntegrityError, match="changed what the model computes") as told:
        require_same_function(wrong, "model")
    assert "Nothing was published" in told.value.hint
    with pytest.raises(IntegrityError, match="nan"):
        require_same_function(float("nan"), "model")


def test_a_16_bit_checkpoint_is_folded_exactly_by_powers_of_two(tmp_path: Path, ggml: Ggml) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model", dtype="bfloat16"))
    family = family_of(index.config)
    job = Job(tmp_path / "q4_0", plan_of(index, "q4_0"), exact=True)
    facts = search_scales(index, family, TOKENS, [job], ggml, SILENT)["q4_0"]
    assert facts["objective"] < facts["objective_plain"]
    scales = read_scales(job.directory / SCALES_FILE)
    assert fold_divergence(index, family, scales, TOKENS[:1], scratch=tmp_path) < 1e-12
    free = random_scales(index, 0, 0.5)
    rounded = fold_divergence(index, family, free, TOKENS[:1], scratch=tmp_path)
    in_f16, in_f32 = (
        fold_divergence(index, family, free, TOKENS[:1], scratch=tmp_path, dtype=dtype)
        for dtype in ("F16", "F32")
    )
    assert in_f32 < 1e-9
    assert 10 * in_f16 < rounded


def test_clipping_is_kept_beside_the_scales_and_folded(
    llama: CheckpointIndex, tmp_path: Path, ggml: Ggml
) -> None:
    family = family_of(llama.config)
    job = Job(tmp_path / "q4_0", plan_of(llama, "q4_0"), clip=True)
    facts = search_scales(llama, family, TOKENS, [job], ggml, SILENT)["q4_0"]
    scales = read_scales(job.directory / SCALES_FILE)
    limits = {n.removesuffix(CLIP): s for n, s in scales.items() if n.endswith(CLIP)}
    assert facts["rows_clipped"] == sum(int(s.isfinite().sum()) for s in limits.values()) > 0
    out = open_checkpoint(write_folded(llama, tmp_path / "out", scales))
    with TensorReader(out) as reader:
        for name, limit in limits.items():
            peaks = reader.load(name).abs().amax(1)
            assert bool((peaks <= limit * (1 + 1e-6)).all())
    assert fold_divergence(llama, family, scales, TOKENS[:1], scratch=tmp_path) > 1e-9
    with pytest.raises(IntegrityError, match="it has no ghost"):
        changes_of(llama, family, {**scales, f"ghost{CLIP}": torch.ones(3)})


def test_types_searched_together_are_as_if_alone(
    llama: CheckpointIndex, tmp_path: Path, ggml: Ggml
) -> None:
    search(llama, tmp_path / "both", ggml, "q4_0", "q5_1")
    search(llama, tmp_path / "one", ggml, "q5_1")
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
    for name in (SCALES_FILE, IMPORTANCE_FILE):
        whole, again = (tmp_path / d / "q4_0" / name for d in ("whole", "killed"))
        assert whole.read_bytes() == again.read_bytes()
    assert facts["groups"] == len(all_groups(index, family_of(index.config)))


def test_scales_of_another_model_are_refused(llama: CheckpointIndex) -> None:
    family = family_of(llama.config)
    scales = random_scales(llama, 0, 0.1)
    with pytest.raises(IntegrityError, match="other blocks or groups"):
        changes_of(llama, family, dict(list(scales.items())[1:]))
    name = groups_of(llama, family, 0)[0].name
    with pytest.raises(IntegrityError, match="has 256 scales, the file 3"):
        changes_of(llama, family, {**scales, name: torch.full((3,), 2.0)})
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(IntegrityError, match="not all positive"):
            changes_of(llama, family, {**scales, name: torch.full((256,), wrong)})


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
        visit_blocks(index, FAMILIES[0], TOKENS, lambda _: None, scratch=tmp_path)


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="nearest known: LlamaForCausalLM") as told:
        family_of({"architectures": ["LlamaForCausalLMX"]})
    assert "without --awq" in told.value.hint


def test_a_block_without_its_tensors_is_refused(tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path))
    family = family_of({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(CheckpointError, match="has none of the tensors"):
        groups_of(index, family, 0)


def test_every_family_has_a_model_here() -> None:
    tried = {ARCHITECTURES[m["arch"]].class_name for m in MODELS.values()}
    for family in FAMILIES:
        assert set(family.architectures) <= tried
