"""What the web page is made of, without a browser."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ggufkit.serve.ui.conversation import Figures, Memory, Settings, State, Turn, Writing
from ggufkit.serve.ui.endpoint import Endpoint, EndpointError, Piece
from ggufkit.serve.ui.markdown import colour_css, to_html
from tests.serve.backends import END, FakeBackend, expected
from tests.serve.serving import Running, eventually, hosted, serving

QUESTION = Turn("user", "hi")
ASKED = State((QUESTION,)).asked()


# The endpoint.


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    backend = FakeBackend(context=256, cells=4096, batch=512)
    backend.scripts[5] = [*"héllo".encode(), END]
    with serving(hosted(backend, "a"), hosted(name="b")) as running:
        yield running


@asynccontextmanager
async def asking(api: Running) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(api.url)
    try:
        yield endpoint
    finally:
        await endpoint.close()


async def whole(api: Running, key: str = "", **fields: Any) -> Writing:
    writing = Writing()
    async with asking(api) as endpoint:
        async for piece in endpoint.answer({**ASKED, "model": "a", **fields}, key):
            writing.take(piece)
    return writing


def failure(api: Running, key: str = "", **fields: Any) -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        asyncio.run(whole(api, key, **fields))
    return caught.value


def test_models_are_named(api: Running) -> None:
    async def ask() -> list[str]:
        async with asking(api) as endpoint:
            return await endpoint.models("")

    assert asyncio.run(ask()) == ["a", "b"]


def test_answers_come_whole_and_with_their_length(api: Running) -> None:
    writing = asyncio.run(whole(api, seed=5))
    assert writing.text == "héllo"
    figures = writing.figures()
    assert (figures.finish, figures.tokens) == ("stop", len("héllo".encode()))
    assert figures.first_seconds is not None
    assert figures.first_seconds > 0

    writing = asyncio.run(whole(api, max_tokens=9))
    assert writing.text == bytes(expected(b"<user>hi<a>", 9)).decode()
    assert (writing.finish, writing.figures().tokens) == ("length", 9)


def test_refusals_are_told_in_the_words_of_the_server(api: Running) -> None:
    unknown = failure(api, model="nobody")
    assert (unknown.status, unknown.code) == (404, "model_not_found")
    assert "nobody" in unknown.message
    full = failure(api, messages=[{"role": "user", "content": "x" * 300}])
    assert (full.status, full.code) == (400, "context_length_exceeded")
    assert "256" in full.message
    with serving(hosted(name="a"), keys=("right",)) as guarded:
        assert failure(guarded).status == 401
        assert failure(guarded, "wrong").code == "invalid_api_key"
        assert failure(guarded, "fälsch").status == 401
        assert asyncio.run(whole(guarded, "right", max_tokens=3)).figures().tokens == 3


def test_a_server_that_is_not_there_is_told() -> None:
    with serving(hosted(name="a")) as gone:
        pass
    assert "cannot be reached" in failure(gone).message


def test_an_answer_that_breaks_off_is_told() -> None:
    backend = FakeBackend(context=256, cells=4096, batch=512, gated=True)
    model = hosted(backend, "a")
    with serving(model) as api:

        async def ask() -> None:
            async with asking(api) as endpoint:
                async for piece in endpoint.answer(ASKED, ""):
                    assert not piece.finish
                    if piece.text:
                        backend.failing = 1
                    backend.allow(1)

        backend.allow(2)
        with pytest.raises(EndpointError):
            asyncio.run(ask())


def test_an_answer_that_nobody_wants_any_more_ends_on_the_server() -> None:
    backend = FakeBackend(context=1 << 16, cells=1 << 17, batch=512, gated=True)
    model = hosted(backend, "a")
    with serving(model) as api:

        async def ask() -> None:
            async with asking(api) as endpoint:
                pieces = endpoint.answer(ASKED, "")
                async for piece in pieces:
                    if piece.text:
                        break
                assert model.engine.metrics().running == 1
                await pieces.aclose()

        def has_ended() -> bool:
            backend.allow(1)
            return model.engine.metrics().finished.get("cancelled") == 1

        backend.allow(3)
        asyncio.run(ask())
        eventually(has_ended)


# The conversation.


def test_settings_that_are_not_set_are_the_models() -> None:
    assert State((QUESTION,)).asked() == {"messages": [{"role": "user", "content": "hi"}]}
    settings = Settings(model="a", system="Be brief.", temperature=0.0, top_k=0, seed=0)
    asked = State((QUESTION,), settings).asked()
    assert asked == {
        "model": "a",
        "temperature": 0.0,
        "top_k": 0,
        "seed": 0,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
        ],
    }


def test_questions_and_answers_take_turns() -> None:
    start = State()
    assert not start.unanswered
    asked = start.with_turn(QUESTION)
    assert asked.unanswered
    assert asked.without_answer() == asked
    assert asked.without_question() == start
    answered = asked.with_turn(Turn("assistant", "hello"))
    assert answered.without_answer() == asked
    assert answered.without_question() == answered


def test_memory_is_bounded() -> None:
    memory = Memory(most=2)
    for tab in ("a", "b", "a", "c"):
        memory.put(tab, State((Turn("user", tab),)))
    assert memory.get("b") == State()
    assert [memory.get(tab).turns[0].text for tab in ("a", "c")] == ["a", "c"]


def test_figures_in_words() -> None:
    assert Figures(0.25, 2.0, 41).told() == "20.0 tokens/s · first token after 0.25 s · 41 tokens"
    assert Figures(0.25, 0.0, 1).told() == "first token after 0.25 s · 1 token"
    assert Figures(0.5, 1.0, 3, "length").told().startswith("cut off at the limit of tokens · 2.0")
    assert Figures(None, finish="stopped").told() == "stopped"
    stopped = Figures(0.5, 1.0, 3, "stopped").told()
    assert stopped == "stopped · about 2.0 tokens/s · first token after 0.50 s · about 3 tokens"


def test_what_was_stopped_is_counted_by_its_pieces() -> None:
    writing = Writing()
    for text in ("", "a", "b", "c"):
        writing.take(Piece(text))
    assert (writing.text, writing.figures().tokens) == ("abc", 3)
    writing.take(Piece(finish="stop"))
    writing.take(Piece(tokens=5))
    figures = writing.figures()
    assert (figures.finish, figures.tokens) == ("stop", 5)


# Markdown.


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=http://x.invalid/a.png>",
        "a <iframe src='http://x.invalid'></iframe> b",
        "```<img src=x>\n<img src=x>\n```",
        "    <img src=x>",
        "| <img src=x> |\n|---|\n| <img src=x> |",
        "![<img src=x>](http://x.invalid/a.png '<img src=x>')",
        '![a](http://x.invalid/"onerror="alert(1))',
        "[<img src=x>](http://x.invalid)",
        "<http://x.invalid/<img>",
        "```python\n'<img src=x>'\n```",
        "<img src=x>" * 20_000,
    ],
)
def test_html_stays_text_and_pictures_are_not_loaded(text: str) -> None:
    html = to_html(text)
    assert html
    for tag in ("<img", "<script", "<iframe", 'onerror="alert'):
        assert tag not in html


@pytest.mark.parametrize("scheme", ["javascript:", "vbscript:", "file:///", "data:text/html,"])
def test_links_lead_to_pages_only(scheme: str) -> None:
    for text in (f"[x]({scheme}y)", f"![x]({scheme}y)", f"<{scheme}y>", f"[x]\n\n[x]: {scheme}y"):
        assert "href" not in to_html(text)
    assert 'href="https://x.invalid"' in to_html("[x](https://x.invalid)")


def test_code_gets_colours_when_it_is_finished() -> None:
    text = "```python\nif x:\n    pass\n```"
    assert '<span class="c-k">if</span>' in to_html(text)
    plain = to_html(text, colours=False)
    assert "<pre><code>if x:\n    pass\n</code></pre>" in plain
    assert "<span>python</span>" in plain
    assert "c-k" not in to_html("```nonsense\nif x:\n```")
    assert "c-k" not in to_html("```python\n" + "if x: pass\n" * 1000 + "```")
    css = colour_css()
    assert "\n.code .c-k " in css
    assert "\n.body--dark .code .c-k " in css
