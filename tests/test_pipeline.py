"""The whole way, on real models through the real tools."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from ggufkit import pipeline
from ggufkit.checkpoint import open_checkpoint
from ggufkit.evaluate import perplexity
from ggufkit.library import manifest_of
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.quantize.types import ALIASES, TYPES, parse_type, space_forecast, stem_of
from ggufkit.store import Store
from ggufkit.texts.load import load_text
from ggufkit.values import AwqOptions, Calibration, EvalResult, QuantizeResult, VerifyOptions
from tests.factory import make_checkpoint

Run = Callable[..., tuple[int, str, str]]
LITTLE = Calibration(samples=4, length=64)
CHUNKS = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load_text("pydoc", cache=tmp_path_factory.mktemp("texts")).path


def test_all_types_of_the_tool_are_known(native: NativeBuild) -> None:
    told: list[str] = []
    toolchain.run([native.tool("llama-quantize"), "--help"], on_text=told.append)
    listed = "".join(told).partition("allowed quantization types")[2]
    names = set(re.findall(r"^ +(?:\d+ +or +)?(\w+) +:", listed, re.MULTILINE))
    assert names == {*TYPES, *ALIASES}
    assert parse_type(" q4_k_m ") == parse_type("Q4_K") == "Q4_K_M"


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("model-F16.gguf", "model"),
        ("model.q4_k_m.gguf", "model"),
        ("Qwen2.5-0.5B-IQ4_XS.gguf", "Qwen2.5-0.5B"),
        ("plain.gguf", "plain"),
    ],
)
def test_a_stem_loses_its_type(name: str, stem: str) -> None:
    assert stem_of(Path(name)) == stem


def test_the_forecast_is_above_what_is_written(tmp_path: Path, native: NativeBuild) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", hidden=192)
    types = ["q2_k", "q4_0", "q4_k_m", "q6_k", "q8_0", "f16", "f32"]
    for result in pipeline.convert(str(checkpoint), types=types, models_dir=tmp_path / "models"):
        parameters = read_gguf(result.path).parameters
        assert result.nbytes < space_forecast(parameters, [result.type])


def test_one_intermediate_serves_all_types_and_is_deleted(
    tmp_path: Path, native: NativeBuild
) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    models = tmp_path / "models"
    results = pipeline.convert(
        str(checkpoint), types=["Q4_0", "q5_k_m", "q4_0", "f16"], models_dir=models
    )
    assert [r.type for r in results] == ["Q4_0", "Q5_K_M", "F16"]
    assert [r.path.name for r in results] == [
        "tiny-Q4_0.gguf",
        "tiny-Q5_K_M.gguf",
        "tiny-F16.gguf",
    ]
    assert not list(models.glob("tiny/convert-*"))
    assert all(r.path.is_symlink() and r.path.parent == models / "tiny" for r in results)
    again = pipeline.convert(str(checkpoint), types=["q4_0", "f16"], models_dir=models)
    assert all(r.reused for r in again)
    kept = pipeline.convert(
        str(checkpoint), types=["q8_0"], keep_intermediate=True, models_dir=models
    )
    assert not kept[0].reused
    (intermediate,) = models.glob("tiny/convert-*/*.gguf")
    assert {t.type for t in read_gguf(intermediate).tensors} == {"F32"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_intermediate_keeps_the_precision(
    tmp_path: Path, native: NativeBuild, dtype: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", dtype=dtype)
    pipeline.convert(
        str(checkpoint), types=["q8_0"], keep_intermediate=True, models_dir=tmp_path / "models"
    )
    (intermediate,) = (tmp_path / "models").glob("tiny/convert-*/*.gguf")
    types = {t.type for t in read_gguf(intermediate).tensors}
    assert types == {"F32", {"float16": "F16", "bfloat16": "BF16"}[dtype]}  # norms are F32


def test_fallbacks_are_told(tmp_path: Path, run_cli: Run, native: NativeBuild) -> None:
    checkpoint = make_checkpoint(tmp_path / "odd", hidden=192, intermediate=320)
    code, out, err = run_cli("--models-dir", tmp_path / "m", "convert", checkpoint)
    assert code == 0, err
    line = " ".join(out.split())
    assert re.search(r"Q4_K_M: 5\.\d\d bits per weight asked, 6\.\d\d got", line), line
    assert re.search(r"\d+ of \d+ tensors fell back: \d+ to q5_0, \d+ to q8_0", line), line
    code, out, err = run_cli("--models-dir", tmp_path / "m", "convert", checkpoint, "--json")
    (told,) = json.loads(out)
    assert told["reused"]
    assert told["bits_per_weight_asked"] < told["bits_per_weight"]
    assert sum(told["fallbacks"].values()) <= told["tensors"]


def test_out_gets_files_with_manifests(tmp_path: Path, native: NativeBuild) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    (result,) = pipeline.convert(
        str(checkpoint), types=["q4_0"], out=tmp_path / "out", models_dir=tmp_path / "models"
    )
    assert result.path == tmp_path / "out" / "tiny-Q4_0.gguf"
    assert not result.path.is_symlink()
    manifest = manifest_of(result.path)
    assert manifest is not None
    assert manifest.facts["origin"] == str(checkpoint)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "tiny-Q4_0.gguf",
        "tiny-Q4_0.gguf.manifest.json",
    ]


def test_a_gguf_is_only_quantized(tmp_path: Path, native: NativeBuild) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    models = tmp_path / "models"
    (floats,) = pipeline.convert(str(checkpoint), types=["f32"], models_dir=models)
    (direct,) = pipeline.convert(str(checkpoint), types=["q4_k_m"], models_dir=models)
    (second,) = pipeline.convert(str(floats.path), types=["q4_k_m"], models_dir=models)
    ours, theirs = (p.path.read_bytes() for p in (second, direct))
    assert ours == theirs


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_awq_gives_a_checkpoint_that_loads_and_converts(
    tmp_path: Path, native: NativeBuild, arch: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / arch, arch)
    models = tmp_path / "models"
    # transformers reads Qwen2's tokenizers by a rule of its own, and this one is none.
    verify = VerifyOptions(allowed=("tokens", "vocabulary") if arch == "qwen2" else ())
    result = pipeline.awq(
        str(checkpoint),
        out=tmp_path / "folded",
        type="q4_0",
        calibration=LITTLE,
        models_dir=models,
    )
    assert result.objective_ratio < 1
    assert (tmp_path / "folded" / "awq" / "scales.safetensors").is_file()
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    # Converting the folded checkpoint is what --awq does in one go.
    (two_steps,) = pipeline.convert(
        str(tmp_path / "folded"), types=["q4_0"], verify=verify, models_dir=models
    )
    (one_step,) = pipeline.convert(
        str(checkpoint),
        types=["q4_0"],
        awq=True,
        calibration=LITTLE,
        verify=verify,
        models_dir=models,
    )
    assert one_step.awq
    two, one = (read_gguf(r.path) for r in (two_steps, one_step))
    two_data, one_data = (r.path.read_bytes() for r in (two_steps, one_step))
    for theirs, ours in zip(two.tensors, one.tensors, strict=True):
        assert (theirs.name, theirs.type) == (ours.name, ours.type)
        assert (
            two_data[theirs.offset : theirs.offset + theirs.nbytes]
            == one_data[ours.offset : ours.offset + ours.nbytes]
        )


def test_float_types_take_no_scales(tmp_path: Path, native: NativeBuild) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    results = pipeline.convert(
        str(checkpoint),
        types=["f16", "q4_0"],
        awq=True,
        calibration=LITTLE,
        models_dir=tmp_path / "models",
    )
    assert [(r.type, r.awq) for r in results] == [("F16", False), ("Q4_0", True)]


def test_the_demo_gives_the_published_file_back(
    demo_gguf: Path, shared_models: Path, text: Path, native: NativeBuild
) -> None:
    """Proves tokenizer, conversion and quantization at once."""
    (made,) = pipeline.convert("demo", types=["q4_1"], models_dir=shared_models)
    published, ours = pipeline.ppl(
        str(text), [demo_gguf, made.path], chunks=CHUNKS, models_dir=shared_models
    )
    assert (ours.perplexity, ours.error) == (published.perplexity, published.error)
    assert ours.tokens == published.tokens == CHUNKS * 512


def test_awq_keeps_the_demo_in_f32_and_helps_it_in_q4_0(
    shared_models: Path, tmp_path: Path, native: NativeBuild
) -> None:
    calibration = Calibration("pydoc-calibration", samples=8)
    result = pipeline.awq(
        "demo",
        out=tmp_path / "folded",
        type="q4_0",
        calibration=calibration,
        models_dir=shared_models,
    )
    assert result.objective_ratio < 0.75
    floats, plain = pipeline.convert("demo", types=["f32", "q4_0"], models_dir=shared_models)
    (folded,) = pipeline.convert(str(tmp_path / "folded"), types=["f32"], models_dir=shared_models)
    (scaled,) = pipeline.convert(
        "demo", types=["q4_0"], awq=True, calibration=calibration, models_dir=shared_models
    )
    told = pipeline.ppl(
        "pydoc-measure",
        [floats.path, folded.path, plain.path, scaled.path],
        chunks=2 * CHUNKS,
        models_dir=shared_models,
    )
    reference, same, rounded, recovered = (t.perplexity for t in told)
    assert same == pytest.approx(reference, rel=1e-3)
    assert scaled.nbytes == plain.nbytes
    assert recovered < rounded - 0.15 * (rounded - reference)
    again = pipeline.ppl("pydoc-measure", [plain.path], chunks=2 * CHUNKS, models_dir=shared_models)
    assert again[0].reused


def test_ppl_takes_the_newest_model_and_says_so(
    run_cli: Run, tmp_path: Path, text: Path, native: NativeBuild
) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    models = tmp_path / "models"
    pipeline.convert(str(checkpoint), types=["q4_0", "q8_0"], models_dir=models)
    code, out, err = run_cli("--models-dir", models, "ppl", text, "--chunks", 2, "-c", 64, "--json")
    assert code == 0, err
    (told,) = json.loads(out)
    assert told["perplexity"] > 1
    assert told["chunks"] == 2
    assert "measuring the newest model" in err
    code, out, err = run_cli(
        "--models-dir", models, "ppl", text, "tiny-q4_0", "tiny-q8_0", "--chunks", 2, "-c", 64
    )
    assert code == 0, err
    assert re.search(r"tiny-Q4_0 +\d+\.\d{4} ± \d+\.\d{4} +\+0\.0000", out)
    assert re.search(r"tiny-Q8_0 +\d+\.\d{4} ± \d+\.\d{4} +[+-]\d+\.\d{4}", out)


def test_plain_conversion_does_not_load_torch(tmp_path: Path, native: NativeBuild) -> None:
    """A 7B model on a 16 GB machine needs the memory for the tools."""
    checkpoint = make_checkpoint(tmp_path / "tiny")
    code = (
        "import sys; from ggufkit import pipeline; from pathlib import Path;"
        f"pipeline.convert({str(checkpoint)!r}, types=['q4_0'],"
        f" models_dir=Path({str(tmp_path / 'models')!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SMALL = Calibration("pydoc-calibration", samples=4, length=128)


def test_scales_can_be_folded_again(tmp_path: Path, native: NativeBuild) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    models = tmp_path / "models"
    first = pipeline.awq(
        str(checkpoint),
        out=tmp_path / "first",
        type="q4_0",
        imatrix=True,
        calibration=SMALL,
        models_dir=models,
    )
    again = pipeline.awq(
        str(checkpoint),
        out=tmp_path / "again",
        type="q4_0",
        awq_options=AwqOptions(scales=first.scales),
        calibration=SMALL,
        models_dir=models,
    )
    for name in ("model.safetensors", "awq/scales.safetensors"):
        assert (first.path / name).read_bytes() == (again.path / name).read_bytes()
    assert (first.path / "awq" / "imatrix.gguf").is_file()
    assert again.objective_ratio is None
    assert again.divergence == pytest.approx(first.divergence)
    assert again.groups_left_alone == first.groups_left_alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_folded_without_harm(dtype: str, tmp_path: Path, native: NativeBuild) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", dtype=dtype)
    models = tmp_path / "models"
    kept = pipeline.awq(
        str(checkpoint),
        out=tmp_path / "out",
        type="q4_0",
        calibration=SMALL,
        models_dir=models,
    )
    assert kept.divergence < 1e-7
    assert open_checkpoint(kept.path).dtype == open_checkpoint(checkpoint).dtype
    pipeline.convert(
        str(checkpoint), types=["q4_0"], awq=True, calibration=SMALL, models_dir=models
    )
    searched = [a.manifest for a in Store(models).artifacts("awq")]
    assert sorted(m.options["exact"] for m in searched) == [False, True]
    assert all(m.facts["divergence"] < 5e-5 for m in searched)


def test_the_guard_keeps_the_better_file(
    tmp_path: Path, native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")

    def convert() -> QuantizeResult:
        (result,) = pipeline.convert(
            str(checkpoint),
            types=["q4_0"],
            awq=True,
            imatrix="auto",
            guard=True,
            calibration=SMALL,
            models_dir=tmp_path / "models",
        )
        return result

    result = convert()
    (told,) = (note for note in result.notes if "guard" in note)
    with_awq, without = map(float, re.findall(r"(\d+\.\d+) with", told))
    assert result.awq == (with_awq < without)
    assert ("AWQ kept" in told) == result.awq
    assert result.imatrix
    # Whatever was measured, the other way round.
    real = perplexity.measure

    def contrary(*args: Any, **kwargs: Any) -> EvalResult:
        told = real(*args, **kwargs)
        return dataclasses.replace(told, perplexity=1 / told.perplexity)

    monkeypatch.setattr(perplexity, "measure", contrary)
    assert convert().awq != result.awq


def test_the_importance_matrix_is_that_of_llama_imatrix(
    tmp_path: Path, native: NativeBuild
) -> None:
    from gguf import GGUFReader

    checkpoint = make_checkpoint(tmp_path / "model")
    text = load_text("pydoc-calibration", cache=tmp_path / "cache").path
    short = tmp_path / "text.txt"
    short.write_text(text.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    models = tmp_path / "models"
    every = Calibration(str(short), samples=1000, length=128)
    pipeline.convert(
        str(checkpoint), types=["q4_0"], imatrix="auto", calibration=every, models_dir=models
    )
    (ours,) = Store(models).artifacts("imatrix")
    (floats,) = pipeline.convert(str(checkpoint), types=["f32"], models_dir=models)
    out = tmp_path / "theirs.gguf"
    ran = toolchain.run(
        [
            *(native.tool("llama-imatrix"), "-m", floats.path, "-f", short, "-o", out),
            *("-c", "128", "-t", "2", "--no-ppl"),
        ]
    )
    assert ran.returncode == 0, ran.tail
    means = []
    for file in (ours.file(".gguf"), out):
        tensors = {t.name: t.data for t in GGUFReader(file).tensors}
        means.append(
            {
                name.removesuffix(".in_sum2"): (
                    data / tensors[name.replace(".in_sum2", ".counts")]
                ).reshape(-1)
                for name, data in tensors.items()
                if name.endswith(".in_sum2")
            }
        )
    own, theirs = means
    assert set(theirs) <= set(own)
    for name, values in theirs.items():
        # The same text but for what is held back, cut at other places.
        assert np.median(np.abs(own[name] / values - 1)) < 0.05, name
        assert np.corrcoef(np.log(own[name]), np.log(values))[0, 1] > 0.98, name
