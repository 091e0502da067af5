"""Tasks on a real model through the real tool, and the statistics of their scores."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ggufkit import pipeline
from ggufkit.errors import ToolError
from ggufkit.evaluate.results import read_results
from ggufkit.evaluate.tasks import Answers, differences, mcnemar, wilson_interval
from ggufkit.llamacpp import tasks, toolchain
from ggufkit.llamacpp.tasks import HELLASWAG, MULTIPLE_CHOICE, TRUTHFUL_QA, WINOGRANDE, Question
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.store import Store
from ggufkit.values import TaskResult
from tests.factory import make_checkpoint

NOUNS = ("dog", "house", "river", "engine", "letter", "garden", "window", "teacher", "apple")
VERBS = ("falls", "sings", "burns", "grows", "turns", "waits")


def questions(task: str, count: int) -> list[Question]:
    """Questions of some variety: lengths, numbers of answers, places of the right one."""
    made = []
    for n in range(count):
        nouns = [NOUNS[(n + k * (1 + n // len(NOUNS))) % len(NOUNS)] for k in range(4)]
        verb = VERBS[n % len(VERBS)]
        if task == WINOGRANDE:
            text = (
                f"When the {nouns[0]}, or what is left, meets the {nouns[1]}, _ {verb} on day {n}."
            )
            made.append(Question(text, (f"the {nouns[0]}", f"the {nouns[1]} of old"), n % 2))
            continue
        size = 4 if task == HELLASWAG else 2 + n % 12
        answers = tuple(f"{verb} {k} times at the {NOUNS[(n + k) % 9]}" for k in range(size))
        made.append(Question(f"Day {n}: The {nouns[0]}", answers, n % size))
    return made


def put(path: Path, task: str, asked: list[Question]) -> Path:
    """A file in the tool's own format."""
    if task == HELLASWAG:
        rows = ((q.context, str(q.right), *q.answers) for q in asked)
        path.write_text("".join(f"{line}\n" for row in rows for line in row))
    else:
        path.write_bytes(tasks.encode(task, asked))
    return path


@pytest.mark.parametrize("task", [HELLASWAG, WINOGRANDE, MULTIPLE_CHOICE, TRUTHFUL_QA])
def test_every_question_of_a_file_is_asked(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path, task: str
) -> None:
    file = put(tmp_path / "file", task, questions(task, 13))
    models = tmp_path / "models"
    ((first,), nothing) = pipeline.task(task, file, [tiny_gguf], models_dir=models)
    assert nothing == []
    assert (first.task, first.data, first.questions) == (task, "file", 13)
    assert first.score * 13 == pytest.approx(round(first.score * 13))
    assert first.low < first.score < first.high or first.score in (0, 1)
    chances = [1 / len(q.answers) for q in questions(task, 13)]
    assert first.chance == pytest.approx(sum(chances) / 13)
    assert not first.reused
    ((again,), _) = pipeline.task(task, file, [tiny_gguf], models_dir=models)
    assert again == dataclasses.replace(first, reused=True)
    (stored,) = read_results(Store(models)).tasks
    assert stored.value == again
    assert list(models.glob("*/task-*/*")) == list(models.glob("*/task-*/manifest.json"))


def test_the_same_as_the_tool_by_itself(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    """With more than 400 questions, of which the tool alone would ask 400."""
    file = put(tmp_path / "q.txt", HELLASWAG, questions(HELLASWAG, 403))
    base = [native.tool("llama-perplexity"), "-m", tiny_gguf, "-t", "1", "-f", file, "--hellaswag"]
    last: list[str] = []
    while not last:  # the tool may lose its last lines
        told: list[str] = []
        toolchain.run([*base, "--hellaswag-tasks", "403"], on_text=told.append)
        last = [line for line in "".join(told).splitlines() if line.startswith("403\t")]
    share, low, high = (float(part.strip("[]%,")) / 100 for part in last[0].split()[1:])
    ((found,), _) = pipeline.task(HELLASWAG, file, [tiny_gguf], models_dir=tmp_path / "models")
    assert found.score == pytest.approx(share, abs=0.02)  # batches of other sizes round otherwise
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_published_and_own_format_are_the_same_questions(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    asked = questions(MULTIPLE_CHOICE, 8)
    own = put(tmp_path / "own.bin", MULTIPLE_CHOICE, questions(MULTIPLE_CHOICE, 8))
    rows = [{"question": q.context, "choices": list(q.answers), "answer": q.right} for q in asked]
    published = tmp_path / "published.jsonl"
    published.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = tmp_path / "models"
    ((first,), _) = pipeline.task(MULTIPLE_CHOICE, published, [tiny_gguf], models_dir=models)
    ((second,), _) = pipeline.task(MULTIPLE_CHOICE, own, [tiny_gguf], models_dir=models)
    assert second == dataclasses.replace(first, data="own.bin", reused=True)


def test_a_part_of_the_questions(tiny_gguf: Path, native: NativeBuild, tmp_path: Path) -> None:
    for task in (HELLASWAG, WINOGRANDE, MULTIPLE_CHOICE):
        file = put(tmp_path / task, task, questions(task, 9))
        models = tmp_path / "models"
        ((some,), _) = pipeline.task(task, file, [tiny_gguf], questions=4, models_dir=models)
        assert some.questions == 4
    ((all_of_them,), _) = pipeline.task(task, file, [tiny_gguf], questions=90, models_dir=models)
    assert all_of_them.questions == 9


def test_questions_longer_than_the_tools_usual_context(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    long = Question("word " * 900, tuple(f"{n} and the end" for n in range(4)), 1)
    file = put(tmp_path / "long.txt", HELLASWAG, [long])
    ((found,), _) = pipeline.task(HELLASWAG, file, [tiny_gguf], models_dir=tmp_path / "models")
    assert found.questions == 1


def test_models_are_compared_question_by_question(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "other", seed=7)
    models = tmp_path / "models"
    (other,) = pipeline.convert(str(checkpoint), types=["q8_0"], models_dir=models)
    file = put(tmp_path / "q.txt", HELLASWAG, questions(HELLASWAG, 24))
    results, (same, found) = pipeline.task(
        HELLASWAG, file, [tiny_gguf, tiny_gguf, other.path], models_dir=models
    )
    assert [r.reused for r in results] == [False, True, False]
    assert (same.only_model, same.only_other, same.p_value) == (0, 0, 1.0)
    assert same.verdict == "indistinguishable"
    assert (found.model, found.other, found.questions) == (other.path, tiny_gguf, 24)
    assert found.only_model - found.only_other == round((results[2].score - results[0].score) * 24)


def test_a_killed_run_goes_on_where_it_was(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = questions(WINOGRANDE, 20)
    file = put(tmp_path / "q.csv", WINOGRANDE, asked)
    ((whole,), _) = pipeline.task(WINOGRANDE, file, [tiny_gguf], models_dir=tmp_path / "whole")

    class KilledError(BaseException):
        pass

    def killed(*args: Any, **options: Any) -> None:
        for outcome in (True, False, True):
            options["on_answer"](outcome)
        raise KilledError

    models = tmp_path / "models"
    real = tasks.ask
    monkeypatch.setattr(tasks, "ask", killed)
    with pytest.raises(KilledError):
        pipeline.task(WINOGRANDE, file, [tiny_gguf], models_dir=models)
    seen: list[int] = []

    def watched(*args: Any, **options: Any) -> tasks.TaskOutput:
        seen.append(len(options["answered"]))
        return real(*args, **options)

    monkeypatch.setattr(tasks, "ask", watched)
    ((found,), _) = pipeline.task(WINOGRANDE, file, [tiny_gguf], models_dir=models)
    assert seen == [3]
    assert found.questions == whole.questions == 20
    (manifest,) = models.glob("*/task-*/manifest.json")
    assert json.loads(manifest.read_text())["facts"]["outcomes"].startswith("101")
    assert not list(models.glob("*/*.partial"))


def test_a_tool_that_gives_up(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_LEAST_CONTEXT", 64)
    monkeypatch.setattr(tasks, "_tokens_at_most", lambda task, question: 64)
    long = Question("word " * 900, tuple(f"{n} and the end" for n in range(4)), 1)
    file = put(tmp_path / "long.txt", HELLASWAG, [long])
    models = tmp_path / "models"
    with pytest.raises(ToolError, match="answered 0 of 1 questions"):
        pipeline.task(HELLASWAG, file, [tiny_gguf], models_dir=models)
    assert not list(models.glob("*/task-*/manifest.json"))


def sheet(name: str, outcomes: str) -> Answers:
    share = outcomes.count("1") / len(outcomes)
    result = TaskResult(
        *(Path(name), HELLASWAG, "q", len(outcomes), share, 0.0, 1.0, 0.25, 1, 1.0), reused=False
    )
    return Answers(result, tuple(letter == "1" for letter in outcomes))


@pytest.mark.parametrize(
    ("first", "second", "verdict", "p_value"),
    [
        ("1111100000", "1111100000", "indistinguishable", 1.0),
        ("0" * 5 + "1" * 10, "1" * 15, "indistinguishable", 2 / 32),
        ("0" * 6 + "1" * 10, "1" * 16, "better", 2 / 64),
        ("1" * 16, "0" * 6 + "1" * 10, "worse", 2 / 64),
        ("10" * 40, "01" * 40, "indistinguishable", 1.0),
    ],
)
def test_verdicts(first: str, second: str, verdict: str, p_value: float) -> None:
    (found,) = differences([sheet("a", first), sheet("b", second)])
    assert (found.model, found.other) == (Path("b"), Path("a"))
    assert found.verdict == verdict
    assert found.p_value == pytest.approx(p_value)


def test_the_exact_test_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert mcnemar(3000, 3000) == 1.0
    assert 0 < mcnemar(2800, 3200) < 1e-6


def test_the_interval_is_the_tools() -> None:
    """Figures that llama-perplexity printed, to four decimals of a per cent."""
    for right, asked, low, high in (
        (8, 8, 67.5592, 100.0),
        (0, 1, 0.0, 79.3451),
        (3, 12, 8.8942, 53.2305),
    ):
        found = wilson_interval(right, asked)
        assert (round(100 * found[0], 4), round(100 * found[1], 4)) == (low, high)
