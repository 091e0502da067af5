"""The web page in a real browser."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser import browser
from tests.serve.page_server import CONTEXT
from tests.serve.serving import eventually

ROOT = Path(__file__).parent.parent.parent
# As patient as the other tests: the machine may have much else to do.
expect.set_options(timeout=60_000)
LONG = "so many letters " * (CONTEXT // 12)
WRITING = re.compile(r"^[a-z]{10,}\s*$")
FIGURES = re.compile(r"\d+\.\d tokens/s · first token after \d+\.\d\d s · \d+ tokens")


@contextmanager
def page_server(*keys: str) -> Iterator[Callable[[], str]]:
    """A server with a page; waits for it and gives its address."""
    command = [sys.executable, "-m", "tests.serve.page_server", *keys]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        told = process.stdout
        try:
            yield lambda: told.readline().strip()
        finally:
            process.stdin.close()
            code = process.wait(60)
        errors.seek(0)
        assert (code, errors.read()) == (0, ""), "the server has nothing to say"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """A server, and one that has the key ``right``; they start side by side."""
    with page_server() as one, page_server("right") as other:
        yield one(), other()


@pytest.fixture(scope="module")
def address(servers: tuple[str, str]) -> str:
    return servers[0]


@dataclass
class Chat:
    """The page as somebody uses it."""

    page: Page
    url: str

    def open(self) -> "Chat":
        self.page.goto(self.url)
        return self

    def say(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")

    def set(self, **values: object) -> None:
        self.page.get_by_label("Settings", exact=True).click()
        for label, value in values.items():
            self.page.get_by_label(label.replace("_", " ")).fill(str(value))
        self.page.get_by_label("Close settings").click()

    def button(self, label: str) -> Locator:
        return self.page.locator(f'button[aria-label="{label}"]:visible')

    @property
    def answers(self) -> Locator:
        return self.page.locator(".answer .text")

    @property
    def figures(self) -> Locator:
        return self.page.locator(".figures")

    def count(self, name: str) -> int:
        """A count of the server's."""
        metrics = httpx.get(f"{self.url}/metrics", trust_env=False).text
        lines = [line.split(" ") for line in metrics.splitlines() if line.startswith(name)]
        return sum(int(float(value)) for *_, value in lines)

    def ended(self) -> int:
        return self.count('ggufkit_finished_total{model="first",reason="cancelled"}')


@pytest.fixture
def make_chat(chromium: Browser) -> Iterator[Callable[..., Chat]]:
    """Makes pages, after which nothing may have been logged, asked or fetched elsewhere."""
    said: list[str] = []
    asked: list[tuple[str, str]] = []
    opened: list[Page] = []

    def make(url: str, width: int = 1280, scheme: str = "light") -> Chat:
        page = chromium.new_page(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append((url, request.url)))
        page.on("websocket", lambda made: asked.append((url.replace("http", "ws", 1), made.url)))
        opened.append(page)
        return Chat(page, url)

    yield make
    for page in opened:
        page.close()
    assert said == []
    assert len(asked) > 10
    assert [found for own, found in asked if not found.startswith(f"{own}/")] == []


@pytest.fixture
def chat(make_chat: Callable[..., Chat], address: str) -> Chat:
    return make_chat(address).open()


def test_answers_grow_and_are_told_with_their_speed(chat: Chat) -> None:
    expect(chat.page.locator(".model")).to_contain_text("first")
    chat.set(Max_tokens=300)
    chat.say("first line")
    expect(chat.answers).to_have_text(WRITING)
    short = len(chat.answers.inner_text())
    expect(chat.button("Stop")).to_be_visible()
    eventually(lambda: len(chat.answers.inner_text()) > short)
    expect(chat.figures).to_have_text(re.compile(r"^cut off.* · " + FIGURES.pattern))
    assert len(chat.answers.inner_text()) == 300
    expect(chat.button("Send")).to_be_visible()
    expect(chat.page.get_by_label("Message")).to_be_focused()


def test_a_conversation_goes_on_and_outlives_a_reload(chat: Chat) -> None:
    chat.set(Seed=2)
    chat.page.get_by_label("Message").press_sequentially("one")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("two")
    chat.page.keyboard.press("Enter")
    expect(chat.figures).to_have_count(1)
    expect(chat.page.locator(".question")).to_have_text("one\ntwo", use_inner_text=True)
    chat.say("three")
    expect(chat.figures).to_have_count(2)
    expect(chat.answers).to_have_text(["short", "short"])
    chat.page.reload()
    expect(chat.page.locator(".question")).to_have_count(2)
    expect(chat.answers).to_have_text(["short", "short"])
    expect(chat.figures).to_have_count(2)
    assert chat.page.get_by_label("Seed").input_value() == "2"
    chat.button("New chat").click()
    expect(chat.page.locator(".welcome")).to_be_visible()
    expect(chat.answers).to_have_count(0)


@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_that_is_stopped_ends_on_the_server(chat: Chat, way: str) -> None:
    before = chat.ended()
    chat.say("for ever")
    expect(chat.answers).to_have_text(WRITING)
    assert chat.ended() == before
    assert chat.count("ggufkit_running") == 1
    if way == "button":
        chat.button("Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    expect(chat.figures).to_have_text(re.compile(r"^stopped · about "))
    eventually(lambda: chat.ended() == before + 1)
    assert chat.count("ggufkit_running") == 0
    assert WRITING.match(chat.answers.inner_text())


def test_an_answer_ends_when_the_page_is_left(chat: Chat) -> None:
    before = chat.ended()
    chat.say("for ever")
    expect(chat.answers).to_have_text(WRITING)
    chat.page.close()
    eventually(lambda: chat.ended() == before + 1)
    assert chat.count("ggufkit_running") == 0


def test_a_new_chat_ends_what_was_being_said(chat: Chat) -> None:
    before = chat.ended()
    chat.say("for ever")
    expect(chat.answers).to_have_text(WRITING)
    chat.button("New chat").click()
    expect(chat.page.locator(".welcome")).to_be_visible()
    eventually(lambda: chat.ended() == before + 1)
    chat.set(Seed=2)
    chat.say("hello")
    expect(chat.answers).to_have_text("short")
    expect(chat.page.locator(".question")).to_have_text("hello")


def test_an_answer_can_be_had_again(chat: Chat) -> None:
    asked = 'ggufkit_requests_total{path="/v1/chat/completions",status="200"}'
    chat.set(Seed=2)
    chat.say("hello")
    expect(chat.figures).to_have_count(1)
    before = chat.count(asked)
    chat.set(Seed=1)
    chat.button("Regenerate").click()
    expect(chat.page.get_by_role("heading", name="A heading")).to_be_visible()
    expect(chat.figures).to_have_count(1)
    expect(chat.answers).to_have_count(1)
    assert chat.count(asked) == before + 1


def test_the_chosen_model_answers(chat: Chat) -> None:
    written = 'ggufkit_generated_tokens_total{model="second"}'
    assert chat.count(written) == 0
    chat.page.locator(".model").click()
    chat.page.get_by_role("option", name="second").click()
    expect(chat.page.locator(".model")).to_contain_text("second")
    chat.set(Max_tokens=7)
    chat.say("hello")
    expect(chat.figures).to_have_text(re.compile("7 tokens$"))
    assert chat.count(written) == 7


def test_what_goes_wrong_is_told_and_is_no_part_of_the_conversation(chat: Chat) -> None:
    chat.say(LONG)
    notice = chat.page.get_by_role("alert").filter(visible=True)
    expect(notice).to_contain_text(re.compile(r"The prompt has \d+ tokens.* the context 4096"))
    expect(notice).to_contain_text("Start a new chat")
    chat.set(Seed=2, Temperature=-1)
    chat.say("hello")
    expect(chat.page.locator(".question")).to_have_count(1)
    expect(notice).to_contain_text("emperature")
    chat.set(Temperature="")
    chat.button("Regenerate").click()
    expect(chat.answers).to_have_text("short")
    expect(notice).to_have_count(0)


def test_answers_are_formatted_and_harmless(chat: Chat) -> None:
    chat.set(Seed=1)
    chat.say("hello")
    expect(chat.figures).to_have_count(1)
    answer = chat.answers
    assert answer.locator("img, script, iframe, b, i").count() == 0
    expect(answer).to_contain_text("<b>HTML</b>")
    expect(answer).to_contain_text("<script src=")
    assert answer.locator("a").evaluate_all("links => links.map(link => link.protocol)") == [
        "http:",
        "http:",
    ]
    expect(answer.locator("td").first).to_have_text("one")
    code = answer.locator(".code")
    expect(code.locator(".bar")).to_contain_text("python")
    assert code.locator("pre span").count() > 5, "it has colours"
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code.get_by_role("button").click()
    expect(code.locator(".copied")).to_have_count(1)
    copied = chat.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith('def greet(name: str) -> str:\n    return f"<i>{name}</i>"')


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_has_the_colours_of_the_system(
    make_chat: Callable[..., Chat], address: str, width: int, scheme: str
) -> None:
    chat = make_chat(address, width, scheme).open()
    chat.set(Seed=1)
    chat.say("x" * 300)
    expect(chat.figures).to_have_count(1)
    seen, wide = chat.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert seen == wide == width
    end = chat.figures.bounding_box()
    below = chat.page.locator(".bottom").bounding_box()
    assert end
    assert below
    assert end["y"] + end["height"] < below["y"], "the end of the answer is in view"
    assert _is_dark(chat.page) == (scheme == "dark")
    chat.button("Light or dark").click()
    assert _is_dark(chat.page) == (scheme == "light")


def test_a_server_with_keys_is_asked_with_one(
    make_chat: Callable[..., Chat], servers: tuple[str, str]
) -> None:
    url = servers[1]
    assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
    chat = make_chat(url).open()
    wanted = chat.page.get_by_label("Key", exact=True)
    wanted.fill("wrong")
    chat.page.get_by_role("button", name="Continue").click()
    told = chat.page.get_by_role("alert").filter(visible=True)
    expect(told).to_have_text("This key is wrong.")
    wanted.fill("right")
    wanted.press("Enter")
    expect(wanted).to_have_count(0)
    expect(chat.page.locator(".model")).to_contain_text("first")
    chat.set(Seed=2)
    chat.say("hello")
    expect(chat.answers).to_have_text("short")


def test_all_of_it_is_fenced_in(address: str) -> None:
    with httpx.Client(base_url=address, trust_env=False, follow_redirects=True) as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'self';" in policy
        assert "http" not in policy
        assert page.url.path == "/ui/"
        # Other paths are the endpoints', and nothing else has changed about them.
        assert client.get("/nothing").json()["error"]["message"] == "there is nothing at /nothing"
        assert "/ui" not in " ".join(client.get("/openapi.json").json()["paths"])


def _is_dark(page: Page) -> bool:
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", ground))) < 300
