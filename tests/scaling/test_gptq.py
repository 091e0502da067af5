"""Rounding with error feedback: never worse than ggml, and true blocks of the type."""

import numpy as np
import pytest
import torch

from ggufkit.errors import UsageError
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.packing import FORMATS, format_of
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.scaling.feedback import Feedback
from ggufkit.scaling.gptq import Rounded, round_matrix

COLUMNS = 512

each_type = pytest.mark.parametrize("type", list(FORMATS))


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


def correlated(seed: int, columns: int = COLUMNS, *, massive: bool = True) -> torch.Tensor:
    """The second moment of inputs that share a few directions, one of them massive."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((24, columns)) * random.lognormal(0, 1, columns)
    inputs = random.standard_normal((2000, 24)) @ mixed
    inputs += 0.5 * random.standard_normal((2000, columns))
    if massive:
        inputs[::500, 7] = 3e3
    return torch.from_numpy(inputs.T @ inputs / 2000)


def weights(seed: int, rows: int = 24, columns: int = COLUMNS) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.standard_t(4, (rows, columns)).astype(np.float32) / 30)


def loss_of(weight: torch.Tensor, values: torch.Tensor, moment: torch.Tensor) -> float:
    error = (weight - values).double()
    return float(((error @ moment) * error).sum())


def check(ggml: Ggml, type: str, weight: torch.Tensor, rounded: Rounded) -> None:
    kind = ggml.type(type)
    read = ggml.dequantize(kind, rounded.packed, weight.shape[1])
    np.testing.assert_array_equal(read, rounded.values.numpy())
    assert rounded.loss <= rounded.loss_plain
    assert rounded.loss <= rounded.loss_importance


@each_type
def test_is_never_worse_than_ggml_and_much_better_on_the_whole(type: str, ggml: Ggml) -> None:
    shares = []
    for seed in range(2):
        weight, moment = weights(seed), correlated(seed)
        rounded = round_matrix(ggml, type, weight, moment, threads=2)
        check(ggml, type, weight, rounded)
        assert rounded.loss == pytest.approx(loss_of(weight, rounded.values, moment), rel=1e-3)
        shares.append(rounded.loss / min(rounded.loss_plain, rounded.loss_importance))
    assert np.mean(shares) < 0.6


@each_type
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_what_it_means_to_write_is_what_ggml_reads(type: str, ggml: Ggml, size: float) -> None:
    """The floats that the rounding works with are those of the blocks, bit for bit."""
    weight, moment = weights(6, rows=4) * size, correlated(6)
    feedback = Feedback(ggml, format_of(type), moment, damping=0.1, sweeps=1)
    seen = {}

    class Watched(feedback.grid.__class__):  # type: ignore[name-defined, misc]
        def fields(self, levels, scales, units):  # type: ignore[no-untyped-def]
            subs = levels.view(len(scales), -1, levels.shape[1])
            pairs = zip(subs, scales, strict=True)
            seen["values"] = torch.cat([self.floats(*pair) for pair in pairs])
            return super().fields(levels, scales, units)

    feedback.grid = Watched(format_of(type))
    packed = feedback(weight)
    read = ggml.dequantize(ggml.type(type), packed, COLUMNS)
    np.testing.assert_array_equal(read, seen["values"].T.numpy())


def test_sweeps_lower_the_cost(ggml: Ggml) -> None:
    weight, moment = weights(1), correlated(1)
    losses = [round_matrix(ggml, "q4_0", weight, moment, sweeps=n).loss for n in (0, 1, 4)]
    assert losses[0] > losses[1] > losses[2]


def test_threads_do_not_change_the_bytes(ggml: Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = weights(2, rows=40), correlated(2)
    monkeypatch.setattr("ggufkit.scaling.gptq.ROWS_AT_ONCE", 8)
    alone, shared = (round_matrix(ggml, "q4_k", weight, moment, threads=n) for n in (1, 3))
    np.testing.assert_array_equal(alone.packed, shared.packed)


@each_type
def test_keeps_what_cannot_be_bettered(type: str, ggml: Ggml) -> None:
    weight = weights(3, rows=6)
    weight[0] = 0
    on_grid = torch.from_numpy(ggml.round_trip(ggml.type("q4_0"), weight.numpy()))
    rounded = round_matrix(ggml, type, on_grid, correlated(3))
    check(ggml, type, on_grid, rounded)
    assert torch.equal(rounded.values[0], torch.zeros(COLUMNS))
    assert rounded.rows_kept >= 1


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        (torch.full((COLUMNS, COLUMNS), torch.nan).double(), "not finite"),
        (torch.eye(COLUMNS).double() * torch.inf, "not finite"),
        (torch.zeros(COLUMNS, COLUMNS).double(), "always zero"),
    ],
)
def test_moments_that_say_nothing_leave_ggmls_rounding(
    ggml: Ggml, moment: torch.Tensor, reason: str
) -> None:
    weight = weights(4)
    rounded = round_matrix(ggml, "q4_0", weight, moment)
    assert reason in rounded.reason
    assert rounded.rows_kept == len(weight)
    np.testing.assert_array_equal(rounded.packed, ggml.quantize(ggml.type("q4_0"), weight.numpy()))


@pytest.mark.parametrize("type", ["q4_0", "q2_k"])
def test_bears_singular_moments(type: str, ggml: Ggml) -> None:
    """Fewer inputs seen than there are, some of them never."""
    inputs = torch.from_numpy(np.random.default_rng(5).standard_normal((20, COLUMNS)))
    inputs[:, 40:90] = 0
    inputs[:, 100] = inputs[:, 101]
    weight, moment = weights(5), inputs.T @ inputs / 20
    rounded = round_matrix(ggml, type, weight, moment)
    check(ggml, type, weight, rounded)
    assert not rounded.reason
    assert rounded.loss < 0.5 * rounded.loss_importance


def test_a_type_that_cannot_be_packed_is_told_with_those_that_can(ggml: Ggml) -> None:
    with pytest.raises(UsageError, match="'iq2_xs' cannot be packed") as told:
        round_matrix(ggml, "iq2_xs", weights(0), correlated(0))
    assert "Q4_0" in told.value.hint
    with pytest.raises(UsageError, match="rows of 288 do not divide into q4_K"):
        round_matrix(ggml, "q4_k", weights(0, columns=288), correlated(0, 288))
