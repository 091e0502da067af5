"""Every kind of bad input, on the real command line: message, hint, exit code, no debris."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ggufkit.store import Store
from tests.factory import BREAKERS, edit_config, make_checkpoint
from tests.sources.hubs import serving

Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.usefixtures("native")


def published(models: Path) -> list[str]:
    """Everything in a models directory that could be taken for a result."""
    return sorted(
        p.relative_to(models).as_posix()
        for p in models.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(models).parts)
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def convert(run_cli: Run, models: Path) -> Run:
    def run(model: object, *args: object) -> tuple[int, str, str]:
        return run_cli("--models-dir", models, "convert", model, *args)

    return run


def refused(told: tuple[int, str, str], code: int, message: str, hint: str) -> None:
    assert told[:2] == (code, "")
    lines = told[2].splitlines()
    error = next(line for line in lines if line.startswith("error: "))
    assert message in error
    assert any(line.startswith("hint: ") and hint in line for line in lines), lines


def test_a_missing_directory(convert: Run, models: Path) -> None:
    refused(convert("nowhere"), 1, "no nowhere", "checkpoint directory")
    assert not models.exists()


def test_an_empty_directory(convert: Run, models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(convert(tmp_path / "empty"), 1, "empty", "")
    assert not published(models) if models.exists() else True


@pytest.mark.parametrize(
    ("damage", "code", "message", "hint"),
    [
        ("no_config", 1, "config.json", "config"),
        ("missing_shard", 1, "model-00002-of-00002.safetensors", "again"),
        ("truncated", 3, "truncated", "again"),
        ("pickle_only", 1, "pickle", "--allow-pickle"),
        ("auto_map", 1, "modeling_evil", "--trust-remote-code"),
        ("no_tokenizer", 1, "tokenizer", ""),
        ("wrong_tokenizer", 1, "tokens, but the model has embeddings", "belong to the model"),
        ("quantized", 1, "quantized", ""),
        ("architecture", 1, "architecture NobodyForCausalLM", ""),
    ],
)
def test_a_broken_checkpoint(
    convert: Run, models: Path, tmp_path: Path, damage: str, code: int, message: str, hint: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "broken")
    BREAKERS[damage](checkpoint)
    told = convert(checkpoint, "--type", "q4_0", "-o", tmp_path / "out")
    refused(told, code, message, hint)
    assert not models.exists() or not published(models)
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_awq_does_not_know(convert: Run, models: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    edit_config(checkpoint, architectures=["LlamaForCausalLMX"])
    told = convert(checkpoint, "--awq", "--type", "q4_0")
    refused(told, 1, "nearest known: LlamaForCausalLM", "without --awq")
    assert not published(models)


def test_nan_weights_stop_awq(convert: Run, models: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    BREAKERS["nan"](checkpoint)
    told = convert(checkpoint, "--awq", "--type", "q4_0", "--calibration-length", "32")
    refused(told, 1, "mlp.down_proj.weight holds NaN", "fetch it again")
    assert not [name for name in published(models) if "Q4_0" in name or "scales" in name]


def test_an_unknown_type(convert: Run, models: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    refused(convert(checkpoint, "--type", "q4_k_x"), 2, "no quantization type 'q4_k_x'", "q4_k")
    assert not models.exists()


def test_awq_on_a_gguf(convert: Run, demo_gguf: Path) -> None:
    told = convert(demo_gguf, "--awq", "--type", "q4_0")
    refused(told, 2, "AWQ, GPTQ and --imatrix auto work on a checkpoint", "leave out --awq")


def test_options_of_awq_that_clash(convert: Run, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    for option in ("--clip", "--sensitivity"):
        told = convert(checkpoint, option)
        refused(told, 2, "options of AWQ's search need AWQ", "Add --awq")
    told = convert(checkpoint, "--guard")
    refused(told, 2, "--guard needs AWQ or GPTQ", "--rounding gptq")
    (tmp_path / "imatrix.gguf").touch()
    told = convert(checkpoint, "--awq", "--imatrix", tmp_path / "imatrix.gguf")
    refused(told, 2, "before scales are folded in", "--imatrix auto")
    told = convert(checkpoint, "--imatrix", tmp_path / "nowhere.gguf")
    refused(told, 2, "There is no importance matrix", "--imatrix auto")


def test_scales_of_another_model(run_cli: Run, models: Path, tmp_path: Path) -> None:
    ours = make_checkpoint(tmp_path / "ours")
    theirs = make_checkpoint(tmp_path / "theirs", layers=1)
    small = ("--calibration-samples", 2, "--calibration-length", 64, "--calibration", "pydoc")
    code, _, _ = run_cli("--models-dir", models, "awq", theirs, "-o", tmp_path / "a", *small)
    assert code == 0
    scales = tmp_path / "a" / "awq" / "scales.safetensors"
    told = run_cli(
        *("--models-dir", models, "awq", ours, "-o", tmp_path / "b", "--scales", scales, *small)
    )
    refused(told, 3, "scales are not for this checkpoint", "leave out --scales")
    assert not (tmp_path / "b").exists()


def test_too_little_memory(
    convert: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggufkit.llamacpp.host.available_memory_nbytes", lambda: 1 << 20)
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    told = convert(checkpoint, "--awq", "--type", "q4_0", "--calibration", "pydoc")
    refused(told, 1, "GiB of memory", "--calibration-samples")
    assert not list(models.rglob("*.safetensors"))
    assert not list(models.rglob("*Q4_0*"))


def test_a_quantized_gguf(run_cli: Run, models: Path, demo_gguf: Path) -> None:
    told = run_cli("--models-dir", models, "quantize", demo_gguf, "--type", "q5_0")
    refused(told, 1, "q4_1", "--allow-requantize")
    assert not published(models)


def test_a_type_that_needs_an_importance_matrix(convert: Run, models: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    told = convert(checkpoint, "--type", "iq1_s")
    refused(told, 1, "importance matrix", "--imatrix")
    assert not published(models)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello world, this is no model", "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata keys"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "big-endian"),
    ],
)
@pytest.mark.parametrize("verb", ["convert", "quantize", "inspect", "ppl"])
def test_a_file_that_is_no_gguf(
    run_cli: Run, models: Path, tmp_path: Path, verb: str, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    (tmp_path / "text.txt").write_text("some words")
    args = {
        "convert": [path],
        "quantize": [path, "--type", "q4_0"],
        "inspect": [path],
        "ppl": [tmp_path / "text.txt", path],
    }
    refused(run_cli("--models-dir", models, verb, *args[verb]), 3, message, "")
    assert not models.exists() or not published(models)


def test_a_truncated_gguf(run_cli: Run, tmp_path: Path, demo_gguf: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(demo_gguf.read_bytes()[:-4096])
    refused(run_cli("inspect", path), 3, "truncated", "again")


def test_a_text_shorter_than_two_contexts(
    run_cli: Run, models: Path, tmp_path: Path, demo_gguf: Path
) -> None:
    (tmp_path / "short.txt").write_text("Only a few words. " * 20)
    told = run_cli("--models-dir", models, "ppl", tmp_path / "short.txt", demo_gguf)
    refused(told, 1, "tokens", "")
    assert "1024" in told[2]
    assert not published(models)


@pytest.mark.parametrize("content", [b"PAR1 not text", b"\xff\xfe\x00text", b""])
def test_a_text_that_is_none(
    run_cli: Run, models: Path, tmp_path: Path, demo_gguf: Path, content: bytes
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    code, out, err = run_cli("--models-dir", models, "ppl", tmp_path / "bad.txt", demo_gguf)
    assert code in (1, 3)
    assert out == ""
    assert "error: " in err
    assert not models.exists() or not published(models)


def test_an_unknown_name_at_the_hub(
    convert: Run, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("huggingface") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        refused(convert("hf:nobody/nothing"), 1, "nobody/nothing", "")
    assert not models.exists() or not published(models)


def test_no_network(models: Path, tmp_path: Path) -> None:
    # Port 9 (discard) on this machine refuses connections.
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "GGUFKIT_MODELS": str(models)}
    ran = subprocess.run(
        [sys.executable, "-m", "ggufkit", "convert", "hf:org/name"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert "error: " in ran.stderr
    assert "network" in ran.stderr
    assert not models.exists() or not published(models)


def test_a_disk_that_is_too_small(convert: Run, models: Path, tmp_path: Path) -> None:
    """A checkpoint of four tebibytes, nearly all of it a hole."""
    checkpoint = make_checkpoint(tmp_path / "huge")
    path = checkpoint / "model.safetensors"
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    width = 256
    rows = (4 << 40) // (4 * width)
    start = len(data)
    header["huge.weight"] = {
        "dtype": "F32",
        "shape": [rows, width],
        "data_offsets": [start, start + rows * width * 4],
    }
    spelled = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(spelled)) + spelled + data)
        file.truncate(8 + len(spelled) + start + rows * width * 4)
    code, out, err = _convert_without_hashing(convert, checkpoint)
    assert (code, out) == (1, "")
    assert "converting huge needs" in err
    assert "GiB are free" in err
    assert "--models-dir" in err
    assert not published(models)


def _convert_without_hashing(convert: Run, checkpoint: Path) -> tuple[int, str, str]:
    """Four tebibytes of zeros would be hashed for hours; any digest will do here."""
    from ggufkit.values import FileDigest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "digest", lambda _, path, *rest: FileDigest("0", path.stat().st_size))
        return convert(checkpoint, "--type", "q4_0")


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that each stage lasts long enough to be hit."""
    torch.manual_seed(0)
    return make_checkpoint(
        tmp_path_factory.mktemp("slow") / "slow", layers=4, hidden=512, intermediate=2048, heads=8
    )


STAGES = {
    "vocab": "reading the vocabulary",
    "awq": "AWQ search",
    "guard": "comparing with the original",
    "fold": "write",
    "convert": "converting",
    "verify": "comparing with the checkpoint",
    "quantize": "quantizing",
}
"""Stage to the beginning of the line that tells of it."""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_a_run_stopped_in_each_stage_ends_with_the_same_bytes(
    tmp_path: Path, slow_checkpoint: Path, how: signal.Signals
) -> None:
    env = {**os.environ, "GGUFKIT_MODELS": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ggufkit", "convert", str(slow_checkpoint), *CONVERSION]
    for stage in STAGES:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stderr is not None
        for line in process.stderr:
            if line.decode().startswith(STAGES[stage]):
                break
        else:
            pytest.fail(f"the run ended before {stage}")
        while stage == "awq" and not list(tmp_path.glob("*/awq-*/.blocks/00001.scales.*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
        assert out == b""
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert b"error: interrupted" in err
        else:
            assert process.returncode == -signal.SIGKILL
        assert not list(tmp_path.glob("*/*.gguf"))
        assert not list(tmp_path.glob("*/quantize-*/manifest.json"))
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    (result,) = json.loads(again.stdout)
    assert Store(tmp_path).digest(Path(result["path"])).sha256 == _reference(slow_checkpoint)
    assert not list(tmp_path.glob("*/*.partial"))


CONVERSION = [
    *("--awq", "--type", "q4_0", "--json"),
    *("--calibration-samples", "4", "--calibration-length", "64"),
]


def _reference(checkpoint: Path) -> str:
    """Digest of the GGUF that an undisturbed run makes."""
    models = checkpoint.parent / "models"
    ran = subprocess.run(
        [sys.executable, "-m", "ggufkit", "convert", str(checkpoint), *CONVERSION],
        env={**os.environ, "GGUFKIT_MODELS": str(models)},
        capture_output=True,
        text=True,
        check=True,
    )
    (result,) = json.loads(ran.stdout)
    return Store(models).digest(Path(result["path"])).sha256
