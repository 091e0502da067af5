"""Questions with given answers, asked through llama-perplexity's own modes.

Of each answer the tool takes the mean log probability of its tokens, and the
likeliest is the model's. What it reads, what it cannot read and what it prints
follow the pinned ``tools/perplexity/perplexity.cpp``: ``winogrande_score`` and
``multiple_choice_score``. HellaSwag is asked as multiple choice as well:
``hellaswag_score`` does the same sums, but asks in an order of its own, and does
not say which question is which.
"""

import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufkit.errors import ToolError, ToolOutputError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild

HELLASWAG = "hellaswag"
WINOGRANDE = "winogrande"
MULTIPLE_CHOICE = "multiple-choice"
TRUTHFUL_QA = "truthful-qa"
TASKS = (HELLASWAG, WINOGRANDE, MULTIPLE_CHOICE, TRUTHFUL_QA)
"""TruthfulQA (mc1) is multiple choice by another name."""

BLANK = "_"
"""What stands for the answer in a sentence of Winogrande."""
MAX_ANSWERS = 100
HELLASWAG_ANSWERS = 4

_LEAST_CONTEXT = 2048
"""Tokens of context that the tool takes for its tasks when not told otherwise."""
_LEAST_SEQUENCES = 4
_TRIES = 8
"""How often the tool may end without having printed anything new."""
_MORE = 8
"""Copies of the last question that each further try adds, to be lost in its place."""
_SLACK = 16
"""Tokens added to an answer's bytes: BOS, a space, words cut otherwise at the seam."""


@dataclass(frozen=True)
class Question:
    """A question with its possible answers.

    Attributes:
        context: what is to be continued; for Winogrande a sentence with a ``BLANK``.
        answers: what may follow, or fill the blank.
        right: index of the right answer.
    """

    context: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class TaskOutput:
    """What llama-perplexity found.

    Attributes:
        outcomes: of each question, whether the model answered rightly.
        seconds: wall time of the tool.
        peak_rss_nbytes: its peak resident memory.
    """

    outcomes: tuple[bool, ...]
    seconds: float
    peak_rss_nbytes: int


# What the tool reads.


def why_unaskable(task: str, question: Question) -> str:
    """Why llama-perplexity cannot ask a question that is sound in itself; empty if it can.

    It compares answers from their first different token on. Where one answer is
    the beginning of all others there is none, and it reads past the end of its
    tokens. Its CSV knows quotes around a sentence, but none within.
    """
    if task == WINOGRANDE:
        texts = [question.context.replace(BLANK, answer, 1) for answer in question.answers]
        if _begins_all(texts):
            return "one filled sentence is the beginning of the other"
        if _csv_line(0, question) is None:
            return "the tool's CSV cannot hold its commas and quotation marks"
        return ""
    if _begins_all(question.answers):
        return "one answer is the beginning of all others"
    return ""


def _begins_all(texts: Sequence[str]) -> bool:
    shortest = min(texts, key=len)
    return all(text.startswith(shortest) for text in texts)


def encode(task: str, questions: Sequence[Question]) -> bytes:
    """Questions in the format that llama-perplexity reads.

    Raises:
        ValueError: if there is one that it cannot ask.
    """
    if task == WINOGRANDE:
        lines = [_csv_line(number, q) for number, q in enumerate(questions)]
        if None in lines:
            raise ValueError("a sentence that the CSV cannot hold")
        # The tool takes away one line end of the file, and then leaves out a last
        # line that has none: with one more line end, it reads all.
        return ("".join(f"{line}\n" for line in lines) + "\n").encode()
    return _binary(questions)


def parse_csv_line(line: str) -> tuple[str, str, str, str] | None:
    """Sentence, two answers and the rest of a line as llama-perplexity cuts it.

    Returns:
        The four texts; None if there are fewer than four commas outside of quotes.
    """
    commas: list[int] = []
    quoted = False
    for at, letter in enumerate(line):
        if letter == '"':
            quoted = not quoted
        elif letter == "," and not quoted:
            commas.append(at)
            if len(commas) == 4:
                break
    if len(commas) < 4:
        return None
    first, second, third, fourth = commas
    sentence = line[first + 1 : second]
    if sentence.startswith('"'):
        sentence = sentence[1:-1]
    return sentence, line[second + 1 : third], line[third + 1 : fourth], line[fourth + 1 :]


def _csv_line(number: int, question: Question) -> str | None:
    """A line that the tool reads as this question; None if there is no such line."""
    wanted = (question.context, *question.answers, str(question.right + 1))
    for sentence in (question.context, f'"{question.context}"'):
        line = f"{number},{sentence},{','.join(question.answers)},{question.right + 1}"
        if parse_csv_line(line) == wanted:
            return line
    return None


def _binary(questions: Sequence[Question]) -> bytes:
    """Count, position of each question in the file, then the questions."""
    packed = [_packed(question) for question in questions]
    head = 4 + 4 * len(packed)
    positions = [head + sum(map(len, packed[:n])) for n in range(len(packed))]
    return struct.pack(f"<{1 + len(packed)}I", len(packed), *positions) + b"".join(packed)


def _packed(question: Question) -> bytes:
    labels = [int(n == question.right) for n in range(len(question.answers))]
    return b"".join(
        (
            _packed_text(question.context),
            struct.pack("<I", len(labels)),
            *map(_packed_text, question.answers),
            struct.pack(f"<{len(labels)}i", *labels),
            struct.pack("<I", 0),  # answers of which several may be right: never asked
        )
    )


def _packed_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<I", len(raw)) + raw


# Asking.


def ask(
    build: NativeBuild,
    model: Path,
    task: str,
    questions: Sequence[Question],
    *,
    answered: Sequence[bool] = (),
    gpu_layers: int,
    threads: int,
    scratch: Path,
    log: Path,
    on_answer: Callable[[bool], None] | None = None,
) -> TaskOutput:
    """Ask questions with llama-perplexity.

    The tool's logger is a thread that is not waited for when the tool ends, so that
    the last answers may get lost. They are asked for again.

    Args:
        build: whose llama-perplexity to run.
        model: the GGUF.
        task: of ``TASKS``.
        questions: what to ask.
        answered: outcomes of the first questions, if they were asked before.
        gpu_layers: layers to put on a GPU.
        threads: how many to use.
        scratch: a directory for the tool's input.
        log: gets what the tool prints.
        on_answer: called after each question with whether it was answered rightly.

    Raises:
        ToolError: if the tool fails, or stops before the last question.
        ToolOutputError: if it prints what cannot be understood.
    """
    outcomes = list(answered)
    seconds, peak, tries = 0.0, 0, 0
    while len(outcomes) < len(questions):
        rest = questions[len(outcomes) :]
        file = scratch / ".questions"
        padding = [rest[-1]] * (_MORE * tries)
        file.write_bytes(encode(task, [*rest, *padding]))
        sheet = AnswerSheet(task, on_answer, len(rest))
        arguments = _arguments(task, model, file, rest, gpu_layers, threads)
        ran = toolchain.run(
            [build.tool("llama-perplexity"), *arguments], on_text=sheet.feed, log=log
        )
        seconds, peak = seconds + ran.seconds, max(peak, ran.peak_rss_nbytes)
        outcomes += sheet.outcomes[: len(rest)] if padding else sheet.outcomes
        if ran.returncode != 0:
            raise toolchain.explain_failure(ran, f"asking {model.name}", log)
        tries = 0 if sheet.outcomes else tries + 1
        # A complaint may be about something else, until not even the next question is answered.
        stuck = not sheet.outcomes and (sheet.complaint or tries == _TRIES)
        if stuck or len(outcomes) > len(questions):
            raise ToolError(
                f"llama-perplexity answered {len(outcomes)} of {len(questions)} questions: "
                f"{sheet.complaint or 'it did not say why'}",
                f"All that it printed: {log}",
            )
    return TaskOutput(tuple(outcomes), seconds, peak)


def _arguments(
    task: str,
    model: Path,
    file: Path,
    questions: Sequence[Question],
    gpu_layers: int,
    threads: int,
) -> list[str]:
    mode = ("--winogrande", "-f") if task == WINOGRANDE else ("--multiple-choice", "-bf")
    sequences = max(_LEAST_SEQUENCES, *(len(q.answers) for q in questions))
    tokens = max(_LEAST_CONTEXT, *(_tokens_at_most(task, q) for q in questions))
    # The context is shared by the sequences; the tool multiplies.
    context = -(-tokens // sequences)
    return [
        *("-m", str(model.absolute()), *mode, str(file.absolute())),
        *("-np", str(sequences), "-c", str(context)),
        *("-t", str(threads), "-ngl", str(gpu_layers)),
    ]


def _tokens_at_most(task: str, question: Question) -> int:
    """Tokens that a question takes with all its answers; no token is less than a byte."""
    context, *answers = (
        len(text.encode("utf-8", "surrogateescape"))
        for text in (question.context, *question.answers)
    )
    # What follows the blank of a sentence is read with each answer.
    repeated = context if task == WINOGRANDE else 0
    return context + sum(answer + _SLACK + repeated for answer in answers)


# What the tool prints, one line for each question, with the share so far in per cent:
#   3<tab>66.6667<tab> -4.536724   -4.404841  2  1          Winogrande: scores, chosen, right
#   3<tab>66.66666667                                       multiple choice
_CHOICE_LINE = re.compile(r"^(?P<number>\d+)\t(?P<share>\d+\.\d+)$")
_WINOGRANDE_LINE = re.compile(
    r"^(?P<number>\d+)\t(?P<share>\d+\.\d+)\t *(?P<first>\S+) +(?P<second>\S+)"
    r" +(?P<chosen>[12]) +(?P<right>[12])$"
)
_QUESTION = re.compile(r"^\d+\t")
_COMPLAINT = re.compile(r"^[\d.]+ E (.*)$")


class AnswerSheet:
    """Reads llama-perplexity's text as it comes: which questions are answered rightly.

    Args:
        task: of ``TASKS``.
        on_answer: called with each outcome.
        count: how many of them are told; what comes after is only padding.

    Attributes:
        outcomes: of the questions so far.
        complaint: the tool's last error; empty if it had none.
    """

    def __init__(
        self, task: str, on_answer: Callable[[bool], None] | None = None, count: int | None = None
    ) -> None:
        self._count = count
        self.outcomes: list[bool] = []
        self.complaint = ""
        self._line = _WINOGRANDE_LINE if task == WINOGRANDE else _CHOICE_LINE
        self._on_answer = on_answer
        self._right = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        """Take the next piece of text; a line without an end counts for nothing.

        Raises:
            ToolOutputError: if a line cannot be read, the shares do not follow from
                each other, or a score is no number.
        """
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if _QUESTION.match(line):
                self._take(line)
            elif found := _COMPLAINT.match(line):
                self.complaint = found[1].strip()

    def _take(self, line: str) -> None:
        number = len(self.outcomes) + 1
        found = self._line.match(line)
        if not found or int(found["number"]) != number:
            raise ToolOutputError(f"this line of llama-perplexity cannot be read: {line}")
        right = float(found["share"]) / 100 * number
        # The share has at least four decimals, of a number of questions below 100,000.
        outcome = round(right) - self._right
        if abs(right - round(right)) > 0.1 or outcome not in (0, 1):
            raise ToolOutputError(f"this share does not follow from the one before: {line}")
        if self._line is _WINOGRANDE_LINE:
            _check_scores(found, bool(outcome), line)
        self._right += outcome
        self.outcomes.append(bool(outcome))
        if self._on_answer and (self._count is None or number <= self._count):
            self._on_answer(bool(outcome))


def _check_scores(found: re.Match[str], outcome: bool, line: str) -> None:
    for name in ("first", "second"):
        try:
            score = float(found[name])
        except ValueError:
            raise ToolOutputError(f"this line of llama-perplexity cannot be read: {line}") from None
        if not math.isfinite(score):
            raise ToolOutputError(
                f"llama-perplexity found no score: {line}", "The model's weights are broken"
            )
    if (found["chosen"] == found["right"]) != outcome:
        raise ToolOutputError(f"choice and share do not agree: {line}")
