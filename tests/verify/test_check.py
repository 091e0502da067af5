"""A GGUF beside its checkpoint, by the processes that answer for both."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from ggufkit import pipeline
from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp import observing, toolchain
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.observing import UnusableGGUFError, check_opens
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.llamacpp.workers import Worker, WorkerEndedError, worker
from ggufkit.verify import check, reference
from ggufkit.verify.check import Verifier, require_names, verify_opens_only
from tests.factory import make_checkpoint
from tests.verify.rewriting import rewrite

SMALL = {"hidden": 64, "intermediate": 128, "vocab": 384}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("verify") / "model", "llama", **SMALL)


@pytest.fixture(scope="module")
def gguf(native: NativeBuild, checkpoint: Path) -> Path:
    out = checkpoint.parent / "model.gguf"
    toolchain.convert_checkpoint(
        native, checkpoint, out, outtype="f32", name="model", log=out.with_name("log")
    )
    return out


def request(checkpoint: Path, scratch: Path, **own: object) -> dict[str, object]:
    index = open_checkpoint(checkpoint)
    return {
        "checkpoint": str(checkpoint),
        "original": str(checkpoint),
        "trust_remote_code": False,
        "parameters": index.parameters,
        "available_nbytes": 1 << 34,
        "threads": 2,
        "stored": "F32",
        "scratch": str(scratch / "offload"),
        **own,
    }


@pytest.mark.parametrize("arch", ["llama", "mixtral", "gemma3", "deepseek_v3"])
def test_a_model_that_does_not_fit_is_streamed_with_the_same_predictions(
    arch: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / arch, arch, layers=3, **SMALL)
    found = []
    for nbytes in (1 << 34, 1):
        out = tmp_path / str(nbytes)
        out.mkdir()
        answer = reference.collect(request(path, out, available_nbytes=nbytes), out)
        assert "error" not in answer["predictions"], answer["predictions"]
        assert answer["predictions"]["missing_keys"] == []
        found.append(np.load(out / reference.LOGITS))
    np.testing.assert_array_equal(*found)


def test_rounding_as_ggml_does_it_explains_what_half_precision_changes(
    native: NativeBuild, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "half", dtype="bfloat16", **SMALL)
    out = tmp_path / "half.gguf"
    toolchain.convert_checkpoint(
        native, path, out, outtype="bf16", name="half", log=tmp_path / "log"
    )
    with Verifier(open_checkpoint(path), stored="BF16") as verifier:
        found = verifier.check(out)
    assert found.mismatches == ()
    # Without the rounding on both sides the distance would be that of rounding.
    assert found.figures["kl_mean"] < found.figures["kl_rounding"] / 3


def test_a_gguf_of_another_model_differs_in_its_predictions(
    checkpoint: Path, gguf: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", "llama", seed=1, **SMALL)
    with Verifier(open_checkpoint(other), stored="F32") as verifier:
        assert [m.name for m in verifier.check(gguf).errors] == ["function"]
    with Verifier(open_checkpoint(other), stored="F32", allowed=["function"]) as verifier:
        found = verifier.check(gguf)
    assert found.errors == ()
    assert found.facts["allowed"] == ["function"]


def test_what_transformers_cannot_read_is_said_to_be_not_compared(
    checkpoint: Path, gguf: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    for file in checkpoint.iterdir():
        os.link(file, strange / file.name)
    config = json.loads((checkpoint / "config.json").read_text())
    (strange / "config.json").unlink()
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "not-yet-known"}))
    with Verifier(open_checkpoint(strange), stored="F32") as verifier:
        found = verifier.check(gguf)
    assert any(
        "predictions" in reason and "not-yet-known" in reason for reason in found.not_compared
    )
    assert "kl_mean" not in found.figures


def test_a_missing_tensor_that_transformers_would_make_up_is_named(
    checkpoint: Path, gguf: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        os.link(file, copy / file.name)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with Verifier(open_checkpoint(copy), stored="F32") as verifier:
        found = verifier.check(gguf)
    (mismatch,) = (m for m in found.errors if m.name == "tensors")
    assert "model.layers.0.mlp.up_proj.weight" in mismatch.message


def test_a_gguf_that_llama_cpp_cannot_open_is_refused_with_its_reason(
    gguf: Path, tmp_path: Path
) -> None:
    short = rewrite(gguf, tmp_path / "short.gguf", tensors={"blk.1.ffn_up.weight": lambda _: None})
    with pytest.raises(UnusableGGUFError, match=r"blk\.1\.ffn_up\.weight"):
        check_opens(short)
    check_opens(gguf)  # the next one is none the worse for it


def test_a_gguf_whose_weights_are_no_numbers_is_refused(gguf: Path, tmp_path: Path) -> None:
    broken = rewrite(
        gguf,
        tmp_path / "nan.gguf",
        tensors={"blk.0.ffn_up.weight": lambda values: values * np.float32("nan")},
    )
    with pytest.raises(UnusableGGUFError, match="not finite"):
        verify_opens_only(broken)


def test_without_a_checkpoint_the_file_is_opened_and_run(gguf: Path, tmp_path: Path) -> None:
    found = verify_opens_only(gguf)
    assert found.mismatches == ()
    assert found.not_compared
    broken = rewrite(gguf, tmp_path / "broken.gguf", keys={"tokenizer.chat_template": "{% for %}"})
    assert [m.name for m in verify_opens_only(broken).errors] == ["template"]


def test_a_template_that_does_not_end_is_stopped(gguf: Path, tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    slow = rewrite(gguf, tmp_path / "slow.gguf", keys={"tokenizer.chat_template": endless})
    (mismatch,) = verify_opens_only(slow).errors
    assert "does not end" in mismatch.message


def test_a_worker_that_ends_is_an_error_and_the_next_question_is_answered(gguf: Path) -> None:
    asked = worker(observing.__name__)
    asked.warm_up()
    process = asked._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    check_opens(gguf)


def test_a_comparison_that_breaks_off_is_an_error(
    checkpoint: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Worker("ggufkit.not.there")
    monkeypatch.setattr(check, "worker", lambda _: asked)
    with (
        Verifier(open_checkpoint(checkpoint), stored="F32") as verifier,
        pytest.raises(ToolError, match="transformers' process ended"),
    ):
        verifier.check(gguf)


def test_the_last_words_of_a_worker_are_its_reason() -> None:
    with pytest.raises(WorkerEndedError, match=r"not\.there"):
        Worker("ggufkit.not.there").ask({})


def test_unknown_names_of_differences_are_refused() -> None:
    assert require_names(["window", "function", "window"]) == ("function", "window")
    with pytest.raises(UsageError, match="no difference called 'speed'"):
        require_names(["speed"])


def test_convert_publishes_nothing_that_differs(tmp_path: Path, native: NativeBuild) -> None:
    path = make_checkpoint(tmp_path / "window", "mistral", **SMALL)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    models = tmp_path / "models"
    from ggufkit.errors import GgufkitError
    from ggufkit.values import VerifyOptions

    with pytest.raises(GgufkitError, match="sliding_window"):
        pipeline.convert(str(path), types=["q8_0"], models_dir=models)
    assert not list(models.rglob("*.gguf"))
    for verify in (VerifyOptions(allowed=("function",)), VerifyOptions(enabled=False)):
        (made,) = pipeline.convert(str(path), types=["q8_0"], models_dir=models, verify=verify)
        manifest = pipeline.inspect(made.path).manifest
        assert manifest is not None
        found = manifest.facts["verification"]
        assert found == "skipped" if not verify.enabled else found["allowed"] == ["function"]
        assert any("compared with the checkpoint" in note for note in made.notes)
    assert {t.type for t in read_gguf(made.path).tensors} == {"F32", "Q8_0"}
