"""Verdicts on real models: what differs by chance alone is told from what is worse."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ggufkit import pipeline
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild

NOISE = 1e-3
"""Relative noise on each weight: a tenth of what Q8_0 rounds away, and other for each sample."""


def sample(floats: Path, out: Path, seed: int) -> Path:
    """A copy of a model in F32 whose weights are a little off, by chance."""
    shutil.copyfile(floats, out)
    rng = np.random.default_rng(seed)
    for tensor in read_gguf(out, arrays=False).tensors:
        if len(tensor.shape) > 1:
            shape = (tensor.parameters,)
            weights = np.memmap(out, np.float32, "r+", tensor.offset, shape)
            weights *= 1 + np.float32(NOISE) * rng.standard_normal(shape, np.float32)
            weights.flush()
    return out


@pytest.mark.slow
def test_samples_of_a_model_are_indistinguishable_and_q4_0_is_worse(
    shared_models: Path, tmp_path: Path, native: NativeBuild
) -> None:
    made = pipeline.convert("demo", types=["f32", "q8_0", "q4_0"], models_dir=shared_models)
    floats, fine, coarse = (m.path for m in made)
    samples = []
    for seed in range(2):
        noisy = sample(floats, tmp_path / f"sample{seed}.gguf", seed)
        (rounded,) = pipeline.quantize(noisy, types=["q8_0"], models_dir=tmp_path / "models")
        samples.append(rounded.path)
        noisy.unlink()
    report = pipeline.compare(
        fine,
        [coarse, *samples],
        texts=["pydoc-measure"],
        context=64,
        chunks=24,
        models_dir=tmp_path / "models",
    )
    verdicts = {c.model: c.verdicts[0].verdict for c in report.comparisons}
    assert verdicts == {coarse: "worse"} | dict.fromkeys(samples, "indistinguishable")
    for pair in report.differences:
        told = pair.difference
        names = {told.model, told.other}
        expected = "worse" if coarse in names else "indistinguishable"
        assert told.verdict == expected, told
    by_models = {(d.difference.measure, d.difference.model) for d in report.differences}
    assert by_models == {
        (measure, model)
        for measure in ("divergence", "log_perplexity")
        for model in (coarse, samples[0])
    }
    assert all(c.delta_log_perplexity_error > 0 for c in report.comparisons)
