"""What tests of the server share: models that are no models, behind real sockets."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.llamacpp.rendering import Renderer
from ggufkit.serve.api.answering import Service
from ggufkit.serve.api.app import create_app
from ggufkit.serve.api.models import Models, Offer
from ggufkit.serve.api.options import Limits
from ggufkit.serve.api.server import Server, listen
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.hosting import Hosted
from ggufkit.serve.prompts import PromptMaker
from ggufkit.serve.requests import ChosenToken
from tests.serve.backends import FakeBackend, Letters

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}<a>"
)


class FakeWords(Letters):
    """A vocabulary of bytes that can tokenize."""

    longest_piece = 1

    def tokenize(self, text: str, *, special: bool = True, ends: bool = False) -> list[int]:
        return [*text.encode(), *(b"$" if ends else b"")]


class FakeScorer:
    """Finds every token as likely as its number says."""

    def __init__(self) -> None:
        self.closed = False

    def score(
        self, tokens: Sequence[int], top: int, wanted: Callable[[], bool]
    ) -> list[ChosenToken]:
        return [ChosenToken(token, bytes([token]), -token / 100, ()) for token in tokens[1:]]

    def close(self) -> None:
        self.closed = True


def hosted(
    backend: FakeBackend | None = None,
    name: str = "fake",
    *,
    template: str | None = TEMPLATE,
    template_seconds: float = 10.0,
    **options: Any,
) -> Hosted:
    """A model that is no model."""
    backend = backend or FakeBackend(context=4096, cells=32768, batch=512)
    prompts = None
    if template is not None:
        prompts = PromptMaker(Renderer(ChatTemplate(template), template_seconds))
    engine = Engine(backend, EngineOptions(**options))
    return Hosted(name, engine, FakeWords(), prompts, FakeScorer())


@dataclass
class Running:
    """A server that runs in a thread.

    Attributes:
        url: where it listens.
        service: what its requests share.
        server: the server.
        http: a client.
    """

    url: str
    service: Service
    server: Server
    http: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        """Ask."""
        messages = [{"role": "user", "content": text}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        """Ask for a completion."""
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})


@contextmanager
def serving(
    *models: Hosted | Offer,
    limits: Limits | None = None,
    limit_nbytes: int | None = None,
    wait_seconds: float = 60.0,
    **options: Any,
) -> Iterator[Running]:
    """Serve models on a port of this machine."""
    offers = [m if isinstance(m, Offer) else Offer(m.name, 1, (lambda m=m: m)) for m in models]
    made = Models(offers, limit_nbytes=limit_nbytes, wait_seconds=wait_seconds)
    service = Service(made, limits or Limits(shutdown_seconds=0.2))
    sock = listen("127.0.0.1", 0)
    url = "http://{}:{}".format(*sock.getsockname())
    server = Server(create_app(service, **options), service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
    thread.start()
    eventually(lambda: server.started)
    try:
        with httpx.Client(base_url=url, timeout=120) as http:
            yield Running(url, service, server, http)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.002)


def told(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must be of OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    found: dict[str, Any] = error
    return found
