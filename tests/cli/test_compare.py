"""``ggufkit compare`` as people see it."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit.cli.compare import sentence
from ggufkit.values import Difference

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    return path


def test_a_table_and_verdicts(
    run_cli: Run, tiny_types: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    models = [tiny_types[t] for t in ("F32", "Q4_0", "Q8_0")]
    arguments = ["--models-dir", tmp_path, "compare", *models, "--text", text, "-c", 64]
    code, out, err = run_cli(*arguments, "--chunks", 16)
    assert code == 0, err
    assert "comparing tiny-Q" in err
    head, titles, first, second, pairs, *sentences = (line for line in out.splitlines() if line)
    assert head.startswith(f"{text}: 16 chunks of 64, 496 tokens scored; reference tiny-F32, ")
    assert titles.split()[:2] == ["model", "file"]
    assert first.split()[0] == "tiny-Q4_0"
    assert second.split()[0] == "tiny-Q8_0"
    assert "indistinguishable" in second
    assert pairs == "pairs, at 95 % confidence (bootstrap over chunks, seed 0):"
    assert (
        sentences[0]
        .strip()
        .startswith("tiny-Q4_0 is worse than tiny-Q8_0 in divergence from the reference (+0.")
    )
    code, out, err = run_cli(*arguments, "--chunks", 16, "--json")
    assert code == 0
    told = json.loads(out)
    assert [c["model"] for c in told["comparisons"]] == [str(m) for m in models[1:]]
    assert all(c["reused"] for c in told["comparisons"])
    assert {d["difference"]["measure"] for d in told["differences"]} == {
        "divergence",
        "log_perplexity",
    }


def test_a_killed_command_goes_on_at_the_chunk(
    tiny_types: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Killed for real after 20 of 40 chunks: the rest alone is computed, to the same digests."""
    deadly = (
        "import os, signal, sys\n"
        "from ggufkit import cli\n"
        "from ggufkit.evaluate.reading import Candidate\n"
        "append = Candidate.append\n"
        "def append_and_die(self, scores):\n"
        "    append(self, scores)\n"
        "    if self.done == 20:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Candidate.append = append_and_die\n"
        "sys.exit(cli.execute(sys.argv[1:]))\n"
    )

    def run(models_dir: str, *how: str) -> subprocess.CompletedProcess[str]:
        arguments: list[str | Path] = ["--models-dir", tmp_path / models_dir, "compare"]
        arguments += [tiny_types["F32"], tiny_types["Q4_0"], "--text", text]
        arguments += ["-c", "256", "--chunks", "40", "--json"]
        command = [sys.executable, *how, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    killed = run("models", "-c", deadly)
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("models/*/compare-*/manifest.json"))
    resumed, unbroken = run("models", "-m", "ggufkit"), run("unbroken", "-m", "ggufkit")
    assert resumed.returncode == unbroken.returncode == 0, resumed.stderr
    computed = [
        json.loads(ran.stdout)["comparisons"][0]["computed_chunks"] for ran in (resumed, unbroken)
    ]
    assert computed == [20, 40]
    digests = [
        json.loads(next(tmp_path.glob(f"{name}/*/compare-*/manifest.json")).read_text())["outputs"]
        for name in ("models", "unbroken")
    ]
    assert digests[0] == digests[1]


def test_errors_are_told(
    run_cli: Run, tiny_types: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model = tiny_types["Q4_0"]
    common = ["--models-dir", tmp_path, "compare"]
    code, _, err = run_cli(*common, tmp_path / "gone.gguf", model, "--text", text)
    assert code == 1
    assert "error: there is no" in err
    code, _, err = run_cli(*common, model)
    assert code == 2
    code, _, err = run_cli(*common, model, model, "--text", tmp_path / "gone.txt")
    assert code == 1
    assert "There is no text" in err
    code, _, err = run_cli(*common, model, model, "--text", text, "-c", 2048, "--chunks", 1)
    assert code == 0, err
    assert "warning" not in err


def told(verdict: str, difference: float, more: int | None) -> Difference:
    return Difference(
        measure="log_perplexity",
        model=Path("a.gguf"),
        other=Path("b.gguf"),
        difference=difference,
        low=difference - 0.1,
        high=difference + 0.1,
        confidence=0.95,
        chunks=40,
        seed=0,
        verdict=verdict,
        chunks_to_decide=more,
    )


def test_verdicts_in_words() -> None:
    assert sentence(told("better", -0.5, None)) == (
        "a is better than b in log perplexity (-0.50000, -0.60000 to -0.40000)"
    )
    open_ = "a and b are indistinguishable in log perplexity at this length"
    assert sentence(told("indistinguishable", 0.05, 100)) == (
        f"{open_} (+0.05000, -0.05000 to +0.15000): some 60 more chunks would decide if the "
        "difference is this large"
    )
    assert sentence(told("indistinguishable", 0.0, None)).endswith("they are equal")
    never = sentence(told("indistinguishable", 1e-9, None))
    assert never.endswith("no text is long enough to decide")
