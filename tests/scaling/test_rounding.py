"""Rounding of whole tiny models of every family: streamed, resumable, towards the original."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.errors import IntegrityError, UsageError
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT, Silent
from ggufkit.scaling import rounding
from ggufkit.scaling.families import family_of
from ggufkit.scaling.groups import all_groups
from ggufkit.scaling.rounding import read_rounded, round_model
from ggufkit.values import Json
from tests.factory import ARCHITECTURES, make_checkpoint

TOKENS = torch.randint(3, 290, (6, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("llama")))


def plan_for(index: CheckpointIndex, type: str = "q4_0") -> dict[str, str]:
    return {
        name: type
        for group in all_groups(index, family_of(index.config))
        for name in group.consumers
    }


def run(index: CheckpointIndex, out: Path, ggml: Ggml, plan: dict[str, str], **more: Any) -> Json:
    progress = more.pop("progress", SILENT)
    return round_model(
        index,
        family_of(index.config),
        TOKENS,
        plan,
        out,
        ggml,
        progress,
        threads=2,
        trust_remote_code=True,
        **more,
    )


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rounds_the_maps_of_every_family(arch: str, ggml: Ggml, tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model", arch=arch), trust_remote_code=True)
    family = family_of(index.config)
    plan = plan_for(index)
    facts = run(index, tmp_path / "out", ggml, plan)
    found = dict(read_rounded(tmp_path / "out"))
    # The maps of experts are one tensor in transformers; ggml's rounding is kept for them,
    # as it is for routers, which llama-quantize leaves alone.
    expected = {n for n in plan if ".experts." not in n and "gate.weight" not in n}
    assert expected <= set(found) <= set(plan)
    assert [told["name"] for told in facts["tensors"]] == [
        told["name"] for told in facts["tensors"] if told["name"] in found
    ]
    for name, packed in found.items():
        shape = index.tensors[name].shape
        rows, columns = reversed(shape) if family.transposed else shape
        assert packed.shape == (rows, columns // 32 * 18)
    assert facts["loss"] < 0.6 * facts["loss_importance"]


def logits(path: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=False)
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


def test_the_model_comes_nearer_to_the_original(
    llama: CheckpointIndex, ggml: Ggml, tmp_path: Path
) -> None:
    kind = ggml.type("q4_0")
    run(llama, tmp_path, ggml, plan_for(llama))
    ours, plain = {}, {}
    model = AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32)
    weights = dict(model.state_dict())
    for name, packed in read_rounded(tmp_path):
        columns = llama.tensors[name].shape[1]
        ours[name] = torch.from_numpy(ggml.dequantize(kind, packed, columns))
        plain[name] = torch.from_numpy(ggml.round_trip(kind, weights[name].numpy()))
    exact = logits(llama.path, {})
    near, far = ((logits(llama.path, w) - exact).square().mean() for w in (ours, plain))
    assert near < 0.6 * far


class Listening(Silent):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


class KilledError(Exception):
    pass


class Killer(Silent):
    """Ends the work when so many blocks are done."""

    def __init__(self, after: int) -> None:
        self._after = after

    def task(self, *_: Any, **__: Any) -> Any:
        killer = self

        class Task:
            def __enter__(self) -> "Task":
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, done: float, note: str = "") -> None:
                if done == killer._after:
                    raise KilledError

        return Task()


def test_a_killed_pass_goes_on_with_the_same_bytes(ggml: Ggml, tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model", layers=3))
    plan = plan_for(index)
    whole = run(index, tmp_path / "whole", ggml, plan)
    with pytest.raises(KilledError):
        run(index, tmp_path / "killed", ggml, plan, progress=Killer(2))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").iterdir()}
    assert len(written) == 4
    assert run(index, tmp_path / "killed", ggml, plan) == whole
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())


def test_types_may_be_mixed_and_others_are_left_alone(
    llama: CheckpointIndex, ggml: Ggml, tmp_path: Path
) -> None:
    plan = plan_for(llama)
    first, second, *_ = plan
    chosen = {first: "q6_k" if llama.tensors[first].shape[1] % 256 == 0 else "q5_1", second: "q4_1"}
    facts = run(llama, tmp_path, ggml, {**chosen, "model.embed_tokens.weight": "q8_0"})
    assert {name for name, _ in read_rounded(tmp_path)} == {first, second}
    assert {told["type"] for told in facts["tensors"]} == set(chosen.values())


def test_a_type_without_support_is_told_before_any_work(
    llama: CheckpointIndex, ggml: Ggml, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="'iq3_s' cannot be packed"):
        run(llama, tmp_path / "out", ggml, plan_for(llama, "iq3_s"))
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_always_zero_are_named(ggml: Ggml, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    silence(path, "model.layers.0.mlp.up_proj.weight")
    index = open_checkpoint(path)
    heard = Listening()
    warned = heard.warned
    facts = run(index, tmp_path / "out", ggml, plan_for(index), progress=heard)
    assert len(warned) == 2
    assert "288 tokens, but the widest map has 512 inputs" in warned.pop(0)
    assert "model.layers.0.mlp.down_proj.weight keeps ggml's rounding" in warned[0]
    assert "always zero" in warned[0]
    assert np.isfinite(facts["loss"])


def test_inputs_that_are_not_finite_are_named(
    llama: CheckpointIndex, ggml: Ggml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    moments = rounding._BlockRounding.moments

    def broken(self: Any, map: rounding.BlockMap) -> tuple[torch.Tensor, torch.Tensor]:
        moment, drift = moments(self, map)
        if map.name == name:
            moment[3, 5] = float("nan")
        return moment, drift

    monkeypatch.setattr(rounding._BlockRounding, "moments", broken)
    heard = Listening()
    facts = run(llama, tmp_path, ggml, plan_for(llama), progress=heard)
    assert f"{name} keeps ggml's rounding: the second moment of its inputs is not finite" in (
        heard.warned
    )
    assert np.isfinite(facts["loss"])
    kept = dict(read_rounded(tmp_path))[name]
    weight = AutoModelForCausalLM.from_pretrained(llama.path).state_dict()[name]
    plain = ggml.quantize(ggml.type("q4_0"), weight.float().numpy())
    np.testing.assert_array_equal(kept, plain)


def test_weights_that_do_not_fit_are_named(ggml: Ggml, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    multiply(path, "model.layers.0.mlp.up_proj.weight", 1e30)
    index = open_checkpoint(path)
    heard = Listening()
    run(index, tmp_path / "out", ggml, plan_for(index), progress=heard)
    assert "up_proj.weight keeps ggml's rounding: its weights do not fit into Q4_0" in (
        " ".join(heard.warned)
    )


def silence(path: Path, name: str) -> None:
    multiply(path, name, 0)


def multiply(path: Path, name: str, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] *= factor
            save_file(tensors, shard, metadata={"format": "pt"})


def test_files_that_are_no_rounded_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / f"00000{rounding._SUFFIX}").write_bytes(b"not one")
    with pytest.raises(IntegrityError, match="cannot be read as rounded tensors"):
        list(read_rounded(tmp_path))
