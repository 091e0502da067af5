"""Files of questions in every format, and every way in which they can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufkit.errors import GgufkitError, IntegrityError, SourceError
from ggufkit.evaluate.questions import QuestionFile, choose, read_questions
from ggufkit.llamacpp import tasks
from ggufkit.llamacpp.tasks import (
    HELLASWAG,
    MULTIPLE_CHOICE,
    TRUTHFUL_QA,
    WINOGRANDE,
    Question,
    encode,
    why_unaskable,
)
from ggufkit.progress import SILENT, Silent

PAN = Question("Cooking: He", ("cracks eggs.", "flies.", "sleeps.", "sings."), 0)
CUP = Question("The cup is in the box, so the _ is full.", ("box", "cup"), 0)
DOG = Question("How many legs has a dog?", ("four", "nine", "a hundred"), 0)


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def put(path: Path, content: str | bytes | list[Any]) -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines_of(questions: list[Question]) -> str:
    """HellaSwag in the tool's own format."""
    rows = ((q.context, str(q.right), *q.answers) for q in questions)
    return "".join(f"{line}\n" for row in rows for line in row)


def own_format(task: str, questions: list[Question]) -> bytes:
    return lines_of(questions).encode() if task == HELLASWAG else encode(task, questions)


def read(tmp_path: Path, task: str, content: str | bytes | list[Any]) -> QuestionFile:
    return read_questions(put(tmp_path / "q", content), task, SILENT)


@pytest.mark.parametrize(
    ("task", "questions"),
    [
        (HELLASWAG, [PAN, PAN]),
        (WINOGRANDE, [CUP, CUP, CUP]),
        (MULTIPLE_CHOICE, [DOG, PAN]),
        (TRUTHFUL_QA, [DOG]),
    ],
)
def test_the_tools_own_formats(tmp_path: Path, task: str, questions: list[Question]) -> None:
    found = read(tmp_path, task, own_format(task, questions))
    assert list(found.questions) == questions
    assert found.name == "q"
    expected = sum(1 / len(q.answers) for q in questions) / len(questions)
    assert found.chance == pytest.approx(expected)


def test_line_ends_of_windows_and_a_mark_in_front(tmp_path: Path) -> None:
    for task, question in ((HELLASWAG, PAN), (WINOGRANDE, CUP)):
        text = "\ufeff" + own_format(task, [question]).decode().replace("\n", "\r\n")
        assert read(tmp_path, task, text).questions == (question,)


HELLASWAG_ROW = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx": "A man [substeps] is sitting  on a roof. he",
    "endings": ["sings [title] Loudly", "a\nb", "c", "d"],
    "label": 3,
    "split": "val",
}


def test_hellaswag_as_published(tmp_path: Path) -> None:
    (found,) = read(tmp_path, HELLASWAG, [HELLASWAG_ROW]).questions
    assert found.context == "Roof shingle removal: A man is sitting on a roof. he"
    assert found.answers == ("sings. Loudly", "a b", "c", "d")
    assert found.right == 3
    as_text = {**HELLASWAG_ROW, "label": "3"}
    assert read(tmp_path, HELLASWAG, json.dumps([as_text])).questions == (found,)


def test_winogrande_as_published(tmp_path: Path) -> None:
    row = {
        "qID": "x-1",
        "sentence": CUP.context,
        "option1": "box",
        "option2": "cup",
        "answer": "1",
    }
    assert read(tmp_path, WINOGRANDE, [row]).questions == (CUP,)


@pytest.mark.parametrize(
    "row",
    [
        {
            "question": DOG.context,
            "mc1_targets": {"choices": list(DOG.answers), "labels": [1, 0, 0]},
        },
        {"question": DOG.context, "mc1_targets": {"four": 1, "nine": 0, "a hundred": 0}},
        {
            "question": DOG.context,
            "choices": {"text": list(DOG.answers), "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        {
            "question": DOG.context,
            "choices": {"text": list(DOG.answers), "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        {
            "question": {
                "stem": DOG.context,
                "choices": [
                    {"text": t, "label": n} for t, n in zip(DOG.answers, "ABC", strict=True)
                ],
            },
            "answerKey": "A",
        },
        {"question": DOG.context, "choices": list(DOG.answers), "answer": 0, "subject": "dogs"},
        {"question": DOG.context, "choices": list(DOG.answers), "answer": "A"},
    ],
    ids=["truthful", "truthful-old", "arc", "arc-numbers", "arc-old", "mmlu", "mmlu-letters"],
)
def test_multiple_choice_as_published(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, MULTIPLE_CHOICE, [row, row]).questions == (DOG, DOG)
    assert read(tmp_path, MULTIPLE_CHOICE, json.dumps([row])).questions == (DOG,)


def hellaswag(**changes: Any) -> list[Any]:
    row = {**HELLASWAG_ROW, **changes}
    return [HELLASWAG_ROW, {key: value for key, value in row.items() if value is not None}]


def winogrande(**changes: Any) -> list[Any]:
    return [{"sentence": CUP.context, "option1": "box", "option2": "cup", "answer": "1"} | changes]


LINES = lines_of([PAN, PAN])
BINARY = encode(MULTIPLE_CHOICE, [DOG, DOG])


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        (HELLASWAG, "", "empty"),
        (HELLASWAG, b"\xff\xfe12", "not UTF-8 text: byte 0"),
        (HELLASWAG, LINES + "one more line\n", "line 13: 1 lines are left"),
        (HELLASWAG, LINES.replace("\n0\n", "\nfoo\n", 1), "line 1: the label .* 'foo'"),
        (HELLASWAG, LINES.replace("\n0\n", "\n7\n", 1), "line 1: the right answer is none"),
        (HELLASWAG, LINES.replace("sings.", "", 1), "line 1: an answer is empty"),
        (HELLASWAG, hellaswag(ctx=None), "line 2: there is no text 'ctx'"),
        (HELLASWAG, hellaswag(endings=["a", "b"]), "line 2: there are 2 endings instead of 4"),
        (HELLASWAG, hellaswag(endings="abcd"), "line 2: there is no list 'endings'"),
        (HELLASWAG, hellaswag(label=""), "line 2: .*validation split"),
        (HELLASWAG, hellaswag(label=4), "line 2: the right answer is none"),
        (HELLASWAG, hellaswag(label=True), "line 2: 'label' is 'True'"),
        (HELLASWAG, [HELLASWAG_ROW, 7], "line 2: this is no JSON object"),
        (HELLASWAG, json.dumps(HELLASWAG_ROW) + "\n{half", "line 2: this is not JSON"),
        (HELLASWAG, "[{]", "is not JSON"),
        (WINOGRANDE, "0,a _ b,x,y\n", "line 1: there are fewer than four commas"),
        (WINOGRANDE, "0,a b,x,y,1\n", "line 1: the sentence has 0 blanks"),
        (WINOGRANDE, "0,a _ b _ c,x,y,1\n", "line 1: the sentence has 2 blanks"),
        (WINOGRANDE, "0,a _ b,x,y,1\n1,a _ b,x,y,3\n", "line 2: the right answer is none"),
        (WINOGRANDE, "0,a _ b,x,y,\n", "line 1: the answer is ''"),
        (WINOGRANDE, "0,a _ b,x,x,1\n", "line 1: both choices are the same"),
        (WINOGRANDE, "0,a _,x,y,1\n", "line 1: nothing follows the blank"),
        (WINOGRANDE, winogrande(answer=""), "validation split"),
        (WINOGRANDE, winogrande(answer="3"), "the right answer is none"),
        (WINOGRANDE, winogrande(option1=5), "no text 'option1'"),
        (MULTIPLE_CHOICE, "one,two\n", "neither llama-perplexity's binary format nor JSON"),
        (MULTIPLE_CHOICE, BINARY[:-9], "truncated: it ends at"),
        (
            MULTIPLE_CHOICE,
            BINARY.replace(b"\1\0\0\0\0\0", b"\0\0\0\0\0\0", 1),
            "0 answers are right",
        ),
        (MULTIPLE_CHOICE, BINARY.replace(b"nine", b"    "), "question 1: an answer is empty"),
        (MULTIPLE_CHOICE, [{"choices": ["a", "b"], "answer": 0}], "no text 'question'"),
        (MULTIPLE_CHOICE, [{"question": "q", "answer": 0}], "no texts in 'choices'"),
        (MULTIPLE_CHOICE, [{"question": "q", "choices": ["a", "b"], "answer": 2}], "none of those"),
        (MULTIPLE_CHOICE, [{"question": "q", "choices": ["a", "b"], "answer": "C"}], "'C' is none"),
        (MULTIPLE_CHOICE, [{"question": "q", "choices": ["a"], "answer": 0}], "1 answers instead"),
        (MULTIPLE_CHOICE, [{"question": "", "choices": ["a", "b"], "answer": 0}], "no question"),
        (TRUTHFUL_QA, [{"question": "q", "choices": ["a", "b"], "answer": 0}], "no 'mc1_targets'"),
        (TRUTHFUL_QA, [{"question": "q", "mc1_targets": {"a": 1, "b": 1}}], "one right answer"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    tmp_path: Path, task: str, content: str | bytes | list[Any], message: str
) -> None:
    with pytest.raises((IntegrityError, SourceError), match=message) as caught:
        read(tmp_path, task, content)
    assert caught.value.message.startswith("q")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_questions(tmp_path / "missing", HELLASWAG, SILENT)


def test_what_the_tool_cannot_ask_is_left_out_and_told(tmp_path: Path) -> None:
    prefix = {"question": "1 + 0 = ?", "choices": ["1", "10", "100"], "answer": 0}
    sound = {"question": "2 + 2 = ?", "choices": ["4", "5"], "answer": 0}
    listener = Listener()
    path = put(tmp_path / "q", [prefix, sound, *[prefix] * 6])
    found = read_questions(path, MULTIPLE_CHOICE, listener)
    assert len(found.questions) == 1
    (warning,) = listener.warnings
    assert warning.startswith("7 of 8 questions are left out, because one answer is the beginning")
    assert warning.endswith("line 1, line 3, line 4, line 5, line 6 and 2 more")
    with pytest.raises(GgufkitError, match="no question that can be asked"):
        read(tmp_path, MULTIPLE_CHOICE, [prefix])


def test_some_questions_are_always_the_same() -> None:
    data = QuestionFile("q", tuple(Question(f"Q{n}", ("a", "b"), 0) for n in range(50)))
    assert choose(data, 50) is choose(data, 99) is data
    ten, twenty = choose(data, 10).questions, choose(data, 20).questions
    assert len(ten) == 10
    assert set(ten) < set(twenty) < set(data.questions)
    order = [data.questions.index(q) for q in twenty]
    assert order == sorted(order) != list(range(20))
    backwards = QuestionFile("q", data.questions[::-1])
    assert set(choose(backwards, 10).questions) == set(ten)


def test_commas_and_quotes_of_sentences() -> None:
    for sentence in (
        "He said, that _ was here.",
        'He said "yes", and _ was "here".',
        'He said "yes, no" when _ was here.',
    ):
        assert not why_unaskable(WINOGRANDE, Question(sentence, ("Tom", "Ann"), 0))
    for sentence, answers in (
        ('In, "and, out", _ goes.', ("Tom", "Ann")),
        ("He saw _ twice.", ("Tom, Dick", "Ann")),
        ('A 5" nail, or _ like it.', ("a screw", "a bolt")),
    ):
        assert "CSV" in why_unaskable(WINOGRANDE, Question(sentence, answers, 0))


LETTERS = st.text(alphabet='ab ,"é', max_size=12)


@given(before=LETTERS, after=LETTERS, first=LETTERS, second=LETTERS, right=st.integers(0, 1))
def test_a_csv_line_is_read_as_it_was_meant_or_not_written(
    before: str, after: str, first: str, second: str, right: int
) -> None:
    question = Question(f"{before}_{after}", (first, second), right)
    if not why_unaskable(WINOGRANDE, question):
        line = encode(WINOGRANDE, [question]).decode().split("\n")[0]
        cut = tasks.parse_csv_line(line)
        assert cut == (question.context, first, second, str(right + 1))


@given(
    st.lists(
        st.builds(
            Question,
            st.text(min_size=1).filter(str.strip),
            st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=5).map(tuple),
            st.just(0),
        ).filter(lambda q: not why_unaskable(MULTIPLE_CHOICE, q)),
        min_size=1,
        max_size=3,
    )
)
def test_the_binary_format_goes_round(
    tmp_path_factory: pytest.TempPathFactory, questions: list[Question]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.bin"
    path.write_bytes(encode(MULTIPLE_CHOICE, questions))
    assert list(read_questions(path, MULTIPLE_CHOICE, SILENT).questions) == questions
