"""Clients and templates that misbehave, and the end of the server; on real sockets."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2 as httpx
import pytest

from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.llamacpp.rendering import Renderer, TemplateStoppedError
from ggufkit.llamacpp.template import TemplateError
from ggufkit.serve.api.options import Limits
from ggufkit.serve.requests import ChosenToken, ClosedError
from tests.serve.backends import FakeBackend
from tests.serve.serving import FakeScorer, Running, eventually, hosted, serving, told

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def gated(**options: int) -> FakeBackend:
    """A backend whose batches wait to be let through."""
    return FakeBackend(context=4096, cells=32768, batch=512, gated=True, **options)


def request(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + content


@contextmanager
def connected(api: Running, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(api.address, timeout=30) as client:
        client.sendall(sent)
        yield client


# Templates.


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (LOOP, "was stopped"),
        ("{{ 'a' * 9999999999 }}", "MemoryError"),
        ("{{ 'a' * 20000000 }}", "writes 20000000 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion depth"),
        ("{{ nothing() }}", "undefined"),
        ("{% for %}", "does not work"),
    ],
)
def test_hostile_templates_are_stopped(template: str, told: str) -> None:
    renderer = Renderer(ChatTemplate(template), 1.0)
    try:
        with pytest.raises(TemplateError, match=told):
            renderer.render([{"role": "user", "content": "hi"}])
    finally:
        renderer.close()


def test_a_stopped_template_leaves_no_process_and_can_be_asked_again() -> None:
    renderer = Renderer(ChatTemplate("{% if go %}" + LOOP + "{% endif %}fine"), 1.0)
    assert renderer.render([]) == "fine"
    worker = renderer._worker
    assert worker is not None
    with pytest.raises(TemplateStoppedError):
        renderer.render([], go=True)
    assert worker.poll() is not None
    assert renderer.render([]) == "fine"
    renderer.close()
    with pytest.raises(TemplateStoppedError):
        renderer.render([])


def test_a_looping_template_disturbs_nobody_else() -> None:
    bad = hosted(name="bad", template=LOOP, template_seconds=1.0)
    with serving(bad, hosted(name="good")) as api, ThreadPoolExecutor(4) as pool:
        api.chat(model="good", max_tokens=1)
        stuck = [pool.submit(api.chat, model="bad") for _ in range(2)]
        assert api.chat(model="good", max_tokens=1).status_code == 200
        assert not any(s.done() for s in stuck)
        for each in stuck:
            assert told(each.result(), 500)["code"] == "template_stopped"


# Clients.


def test_two_hundred_connections_at_once() -> None:
    with serving(hosted()) as api:
        limits = httpx.Limits(max_connections=200)
        with httpx.Client(base_url=api.url, timeout=60, limits=limits) as many:

            def ask(n: int) -> int:
                body = {"prompt": f"prompt {n}", "max_tokens": 5, "stream": n % 2 == 0}
                return many.post("/v1/completions", json=body).status_code

            with ThreadPoolExecutor(200) as pool:
                assert set(pool.map(ask, range(200))) == {200}


def test_more_connections_than_allowed_are_told_so() -> None:
    limits = Limits(connections=3, shutdown_seconds=0.1)
    with serving(hosted(), limits=limits) as api:
        idle = [socket.create_connection(api.address) for _ in range(3)]
        eventually(lambda: len(api.server.server_state.connections) == 3)
        assert told(api.http.get("/health"), 503)["code"] == "overloaded"
        for each in idle:
            each.close()
        eventually(lambda: not api.server.server_state.connections)
        assert api.http.get("/health").status_code == 200


def test_more_requests_than_may_wait_are_told_so() -> None:
    backend = gated()
    with serving(hosted(backend, parallel=1, queue=1)) as api, ThreadPoolExecutor(3) as pool:
        engine = api.service.models
        asked = [pool.submit(api.complete, f"{n}", max_tokens=1) for n in range(1)]
        eventually(lambda: bool(engine.loaded) and engine.loaded[0].engine.metrics().running == 1)
        asked.append(pool.submit(api.complete, "second", max_tokens=1))
        eventually(lambda: engine.loaded[0].engine.metrics().waiting == 1)
        refused = api.complete("third", max_tokens=1)
        assert told(refused, 503)["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        backend.allow(100)
        assert all(a.result().status_code == 200 for a in asked)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_not_worked_for(stream: bool) -> None:
    backend = gated()
    model = hosted(backend)
    with serving(model) as api:
        body = {"prompt": "x", "max_tokens": 1000, "stream": stream}
        with connected(api, request(body)) as client:
            backend.allow(3)
            eventually(lambda: model.engine.metrics().running == 1)
            if stream:
                assert client.recv(100)
        eventually(lambda: model.engine.metrics().running == 1 and backend.allow(1) is None)
        eventually(lambda: backend.allow(1) is None and model.engine.metrics().running == 0)
        assert model.engine.metrics().finished == {"cancelled": 1}
        assert not api.service.active


def test_a_killed_client_disturbs_nobody() -> None:
    model = hosted(FakeBackend(context=1 << 20, cells=1 << 21, batch=512))
    code = (
        "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
        "s.sendall(sys.argv[3].encode()); s.recv(1000); print('reads', flush=True);"
        "import time; time.sleep(60)"
    )
    sent = request({"prompt": "x", "max_tokens": 1 << 19, "stream": True}).decode()
    with serving(model) as api:
        host, port = api.address
        client = subprocess.Popen(
            [sys.executable, "-c", code, host, str(port), sent], stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        with client.stdout:
            assert client.stdout.readline() == b"reads\n"
            client.send_signal(signal.SIGKILL)
            client.wait()
        assert api.complete("y", max_tokens=3).status_code == 200
        eventually(lambda: model.engine.metrics().running == 0)
        eventually(lambda: not api.service.active)


def test_a_client_that_stops_reading_is_cut_off() -> None:
    model = hosted(FakeBackend(context=1 << 20, cells=1 << 21, batch=512))
    limits = Limits(send_seconds=0.5, shutdown_seconds=0.1)
    body = {"prompt": ["x"] * 4, "max_tokens": 1 << 19, "stream": True, "logprobs": 20}
    with serving(model, limits=limits) as api:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(api.address)
            client.sendall(request(body))
            eventually(lambda: model.engine.metrics().running >= 1)
            assert api.complete("y", max_tokens=3).status_code == 200, "others are served"
            eventually(lambda: model.engine.metrics().running == 0)
            eventually(lambda: not api.service.active)
            # The connection of the client that asks now is the only one left.
            eventually(lambda: len(api.server.server_state.connections) <= 1)
        assert set(model.engine.metrics().finished) <= {"cancelled", "slow", "length"}


def test_a_whole_answer_that_nobody_reads_is_cut_off() -> None:
    limits = Limits(send_seconds=0.3, shutdown_seconds=0.1)
    model = hosted(FakeBackend(context=1 << 20, cells=1 << 21, batch=1 << 20))
    asked = {"prompt": "x" * 600_000, "max_tokens": 1, "echo": True}
    with serving(model, limits=limits) as api:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(api.address)
            client.sendall(request(asked))
            eventually(lambda: model.engine.metrics().finished["length"] == 1)
            eventually(lambda: not api.server.server_state.connections)
        (choice,) = api.complete(**asked).json()["choices"]
        assert len(choice["text"]) == 600_001, "who reads gets it all"


def test_a_large_request_is_refused_before_it_is_sent() -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n"
    )
    with serving(hosted()) as api, connected(api, head) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_request_that_does_not_arrive_is_not_waited_for() -> None:
    limits = Limits(receive_seconds=0.3, shutdown_seconds=0.1)
    with serving(hosted(), limits=limits) as api:
        with connected(api, b"POST /v1/completions HTTP/1.1\r\nHost:") as client:
            assert client.recv(100) == b"", "half of the headers"
        with connected(api, request({"prompt": "x"})[:-3]) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        with connected(api) as client:
            assert client.recv(100) == b"", "nothing at all"
        assert api.complete().status_code == 200


def test_what_is_no_http_is_refused() -> None:
    with serving(hosted()) as api:
        with connected(api, b"\x16\x03\x01 hello\r\n\r\n") as client:
            assert client.recv(100).startswith(b"HTTP/1.1 400 ")
        assert api.complete().status_code == 200


def test_time_is_limited() -> None:
    backend = gated()
    limits = Limits(timeout_seconds=0.3, shutdown_seconds=0.1)
    with serving(hosted(backend), limits=limits) as api, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(api.complete, "x", max_tokens=1000)
        eventually(lambda: backend.allow(1) is None and whole.done())
        assert told(whole.result(), 504)["code"] == "timeout"
        stream = pool.submit(api.complete, "x", max_tokens=1000, stream=True)
        eventually(lambda: backend.allow(1) is None and stream.done())
        last = stream.result().text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


class Pondering(FakeScorer):
    """Takes as long as it may."""

    given_up = False

    def score(
        self, tokens: Sequence[int], top: int, wanted: Callable[[], bool]
    ) -> list[ChosenToken]:
        while wanted():
            time.sleep(0.002)
        self.given_up = True
        raise ClosedError("the work was given up")


def test_scoring_ends_with_its_time_and_with_its_client() -> None:
    model = hosted()
    model.scorer = scorer = Pondering()
    asked = {"prompt": "abc", "echo": True, "logprobs": 1}
    with serving(model) as api:
        with connected(api, request(asked)):
            eventually(lambda: bool(model.scoring._threads))
            assert not scorer.given_up
        eventually(lambda: scorer.given_up)
    model = hosted()
    model.scorer = Pondering()
    limits = Limits(timeout_seconds=0.2, shutdown_seconds=0.1)
    with serving(model, limits=limits) as api:
        assert told(api.complete(**asked), 504)["code"] == "timeout"


def test_an_engine_that_breaks_is_told() -> None:
    backend = FakeBackend()
    backend.failing = 1
    with serving(hosted(backend)) as api:
        assert told(api.complete("x"), 500)["type"] == "server_error"
        assert api.complete("x").status_code == 200


def test_a_bug_is_told_without_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    model = hosted()
    model.words.tokenize = None  # type: ignore[assignment,method-assign]
    with serving(model) as api:
        error = told(api.complete("x"), 500)
        counts = api.http.get("/metrics").text
    assert 'ggufkit_requests_total{path="/v1/completions",status="500"} 1.0' in counts
    assert error["message"] == "the server has a bug"
    assert "NoneType" in caplog.text


# The end.


def test_answers_finish_when_the_server_ends() -> None:
    backend = gated()
    limits = Limits(shutdown_seconds=20)
    with serving(hosted(backend), limits=limits) as api, ThreadPoolExecutor(2) as pool:
        running = pool.submit(api.complete, "x", max_tokens=20, stream=True)
        eventually(lambda: bool(api.service.active))
        api.server.should_exit = True
        eventually(lambda: api.service.models.closing)
        with pytest.raises(ConnectionRefusedError), connected(api):
            pass
        backend.allow(100)
        assert "[DONE]" in running.result().text


def test_answers_that_take_too_long_are_given_up_and_told() -> None:
    backend = gated()
    limits = Limits(shutdown_seconds=0.3)
    with serving(hosted(backend), limits=limits) as api, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(api.complete, "x", max_tokens=20)
        backend.allow(2)
        stream = pool.submit(api.complete, "y", max_tokens=20, stream=True)
        eventually(lambda: len(api.service.active) == 2)
        tickets = list(api.service.active)
        api.server.should_exit = True
        eventually(lambda: all(ticket.cancelled for ticket in tickets))
        backend.allow(1)
        assert told(whole.result(), 503)["code"] == "shutting_down"
        assert '"shutting_down"' in stream.result().text


def test_memory_comes_back() -> None:
    """Clients that go away in the middle leave nothing behind."""
    model = hosted()
    with serving(model) as api:

        def rounds(count: int) -> int:
            for n in range(count):
                with connected(api, request({"prompt": f"{n}", "stream": True})) as client:
                    client.recv(10)
            eventually(lambda: model.engine.metrics().running == 0 and not api.service.active)
            eventually(lambda: not api.server.server_state.connections)
            return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0

        before = rounds(20)
        started = time.monotonic()
        assert rounds(100) <= before + 2
        assert time.monotonic() - started < 60
