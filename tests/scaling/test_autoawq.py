"""AutoAWQ's search as a source of scales: complete, exact, and on weights left alone."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.errors import CheckpointError, GgufkitError, IntegrityError, UsageError
from ggufkit.progress import SILENT, Silent
from ggufkit.scaling import autoawq
from ggufkit.scaling.autoawq import autoawq_scales
from ggufkit.scaling.families import family_of
from ggufkit.scaling.fold import Scales, changes_of
from ggufkit.scaling.groups import all_groups
from tests.factory import make_checkpoint

TOKENS = torch.randint(3, 512, (3, 64), generator=torch.Generator().manual_seed(1))
EXACT = 2e-5
"""Float32 arithmetic on other numbers: the relative error stays near its precision."""

Make = Callable[..., CheckpointIndex]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda arch="llama", **shape: open_checkpoint(make_checkpoint(tmp_path, arch, **shape))


def search(index: CheckpointIndex, progress: Any = SILENT) -> dict[str, torch.Tensor]:
    return autoawq_scales(index, family_of(index.config), TOKENS, progress)


def error_of_fold(index: CheckpointIndex, scales: Scales) -> float:
    """Relative error of the logits after folding, in float32."""
    model = AutoModelForCausalLM.from_pretrained(index.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        before = model(TOKENS).logits
        for name, change in changes_of(index, family_of(index.config), scales).items():
            weight = model.get_parameter(name)
            weight.copy_(change(weight))
        after = model(TOKENS).logits
    return float((after - before).abs().max() / before.abs().max())


class Listener(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.tasks: list[tuple[str, float | None, str]] = []
        self.done: list[float] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator["Listener"]:
        self.tasks.append((title, total, unit))
        yield self

    def update(self, done: float, note: str = "") -> None:
        self.done.append(done)

    def set_total(self, total: float) -> None:
        raise AssertionError("the total is known from the start")


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        ({"arch": "llama"}, {"attn_out"}),
        ({"arch": "llama", "kv_heads": 4, "hidden": 192, "bias": True}, set()),
        ({"arch": "qwen2"}, {"attn_out"}),
        ({"arch": "gemma2"}, {"attn_out"}),
        ({"arch": "phi3", "kv_heads": 4}, set()),
        ({"arch": "cohere"}, {"attn_out"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_scales_are_complete_and_fold_exactly(
    make: Make, model: dict[str, Any], left_out: set[str]
) -> None:
    index = make(**model)
    listener = Listener()
    scales = search(index, listener)
    groups = all_groups(index, family_of(index.config))
    assert {name: s.shape for name, s in scales.items()} == {g.name: (g.width,) for g in groups}
    assert {s.dtype for s in scales.values()} == {torch.float32}
    assert {g.kind for g in groups if bool((scales[g.name] == 1).all())} == left_out
    assert error_of_fold(index, scales) < EXACT
    assert listener.warnings == []


def test_the_blocks_are_told_and_nothing_else(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    index = make()
    listener = Listener()
    capfd.readouterr()
    search(index, listener)
    assert listener.tasks == [("AutoAWQ search", 2, "blocks")]
    assert listener.done == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_every_token_goes_through_unchanged_weights(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves the last block of AutoAWQ's run is what leaves the model's."""
    index = make()
    before = hashlib.sha256((index.path / "model.safetensors").read_bytes()).digest()
    load, loaded = autoawq._load_model, []
    monkeypatch.setattr(autoawq, "_load_model", lambda *a: loaded.append(load(*a)) or loaded[0])
    search(index)
    body = AutoModelForCausalLM.from_pretrained(index.path).eval().model
    with torch.inference_mode():
        seen = body.norm(loaded[0].quantizer.inps)
        assert torch.equal(seen, body(TOKENS).last_hidden_state)
    state = AutoModelForCausalLM.from_pretrained(index.path).state_dict()
    for name, weight in loaded[0].model.state_dict().items():
        assert torch.equal(weight, state[name]), name
    assert hashlib.sha256((index.path / "model.safetensors").read_bytes()).digest() == before


def test_weights_that_stay_scaled_are_noticed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make()
    monkeypatch.setattr(autoawq, "copied_state", nullcontext)
    with pytest.raises(IntegrityError, match=r"changed the weights of block 0 \(self_attn.q_proj"):
        search(index)


def test_dropped_sequences_are_noticed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = importlib.import_module("awq.quantize.quantizer")
    give = quantizer.get_calib_dataset
    monkeypatch.setattr(quantizer, "get_calib_dataset", lambda **asked: give(**asked)[1:])
    with pytest.raises(GgufkitError, match="looks at 2 x 64 of 3 x 64 calibration tokens"):
        search(make())


def test_scales_that_cannot_be_folded_exactly_are_left_out(make: Make) -> None:
    """Phi-3 with shared key/value heads: AutoAWQ scales each input of o_proj by itself."""
    index = make("phi3")
    listener = Listener()
    scales = search(index, listener)
    assert len(listener.warnings) == 1
    assert "2 of AutoAWQ's scales cannot be folded exactly" in listener.warnings[0]
    assert "model.layers.0.self_attn.o_proj.weight" in listener.warnings[0]
    assert bool((scales["model.layers.1.attn_out"] == 1).all())
    assert not bool((scales["model.layers.1.attn_in"] == 1).all())
    assert error_of_fold(index, scales) < EXACT


@pytest.mark.parametrize(("hidden", "size"), [(256, 128), (192, 64), (96, 32)])
def test_the_group_size_divides_all_rows(make: Make, hidden: int, size: int) -> None:
    index = make(hidden=hidden)
    assert autoawq._group_size(index, all_groups(index, family_of(index.config))) == size


def test_rows_that_no_group_size_divides_are_named(make: Make) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\..*q_proj\.weight has 80 inputs"):
        search(make(hidden=80))


def test_broken_weights_are_named(make: Make) -> None:
    index = make()
    tensors = load_file(index.path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, index.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        search(index)


def test_models_that_autoawq_does_not_know_are_named(make: Make) -> None:
    with pytest.raises(CheckpointError, match="does not know models of type 'gpt2'") as told:
        search(make("gpt2"))
    assert "Leave out --awq-backend" in told.value.hint


def test_what_autoawq_stumbles_over_is_told_in_one_line(make: Make) -> None:
    with pytest.raises(CheckpointError, match=r"fails on StableLmForCausalLM .*ValueError") as told:
        search(make("stablelm_parallel"))
    assert "\n" not in told.value.message
    assert isinstance(told.value.__cause__, ValueError)
    quantizer = importlib.import_module("awq.quantize.quantizer")
    assert quantizer.tqdm.__name__ == "tqdm"
    assert quantizer.apply_scale.__name__ == "apply_scale"


def test_a_missing_package_says_how_to_install_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    index = make()
    monkeypatch.setattr(autoawq, "version", missing)
    with pytest.raises(UsageError, match="AutoAWQ is not installed") as told:
        search(index)
    assert "pip install 'ggufkit[autoawq]'" in told.value.hint


def test_a_package_that_cannot_be_loaded_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make()
    monkeypatch.setitem(sys.modules, "awq.models", None)
    with pytest.raises(UsageError, match=r"AutoAWQ cannot be loaded: .*awq\.models"):
        search(index)
