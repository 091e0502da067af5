"""Scales learned on the divergence: what is learned, what is written, and going on after a kill."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.packing import format_of
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT, Progress
from ggufkit.scaling import refine
from ggufkit.scaling.families import family_of
from ggufkit.scaling.refine import forecast, refine_model, without
from ggufkit.scaling.rounding import read_rounded, round_model
from ggufkit.values import Json
from tests.factory import make_checkpoint
from tests.scaling.test_rounding import TOKENS, KilledError, Killer, Listening, plan_for

HELD_BACK = torch.randint(3, 290, (2, 48), generator=torch.Generator().manual_seed(1))
ARCHITECTURES = ("llama", "gpt2", "gemma2")


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


def rounded(index: CheckpointIndex, directory: Path, ggml: Ggml, type: str) -> dict[str, str]:
    plan = plan_for(index, type)
    family = family_of(index.config)
    round_model(index, family, TOKENS, plan, directory, ggml, SILENT, threads=2)
    return plan


def run(
    index: CheckpointIndex,
    place: Path,
    ggml: Ggml,
    plan: dict[str, str],
    out: str = "refined",
    progress: Progress = SILENT,
) -> dict[str, Json]:
    return refine_model(
        index,
        family_of(index.config),
        TOKENS,
        HELD_BACK,
        plan,
        place / "rounded",
        place / out,
        ggml,
        progress,
    )


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six sequences are a very short text: larger steps show something."""
    monkeypatch.setattr(refine, "EPOCHS", 6)
    monkeypatch.setattr(refine, "BLOCK_RATE", 3e-3)


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q2_k"])
def test_the_divergence_falls_and_only_scales_change(
    arch: str, type: str, ggml: Ggml, tmp_path: Path
) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model", arch=arch))
    plan = rounded(index, tmp_path / "rounded", ggml, type)
    told = run(index, tmp_path, ggml, plan)
    learned = told["divergence_learned"]
    assert len(learned) == 6
    assert learned[-1] < learned[0]
    before, after = (dict(read_rounded(tmp_path / name)) for name in ("rounded", "refined"))
    assert before.keys() == after.keys()
    format = format_of(type)
    if not told["kept"]:
        assert told["divergence_after"] >= told["divergence_before"]
        assert all(np.array_equal(before[name], after[name]) for name in before)
        return
    assert told["divergence_after"] < told["divergence_before"]
    for name in before:
        one, other = format.unpack(before[name]), format.unpack(after[name])
        for field in ("codes", "scales", "mins"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed


def test_gradients_are_those_of_the_divergence(
    ggml: Ggml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step along one factor changes the divergence by what its gradient says."""
    from ggufkit.scaling.streaming import streamed_model

    index = open_checkpoint(make_checkpoint(tmp_path / "model"))
    plan = rounded(index, tmp_path / "rounded", ggml, "q4_0")
    seen: dict[str, torch.Tensor] = {}

    def keep(self: Any, gradient: torch.Tensor, number: int, share: float) -> None:
        seen[next(n for n, f in learner._factors.items() if f is self)] = gradient

    monkeypatch.setattr(refine._Factors, "step", keep)
    family = family_of(index.config)
    with streamed_model(index, family, tmp_path, gradients=True) as model:
        learner = refine._Learner(index, family, model, plan, tmp_path / "rounded", ggml, {})
        wanted = learner._final(TOKENS)
        learner._step(TOKENS, wanted, 1, 1.0)
        name = "model.layers.0.mlp.down_proj.weight"
        slope = float(seen[name][:, 0].sum())
        met = []
        for sign in (1, -1):
            learner._factors[name].blocks[:, 0] = sign * 0.01
            met.append(learner._step(TOKENS, wanted, 1, 1.0))
    assert (met[0] - met[1]) / 0.02 == pytest.approx(slope, rel=0.02)


@pytest.mark.usefixtures("faster")
def test_a_killed_run_goes_on_with_the_same_bytes(ggml: Ggml, tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model"))
    plan = rounded(index, tmp_path / "rounded", ggml, "q4_0")
    whole = run(index, tmp_path, ggml, plan, "whole")
    with pytest.raises(KilledError):
        run(index, tmp_path, ggml, plan, "killed", Killer(5))
    assert not list(read_rounded(tmp_path / "killed"))
    assert run(index, tmp_path, ggml, plan, "killed") == whole
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_what_does_not_help_is_not_kept(
    ggml: Ggml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "ROW_RATE", -0.1)  # up instead of down
    index = open_checkpoint(make_checkpoint(tmp_path / "model"))
    plan = rounded(index, tmp_path / "rounded", ggml, "q4_0")
    heard = Listening()
    told = run(index, tmp_path, ggml, plan, progress=heard)
    assert not told["kept"]
    assert told["divergence_after"] > told["divergence_before"]
    assert "learned scales are not kept" in heard.warned[-1]
    before, after = (dict(read_rounded(tmp_path / name)) for name in ("rounded", "refined"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_what_is_held_back_is_not_learned_from() -> None:
    text = torch.arange(1000)
    pieces = torch.stack([text[at : at + 100] for at in (0, 150, 250, 400, 900)])
    held = torch.stack([text[200:300], text[431:531]])
    assert without((pieces[:2], pieces[2:]), held)[:, 0].tolist() == [0, 900]
    assert without([pieces[:, :31]], held[:, :31])[:, 0].tolist() == [0, 150, 250, 400, 900]


def test_the_forecast_grows_with_what_is_held(tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model"))
    family, plan = family_of(index.config), plan_for(index)
    short, long = (forecast(index, family, plan, length=n) for n in (512, 4096))
    assert 700 << 20 < short < long
