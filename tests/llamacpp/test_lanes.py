"""Sequences that come and go between lanes and memory, through the real library."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufkit.llamacpp.batching import BatchContext, ContextOptions, Decoded, Model
from ggufkit.llamacpp.lanes import _closing_move
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.requests import Request
from tests.llamacpp.test_batching import GREEDY, PROMPT, tiny

LANES = ContextOptions(context=256, sequences=8, batch=64, threads=1, lanes=3)


@pytest.fixture(scope="module")
def model(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(tiny(native, tmp_path_factory.mktemp("lanes"), "llama"), build=native) as loaded:
        yield loaded


@pytest.fixture
def context(model: Model) -> Iterator[BatchContext]:
    made = BatchContext(model, LANES)
    yield made
    made.close()


class Writer:
    """A sequence that goes on greedily."""

    def __init__(self, context: BatchContext, sequence: int, tokens: list[int], known: int = 0):
        self.context, self.sequence = context, sequence
        self.tokens, self.known = list(tokens), known
        self.sampler = context.sampler(GREEDY)

    def add(self) -> int:
        new = self.tokens[self.known :]
        place = self.context.add(self.sequence, self.known, new, output=True)
        self.known = len(self.tokens)
        return place


def step(context: BatchContext, *writers: Writer) -> None:
    context.clear()
    places = [writer.add() for writer in writers]
    assert context.decode() is Decoded.DONE
    for writer, place in zip(writers, places, strict=True):
        writer.tokens.append(writer.sampler.sample(place))


def alone(model: Model, prompt: list[int], count: int) -> list[int]:
    context = BatchContext(model, ContextOptions(context=256, sequences=1, batch=128, threads=1))
    writer = Writer(context, 0, prompt)
    for _ in range(count):
        step(context, writer)
    context.close()
    return writer.tokens


def test_more_sequences_than_lanes_write_what_each_writes_alone(
    model: Model, context: BatchContext
) -> None:
    assert (context.at_once, context.sequences, context.cells) == (3, 8, 3 * 256)
    prompts = [[n, *range(60, 60 + 2 * n)] for n in range(3, 11)]
    writers = [Writer(context, n, prompt) for n, prompt in enumerate(prompts)]
    for trio in itertools.combinations(writers, 3):
        step(context, *trio)
    for writer, prompt in zip(writers, prompts, strict=True):
        assert writer.tokens == alone(model, prompt, len(writer.tokens) - len(prompt))


@pytest.mark.parametrize("rests", [False, True])
def test_a_copy_begins_like_its_source(model: Model, context: BatchContext, rests: bool) -> None:
    step(context, Writer(context, 0, [*PROMPT, 7, 8, 9]))
    if rests:
        step(context, *(Writer(context, n, [n, 5]) for n in (5, 6, 7)))
        assert context.rank(0) == 3, "it lies aside"
    context.copy(0, 1, len(PROMPT) - 1)
    assert context.forget(0)
    writer = Writer(context, 1, PROMPT, known=len(PROMPT) - 1)
    for _ in range(6):
        step(context, writer)
    assert writer.tokens == alone(model, PROMPT, 6)


def test_what_lies_aside_can_be_taken_back_in_part(model: Model, context: BatchContext) -> None:
    step(context, Writer(context, 0, [*PROMPT, 7, 8, 9]))
    step(context, *(Writer(context, n, [n, 5]) for n in (5, 6, 7)))
    assert context.forget(0, 20)
    assert context.forget(0, 30), "less is left already"
    writer = Writer(context, 0, PROMPT, known=20)
    for _ in range(6):
        step(context, writer)
    assert writer.tokens == alone(model, PROMPT, 6)


def test_a_gap_is_closed_and_nothing_changes(model: Model, context: BatchContext) -> None:
    prompts = [[n + 5, *PROMPT[:15]] for n in range(3)]
    writers = [Writer(context, n, prompt) for n, prompt in enumerate(prompts)]
    step(context, writers[0])
    step(context, *writers)
    assert [context.rank(n) for n in range(3)] == [0, 1, 2]
    context.forget(1)
    for _ in range(8):
        step(context, writers[0], writers[2])
    assert abs(context.rank(0) - context.rank(2)) == 1
    for writer in (writers[0], writers[2]):
        prompt = prompts[writer.sequence]
        assert writer.tokens == alone(model, prompt, len(writer.tokens) - len(prompt))


def test_a_new_sequence_comes_beside_those_that_are_computed(context: BatchContext) -> None:
    first, *rest = (Writer(context, n, [n + 5, 6, 7]) for n in range(3))
    step(context, first, *rest)
    context.forget(1)
    step(context, first)
    new = Writer(context, 4, [9, 8, 7])
    step(context, first, new)
    assert abs(context.rank(0) - context.rank(4)) == 1


def test_what_lies_aside_is_bounded(model: Model) -> None:
    options = ContextOptions(context=256, sequences=6, batch=64, threads=1, lanes=1)
    context = BatchContext(model, options)
    for sequence in range(6):
        for start in range(0, 128, 64):
            context.clear()
            context.add(sequence, start, [5 + sequence] * 64, output=False)
            outcome = context.decode()
            if outcome is Decoded.FULL:
                # Two lie aside that fill all that may, and a third came.
                assert sequence == 3
                context.forget(0)
                assert context.decode() is Decoded.DONE
                context.close()
                return
            assert outcome is Decoded.DONE
    raise AssertionError("it never was full")


def test_copies_lie_aside_once(model: Model, context: BatchContext) -> None:
    step(context, Writer(context, 0, PROMPT))
    step(context, *(Writer(context, n, [n, 5]) for n in (5, 6, 7)))
    for target in (1, 2, 3):
        context.copy(0, target, 30)
    lanes = context._lanes
    assert lanes is not None
    assert len({id(aside.data) for aside in lanes._aside.values()}) == 1
    context.forget_all()
    assert not lanes._aside


def test_a_sliding_window_keeps_one_pool(native: NativeBuild, tmp_path: Path) -> None:
    with Model(tiny(native, tmp_path, "gemma3"), build=native) as model:
        context = BatchContext(model, LANES)
        assert (context.at_once, context.cells) == (8, 256)
        context.close()


def test_an_engine_over_lanes_writes_what_each_writes_alone(model: Model) -> None:
    system = list(range(50, 110))
    prompts = [[*(system if n % 2 else system[:9]), 5 + n, *range(20, 20 + n)] for n in range(12)]
    engine = Engine(BatchContext(model, LANES), EngineOptions(parallel=8))
    assert engine.parallel == 3
    try:
        requests = [Request(p, sampling=GREEDY, max_tokens=9, ignore_end=True) for p in prompts]
        answers = [ticket.answer() for ticket in [engine.submit(r) for r in requests]]
        metrics = engine.metrics()
    finally:
        engine.close()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert [*prompt, *answer.tokens] == alone(model, prompt, 9)
    assert metrics.cached_tokens > 3 * len(system)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_moves_end_in_one_run(given_: tuple[int, set[int]]) -> None:
    count, lanes = given_
    for _ in range(count):
        move = _closing_move(lanes, count)
        if move is None:
            break
        lane, target = move
        assert lane in lanes
        assert target not in lanes
        assert 0 <= target < count
        lanes = lanes - {lane} | {target}
    assert not lanes or max(lanes) - min(lanes) == len(lanes) - 1
