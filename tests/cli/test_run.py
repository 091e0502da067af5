"""``ggufkit run`` on the real command line, and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggufkit import pipeline
from ggufkit.llamacpp.batching import ContextOptions, ModelOptions
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.batch import BatchOptions, BatchReport
from ggufkit.serve.chat import Style
from ggufkit.serve.drafting import DraftOptions
from ggufkit.serve.model import Sampling

Run = Callable[..., tuple[int, str, str]]
ANSWER = {"id": "a", "answer": "Gr\u00fc\u00dfe", "finish_reason": "stop", "key": "k"}


class Fake:
    """Stands for :func:`pipeline.run` and keeps what it was asked for."""

    def __init__(self, report: BatchReport) -> None:
        self.report = report
        self.options: dict[str, Any] = {}

    def __call__(self, model: Path, prompts: Any, out: Any, **options: Any) -> BatchReport:
        self.options = {"model": model, "prompts": prompts, "out": out, **options}
        if callable(out):
            out(ANSWER)
        return self.report


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def make(**numbers: Any) -> Fake:
        made = Fake(BatchReport(rows=1, **numbers))
        monkeypatch.setattr(pipeline, "run", made)
        return made

    return make


def test_every_option_arrives(
    run_cli: Run, fake: Callable[..., Fake], gguf: Path, tmp_path: Path
) -> None:
    made = fake(answered=1, generated_tokens=10, guessed_tokens=8, right_tokens=6, seconds=2.0)
    options = (
        f"-md {gguf} -n 9 -c 512 -t 3 --temp 0.5 --seed 11 -ngl auto --completion -np 4 -fa off"
    )
    code, out, err = run_cli(
        *("--models-dir", tmp_path, "run", gguf, "in.jsonl", "-o", "out.jsonl"),
        *("-sys", "Be brief", "--in-prefix", "<", "--chat-template", "chatml", "-r", "x"),
        *options.split(),
    )
    assert (code, out) == (0, "")
    assert err == "1 answers, 10 tokens in 2.0 s, 5.0 tokens/s, 75 % of guesses right\n"
    assert made.options.pop("progress")
    assert made.options == {
        "model": gguf,
        "prompts": Path("in.jsonl"),
        "out": Path("out.jsonl"),
        "models_dir": tmp_path,
        "options": BatchOptions(
            system="Be brief",
            sampling=Sampling(temperature=0.5, max_tokens=9, seed=11, stop=("x",)),
            style=Style(completion=True, prefix="<"),
            model=ModelOptions(gpu_layers="auto"),
            context=ContextOptions(context=512, threads=3, flash_attention="off"),
            chat_template="chatml",
            parallel=4,
            draft=DraftOptions(gguf),
        ),
    }


def test_without_a_file_answers_go_to_stdout(
    run_cli: Run, fake: Callable[..., Fake], gguf: Path
) -> None:
    fake(answered=1)
    code, out, _ = run_cli("run", gguf, "in.jsonl")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [ANSWER]
    code, out, err = run_cli("run", gguf, "in.jsonl", "--json")
    assert (code, out) == (2, "")
    assert "stdout has the answers" in err


def test_the_report_as_json(run_cli: Run, fake: Callable[..., Fake], gguf: Path) -> None:
    fake(reused=1)
    code, out, _ = run_cli("run", gguf, "in.jsonl", "-o", "out.jsonl", "--json")
    assert code == 0
    assert (json.loads(out)["rows"], json.loads(out)["reused"]) == (1, 1)
    _, _, err = run_cli("run", gguf, "in.jsonl", "-o", "out.jsonl")
    assert err == "reused: all 1 prompts were answered before\n"


def test_failures_are_told(run_cli: Run, fake: Callable[..., Fake], gguf: Path) -> None:
    fake(answered=1, failed=1)
    code, _, err = run_cli("run", gguf, "in.jsonl", "-o", "out.jsonl")
    assert code == 1
    assert "error: 1 of 1 prompts could not be answered" in err
    assert "hint: out.jsonl says why" in err


def test_prompts_from_stdin(
    demo_gguf: Path, native: NativeBuild, tmp_path: Path, shared_models: Path
) -> None:
    ran = subprocess.run(
        command(demo_gguf, "-", shared_models),
        input=b'{"prompt": "Hi"}\n{"prompt": "Ho"}\n',
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert len([json.loads(line) for line in ran.stdout.splitlines()]) == 2


def command(model: Path, prompts: object, models_dir: Path, *more: object) -> list[str]:
    given = (model, prompts, "--temp", "0", "-n", "12", *more)
    start = (sys.executable, "-m", "ggufkit", "--models-dir", models_dir, "run")
    return [str(part) for part in (*start, *given)]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_nothing_is_lost_or_doubled(
    demo_gguf: Path, native: NativeBuild, tmp_path: Path, shared_models: Path, blow: signal.Signals
) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": n, "prompt": f"Count from {n} to {n + 100}."} for n in range(12)]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = command(demo_gguf, prompts, shared_models, "-o", out, "-np", "2")
    with subprocess.Popen(asked, stderr=subprocess.PIPE) as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(blow)
        assert process.stderr
        told = process.stderr.read()
    assert process.returncode == (130 if blow == signal.SIGINT else -blow)
    assert (b"error: interrupted" in told) == (blow == signal.SIGINT)
    before = out.read_bytes()
    done = before.count(b"\n")
    assert 2 <= done < 12
    ran = subprocess.run([*asked, "--json"], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["reused"], report["answered"]) == (done, 12 - done)
    after = out.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    assert sorted(json.loads(line)["id"] for line in after.splitlines()) == list(range(12))
    assert sorted(os.listdir(tmp_path)) == [
        "in.jsonl",
        "out.jsonl",
    ]
