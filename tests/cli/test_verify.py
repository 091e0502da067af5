"""``ggufkit verify`` on the command line: what it prints and its exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.factory import make_checkpoint
from tests.verify.rewriting import rewrite

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli-verify")
    return make_checkpoint(place / "model", hidden=64, intermediate=128, vocab=384)


@pytest.fixture(scope="module")
def gguf(native: NativeBuild, checkpoint: Path) -> Path:
    out = checkpoint.parent / "model.gguf"
    toolchain.convert_checkpoint(
        native, checkpoint, out, outtype="f32", name="model", log=out.with_name("log")
    )
    return out


def test_the_same_model_is_said_to_be_the_same(
    gguf: Path, checkpoint: Path, run_cli: RunCli
) -> None:
    code, out, _ = run_cli("verify", gguf, "--against", checkpoint)
    assert code == 0
    assert "same as the checkpoint model" in out
    assert "predictions: 48" in out


def test_differences_are_named_and_end_with_1(
    gguf: Path, checkpoint: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    base = {"llama.rope.freq_base": 77777.0}
    other = rewrite(gguf, tmp_path / "other.gguf", keys=base)
    code, out, _ = run_cli("verify", other, "--against", checkpoint, "--json")
    assert code == 1
    found = json.loads(out)
    assert [m["name"] for m in found["mismatches"]] == ["function"]
    code, out, _ = run_cli(
        *("verify", other, "--against", checkpoint, "--allow-difference", "function")
    )
    assert code == 0
    assert "(allowed)" in out


def test_without_a_checkpoint_the_file_is_opened(gguf: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("verify", gguf)
    assert code == 0
    assert "opened and run by llama.cpp" in out


def test_what_llama_cpp_cannot_open_ends_with_an_error(
    gguf: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    short = rewrite(gguf, tmp_path / "short.gguf", tensors={"output_norm.weight": lambda _: None})
    code, _, err = run_cli("verify", short)
    assert code == 1
    assert "error: llama.cpp cannot open short.gguf" in err
    assert "output_norm" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "nowhere/at-all/here"], "error:"),
        (["--allow-difference", "everything"], "there is no difference called 'everything'"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, gguf: Path, run_cli: RunCli
) -> None:
    code, _, err = run_cli("verify", gguf, *arguments)
    assert code in (1, 2)
    assert message in err


def test_a_gguf_is_not_compared_with_a_gguf(gguf: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("verify", gguf, "--against", gguf)
    assert code == 2
    assert "a GGUF is compared with a checkpoint" in err


def test_a_text_is_no_gguf(run_cli: RunCli, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_text("not a model")
    code, _, err = run_cli("verify", wrong)
    assert code == 3
    assert "error:" in err
