import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit.cli import task as verb
from ggufkit.llamacpp import tasks
from ggufkit.llamacpp.toolchain import NativeBuild

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "q.txt"
    answers = "falls\nsings\nburns\ngrows\n"
    path.write_text("".join(f"Day {n}: It\n{n % 4}\n{answers}" for n in range(6)))
    return path


def test_the_verb_knows_the_tasks() -> None:
    assert verb._NAMES == tasks.TASKS


def test_a_table_and_json(
    run_cli: Run, native: NativeBuild, tiny_gguf: Path, tmp_path: Path, file: Path
) -> None:
    ask = ("--models-dir", tmp_path / "models", "task", "hellaswag", file)
    code, out, err = run_cli(*ask, tiny_gguf)
    assert code == 0, err
    assert out.startswith("hellaswag on q.txt: 6 questions; guessing gives 25.0 %\n")
    assert "95 % interval" in out
    assert "against the first" not in out
    code, out, err = run_cli(*ask, tiny_gguf, tiny_gguf)
    assert "indistinguishable: 0 right that it has wrong, 0 the other way (p = 1)" in out
    assert "reused" in out
    code, out, err = run_cli(*ask, tiny_gguf, "--questions", "2", "--json")
    told = json.loads(out)
    assert told["results"][0]["questions"] == 2
    assert told["differences"] == []


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("hellaswag", "one\ntwo\n", 3, "q.txt, line 1: the label"),
        ("truthful-qa", "one\ntwo\n", 3, "neither llama-perplexity's binary format nor JSON"),
        ("hellaswag", "", 1, "q.txt is empty"),
        ("arithmetic", "x", 2, "'arithmetic' is not one of"),
    ],
)
def test_bad_input(
    run_cli: Run,
    native: NativeBuild,
    tiny_gguf: Path,
    file: Path,
    tmp_path: Path,
    name: str,
    content: str,
    code: int,
    message: str,
) -> None:
    file.write_text(content)
    models = tmp_path / "models"
    told = run_cli("--models-dir", models, "task", name, file, tiny_gguf)
    assert told[:2] == (code, "")
    assert message in told[2]
    assert not list(models.glob("*/task-*/manifest.json"))


def test_no_such_file(run_cli: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    code, out, err = run_cli("task", "hellaswag", tmp_path / "none.txt", tiny_gguf)
    assert (code, out) == (2, "")
    assert "does not exist" in err
