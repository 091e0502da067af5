"""Rounding with error feedback, from a checkpoint to a GGUF that llama.cpp runs."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from ggufkit import pipeline
from ggufkit.conversion import ROUNDING_KEY, Conversion
from ggufkit.errors import UsageError
from ggufkit.evaluate import perplexity
from ggufkit.library import manifest_of
from ggufkit.llamacpp.gguf import read_gguf, write_replaced
from ggufkit.llamacpp.packing import format_of
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.store import Store
from ggufkit.texts.load import load_text
from ggufkit.values import (
    Artifact,
    Calibration,
    Checkpoint,
    EvalResult,
    FetchOptions,
    QuantizeResult,
    RoundingOptions,
)
from tests.factory import ARCHITECTURES, edit_config, make_checkpoint, write_demo_tokenizer
from tests.scaling.test_rounding import Listening
from tests.test_factory import BLOCKS

Run = Callable[..., tuple[int, str, str]]
SMALL = Calibration("pydoc-calibration", samples=4, length=64)
OPTIONS = ["--calibration", "pydoc-calibration"]
OPTIONS += ["--calibration-samples", "4", "--calibration-length", "64"]
GPTQ = RoundingOptions("gptq")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, native: NativeBuild) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tokenizer(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_tokenizer(demo_gguf, tmp_path_factory.mktemp("tokenizer"))


def contents(path: Path) -> dict[str, bytes]:
    return {t.name: np.asarray(t.data).tobytes() for t in GGUFReader(path).tensors}


# What stays as llama-quantize wrote it, by family: a part of the name and why.
LEFT_ALONE = {
    "llama": {},
    "gpt2": {},
    "gemma2": {},
    "phi3": {},
    "internlm2": {"attn_v": "was rounded to"},
    "qwen2_moe": {"_exps": "no linear map of a block"},
    "deepseek_v2": {
        "_exps": "no linear map of a block",
        "attn_k_b": "no linear map of a block",
        "attn_v_b": "no linear map of a block",
    },
}


@pytest.mark.parametrize("arch", LEFT_ALONE)
def test_the_file_is_the_stock_one_but_for_the_data_of_linear_maps(
    arch: str, tokenizer: Path, tmp_path: Path, native: NativeBuild
) -> None:
    row = ARCHITECTURES[arch]
    path = make_checkpoint(
        tmp_path / arch,
        arch,
        layers=BLOCKS.get(arch, 2),
        tokenizer=tokenizer if row.byte_level else None,
    )
    heard = Listening()
    job = Conversion(
        Store(tmp_path / "models"),
        native,
        Checkpoint(path, arch, str(path), "0" * 64),
        FetchOptions(trust_remote_code=True),
        SMALL,
        ["Q4_K_M"],
        heard,
        rounding=GPTQ,
        guard=True,
    )
    stock = job.quantize("Q4_K_M", None)
    made = job.make("Q4_K_M", None)
    told = made.manifest.facts["rounding"]
    ours, theirs = (read_gguf(artifact.file(".gguf")) for artifact in (made, stock))
    assert list(ours.metadata) == [*theirs.metadata, ROUNDING_KEY]
    assert "GPTQ by ggufkit on 4 x 64 tokens" in ours.metadata.pop(ROUNDING_KEY)
    assert ours.metadata == theirs.metadata
    described = [[(t.name, t.shape, t.type, t.nbytes) for t in g.tensors] for g in (ours, theirs)]
    assert described[0] == described[1]
    # Other data where it is said, and nowhere else.
    before, after = contents(stock.file(".gguf")), contents(made.file(".gguf"))
    assert {name for name in after if after[name] != before[name]} <= set(told["names"])
    quantized = {t.name for t in ours.tensors if t.type not in ("F32", "F16", "BF16")}
    left = {tensor["name"]: tensor["reason"] for tensor in told["left_alone"]}
    assert quantized == set(told["names"]) | set(left)
    for name, reason in left.items():
        if name.startswith("blk."):
            assert any(part in name and why in reason for part, why in LEFT_ALONE[arch].items())
    kept = [name for name in left if name.startswith("blk.")]
    assert bool(kept) == bool(LEFT_ALONE[arch])
    about = [line for line in heard.warned if "keep llama-quantize's rounding" in line]
    assert bool(about) == bool(kept)
    if kept:
        assert f"{len(kept)} of {len(kept) + len(told['names'])} quantized tensors" in about[0]
    assert told["loss"] < 0.9 * told["loss_importance"] < told["loss_plain"]
    assert {tensor["name"] for tensor in told["tensors"]} <= set(job.index.tensors)


def test_a_folded_model_is_rounded_as_it_will_be_stored(
    tmp_path: Path, models: Path, native: NativeBuild
) -> None:
    """Scales are folded in memory; had that other bits than the converter got, no row would fit."""
    checkpoint = make_checkpoint(tmp_path / "half", dtype="bfloat16")
    (made,) = pipeline.convert(
        str(checkpoint),
        types=["q4_0"],
        awq=True,
        imatrix="auto",
        rounding=GPTQ,
        calibration=SMALL,
        models_dir=models,
    )
    assert (made.awq, made.imatrix, made.rounding) == (True, True, "GPTQ")
    assert made.label == "Q4_0 with AWQ and GPTQ and imatrix"
    assert made.path.name == "half-awq-gptq-imatrix-Q4_0.gguf"
    manifest = manifest_of(made.path)
    assert manifest is not None
    told = manifest.facts["rounding"]
    assert [tensor["name"] for tensor in told["left_alone"]] == ["token_embd.weight"]
    assert {record["by"] for record in manifest.facts["calibrated"]} == {"AWQ", "GPTQ"}
    # The stock file was only a step on the way.
    assert len(list(models.glob("half/quantize-*"))) == 1
    assert not list(models.glob("half/convert-*"))


def test_on_the_command_line(run_cli: Run, tiny: Path, models: Path) -> None:
    command = ["--models-dir", models, "convert", tiny, "--type", "q4_0", "--rounding", "gptq"]
    code, out, err = run_cli(*command, *OPTIONS)
    assert code == 0, err
    assert "rounding ..." in err
    assert "Q4_0 with GPTQ: " in out
    code, out, err = run_cli(*command, *OPTIONS, "--json")
    assert code == 0, err
    assert err == ""
    (told,) = json.loads(out)
    assert (told["rounding"], told["reused"]) == ("GPTQ", True)
    note, compared = told["notes"]
    assert compared.startswith("compared with the checkpoint: ")
    assert re.match(r"Q4_0 GPTQ: 14 of 15 quantized tensors \(\d+ % of their weights\); ", note)
    assert re.search(r"0\.\d\d times those of plain rounding, 0\.\d\d times", note)
    code, out, _ = run_cli("--models-dir", models, "inspect", told["path"])
    assert code == 0
    assert ROUNDING_KEY in out
    assert "GPTQ by ggufkit on" in re.sub(r"\s+", " ", out)
    code, out, _ = run_cli("--models-dir", models, "inspect", told["path"], "--json")
    manifest = json.loads(out)["manifest"]
    losses = manifest["facts"]["rounding"]["tensors"]
    assert len(losses) == 14
    assert all(loss["loss"] <= loss["loss_plain"] for loss in losses)


def test_what_cannot_be_rounded_is_refused_before_any_work(
    run_cli: Run, tiny: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    command = ["--models-dir", models, "convert"]
    gptq = ["--rounding", "gptq", *OPTIONS]
    for type in ("iq3_s", "iq2_xxs", "tq1_0", "iq3_m"):
        code, _, err = run_cli(*command, tiny, "--type", "q4_0", "--type", type, *gptq)
        assert code == 2 or code == 1
        assert f"blocks of type '{type.upper()}' cannot be packed" in err
        assert "Known: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q2_K, Q3_K, Q4_K" in err
    assert not models.exists()
    code, _, err = run_cli(*command, tiny_gguf, "--type", "q4_0", *gptq)
    assert code != 0
    assert "is a GGUF; AWQ, GPTQ and --imatrix auto work on a checkpoint" in err
    code, _, err = run_cli(*command, tiny, "--type", "q4_0", "--guard")
    assert code != 0
    assert "--guard needs AWQ or GPTQ" in err


def test_blocks_in_an_unknown_order_are_refused(run_cli: Run, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "unknown")
    edit_config(path, architectures=["MambaForCausalLM"])
    models = tmp_path / "models"
    code, _, err = run_cli(
        *("--models-dir", models, "convert", path, "--type", "q4_0", "--rounding", "gptq"),
        *OPTIONS,
    )
    assert code == 1
    assert "error: GPTQ needs to know the order of a model's blocks" in err
    assert "hint: Convert with --rounding ggml" in err
    assert not list(models.glob("*/quantize-*"))


def test_too_little_text(run_cli: Run, tiny: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    text = tmp_path / "text.txt"
    command = ["--models-dir", models, "convert", tiny, "--type", "q4_0", "--rounding", "gptq"]
    command += ["--calibration", text, "--calibration-length", "64"]
    text.write_text("Hardly a word.", encoding="utf-8")
    code, _, err = run_cli(*command)
    assert code == 1
    assert re.search(r"error: the calibration text has only \d+ tokens", err)
    assert not list(models.glob("*/*.gguf"))
    text.write_text("A few more words, of which none is new. " * 15, encoding="utf-8")
    code, _, err = run_cli(*command)
    assert code == 0
    assert re.search(r"rounding looks at \d+ tokens, but the widest map has \d+ inputs", err)


def test_killed_within_a_block_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", layers=3)
    deadly = (
        "import os, signal, sys\n"
        "from ggufkit import cli\n"
        "from ggufkit.scaling import rounding\n"
        "round_matrix, calls = rounding.round_matrix, []\n"
        "def round_and_die(*args, **more):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 11:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return round_matrix(*args, **more)\n"
        "rounding.round_matrix = round_and_die\n"
        "sys.exit(cli.execute(sys.argv[1:]))\n"
    )

    def run(models: str, *how: str) -> subprocess.CompletedProcess[str]:
        command = ["--models-dir", tmp_path / models, "convert", checkpoint, "--type", "q4_0"]
        command += ["--rounding", "gptq", *OPTIONS, "--json"]
        return subprocess.run(
            [sys.executable, *how, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    killed = run("models", "-c", deadly)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("models/tiny/round-*.partial")
    first = left / "00000.rounded.safetensors"
    written = first.stat().st_mtime_ns
    assert not (left / "00001.rounded.safetensors").exists()  # seven maps of a block, then four
    resumed, unbroken = run("models", "-m", "ggufkit"), run("unbroken", "-m", "ggufkit")
    assert resumed.returncode == unbroken.returncode == 0, resumed.stderr
    (published,) = tmp_path.glob("models/tiny/round-*")
    assert (published / first.name).stat().st_mtime_ns == written
    digests = []
    for ran, models in ((resumed, "models"), (unbroken, "unbroken")):
        (told,) = json.loads(ran.stdout)
        (rounded,) = Store(tmp_path / models).artifacts("round")
        gguf = Store(tmp_path / models).digest(Path(told["path"])).sha256
        digests.append((gguf, rounded.manifest.outputs))
    assert digests[0] == digests[1]


def test_the_guard_keeps_the_best_of_three(
    tiny: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert() -> QuantizeResult:
        (result,) = pipeline.convert(
            str(tiny),
            types=["q4_0"],
            awq=True,
            rounding=GPTQ,
            guard=True,
            calibration=SMALL,
            models_dir=models,
        )
        return result

    real = perplexity.measure
    figures = {(True, "gptq"): 20.0, (True, "ggml"): 30.0, (False, "ggml"): 40.0}

    def measure(store: Store, build: NativeBuild, model: Path, *args: Any, **more: Any) -> Any:
        manifest = manifest_of(model)
        assert manifest is not None
        rounding = "gptq" if "rounding" in manifest.options else "ggml"
        found: EvalResult = real(store, build, model, *args, **more)
        assert math.isfinite(found.perplexity)
        way = (bool(manifest.inputs["scales"]), rounding)
        return dataclasses.replace(found, perplexity=figures[way])

    monkeypatch.setattr(perplexity, "measure", measure)
    for best in figures:
        figures[best] = 10.0
        result = convert()
        assert (result.awq, result.rounding.lower()) == best
        assert result.path.is_file()
        (told,) = (note for note in result.notes if "guard" in note)
        name = {(True, "gptq"): "AWQ and GPTQ", (True, "ggml"): "AWQ"}.get(best, "plain")
        assert f"Q4_0 guard: {name} kept" in told
        figures[best] = 50.0


def test_llama_cpp_computes_what_the_floats_of_the_blocks_say(
    tiny: Path, models: Path, native: NativeBuild, tmp_path: Path
) -> None:
    """The floats that packing says the blocks are, put into the float GGUF.

    What is left is that llama.cpp rounds activations to 8 bits when weights are blocks,
    each processor's kernels in their own order: log perplexity differed by up to 0.008.
    """
    types = {t: t for t in ("q4_0", "q2_k", "iq4_xs")}
    results = pipeline.convert(
        str(tiny),
        types=[*types, "f32"],
        rounding=GPTQ,
        calibration=SMALL,
        models_dir=models,
    )
    *made, floats = results
    text = load_text("pydoc-measure", cache=tmp_path / "cache").path
    for result in made:
        tensors = read_gguf(result.path, arrays=False).tensors

        def data(result: QuantizeResult = result, tensors: Any = tensors) -> Any:
            raw = np.memmap(result.path, np.uint8, "r")
            for tensor in tensors:
                if tensor.type in ("F32", "F16"):
                    continue
                format = format_of(tensor.type)
                packed = np.array(raw[tensor.offset : tensor.offset + tensor.nbytes])
                rows = packed.reshape(tensor.shape[1], -1)
                yield tensor.name, format.dequantize(format.unpack(rows)).view(np.uint8)

        predicted = tmp_path / f"predicted-{result.type}.gguf"
        write_replaced(floats.path, predicted, data(), (ROUNDING_KEY, "as floats"))
        ours, theirs = (
            pipeline.ppl(str(text), [path], context=128, chunks=8, models_dir=tmp_path / "ppl")[0]
            for path in (predicted, result.path)
        )
        assert abs(math.log(ours.perplexity / theirs.perplexity)) < 0.02


def test_types_of_floats_are_converted_plainly(tiny: Path, models: Path) -> None:
    (made,) = pipeline.convert(
        str(tiny), types=["f16"], rounding=GPTQ, calibration=SMALL, models_dir=models
    )
    assert made.rounding == "ggml"


def test_an_artifact_says_how_it_was_rounded(tiny: Path, models: Path) -> None:
    with pytest.raises(UsageError, match="cannot be packed"):
        pipeline.convert(str(tiny), types=["iq1_s"], rounding=GPTQ, models_dir=models)
    found: list[Artifact] = [
        a for a in Store(models).artifacts("quantize") if a.manifest.options.get("rounding")
    ]
    assert found
    assert all(a.manifest.options["rounding"]["method"] == "gptq" for a in found)
