"""How many questions a model answers rightly, each answer sheet kept as a stage."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ggufkit import settings
from ggufkit.evaluate.perplexity import name_in_store
from ggufkit.evaluate.questions import QuestionFile
from ggufkit.llamacpp import tasks
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Progress
from ggufkit.store import Store
from ggufkit.values import Json, TaskDifference, TaskResult, to_json

_VERSION = 1
_Z = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it."""
_LEVEL = 0.05
_LETTER = {False: "0", True: "1"}


@dataclass(frozen=True)
class Answers:
    """A model's answers.

    Attributes:
        result: what they come to.
        outcomes: of each question, whether it was answered rightly.
    """

    result: TaskResult
    outcomes: tuple[bool, ...]


def measure(
    store: Store,
    build: NativeBuild,
    model: Path,
    task: str,
    data: QuestionFile,
    *,
    gpu_layers: int,
    progress: Progress,
) -> Answers:
    """Ask one model the questions of a file; after a kill it goes on where it was.

    Args:
        store: keeps the answers, so that asking again is instant.
        build: whose llama-perplexity to run.
        model: the GGUF.
        task: which of the tool's tasks the questions are for.
        data: the questions.
        gpu_layers: layers to put on a GPU.
        progress: told question by question.

    Raises:
        ToolError: if the tool fails.
    """

    def work(directory: Path) -> dict[str, Json]:
        told = _ask(store, build, model, task, data, gpu_layers, directory, progress)
        right, asked = sum(told.outcomes), len(told.outcomes)
        low, high = wilson_interval(right, asked)
        result = TaskResult(
            model=model,
            task=task,
            data=data.name,
            questions=asked,
            score=right / asked,
            low=low,
            high=high,
            chance=data.chance,
            file_nbytes=model.stat().st_size,
            seconds=told.seconds,
        )
        facts: dict[str, Json] = to_json(result)
        return facts | {
            "outcomes": "".join(_LETTER[outcome] for outcome in told.outcomes),
            "peak_rss_nbytes": told.peak_rss_nbytes,
        }

    artifact = store.run(
        "task",
        version=_VERSION,
        model=name_in_store(store, model),
        inputs={
            "model": store.digest(model, progress).sha256,
            "data": hashlib.sha256(tasks.encode(task, data.questions)).hexdigest(),
        },
        options={"task": task, "questions": len(data.questions), "gpu_layers": gpu_layers},
        tool={"llama.cpp": build.commit, "backend": build.backend},
        work=work,
        resume=True,
        progress=progress,
    )
    facts = artifact.manifest.facts | {
        "model": model,
        "data": data.name,
        "reused": artifact.reused,
    }
    result = TaskResult(**{f.name: facts[f.name] for f in fields(TaskResult)})
    return Answers(result, tuple(letter == "1" for letter in facts["outcomes"]))


def _ask(
    store: Store,
    build: NativeBuild,
    model: Path,
    task: str,
    data: QuestionFile,
    gpu_layers: int,
    directory: Path,
    progress: Progress,
) -> tasks.TaskOutput:
    """Ask, with the answers so far kept in the directory."""
    total = len(data.questions)
    sheet = directory / ".answers"
    known = [letter == "1" for letter in sheet.read_text()] if sheet.exists() else []
    with (
        progress.task(f"{task} of {model.stem}", total, "questions") as bar,
        sheet.open("a") as kept,
    ):
        done = len(known)

        def on_answer(outcome: bool) -> None:
            nonlocal done
            done += 1
            kept.write(_LETTER[outcome])
            kept.flush()
            bar.update(done)

        return tasks.ask(
            build,
            model,
            task,
            data.questions,
            answered=known[:total],
            gpu_layers=gpu_layers,
            threads=settings.threads(),
            scratch=directory,
            log=store.log(f"{task}-{model.stem}"),
            on_answer=on_answer,
        )


def differences(sheets: Sequence[Answers]) -> list[TaskDifference]:
    """Each model against the first, question by question."""
    return [_difference(sheet, sheets[0]) for sheet in sheets[1:]]


def _difference(sheet: Answers, other: Answers) -> TaskDifference:
    pairs = list(zip(sheet.outcomes, other.outcomes, strict=True))
    only_model, only_other = pairs.count((True, False)), pairs.count((False, True))
    p_value = mcnemar(only_model, only_other)
    verdict = "better" if only_model > only_other else "worse"
    return TaskDifference(
        task=sheet.result.task,
        model=sheet.result.model,
        other=other.result.model,
        questions=len(pairs),
        only_model=only_model,
        only_other=only_other,
        p_value=p_value,
        verdict=verdict if p_value < _LEVEL else "indistinguishable",
    )


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, JASA 22, 1927).

    Args:
        right: how many were right.
        asked: of how many, at least 1.
    """
    share, spread = right / asked, _Z * _Z / asked
    half = math.sqrt(spread * (4 * share * (1 - share) + spread)) / 2
    middle = share + spread / 2
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def mcnemar(one: int, other: int) -> float:
    """McNemar's exact test: two-sided p-value for two counts of disagreement.

    If both models are equally good, each question on which they disagree falls to
    either side like a coin (Q. McNemar, Psychometrika 12, 1947; exact by the
    binomial distribution).
    """
    disagreed = one + other
    ways = tail = 1
    for k in range(1, min(one, other) + 1):
        ways = ways * (disagreed - k + 1) // k
        tail += ways
    return min(1.0, float(2 * tail / 2**disagreed))
