"""The scheduler, over a backend that checks its books."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufkit.errors import GgufkitError, ToolError, UsageError
from ggufkit.llamacpp.runtime import ContextError
from ggufkit.llamacpp.sampling import GrammarError, SamplingParams
from ggufkit.serve.engine import Engine, EngineOptions, common_prefix
from ggufkit.serve.requests import (
    BusyError,
    ClosedError,
    Delta,
    Embedding,
    EmbedRequest,
    Event,
    Finish,
    Request,
    Ticket,
)
from tests.serve.backends import END, FakeBackend, expected

HELLO = list(b"hello")


@contextmanager
def running(backend: FakeBackend, **options: Any) -> Iterator[Engine]:
    engine = Engine(backend, EngineOptions(**options))
    try:
        yield engine
    finally:
        engine.close(drain=False)
        assert backend.closed


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.001)


def finish_of(ticket: Ticket) -> Finish:
    *_, last = ticket
    assert isinstance(last, Finish)
    return last


# One answer.


def test_an_answer_is_what_the_model_writes() -> None:
    with running(FakeBackend()) as engine:
        answer = engine.submit(Request(HELLO, max_tokens=10)).answer()
    assert list(answer.tokens) == expected(HELLO, 10)
    assert answer.text == bytes(answer.tokens).decode()
    assert answer.finish.reason == "length"
    usage = answer.finish.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens) == (5, 0, 10)
    assert 0 <= usage.queue_seconds <= usage.first_token_seconds
    assert usage.tokens_per_second > 0


def test_text_comes_token_by_token_and_ends_with_a_finish() -> None:
    with running(FakeBackend()) as engine:
        events = list(engine.submit(Request(HELLO, max_tokens=3)))
    assert [type(e) for e in events] == [Delta, Delta, Delta, Finish]
    assert [len(e.tokens) for e in events[:-1] if isinstance(e, Delta)] == [1, 1, 1]


def test_the_model_ends_by_a_token_that_is_not_part_of_the_answer() -> None:
    backend = FakeBackend()
    backend.scripts[1] = [*b"ab", END]
    with running(backend) as engine:
        answer = engine.submit(Request(HELLO, SamplingParams(seed=1))).answer()
    assert (answer.text, answer.finish.reason, len(answer.tokens)) == ("ab", "stop", 2)


def test_an_end_can_be_ignored_and_other_tokens_can_end() -> None:
    backend = FakeBackend()
    backend.scripts[1] = [*b"a", END, *b"b"]
    seeded = SamplingParams(seed=1)
    with running(backend) as engine:
        on = engine.submit(Request(HELLO, seeded, max_tokens=3, ignore_end=True)).answer()
        early = engine.submit(Request(HELLO, seeded, stop_tokens=frozenset(b"a"))).answer()
    assert (on.text, on.tokens, on.finish.reason) == ("ab", (97, END, 98), "length")
    assert (early.text, early.finish.reason) == ("", "stop")


def test_a_full_context_ends_the_answer() -> None:
    with running(FakeBackend(context=16)) as engine:
        answer = engine.submit(Request(HELLO)).answer()
    assert answer.finish.reason == "length"
    assert len(answer.tokens) == 16 - len(HELLO)


def test_stop_strings_never_show() -> None:
    backend = FakeBackend()
    backend.scripts[1] = list(b"one two STOP three")
    with running(backend) as engine:
        ticket = engine.submit(Request(HELLO, SamplingParams(seed=1), stop=("STOP", "x")))
        events = list(ticket)
    texts = [e.text for e in events if isinstance(e, Delta)]
    assert "".join(texts) == "one two "
    assert not any("S" in text for text in texts)
    assert isinstance(events[-1], Finish)
    assert (events[-1].reason, events[-1].stop) == ("stop", "STOP")


def test_what_only_looked_like_a_stop_string_comes_in_the_end() -> None:
    backend = FakeBackend()
    backend.scripts[1] = list(b"a STO")
    with running(backend) as engine:
        request = Request(HELLO, SamplingParams(seed=1), max_tokens=5, stop=("STOP",))
        assert engine.submit(request).answer().text == "a STO"


def test_characters_are_whole() -> None:
    backend = FakeBackend()
    backend.scripts[1] = list("é€😀".encode())
    with running(backend) as engine:
        events = list(engine.submit(Request(HELLO, SamplingParams(seed=1), max_tokens=9)))
    deltas = [e for e in events if isinstance(e, Delta)]
    assert [d.text for d in deltas] == ["é", "€", "😀"]
    assert [len(d.tokens) for d in deltas] == [2, 3, 4]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    backend = FakeBackend()
    backend.scripts[1] = list("é".encode()[:1])
    with running(backend) as engine:
        answer = engine.submit(Request(HELLO, SamplingParams(seed=1), max_tokens=1)).answer()
    assert (answer.text, len(answer.tokens)) == ("\ufffd", 1)


def test_log_probabilities_come_with_each_token() -> None:
    with running(FakeBackend()) as engine:
        answer = engine.submit(Request(HELLO, max_tokens=3, logprobs=2)).answer()
    assert [c.token for c in answer.chosen] == list(answer.tokens)
    assert [c.piece for c in answer.chosen] == [bytes([t]) for t in answer.tokens]
    assert all(len(c.top) == 2 and c.logprob < 0 for c in answer.chosen)


def test_the_sampler_is_shown_the_prompt_and_freed() -> None:
    backend = FakeBackend()
    with running(backend) as engine:
        engine.submit(Request(HELLO, max_tokens=1)).answer()
        (sampler,) = backend.samplers
        assert sampler.primed == HELLO
        assert sampler.closed


# Many answers.


def test_two_hundred_at_once_are_all_right() -> None:
    prompts = [[1 + n % 200, *range(1, 1 + n % 13)] for n in range(200)]
    with running(FakeBackend(cells=200)) as engine:
        tickets = [engine.submit(Request(p, max_tokens=8)) for p in prompts]
        answers = [ticket.answer() for ticket in tickets]
        metrics = engine.metrics()
    assert [list(a.tokens) for a in answers] == [expected(p, 8) for p in prompts]
    assert metrics.finished == {"length": 200}
    assert metrics.generated_tokens == 1600
    assert metrics.prompt_tokens + metrics.cached_tokens == sum(map(len, prompts))


def test_those_who_write_come_first_in_each_batch_and_prompts_fill_the_rest() -> None:
    backend = FakeBackend(batch=8, gated=True)
    with running(backend) as engine:
        engine.submit(Request(HELLO, max_tokens=30))
        backend.allow(2)
        eventually(lambda: len(backend.batches) == 2)
        engine.submit(Request(list(range(1, 31)), max_tokens=2))
        backend.allow(5)
        eventually(lambda: len(backend.batches) == 7)
        # Batches of the writer alone and of the prompt alone have one sequence.
        chunks = [b for b in backend.batches if len(b) == 2]
        assert chunks
        assert all(b[0] == (0, 1) for b in chunks), "the writer comes first"
        assert all(sum(n for _, n in b) <= 8 for b in chunks)
        assert chunks[0][1][1] == 7, "the prompt fills the rest"
        without = [all(sequence != 0 for sequence, _ in b) for b in backend.batches]
        assert any(without), "the prompt has batches of its own"
        assert not any(map(all, pairwise(without))), "but no two in a row"


def test_no_more_run_than_are_allowed() -> None:
    backend = FakeBackend(gated=True)
    with running(backend, parallel=2) as engine:
        for n in range(5):
            engine.submit(Request([n + 1] * 3, max_tokens=4))
        backend.allow(3)
        eventually(lambda: len(backend.batches) == 3)
        assert engine.metrics().running == 2
        assert engine.metrics().waiting == 3
        assert all(len(batch) <= 2 for batch in backend.batches)


def test_clients_take_turns_and_keep_their_own_order() -> None:
    order = []
    backend = FakeBackend(gated=True)
    with running(backend, parallel=1) as engine:
        names = ["a1", "a2", "a3", "b1", "b2"]
        tickets = {n: engine.submit(Request(HELLO, max_tokens=1, client=n[0])) for n in names}
        for name, ticket in tickets.items():
            ticket.on_ready(lambda name=name: order.append(name))  # type: ignore[misc]
        backend.allow(5)
        for ticket in tickets.values():
            ticket.answer()
    assert order[0] == "a1"
    assert order.index("b1") < order.index("a3"), "nobody waits for all of another's"
    assert [n for n in order if n[0] == "a"] == ["a1", "a2", "a3"]


def test_one_more_than_the_queue_holds_is_refused() -> None:
    backend = FakeBackend(gated=True)
    with running(backend, parallel=1, queue=2) as engine:
        first = engine.submit(Request(HELLO, max_tokens=1))
        eventually(lambda: engine.metrics().waiting == 0)
        waiting = [engine.submit(Request(HELLO, max_tokens=1)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are waiting already"):
            engine.submit(Request(HELLO))
        assert engine.metrics().refused == 1
        backend.allow(10)
        assert [finish_of(t).reason for t in (first, *waiting)] == ["length"] * 3


def test_those_with_other_adapters_never_share_a_batch() -> None:
    backend = FakeBackend()
    lora = (("style", 0.5),)
    with running(backend) as engine:
        plain = [engine.submit(Request(HELLO, max_tokens=6)) for _ in range(2)]
        other = [engine.submit(Request(HELLO, max_tokens=6, adapters=lora)) for _ in range(2)]
        answers = [t.answer() for t in (*plain, *other)]
    assert all(list(a.tokens) == expected(HELLO, 6) for a in answers)
    assert {(), lora} == set(backend.used_adapters)
    assert answers[2].finish.usage.cached_tokens == 0, "keys and values differ by adapter"


# What is known already.


def test_a_conversation_computes_only_what_is_new() -> None:
    backend = FakeBackend(context=512, cells=1024)
    with running(backend) as engine:
        first = engine.submit(Request(list(range(1, 201)), max_tokens=10)).answer()
        prompt = [*range(1, 201), *first.tokens, *b"and then?"]
        second = engine.submit(Request(prompt, max_tokens=5)).answer()
    assert list(second.tokens) == expected(prompt, 5)
    # The answer's last token was never computed.
    assert second.finish.usage.cached_tokens == 200 + 10 - 1
    assert backend.copied == 0, "the sequence goes on in place"


def test_the_same_prompt_computes_its_last_token_again() -> None:
    with running(FakeBackend()) as engine:
        engine.submit(Request(HELLO, max_tokens=1)).answer()
        again = engine.submit(Request(HELLO, max_tokens=3)).answer()
    assert again.finish.usage.cached_tokens == len(HELLO) - 1
    assert list(again.tokens) == expected(HELLO, 3)


def test_a_system_prompt_is_shared_and_stays_with_both() -> None:
    system = list(range(1, 41))
    backend = FakeBackend(context=128, cells=512)
    long_tail = [*system, *([201] * 50)]
    with running(backend) as engine:
        engine.submit(Request(long_tail, max_tokens=2)).answer()
        other = engine.submit(Request([*system, 202], max_tokens=2)).answer()
        again = engine.submit(Request(long_tail, max_tokens=2)).answer()
    assert other.finish.usage.cached_tokens == len(system)
    assert again.finish.usage.cached_tokens == len(long_tail) - 1
    assert backend.copied == len(system)


def test_those_that_come_together_compute_a_shared_beginning_once() -> None:
    system = [*range(1, 101)]
    backend = FakeBackend(context=256, cells=2048, batch=16, gated=True)
    prompts = [[*system, 200 + n] for n in range(4)]
    with running(backend) as engine:
        tickets = [engine.submit(Request(p, max_tokens=4)) for p in prompts]
        backend.allow(1000)
        answers = [t.answer() for t in tickets]
        metrics = engine.metrics()
    assert [list(a.tokens) for a in answers] == [expected(p, 4) for p in prompts]
    assert metrics.prompt_tokens == len(system) + 4
    assert metrics.cached_tokens == 3 * len(system)


def test_followers_go_on_alone_if_their_leader_goes_away() -> None:
    system = [*range(1, 101)]
    backend = FakeBackend(context=256, cells=2048, batch=16, gated=True)
    with running(backend) as engine:
        leader = engine.submit(Request([*system, 200], max_tokens=4))
        backend.allow(1)
        eventually(lambda: len(backend.batches) == 1)
        follower = engine.submit(Request([*system, 201], max_tokens=4))
        backend.allow(1)
        eventually(lambda: len(backend.batches) == 2)
        leader.cancel()
        backend.allow(1000)
        answer = follower.answer()
        assert finish_of(leader).reason == "cancelled"
    assert list(answer.tokens) == expected([*system, 201], 4)
    assert 0 < answer.finish.usage.cached_tokens < len(system)


def test_what_shall_not_be_remembered_is_not() -> None:
    with running(FakeBackend()) as engine:
        engine.submit(Request(HELLO, max_tokens=2, remember=False)).answer()
        again = engine.submit(Request(HELLO, max_tokens=2)).answer()
    assert again.finish.usage.cached_tokens == 0


def test_a_model_that_cannot_go_back_reuses_whole_sequences_only() -> None:
    backend = FakeBackend(can_trim=False)
    with running(backend) as engine:
        first = engine.submit(Request(HELLO, max_tokens=3)).answer()
        grown = [*HELLO, *first.tokens, 200]
        second = engine.submit(Request(grown, max_tokens=3)).answer()
        other = engine.submit(Request([*HELLO, 201], max_tokens=3)).answer()
    assert second.finish.usage.cached_tokens == len(HELLO) + 2
    assert other.finish.usage.cached_tokens == 0
    assert list(other.tokens) == expected([*HELLO, 201], 3)


def test_the_oldest_memory_makes_room() -> None:
    backend = FakeBackend(cells=40, context=40, sequences=4)
    with running(backend) as engine:
        for n in range(1, 8):
            prompt = [n] * 15
            assert list(engine.submit(Request(prompt, max_tokens=3)).answer().tokens) == expected(
                prompt, 3
            )
        kept = engine.submit(Request([7] * 15, max_tokens=1)).answer()
    assert kept.finish.usage.cached_tokens == 14, "the newest is kept"


def test_without_room_the_youngest_is_set_back_and_nobody_is_wrong() -> None:
    backend = FakeBackend(cells=100, context=90, sequences=8, batch=32)
    prompts = [[n] * 10 for n in range(1, 5)]
    with running(backend) as engine:
        tickets = [engine.submit(Request(p, max_tokens=70)) for p in prompts]
        answers = [t.answer() for t in tickets]
        metrics = engine.metrics()
    assert [list(a.tokens) for a in answers] == [expected(p, 70) for p in prompts]
    assert metrics.preempted > 0


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), min_size=1, max_size=20),
    cells=st.integers(50, 150),
    batch=st.integers(1, 20),
    can_trim=st.booleans(),
)
def test_whatever_comes_the_answers_are_right(
    prompts: list[list[int]], cells: int, batch: int, can_trim: bool
) -> None:
    backend = FakeBackend(cells=cells, context=50, batch=batch, can_trim=can_trim)
    with running(backend) as engine:
        tickets = [engine.submit(Request(p, max_tokens=6)) for p in prompts]
        answers = [t.answer() for t in tickets]
    assert [list(a.tokens) for a in answers] == [expected(p, 6) for p in prompts]


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_a_common_prefix_is_found(first: list[int], second: list[int]) -> None:
    count = common_prefix(first, second)
    assert first[:count] == second[:count]
    assert first[count : count + 1] != second[count : count + 1] or count == len(first) == len(
        second
    )


# Clients that go away.


def test_a_cancelled_answer_ends_and_frees_its_place() -> None:
    backend = FakeBackend(gated=True)
    with running(backend, parallel=1) as engine:
        first = engine.submit(Request(HELLO, max_tokens=50))
        second = engine.submit(Request([9], max_tokens=2))
        backend.allow(3)
        eventually(lambda: len(backend.batches) == 3)
        first.cancel()
        backend.allow(4)
        assert list(second.answer().tokens) == expected([9], 2)
        end = finish_of(first)
    assert end.reason == "cancelled"
    assert end.usage.generated_tokens <= 4


def test_a_request_can_be_cancelled_while_it_waits() -> None:
    backend = FakeBackend(gated=True)
    with running(backend, parallel=1) as engine:
        engine.submit(Request(HELLO, max_tokens=50))
        waiting = engine.submit(Request([9], max_tokens=2))
        waiting.cancel()
        backend.allow(2)
        assert finish_of(waiting).reason == "cancelled"
        assert engine.metrics().waiting == 0


def test_time_can_run_out() -> None:
    backend = FakeBackend(gated=True, context=5000, cells=6000)
    with running(backend, parallel=1) as engine:
        first = engine.submit(Request(HELLO, timeout_seconds=0.05))
        waiting = engine.submit(Request(HELLO, timeout_seconds=0.05))
        eventually(lambda: bool(backend.allow(1) or engine.metrics().finished))
        assert finish_of(first).reason == "timeout"
        assert finish_of(waiting).reason == "timeout"


def test_a_reader_that_does_not_read_is_cut_off_and_nobody_else() -> None:
    with running(FakeBackend(context=64), unread=8) as engine:
        slow = engine.submit(Request(HELLO, max_tokens=50))
        eventually(lambda: engine.metrics().running == 0)
        other = engine.submit(Request(HELLO, max_tokens=5)).answer()
        events = slow.take()
    assert len(events) == 9
    assert isinstance(events[-1], Finish)
    assert events[-1].reason == "slow"
    assert other.finish.reason == "length"


def test_a_reader_that_cannot_be_told_is_cut_off() -> None:
    def broken() -> None:
        raise RuntimeError("the loop is closed")

    backend = FakeBackend(gated=True)
    with running(backend) as engine:
        ticket = engine.submit(Request(HELLO, max_tokens=50))
        ticket.on_ready(broken)
        backend.allow(2)
        assert finish_of(ticket).reason == "slow"


def test_coroutines_read_too() -> None:
    async def read(engine: Engine, prompt: list[int]) -> list[Event]:
        return [e async for e in engine.submit(Request(prompt, max_tokens=20)).events()]

    async def all_of_them(engine: Engine) -> list[list[Event]]:
        return await asyncio.gather(*(read(engine, [n]) for n in range(1, 21)))

    with running(FakeBackend()) as engine:
        found = asyncio.run(all_of_them(engine))
    for n, events in enumerate(found, start=1):
        tokens = [t for e in events if isinstance(e, Delta) for t in e.tokens]
        assert tokens == expected([n], 20)
        assert isinstance(events[-1], Finish)


def test_no_event_is_lost_between_a_cancelled_wait_and_the_next() -> None:
    async def read_in_bites(ticket: Ticket) -> list[int]:
        tokens: list[int] = []
        while True:
            async for event in ticket.events():
                if isinstance(event, Finish):
                    return tokens
                assert isinstance(event, Delta)
                tokens += event.tokens

    with running(FakeBackend()) as engine:
        ticket = engine.submit(Request(HELLO, max_tokens=30))
        assert asyncio.run(read_in_bites(ticket)) == expected(HELLO, 30)


# Bad input.


@pytest.mark.parametrize(
    ("request_", "error", "told"),
    [
        (Request([]), UsageError, "the prompt is empty"),
        (Request([1, 256]), UsageError, "not among the model's 256"),
        (Request([-1]), UsageError, "not among the model's 256"),
        (Request([1] * 64), ContextError, "has 65 tokens .* and the context 64"),
        (Request([1], max_tokens=0), UsageError, "max_tokens is 0"),
        (Request([1], stop=("",)), UsageError, "stop strings"),
        (Request([1], logprobs=-1), UsageError, "logprobs is -1"),
        (Request([1], timeout_seconds=0), UsageError, "timeout is 0"),
        (Request([1], timeout_seconds=float("nan")), UsageError, "timeout is nan"),
        (Request([1], SamplingParams(grammar="x")), UsageError, "no grammars here"),
        (Request([1], adapters=(("unknown", 1.0),)), UsageError, "no such adapter"),
        (EmbedRequest([1] * 17), ContextError, "the context 16"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_computed(
    request_: Request | EmbedRequest, error: type[GgufkitError], told: str
) -> None:
    backend = FakeBackend()
    with running(backend) as engine:
        with pytest.raises(error, match=told):
            engine.submit(request_)
        assert engine.metrics().waiting == 0
    assert not backend.batches


# Embeddings.


def test_embeddings_come_between_answers() -> None:
    with running(FakeBackend()) as engine:
        writer = engine.submit(Request(HELLO, max_tokens=30))
        tickets = [engine.submit(EmbedRequest([n, 1])) for n in range(1, 6)]
        found = [t.answer() for t in tickets]
        assert list(writer.answer().tokens) == expected(HELLO, 30)
    assert [list(a.vector or ()) for a in found] == [[n + 1.0, 2.0] for n in range(1, 6)]
    assert all(a.finish.usage.prompt_tokens == 2 for a in found)


def test_an_embedding_is_an_event() -> None:
    with running(FakeBackend()) as engine:
        events = list(engine.submit(EmbedRequest([1])))
    assert [type(e) for e in events] == [Embedding, Finish]


# The end.


def test_a_drain_finishes_what_runs_and_waits() -> None:
    backend = FakeBackend()
    engine = Engine(backend, EngineOptions(parallel=1))
    tickets = [engine.submit(Request([n], max_tokens=20)) for n in range(1, 6)]
    engine.close()
    assert [finish_of(t).reason for t in tickets] == ["length"] * 5
    assert backend.closed
    with pytest.raises(ClosedError):
        engine.submit(Request(HELLO))


def test_a_drain_may_take_so_long_and_no_longer() -> None:
    backend = FakeBackend(gated=True)
    engine = Engine(backend)
    ticket = engine.submit(Request(HELLO))
    engine.close(timeout=0.05)
    assert finish_of(ticket).reason == "cancelled"
    assert backend.closed


def test_a_hard_stop_cancels_all() -> None:
    backend = FakeBackend(gated=True)
    engine = Engine(backend, EngineOptions(parallel=1))
    tickets = [engine.submit(Request([n])) for n in range(1, 6)]
    engine.close(drain=False)
    assert [finish_of(t).reason for t in tickets] == ["cancelled"] * 5
    assert backend.aborted.is_set()
    engine.close()


def test_a_failed_batch_ends_its_answers_and_no_others() -> None:
    backend = FakeBackend(gated=True)
    with running(backend) as engine:
        backend.failing = 1
        ticket = engine.submit(Request(HELLO, max_tokens=5))
        backend.allow(20)
        end = finish_of(ticket)
        assert (end.reason, str(end.error)) == ("error", "the computation failed")
        assert list(engine.submit(Request(HELLO, max_tokens=5)).answer().tokens) == expected(
            HELLO, 5
        )


def test_a_grammar_that_nothing_fits_is_an_error_of_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stuck(index: int) -> int:
        raise GrammarError("no token fits")

    backend = FakeBackend(gated=True)
    with running(backend) as engine:
        ticket = engine.submit(Request(HELLO))
        monkeypatch.setattr(backend.samplers[0], "sample", stuck)
        backend.allow(1)
        with pytest.raises(GrammarError):
            ticket.answer()
        assert engine.healthy


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_engine_is_told_to_everybody() -> None:
    backend = FakeBackend(gated=True)
    engine = Engine(backend, EngineOptions(parallel=1))
    tickets = [engine.submit(Request(HELLO)) for _ in range(3)]
    backend.crashing = True
    backend.allow(1)
    for ticket in tickets:
        with pytest.raises(ToolError, match="the engine broke: RuntimeError"):
            ticket.answer()
    assert not engine.healthy
    with pytest.raises(ClosedError, match="has failed"):
        engine.submit(Request(HELLO))
    engine.close()


def test_an_idle_engine_sleeps_until_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeBackend()) as engine:
        sleeps: list[float | None] = []
        wait = engine._state.wait

        def counted(timeout: float | None = None) -> bool:
            sleeps.append(timeout)
            return wait(timeout)

        monkeypatch.setattr(engine._state, "wait", counted)
        engine.submit(Request(HELLO, max_tokens=2)).answer()
        eventually(lambda: sleeps == [None])
