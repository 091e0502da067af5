"""Models that serve many: loaded, asked, unloaded; through the real library."""

import threading
from functools import partial
from pathlib import Path

import pytest

from ggufkit.errors import UsageError
from ggufkit.llamacpp import host
from ggufkit.llamacpp.batching import ContextOptions
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.runtime import ContextError
from ggufkit.serve.api.models import Offer
from ggufkit.serve.hosting import HostOptions, load, needed_nbytes, sized
from ggufkit.serve.model import cache_nbytes
from tests.serve.serving import eventually, hosted, serving, told

OPTIONS = HostOptions(context=ContextOptions(context=64, batch=64, threads=1), parallel=2)


def test_all_users_have_room_for_a_whole_context_if_memory_has(tiny_gguf: Path) -> None:
    metadata = Metadata(read_gguf(tiny_gguf))
    room = sized(metadata, OPTIONS)
    assert (room.context, room.cells, room.sequences, room.lanes) == (64, 128, 4, 2)
    asked = HostOptions(context=ContextOptions(context=64, cells=80), parallel=2)
    assert (sized(metadata, asked).cells, sized(metadata, asked).lanes) == (80, None)
    weights = tiny_gguf.stat().st_size
    more = HostOptions(context=ContextOptions(context=64), parallel=8)
    assert weights < needed_nbytes(metadata, weights, OPTIONS)
    assert needed_nbytes(metadata, weights, OPTIONS) < needed_nbytes(metadata, weights, more)


def test_each_answer_has_cells_of_its_own_where_memory_has_whole_contexts(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = Metadata(read_gguf(demo_gguf))
    options = HostOptions(context=ContextOptions(context=1024), parallel=3)
    per_token = cache_nbytes(metadata, options.context)
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 5 * 3 * 1024 * per_token)
    room = sized(metadata, options)
    assert (room.cells, room.sequences, room.lanes) == (3 * 1024, 6, 3)
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 4 * 2000 * per_token)
    room = sized(metadata, options)
    assert (room.cells, room.lanes) == (2000, None), "one pool, a quarter of what is free"
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 4 * 100 * per_token)
    assert sized(metadata, options).cells == 1024, "one context in any case"


@pytest.mark.parametrize(("cells", "lanes"), [(3 * 256, 3), (3 * 256 - 1, None), (4 * 256, None)])
def test_cells_that_are_asked_for(demo_gguf: Path, cells: int, lanes: int | None) -> None:
    asked = ContextOptions(context=256, cells=cells)
    room = sized(Metadata(read_gguf(demo_gguf)), HostOptions(context=asked, parallel=3))
    assert (room.cells, room.lanes) == (cells, lanes)


def test_prompts_are_checked() -> None:
    model = hosted(template=None)
    try:
        assert model.tokens_of("abc") == [97, 98, 99]
        assert model.tokens_of([1, 2], room=2) == [1, 2]
        for prompt in ("", [], [-1], [256]):
            with pytest.raises(UsageError):
                model.tokens_of(prompt)
        for prompt, room in (("abc", 2), ([1, 2, 3], 2), ("x" * 100_000, 10)):
            with pytest.raises(ContextError):
                model.tokens_of(prompt, room=room)
    finally:
        model.close()


def test_models_take_turns_in_memory_and_leave_nothing_behind(tiny_gguf: Path) -> None:
    metadata = Metadata(read_gguf(tiny_gguf))
    nbytes = needed_nbytes(metadata, tiny_gguf.stat().st_size, OPTIONS)
    offers = [Offer(name, nbytes, partial(load, name, tiny_gguf, OPTIONS)) for name in "ab"]
    before = set(threading.enumerate())
    asked = {"max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
    with serving(*offers, limit_nbytes=nbytes * 3 // 2) as api:
        texts = set()
        for name in "abab":
            answer = api.complete("one two", model=name, **asked).json()
            texts.add(answer["choices"][0]["text"])
            (loaded,) = api.service.models.loaded
            assert loaded.name == name
        assert len(texts) == 1
        assert told(api.complete("x" * 10_000, model="b"), 400)["code"] == "context_length_exceeded"
    # The event loop's helpers are told to end, and nobody waits for them.
    eventually(lambda: not set(threading.enumerate()) - before)
