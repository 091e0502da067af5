"""Servers that are measured against one another, each a process of its own.

``ggufkit serve``, llama-server of the same commit, and the server that is packaged
with llama-cpp-python. What is missing is made once and kept in the cache:
llama-server is built from the pinned source by the same recipe as the other
tools, and the packaged server gets a Python environment of its own.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from bench.processes import GGUFKIT, checked
from ggufkit import settings
from ggufkit.llamacpp import building, host, toolchain
from ggufkit.llamacpp.pin import Pin, native_dir, read_pin

_FLAGS = ("-DGGUFKIT_LLAMA_SERVER=ON",)
_TICKS = os.sysconf("SC_CLK_TCK")
_PACKAGES = (
    *("uvicorn>=0.22", "fastapi>=0.100", "pydantic-settings>=2.0.1", "sse-starlette>=1.6.1"),
    *("starlette-context>=0.3.6,<0.4", "PyYAML>=5.1"),  # its extra `server`
    *("numpy", "diskcache", "jinja2", "typing-extensions"),
)


@dataclass(frozen=True)
class Ask:
    """A prompt, and how many tokens to answer.

    Attributes:
        prompt: text.
        answer: tokens; the model's own end does not count.
        tokens: the same prompt as tokens, for what does not go over HTTP.
    """

    prompt: str
    answer: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reply:
    """How one answer came.

    Attributes:
        tokens: how many.
        first_seconds: until the first of its text.
        first_cpu_seconds: processor time that the server had used by then.
        cached: tokens of the prompt that were known already, if the server says so.
    """

    tokens: int
    first_seconds: float
    first_cpu_seconds: float
    cached: int | None = None


@dataclass(frozen=True)
class Server:
    """One that runs.

    Attributes:
        name: what it is called in the table.
        port: on 127.0.0.1.
        pid: its process.
        model: what requests must name.
        tells_usage: whether it ignores the model's end and tells usage in streams.
    """

    name: str
    port: int
    pid: int
    model: str
    tells_usage: bool

    def ask(self, ask: Ask) -> Reply:
        """Let it answer, as a stream."""
        body = {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": ask.answer,
            "temperature": 0,
            "stream": True,
        }
        if self.tells_usage:
            body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        started, first, spent = time.monotonic(), 0.0, 0.0
        pieces, reason, usage = 0, None, dict[str, Any]()
        for event in self._events("/v1/completions", body):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                reason = choice["finish_reason"] or reason
                if choice["text"]:
                    if not pieces:
                        first, spent = time.monotonic() - started, self.cpu_seconds()
                    pieces += 1
        if self.tells_usage:
            assert usage["completion_tokens"] == ask.answer, usage
        tokens = ask.answer if reason == "length" else pieces
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens")
        return Reply(tokens, first, spent, cached)

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """A greedy answer of llama-server, token by token, with nothing remembered."""
        body = {
            "prompt": list(prompt),
            "n_predict": count,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        found = [t for event in self._events("/completion", body) for t in event.get("tokens", [])]
        return [int(t) for t in found]

    def _events(self, path: str, body: dict[str, object]) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            sys.exit(f"{self.name} answers {response.status}: {response.read()!r}")
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
        connection.close()

    def cpu_seconds(self) -> float:
        """Processor time that it and what it started have used."""
        return sum(cpu_seconds(pid) for pid in (self.pid, *children(self.pid)))

    def memory_nbytes(self) -> int:
        """Memory of its own, that is without what files lie in."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


# Ways to serve.


@contextmanager
def ours(model: Path, users: int, context: int) -> Iterator[Server]:
    port = free_port()
    command = [*GGUFKIT, "serve", model, "--alias", "model", "--port", port]
    command += ["-np", users, "-c", context, "-t", settings.threads()]
    with running(command) as pid:
        yield ready(Server("ggufkit serve", port, pid, "model", tells_usage=True), "/health")


@contextmanager
def llama_server(binary: Path, model: Path, users: int, context: int) -> Iterator[Server]:
    port = free_port()
    command = [binary, "-m", model, "-np", users, "-c", users * context]
    command += ["-t", settings.threads(), "--host", "127.0.0.1", "--port", port, "--no-webui"]
    with running(command) as pid:
        yield ready(Server("llama-server", port, pid, "model", tells_usage=True), "/health")


@contextmanager
def packaged(python: Path, model: Path, context: int) -> Iterator[Server]:
    port, threads = free_port(), settings.threads()
    command = [python, "-m", "llama_cpp.server", "--model", model, "--model_alias", "model"]
    command += ["--n_ctx", context, "--n_threads", threads, "--n_threads_batch", threads]
    # Otherwise it ends a stream when somebody else asks.
    command += ["--interrupt_requests", "false", "--verbose", "false"]
    command += ["--host", "127.0.0.1", "--port", port]
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(toolchain.find_build().root / "bin")}
    with running(command, env) as pid:
        server = Server("llama_cpp.server", port, pid, "model", tells_usage=False)
        yield ready(server, "/v1/models")


@contextmanager
def running(command: Sequence[object], env: dict[str, str] | None = None) -> Iterator[int]:
    argv = [str(word) for word in command]
    out = subprocess.DEVNULL
    with subprocess.Popen(argv, env=env, stdout=out, stderr=out) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def ready(server: Server, path: str) -> Server:
    while not answers(server.port, path):
        if not Path(f"/proc/{server.pid}/status").exists() or ended(server.pid):
            sys.exit(f"{server.name} ended before it served")
        time.sleep(0.1)
    return server


def ended(pid: int) -> bool:
    return (
        Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    )


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What is made once.


def build_llama_server() -> Path:
    """llama-server of the pin, built like the other tools; kept in the cache."""
    pin, compiler, cpu = read_pin(), building.find_compiler(), host.cpu_identity()
    key = building.build_key(pin.sha256, "cpu", _FLAGS, compiler, cpu)
    place = settings.cache_dir() / "bench" / f"llama-server-{key}"
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):
        if not (place / "finished").exists():
            print("building llama-server; this takes minutes, once", file=sys.stderr)
            _build(place, pin)
            (place / "finished").touch()
    return place / "build" / "bin" / "llama-server"


def _build(place: Path, pin: Pin) -> None:
    """What a killed build has left is gone on with."""
    building.require_cmake()
    tree, directory = place / "llama.cpp", place / "build"
    building.unpack(building.fetch_archive(pin), tree)
    log = building.log_file("llama-server")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "--preset", "cpu", "-B", directory, *ninja, *_FLAGS]
    configure += [f"-DLLAMA_CPP_SOURCE_DIR={tree}", f"-DLLAMA_BUILD_COMMIT={pin.commit}"]
    compile_ = ["cmake", "--build", directory, "--target", "llama-server"]
    compile_ += ["--config", "Release", "--parallel", str(settings.threads())]
    for command in ([*configure, "-DLLAMA_BUILD_NUMBER=0"], compile_):
        ran = toolchain.run(command, cwd=native_dir(), log=log)
        if ran.returncode != 0:
            sys.exit(f"llama-server cannot be built; see {log}")
    shutil.rmtree(tree)


def packaged_python() -> Path:
    """A Python with llama-cpp-python and what its server needs; kept in the cache."""
    pin = read_pin()
    place = settings.cache_dir() / "bench" / f"llama_cpp-server-{pin.version}"
    python = place / "bin" / "python"
    if (place / "finished").exists():
        return python
    print("installing what llama_cpp.server needs; once", file=sys.stderr)
    shutil.rmtree(place, ignore_errors=True)
    checked([sys.executable, "-m", "venv", place])
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    checked([*pip, *_PACKAGES])
    wheel = building.binding_wheel(pin)
    checked([*pip, "--no-deps", "--no-index", wheel])
    (place / "finished").touch()
    return python
