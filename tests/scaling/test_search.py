import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.scaling import search
from ggufkit.scaling.families import FAMILIES, AttentionShape
from ggufkit.scaling.groups import BlockGroup
from ggufkit.scaling.search import GroupObjective, search_group
from ggufkit.scaling.statistics import GroupStatistics


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


def inputs_with_outliers(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x[:, ::17] *= 20
    return x


def statistics_of(x: torch.Tensor) -> GroupStatistics:
    return GroupStatistics((x.T @ x / len(x)), x.abs().mean(0), len(x))


def group_of(width: int, spread: torch.Tensor | None = None) -> BlockGroup:
    return BlockGroup("blocks.0.group", "group", "producer", ("consumer",), None, spread, width)


def relative(error: torch.Tensor, output: torch.Tensor) -> float:
    """Squared error of each output, relative to its power plus the mean power."""
    power = output.double().square().mean(0)
    return float((error.double().square().mean(0) / (power + power.mean())).sum())


def test_the_objective_is_the_error_of_the_outputs(ggml: Ggml) -> None:
    x = inputs_with_outliers(300, 64)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    kind = ggml.type("q4_0")
    scales = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    stored = torch.from_numpy(ggml.round_trip(kind, (weight * scales).numpy()))
    direct = relative((x / scales) @ stored.T - x @ weight.T, x @ weight.T)
    objective = GroupObjective(ggml, [weight], [kind], statistics_of(x).gram)
    assert objective(scales) == pytest.approx(direct, rel=1e-3)


@pytest.mark.parametrize("type", ["q4_0", "q4_k", "q2_k", "iq4_xs"])
def test_outlier_channels_are_protected(ggml: Ggml, type: str) -> None:
    x = inputs_with_outliers(600, 256)
    weights = [torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in (128, 64)]
    kinds = [ggml.type(type)] * 2
    statistics = statistics_of(x)
    objective = GroupObjective(ggml, weights, kinds, statistics.gram)
    found = search_group(objective, weights, statistics, group_of(256))
    assert found.loss < 0.6 * found.loss_plain
    assert objective(found.scales) == pytest.approx(found.loss)
    assert found.scales[::17].mean() > 1.5 * found.scales.mean()


def test_with_an_importance_matrix_the_objective_uses_it(ggml: Ggml) -> None:
    x = inputs_with_outliers(300, 64)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    kind = ggml.type("q4_0")
    scales = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    importance = (x / scales).square().mean(0)
    stored = torch.from_numpy(ggml.round_trip(kind, (weight * scales).numpy(), importance.numpy()))
    direct = relative((x / scales) @ stored.T - x @ weight.T, x @ weight.T)
    objective = GroupObjective(ggml, [weight], [kind], statistics_of(x).gram, importance=True)
    assert objective(scales) == pytest.approx(direct, rel=1e-3)


def test_a_sample_of_rows_tells_what_all_rows_do(ggml: Ggml) -> None:
    x = inputs_with_outliers(600, 256)
    weight = torch.randn(2000, 256, generator=torch.Generator().manual_seed(4))
    weight[7] *= 100  # nearly all of the error is in one row
    objective = GroupObjective(ggml, [weight], [ggml.type("q4_k")], statistics_of(x).gram)
    assert objective.sampled
    scales = x.abs().mean(0).sqrt()
    for candidate in (None, scales):
        assert objective.estimate(candidate) == pytest.approx(objective(candidate), rel=0.05)
    few = GroupObjective(ggml, [weight[:100]], [ggml.type("q4_k")], statistics_of(x).gram)
    assert not few.sampled


def test_exact_scales_are_powers_of_two(ggml: Ggml) -> None:
    x = inputs_with_outliers(300, 64)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    statistics = statistics_of(x)
    objective = GroupObjective(ggml, [weight], [ggml.type("q4_0")], statistics.gram)
    found = search_group(objective, [weight], statistics, group_of(64), exact=True)
    assert found.loss < found.loss_plain
    assert bool((found.scales.log2() == found.scales.log2().round()).all())
    original = weight.bfloat16()
    scaled = (original.double() * found.scales.double()).bfloat16()
    assert torch.equal(scaled.double() / found.scales.double(), original.double())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0, 3))
def test_nothing_ever_gets_worse(ggml: Ggml, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 64, generator=generator)
    x *= (torch.randn(64, generator=generator) * spread).exp()
    weight = torch.randn(64, 64, generator=generator)
    statistics = statistics_of(x)
    objective = GroupObjective(ggml, [weight], [ggml.type("q4_0")], statistics.gram)
    found = search_group(objective, [weight], statistics, group_of(64))
    assert found.loss <= found.loss_plain == objective(None)
    assert bool((found.scales > 0).all())
    assert bool(found.scales.isfinite().all())
    if found.loss == found.loss_plain:
        assert bool((found.scales == 1).all())


def test_dead_channels_and_floats_are_left_alone(ggml: Ggml) -> None:
    weight = torch.zeros(32, 64)
    statistics = statistics_of(torch.zeros(10, 64))
    for type in ("q4_0", "f16"):
        objective = GroupObjective(ggml, [weight], [ggml.type(type)], statistics.gram)
        found = search_group(objective, [weight], statistics, group_of(64))
        assert bool((found.scales == 1).all())
    assert GroupObjective(ggml, [weight], [ggml.type("f16")], statistics.gram).idle


def test_query_heads_that_share_a_key_value_head_share_scales(ggml: Ggml) -> None:
    attention_out = next(g for g in FAMILIES[0].groups if g.name == "attn_out")
    assert attention_out.spread
    spread = attention_out.spread(AttentionShape(query_heads=6, kv_heads=2, value_dim=16))
    assert spread.shape == (96,)
    # Query heads 0, 1, 2 read key/value head 0; heads 3, 4, 5 read head 1.
    assert spread[:16].tolist() == spread[16:32].tolist() == list(range(16))
    assert spread[80:].tolist() == list(range(16, 32))
    x = inputs_with_outliers(300, 96)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    statistics = statistics_of(x)
    objective = GroupObjective(ggml, [weight], [ggml.type("q4_0")], statistics.gram)
    found = search_group(objective, [weight], statistics, group_of(32, spread))
    assert found.scales.shape == (32,)
    assert objective(found.scales[spread]) == pytest.approx(found.loss)


def test_estimates_only_choose_who_is_judged(ggml: Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a sample says, scales that lose on all rows are not taken."""
    x = inputs_with_outliers(300, 256)
    weight = torch.randn(400, 256, generator=torch.Generator().manual_seed(5))
    statistics = statistics_of(x)
    objective = GroupObjective(ggml, [weight], [ggml.type("q4_k")], statistics.gram)
    monkeypatch.setattr(search.GroupObjective, "__call__", lambda self, _: self.plain)
    found = search_group(objective, [weight], statistics, group_of(256))
    assert bool((found.scales == 1).all())


def test_clipping_lowers_the_error_of_each_row_it_touches(ggml: Ggml) -> None:
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    weight[::3, 5] = 30.0  # an outlier that spoils its block
    gram = statistics_of(x).gram
    gram[5] = gram[:, 5] = 0  # and that nothing ever reaches
    kind = ggml.type("q4_0")
    objective = GroupObjective(ggml, [weight], [kind], gram)
    limits = objective.clip_limits(torch.ones(64))[0]
    assert bool(limits[::3].isfinite().all())

    def errors(rows: torch.Tensor) -> torch.Tensor:
        error = torch.from_numpy(ggml.round_trip(kind, rows)) - weight
        return (error @ gram * error).sum(1)

    clipped = weight.clamp(-limits[:, None], limits[:, None])
    before, after = errors(weight.numpy()), errors(clipped.numpy())
    touched = limits.isfinite()
    assert bool((after[touched] < before[touched]).all())
    assert torch.equal(after[~touched], before[~touched])
