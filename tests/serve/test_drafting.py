"""Guessing ahead: whatever is guessed, what is written stays the same."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufkit.errors import UsageError
from ggufkit.llamacpp.batching import ContextOptions
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.llamacpp.template import Message
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve import drafting
from ggufkit.serve.drafting import Drafter, DraftOptions
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.model import ChatModel, Sampling
from ggufkit.serve.requests import Request
from tests.serve.backends import END, SIZE, FakeBackend, after, expected

HELLO = list(b"hello")
ROOM = ContextOptions(context=256, threads=1)


@pytest.fixture
def bold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model that ventures whatever it guesses."""
    monkeypatch.setattr(drafting, "_LEAST_LOGPROB", -math.inf)


class Guessing:
    """Guesses right so often, by a script of what is right."""

    def __init__(self, right: Sequence[bool], count: int = 3) -> None:
        self.count = count
        self.closed = False
        self._right = list(right)
        self._turn = 0

    def warm_up(self) -> None:
        pass

    def guess(self, wanted: Mapping[int, tuple[Sequence[int], int]]) -> dict[int, list[int]]:
        return {sequence: self._guess(list(t), most) for sequence, (t, most) in wanted.items()}

    def _guess(self, tokens: list[int], most: int) -> list[int]:
        guess: list[int] = []
        for _ in range(min(most, self.count)):
            self._turn += 1
            token = after(tokens)
            if not self._right[self._turn % len(self._right)]:
                token = 97 + (token - 96) % 26
            guess.append(token)
            tokens.append(token)
        return guess

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@contextmanager
def guessing(
    backend: FakeBackend, guesser: Guessing | Drafter, parallel: int | None = None
) -> Iterator[Engine]:
    engine = Engine(backend, EngineOptions(parallel=parallel), guesser)
    try:
        yield engine
    finally:
        engine.close(drain=False)


@given(
    right=st.lists(st.booleans(), min_size=1, max_size=7),
    count=st.integers(1, 6),
    users=st.integers(1, 5),
    length=st.integers(1, 20),
)
@settings(deadline=None, max_examples=60)
def test_answers_do_not_depend_on_guesses(
    right: list[bool], count: int, users: int, length: int
) -> None:
    guesser = Guessing(right, count)
    with guessing(FakeBackend(), guesser, parallel=4) as engine:
        prompts = [[*HELLO, 65 + n] for n in range(users)]
        tickets = [engine.submit(Request(p, max_tokens=length)) for p in prompts]
        answers = [ticket.answer() for ticket in tickets]
    assert [list(a.tokens) for a in answers] == [expected(p, length) for p in prompts]
    usages = [a.finish.usage for a in answers]
    assert all(0 <= u.right_tokens <= u.guessed_tokens for u in usages)
    if all(right):
        assert all(u.right_tokens == u.guessed_tokens for u in usages)
    if not any(right):
        assert all(u.right_tokens == 0 for u in usages)
    assert guesser.closed


def test_right_guesses_save_steps() -> None:
    steps = {}
    for right in (True, False):
        backend = FakeBackend()
        with guessing(backend, Guessing([right])) as engine:
            answer = engine.submit(Request(HELLO, max_tokens=16)).answer()
            assert list(answer.tokens) == expected(HELLO, 16)
            told = engine.metrics()
        steps[right] = len(backend.batches)
        assert told.right_tokens == (11 if right else 0)
    assert steps == {True: 1 + 4, False: 16}


def test_an_answer_that_ends_within_a_guess_leaves_the_sequence_clean() -> None:
    backend = FakeBackend()
    first, second, *_ = expected(HELLO, 4)
    with guessing(backend, Guessing([True])) as engine:
        stop = Request(HELLO, stop_tokens=frozenset({second}))
        assert engine.submit(stop).answer().tokens == (first,)
        # It is gone on from what is remembered; the backend checks positions.
        longer = [*HELLO, first, 66]
        answer = engine.submit(Request(longer, max_tokens=5)).answer()
    assert list(answer.tokens) == expected(longer, 5)


def test_the_sampler_decides_and_is_asked_once_for_each_token() -> None:
    backend = FakeBackend()
    backend.scripts[1] = [*b"abc", END]
    with guessing(backend, Guessing([True])) as engine:
        answer = engine.submit(Request(HELLO, SamplingParams(seed=1))).answer()
    assert answer.text == "abc"
    assert backend.samplers[0]._script == []


def test_guesses_stay_within_limit_and_context() -> None:
    with guessing(FakeBackend(context=16), Guessing([True], count=6)) as engine:
        answer = engine.submit(Request(HELLO)).answer()
        assert list(answer.tokens) == expected(HELLO, 11)
        assert answer.finish.reason == "length"
        short = engine.submit(Request(HELLO, max_tokens=1)).answer()
        assert short.finish.usage.guessed_tokens == 0


def test_guesses_make_nobody_wait_for_room() -> None:
    backend = FakeBackend(cells=40, context=32, sequences=4)
    with guessing(backend, Guessing([True, False], count=6), parallel=4) as engine:
        prompts = [[65 + n] * 4 for n in range(4)]
        tickets = [engine.submit(Request(p, max_tokens=12, remember=False)) for p in prompts]
        answers = [list(ticket.answer().tokens) for ticket in tickets]
    assert answers == [expected(p, 12) for p in prompts]


# The draft model.


def test_the_small_model_guesses_what_it_would_write(bold: None) -> None:
    drafter = Drafter(FakeBackend(sequences=2), count=3, size=SIZE)
    assert drafter.guess({0: (HELLO, 3), 1: (HELLO[:2], 1)}) == {
        0: expected(HELLO, 3),
        1: expected(HELLO[:2], 1),
    }
    # It went on with its own guesses; what was written differs.
    written = [*HELLO, 65, 66]
    assert drafter.guess({0: (written, 2)}) == {0: expected(written, 2)}
    assert drafter.guess({0: (written, 0)}) == {}
    drafter.close()


def test_a_long_prompt_is_read_in_parts(bold: None) -> None:
    backend = FakeBackend(batch=4)
    drafter = Drafter(backend, count=2, size=SIZE)
    prompt = list(range(65, 75))
    told = [drafter.guess({0: (prompt, 2)}) for _ in range(3)]
    assert told == [{}, {}, {0: expected(prompt, 2)}]
    assert max(size for batch in backend.batches for _, size in batch) == 4
    drafter.close()


def test_there_is_no_guess_where_the_small_model_doubts_or_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = FakeBackend(context=8)
    drafter = Drafter(backend, count=2, size=120)
    monkeypatch.setattr(drafting, "_LEAST_LOGPROB", math.log(0.51))
    assert drafter.guess({0: (HELLO, 2)}) == {}
    monkeypatch.setattr(drafting, "_LEAST_LOGPROB", -math.inf)
    for impossible in ([5, 200], [5, -3], [5] * 8):
        assert drafter.guess({1: (impossible, 2)}) == {}
    # A token that the large model does not have.
    other = FakeBackend()
    other.scripts[0] = [122]
    unknown = Drafter(other, count=2, size=120)
    assert unknown.guess({0: (HELLO, 2)}) == {}
    unknown.close()
    drafter.close()


def test_no_room_means_no_guess(bold: None) -> None:
    drafter = Drafter(FakeBackend(cells=8, sequences=2), count=3, size=SIZE)
    assert drafter.guess({0: (HELLO, 3)}) == {0: expected(HELLO, 3)}
    assert drafter.guess({1: (HELLO, 3)}) == {}
    assert drafter.guess({1: (HELLO, 3)}) == {1: expected(HELLO, 3)}
    drafter.close()


# Real ones.


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_a_model_writes_the_same_with_and_without_guesses(
    tiny_types: dict[str, Path], native: NativeBuild, bold: None
) -> None:
    greedy = Sampling(temperature=0, max_tokens=40)
    drawn = Sampling(temperature=1.2, seed=5, max_tokens=40, repeat_penalty=1.2)
    path = tiny_types["F32"]
    with ChatModel(path, context=ROOM, build=native) as plain:
        wanted = ["".join(plain.stream(user("Hello"), s)) for s in (greedy, drawn)]
    shares = {}
    for type in ("Q8_0", "Q4_0"):
        draft = DraftOptions(tiny_types[type], count=3)
        with ChatModel(path, context=ROOM, draft=draft, build=native) as model:
            for sampling, text in zip((greedy, drawn), wanted, strict=True):
                assert "".join(model.stream(user("Hello"), sampling)) == text
                told = model.statistics
                assert told.guessed_tokens > 0
                shares[type, sampling.temperature] = told.right_tokens / told.guessed_tokens
            again = "".join(model.stream(user("Hello there"), greedy))
        with ChatModel(path, context=ROOM, build=native) as plain:
            assert "".join(plain.stream(user("Hello there"), greedy)) == again
    assert shares["Q8_0", 0] > 0.5


def test_another_vocabulary_is_refused(
    tiny_types: dict[str, Path], seeing: tuple[Path, Path], native: NativeBuild
) -> None:
    with pytest.raises(UsageError, match="has another vocabulary than"):
        ChatModel(tiny_types["F32"], context=ROOM, draft=DraftOptions(seeing[0]), build=native)


Run = Callable[..., tuple[int, str, str]]


def test_the_command_guesses(run_cli: Run, tiny_types: dict[str, Path]) -> None:
    ask = ["chat", tiny_types["F32"], "-p", "Hi", "-st", "-n", "12", "--temp", "0", "-c", "128"]
    code, plain, _ = run_cli(*ask)
    assert code == 0
    assert run_cli(*ask, "--draft", tiny_types["Q8_0"], "--draft-max", "2")[:2] == (0, plain)
