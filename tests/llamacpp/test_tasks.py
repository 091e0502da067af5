"""What llama-perplexity prints for its tasks: as recorded, and broken in every way."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit.errors import ToolError, ToolOutputError
from ggufkit.llamacpp import tasks, toolchain
from ggufkit.llamacpp.tasks import (
    HELLASWAG,
    MULTIPLE_CHOICE,
    TRUTHFUL_QA,
    WINOGRANDE,
    AnswerSheet,
    Question,
    ask,
    encode,
    parse_csv_line,
    why_unaskable,
)
from ggufkit.llamacpp.toolchain import NativeBuild, ToolRun

DATA = Path(__file__).parent / "data"
RECORDED = {
    task: (DATA / f"task-{task}.txt").read_text(encoding="utf-8")
    for task in (WINOGRANDE, MULTIPLE_CHOICE)
}
"""Of a model with weights drawn by chance."""


def outcomes(task: str, text: str, size: int = 10_000) -> list[bool]:
    seen: list[bool] = []
    sheet = AnswerSheet(task, seen.append)
    for at in range(0, len(text), size):
        sheet.feed(text[at : at + size])
    assert sheet.outcomes == seen
    return seen


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_recorded_outcomes(size: int) -> None:
    found = outcomes(WINOGRANDE, RECORDED[WINOGRANDE], size)
    assert [n for n, right in enumerate(found, 1) if right] == [2, 5, 8]
    assert len(found) == 9
    for task in (MULTIPLE_CHOICE, TRUTHFUL_QA, HELLASWAG):
        found = outcomes(task, RECORDED[MULTIPLE_CHOICE], size)
        assert found == [False, True, False, True, True, False]


def test_shares_of_ten_thousand_questions_are_exact() -> None:
    expected = [n % 7 in (0, 3, 4) for n in range(12_000)]
    right, lines = 0, []
    for number, outcome in enumerate(expected, 1):
        right += outcome
        lines.append(f"{number}\t{100 * right / number:.8f}\n")
    assert outcomes(MULTIPLE_CHOICE, "".join(lines)) == expected


WINOGRANDE_LINE = "2\t50.0000\t -7.025247   -6.821383  2  2"


@pytest.mark.parametrize(
    ("task", "old", "new", "message"),
    [
        (MULTIPLE_CHOICE, "3\t33.33333333", "3\t39.33333333", "does not follow"),
        (MULTIPLE_CHOICE, "3\t33.33333333", "3\t100.00000000", "does not follow"),
        (MULTIPLE_CHOICE, "3\t33.33333333", "3\t0.00000000", "does not follow"),
        (MULTIPLE_CHOICE, "3\t33.33333333", "4\t33.33333333", "cannot be read"),
        (MULTIPLE_CHOICE, "3\t33.33333333", "3\t-nan", "cannot be read"),
        (MULTIPLE_CHOICE, "3\t33.33333333", "3\t33.33333333%\tx", "cannot be read"),
        (WINOGRANDE, WINOGRANDE_LINE, "2\t50.0000\t nan  -6.821383  2  2", "found no score"),
        (WINOGRANDE, WINOGRANDE_LINE, "2\t50.0000\t high  -6.821383  2  2", "cannot be read"),
        (WINOGRANDE, WINOGRANDE_LINE, "2\t50.0000\t -7.0  -6.8  2  1", "do not agree"),
        (WINOGRANDE, WINOGRANDE_LINE, "2\t50.0000\t -7.0  -6.8  2  3", "cannot be read"),
    ],
)
def test_a_line_that_cannot_be_understood(task: str, old: str, new: str, message: str) -> None:
    assert old in RECORDED[task]
    with pytest.raises(ToolOutputError, match=message):
        outcomes(task, RECORDED[task].replace(old, new))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Texts and statuses that the tool ends with, one for each run; all that runs is this."""
    runs: list[tuple[str, int]] = []

    def run(argv: object, *, on_text: Callable[[str], None], log: Path) -> ToolRun:
        text, status = runs.pop(0)
        on_text(text)
        return ToolRun((str(argv),), status, 1.5, 1000 + len(runs), tuple(text.splitlines()))

    monkeypatch.setattr(toolchain, "run", run)
    return runs


def choices(count: int) -> list[Question]:
    return [Question(f"Question {n}", ("yes", "no"), 0) for n in range(count)]


def ask_all(native: NativeBuild, place: Path, count: int, *answered: bool) -> tasks.TaskOutput:
    return ask(
        native,
        place / "model.gguf",
        MULTIPLE_CHOICE,
        choices(count),
        answered=answered,
        gpu_layers=0,
        threads=1,
        scratch=place,
        log=place / "log",
    )


def test_answers_that_got_lost_are_asked_for_again(
    native: NativeBuild, tmp_path: Path, told: list[tuple[str, int]]
) -> None:
    told += [
        ("0.1 E odd token\n1\t100.00000000\n2\t100.0000000", 0),
        ("", 0),
        ("1\t0.00000000\n", 0),
    ]
    told += [("1\t100.00000000\n2\t50.00000000\n", 0)]
    found = ask_all(native, tmp_path, 5, True)
    assert found == tasks.TaskOutput((True, True, False, True, False), 6.0, 1003)
    assert not told
    left = (tmp_path / ".questions").read_bytes()
    assert left == encode(MULTIPLE_CHOICE, choices(5)[3:])


def test_nothing_is_asked_that_is_answered(native: NativeBuild, tmp_path: Path) -> None:
    assert ask_all(native, tmp_path, 2, True, False).outcomes == (True, False)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([("", 0)] * 8, "answered 0 of 3 questions: it did not say why"),
        (
            [
                ("1\t0.00000000\n0.00.889.213 E multiple: task 1 does not fit\n", 0),
                ("0.00.889.213 E multiple: task 0 does not fit\n", 0),
            ],
            "answered 1 of 3 questions: multiple: task 0 does not fit",
        ),
        ([("".join(f"{n}\t0.00000000\n" for n in range(1, 6)), 0)], "answered 5 of 3 questions"),
        ([("0.00.1 E error loading model: no room\n", 1)], "asking model.gguf failed: .*no room"),
    ],
)
def test_a_tool_that_does_not_go_on(
    native: NativeBuild,
    tmp_path: Path,
    told: list[tuple[str, int]],
    runs: list[tuple[str, int]],
    message: str,
) -> None:
    told += runs
    with pytest.raises(ToolError, match=message):
        ask_all(native, tmp_path, 3)
    assert not told


def test_the_tools_formats() -> None:
    cup = Question("It is late, so _ goes.", ("Tom", "Ann"), 1)
    assert encode(WINOGRANDE, [cup]) == b'0,"It is late, so _ goes.",Tom,Ann,2\n\n'
    two = Question("Q", ("ab", "c"), 1)
    head = b"\1\0\0\0" + b"\x08\0\0\0"
    body = b"\1\0\0\0Q" + b"\2\0\0\0" + b"\2\0\0\0ab" + b"\1\0\0\0c" + b"\0\0\0\0\1\0\0\0"
    for task in (HELLASWAG, MULTIPLE_CHOICE, TRUTHFUL_QA):
        assert encode(task, [two]) == head + body + b"\0\0\0\0"


def test_what_cannot_be_asked_is_not_encoded() -> None:
    odd = Question("It _ goes.", ("a, b", "c"), 0)
    assert why_unaskable(WINOGRANDE, odd)
    with pytest.raises(ValueError, match="cannot hold"):
        encode(WINOGRANDE, [odd])
    assert parse_csv_line("0,a,b,c") is None


@pytest.mark.parametrize(
    ("answers", "askable"),
    [
        (("1", "10", "100"), False),
        (("blue", "blueish"), False),
        (("same", "same"), False),
        (("1", "10", "2"), True),
        (("four", "five"), True),
    ],
)
def test_an_answer_that_begins_all_others(answers: tuple[str, ...], askable: bool) -> None:
    assert bool(why_unaskable(MULTIPLE_CHOICE, Question("Q", answers, 0))) is not askable
