"""Files of questions: llama-perplexity's own formats and the published JSON ones.

Every question is checked when the file is read, because the tool itself passes
over, or trips over, what it cannot use, after hours of work if need be.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ggufkit.errors import IntegrityError, SourceError
from ggufkit.llamacpp.tasks import (
    BLANK,
    HELLASWAG,
    HELLASWAG_ANSWERS,
    MAX_ANSWERS,
    MULTIPLE_CHOICE,
    TRUTHFUL_QA,
    WINOGRANDE,
    Question,
    parse_csv_line,
    why_unaskable,
)
from ggufkit.progress import Progress
from ggufkit.values import Json

_Item = TypeVar("_Item")
_HEAD = 4096
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LINES_A_QUESTION = 2 + HELLASWAG_ANSWERS
_NAMED = 5
"""Places that a message names before it only counts."""


@dataclass(frozen=True)
class QuestionFile:
    """The questions of a file that can be asked.

    Attributes:
        name: of the file.
        questions: in its order.
    """

    name: str
    questions: tuple[Question, ...]

    @property
    def chance(self) -> float:
        """Share that guessing would answer rightly, on average."""
        return sum(1 / len(q.answers) for q in self.questions) / len(self.questions)


class _QuestionError(Exception):
    """What is wrong with one question."""


def read_questions(path: Path, task: str, progress: Progress) -> QuestionFile:
    """Read and check a file of questions.

    ==================  =====================================  =============================
    task                llama-perplexity's own format          JSON lines, or one JSON array
    ==================  =====================================  =============================
    hellaswag           six lines each: context, label, four   ``activity_label``, ``ctx``,
                        endings                                ``endings``, ``label``
    winogrande          CSV: number, sentence with ``_``, two  ``sentence``, ``option1``,
                        choices, 1 or 2                        ``option2``, ``answer``
    multiple-choice,    binary                                 TruthfulQA (``mc1_targets``),
    truthful-qa                                                ARC, MMLU
    ==================  =====================================  =============================

    Args:
        path: the file.
        task: which of the tool's tasks they are for.
        progress: told which sound questions the tool cannot ask.

    Raises:
        SourceError: if there is no such file, or it holds no question.
        IntegrityError: if a question is not as it should be, with its line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    found: list[Question] = []
    left_out: dict[str, list[str]] = {}
    for place, question in _read(path, raw, task):
        if reason := why_unaskable(task, question):
            left_out.setdefault(reason, []).append(place)
        else:
            found.append(question)
    for reason, places in left_out.items():
        progress.warn(
            f"{len(places)} of {len(found) + sum(map(len, left_out.values()))} questions are left "
            f"out, because {reason}: {_some(places)}"
        )
    if not found:
        raise SourceError(f"{path.name} holds no question that can be asked")
    return QuestionFile(path.name, tuple(found))


def choose(data: QuestionFile, count: int) -> QuestionFile:
    """Some of a file's questions, always the same ones, in the order of the file.

    Those with the smallest hashes are taken: chosen as by chance, whatever order
    the file has, and the first hundred are among the first thousand.

    Args:
        data: the questions.
        count: how many to take at most.
    """
    if count >= len(data.questions):
        return data
    hashes = [hashlib.sha256(repr(question).encode()).digest() for question in data.questions]
    taken = sorted(sorted(range(len(hashes)), key=lambda n: hashes[n])[:count])
    return QuestionFile(data.name, tuple(data.questions[n] for n in taken))


def _some(places: list[str]) -> str:
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return ", ".join(places[:_NAMED]) + more


def _read(path: Path, raw: bytes, task: str) -> Iterator[tuple[str, Question]]:
    """All questions with their places, such as ``line 7``."""
    if not raw.strip():
        raise SourceError(f"{path.name} is empty")
    if b"\0" in raw[:_HEAD] and task in (MULTIPLE_CHOICE, TRUTHFUL_QA):
        return _checked(path, task, _from_binary(path, raw), lambda question: question)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IntegrityError(
            f"{path.name} is not UTF-8 text: byte {error.start}", "Convert it with: iconv"
        ) from error
    if text.lstrip()[:1] in ("{", "["):
        return _checked(path, task, _json_rows(path, text), _ROWS[task])
    if task == HELLASWAG:
        return _checked(path, task, _groups(text), _of_group)
    if task == WINOGRANDE:
        return _checked(path, task, _lines(text), _of_csv)
    raise IntegrityError(
        f"{path.name} is neither llama-perplexity's binary format nor JSON",
        "JSON lines of TruthfulQA, ARC and MMLU are understood",
    )


def _checked(
    path: Path,
    task: str,
    items: Iterable[tuple[str, _Item]],
    question_of: Callable[[_Item], Question],
) -> Iterator[tuple[str, Question]]:
    for place, item in items:
        try:
            question = question_of(item)
            _check(task, question)
        except _QuestionError as error:
            raise IntegrityError(f"{path.name}, {place}: {error}") from error
        yield place, question


def _check(task: str, question: Question) -> None:
    if not question.context.strip():
        raise _QuestionError("there is no question")
    if not all(answer.strip() for answer in question.answers):
        raise _QuestionError("an answer is empty")
    if task == HELLASWAG and len(question.answers) != HELLASWAG_ANSWERS:
        raise _QuestionError(
            f"there are {len(question.answers)} endings instead of {HELLASWAG_ANSWERS}"
        )
    if not 2 <= len(question.answers) <= MAX_ANSWERS:
        raise _QuestionError(
            f"there are {len(question.answers)} answers instead of 2 to {MAX_ANSWERS}"
        )
    if not 0 <= question.right < len(question.answers):
        raise _QuestionError("the right answer is none of those given")
    if task == WINOGRANDE:
        _check_sentence(question)


def _check_sentence(question: Question) -> None:
    if question.context.count(BLANK) != 1:
        raise _QuestionError(
            f"the sentence has {question.context.count(BLANK)} blanks '{BLANK}' instead of 1"
        )
    if not question.context.partition(BLANK)[2].strip():
        raise _QuestionError("nothing follows the blank, and what follows it is what is scored")
    if question.answers[0] == question.answers[1]:
        raise _QuestionError("both choices are the same")


# llama-perplexity's own formats.


def _lines(text: str) -> Iterator[tuple[str, str]]:
    lines = text.rstrip().split("\n")
    return ((f"line {n}", line.removesuffix("\r")) for n, line in enumerate(lines, 1))


def _groups(text: str) -> Iterator[tuple[str, list[str]]]:
    lines = [line for _, line in _lines(text)]
    for first in range(0, len(lines), _LINES_A_QUESTION):
        yield f"line {first + 1}", lines[first : first + _LINES_A_QUESTION]


def _of_group(lines: list[str]) -> Question:
    if len(lines) > 1:
        label = _number(lines[1], "the label on the line after")
    if len(lines) != _LINES_A_QUESTION:
        raise _QuestionError(f"{len(lines)} lines are left; a question takes {_LINES_A_QUESTION}")
    return Question(lines[0], tuple(lines[2:]), label)


def _of_csv(line: str) -> Question:
    cut = parse_csv_line(line)
    if cut is None:
        raise _QuestionError("there are fewer than four commas outside of quotation marks")
    sentence, first, second, answer = cut
    return Question(sentence, (first, second), _number(answer, "the answer") - 1)


def _from_binary(path: Path, raw: bytes) -> Iterator[tuple[str, Question]]:
    reader = _Reader(path, raw)
    count = reader.number()
    reader.skip(4 * count)  # where each question begins
    for number in range(1, count + 1):
        context, answers, labels = reader.text(), reader.texts(), reader.labels
        reader.texts()  # answers of which several may be right: the tool does not ask these
        place = f"question {number}"
        if sorted(labels) != [0] * (len(labels) - 1) + [1]:
            raise IntegrityError(f"{path.name}, {place}: {labels.count(1)} answers are right")
        yield place, Question(context, answers, labels.index(1))


class _Reader:
    """A cursor over the binary format; every read is checked."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self._path = path
        self._raw = raw
        self._at = 0
        self.labels: list[int] = []

    def skip(self, nbytes: int) -> bytes:
        """The next bytes.

        Raises:
            IntegrityError: if there are fewer.
        """
        taken = self._raw[self._at : self._at + nbytes]
        if len(taken) < nbytes:
            raise IntegrityError(
                f"{self._path.name} is no binary file of questions, or truncated: it ends at "
                f"byte {len(self._raw)}, where {self._at + nbytes} are needed"
            )
        self._at += nbytes
        return taken

    def number(self) -> int:
        """The next count."""
        return int.from_bytes(self.skip(4), "little")

    def text(self) -> str:
        """The next text; bytes that are no UTF-8 come through."""
        return self.skip(self.number()).decode("utf-8", "surrogateescape")

    def texts(self) -> tuple[str, ...]:
        """The next answers; their ``labels`` follow them."""
        count = self.number()
        found = tuple(self.text() for _ in range(count))
        self.labels = list(struct.unpack(f"<{count}i", self.skip(4 * count)))
        return found


# The published data sets.


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Json]]]:
    for place, row in _json_array(path, text) or _json_lines(path, text):
        if not isinstance(row, dict):
            raise IntegrityError(f"{path.name}, {place}: this is no JSON object")
        yield place, row


def _json_array(path: Path, text: str) -> list[tuple[str, Json]]:
    if not text.lstrip().startswith("["):
        return []
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise IntegrityError(f"{path.name} is not JSON: {error}") from error
    return [(f"question {n}", row) for n, row in enumerate(rows, 1)]


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Json]]:
    for place, line in _lines(text):
        try:
            yield place, json.loads(line)
        except ValueError as error:
            raise IntegrityError(f"{path.name}, {place}: this is not JSON: {error}") from error


def _of_hellaswag(row: Mapping[str, Json]) -> Question:
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx')}"
    endings = row.get("endings")
    if not isinstance(endings, list):
        raise _QuestionError("there is no list 'endings'")
    if row.get("label") in (None, ""):
        raise _QuestionError(
            "there is no 'label'; the test split has none: use the validation split"
        )
    label = _number(row["label"], "'label'")
    return Question(_tidied(context), tuple(_tidied(str(e)) for e in endings), label)


def _tidied(text: str) -> str:
    """Text without the marks that WikiHow left in HellaSwag, on one line.

    As the LM Evaluation Harness does it (``lm_eval/tasks/hellaswag``), which
    llama.cpp's own file of questions was made with.
    """
    plain = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return plain.replace("  ", " ").replace("\r", "").replace("\n", " ")


def _of_winogrande(row: Mapping[str, Json]) -> Question:
    if row.get("answer") in (None, ""):
        raise _QuestionError(
            "there is no 'answer'; the test split has none: use the validation split"
        )
    choices = (_text(row, "option1"), _text(row, "option2"))
    sentence = " ".join(_text(row, "sentence").splitlines())
    return Question(sentence, choices, _number(row["answer"], "'answer'") - 1)


def _of_choices(row: Mapping[str, Json]) -> Question:
    """A row of TruthfulQA, ARC or MMLU."""
    if "mc1_targets" in row:
        return _of_truthful_qa(row)
    question, choices = row.get("question"), row.get("choices")
    if isinstance(question, dict):  # ARC as first published
        choices = question.get("choices")
        question = question.get("stem")
    if not isinstance(question, str):
        raise _QuestionError("there is no text 'question'")
    named = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    texts, names, key = choices, None, row.get("answer")  # MMLU
    if isinstance(choices, dict):  # ARC as the hubs have it
        texts, names, key = choices.get("text"), choices.get("label"), row.get("answerKey")
    elif named:
        texts, names = ([choice.get(name) for choice in named] for name in ("text", "label"))
        key = row.get("answerKey")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _QuestionError("there are no texts in 'choices'")
    return Question(question.strip(), tuple(t.strip() for t in texts), _index(key, names, texts))


def _index(key: Json, names: Json, texts: list[str]) -> int:
    """Which choice a key such as ``B``, ``2`` or an index means."""
    if isinstance(names, list) and key in names:
        return names.index(key)
    if names is None and isinstance(key, int) and not isinstance(key, bool):
        return key
    if names is None and isinstance(key, str) and key in _LETTERS[: len(texts)] and key:
        return _LETTERS.index(key)
    raise _QuestionError(f"the right answer '{key}' is none of those given")


def _of_truthful_qa(row: Mapping[str, Json]) -> Question:
    targets = row.get("mc1_targets")
    if not isinstance(targets, dict):
        raise _QuestionError("there are no 'mc1_targets'")
    if isinstance(targets.get("choices"), list):  # as the hubs have it
        answers, labels = targets["choices"], targets.get("labels")
    else:
        answers, labels = list(targets), list(targets.values())
    if not isinstance(labels, list) or len(labels) != len(answers) or labels.count(1) != 1:
        raise _QuestionError("'mc1_targets' do not have just one right answer")
    texts = tuple(str(answer).strip() for answer in answers)
    return Question(_text(row, "question").strip(), texts, labels.index(1))


_ROWS: dict[str, Callable[[Mapping[str, Json]], Question]] = {
    HELLASWAG: _of_hellaswag,
    WINOGRANDE: _of_winogrande,
    MULTIPLE_CHOICE: _of_choices,
    TRUTHFUL_QA: _of_truthful_qa,
}


def _text(row: Mapping[str, Json], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _QuestionError(f"there is no text '{key}'")
    return value


def _number(value: Json, what: str) -> int:
    """A number, which the data sets also write as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r" *\d+ *", value):
        return int(value)
    raise _QuestionError(f"{what} is '{value}', which is no number")
