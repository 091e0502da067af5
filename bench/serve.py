"""``python -m bench.serve MODEL``: the engine against llama.cpp's own programs.

One user is held against llama-bench, many users against llama-server of the same
commit, given by ``--server``. Ways run in turn, so that a machine whose speed
drifts does not favour one; medians of ratios are shown. Beside the wall clock
stands the processor's time, which says what the work costs even while something
else runs on the machine.
"""

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggufkit import settings
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.batching import BatchContext, ContextOptions, Model
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.serve.engine import Engine
from ggufkit.serve.requests import Delta, Finish, Request

GREEDY = SamplingParams(temperature=0)
PROMPTS = (64, 128, 256, 512)
ANSWERS = (32, 64, 96, 128)
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ask:
    """A prompt and how many tokens to answer.

    Attributes:
        prompt: its tokens.
        answer: tokens to write, unless ``alone`` lets the model end before.
        alone: with nothing remembered before or after.
    """

    prompt: list[int]
    answer: int
    alone: bool = False


@dataclass(frozen=True)
class Reply:
    """Tokens of an answer, and seconds until the first of them."""

    tokens: list[int]
    first_seconds: float


@dataclass(frozen=True)
class Round:
    """Some users at once."""

    seconds: float
    cpu_seconds: float
    replies: list[Reply]

    @property
    def speed(self) -> float:
        """Tokens written per second, of all users together."""
        return sum(len(r.tokens) for r in self.replies) / self.seconds

    @property
    def worst_first(self) -> float:
        """The longest that a user waited for the first token."""
        return max(r.first_seconds for r in self.replies)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.serve", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="where prompts are taken from")
    parser.add_argument("--server", type=Path, help="a llama-server of the same commit")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--split",
        action="store_true",
        help="cells of its own for each sequence, as llama-server -np has them",
    )
    parser.add_argument("--equal", type=int, default=50, help="prompts compared token by token")
    options = parser.parse_args()
    with Model(options.model) as model:
        text = model.vocabulary.tokenize(options.text.read_text(encoding="utf-8")[:400_000])
        room = ContextOptions(context=8192, sequences=2 * options.users)
        if options.split:
            room = ContextOptions(context=1024, sequences=options.users, unified=False)
        context = BatchContext(model, room)
        engine = Engine(context)
        try:
            one_user(engine, options.model, text, options.runs)
            if options.server:
                with server(options.server, options.model, options.users) as port:
                    equal(engine, port, text, options.equal)
                    many_users(engine, port, text, options.users, options.runs)
            told = engine.metrics()
            python = (told.step_seconds - told.decode_seconds) / told.steps
            print(f"outside of llama_decode: {1e6 * python:.0f} us per step")
        finally:
            engine.close()


def one_user(engine: Engine, model: Path, text: list[int], runs: int) -> None:
    decoding, reading = [], []
    for n in range(runs):
        bench = llama_bench(model)
        written = engine.submit(
            Request(text[n : n + 1], GREEDY, max_tokens=129, ignore_end=True, remember=False)
        ).answer()
        prompt = text[1000 * n + 5 : 1000 * n + 517]
        read = engine.submit(Request(prompt, GREEDY, max_tokens=1, remember=False)).answer()
        decoding.append(written.finish.usage.tokens_per_second / bench["tg"])
        reading.append(read.finish.usage.first_token_seconds * bench["pp"] / 512)
    show("decoding / llama-bench tg128", decoding, "at least 0.97")
    show("time to first token / llama-bench pp512", reading, "at most 1.05")


def llama_bench(model: Path) -> dict[str, float]:
    """Tokens per second of reading (pp) and writing (tg)."""
    tool = toolchain.find_build().tool("llama-bench")
    threads = str(settings.threads())
    command = [tool, "-m", model, "-t", threads, "-p", "512", "-n", "128", "-r", "1", "-o", "json"]
    ran = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
    tests = json.loads(ran.stdout)
    return {"pp" if t["n_prompt"] else "tg": t["avg_ts"] for t in tests}


def many_users(engine: Engine, port: int, text: list[int], users: int, runs: int) -> None:
    speed, cpu, first = [], [], []
    for n in range(runs):
        asks = mixed(text, users, seed=n)
        ours = round_of(asks, lambda ask: ask_engine(engine, ask), own_cpu)
        theirs = round_of(asks, lambda ask: ask_server(port, ask), lambda: server_cpu(port))
        speed.append(ours.speed / theirs.speed)
        cpu.append(ours.cpu_seconds / theirs.cpu_seconds)
        first.append(ours.worst_first / theirs.worst_first)
        print(
            f"  {ours.speed:.1f} and {theirs.speed:.1f} tokens/s, processor "
            f"{ours.cpu_seconds:.1f} and {theirs.cpu_seconds:.1f} s, first token after "
            f"{ours.worst_first:.2f} and {theirs.worst_first:.2f} s at worst"
        )
    show(f"{users} users, tokens/s / llama-server", speed, "at least 1.00")
    show(f"{users} users, processor time / llama-server", cpu, "")
    show(f"{users} users, worst first token / llama-server", first, "at most 1.00")


def equal(engine: Engine, port: int, text: list[int], count: int) -> None:
    """Greedy answers alone, token by token."""
    same = 0
    for n in range(count):
        ask = Ask(text[700 * n : 700 * n + 20 + 7 * n], 48, alone=True)
        ours, theirs = ask_engine(engine, ask).tokens, ask_server(port, ask).tokens
        same += ours == theirs[: len(ours)]
    print(f"greedy answers equal to llama-server's, token by token: {same} of {count}")


def mixed(text: list[int], users: int, seed: int) -> list[Ask]:
    """Prompts and answers of mixed lengths, no two alike."""
    draw = random.Random(seed)
    starts = draw.sample(range(0, len(text) - 512), users)
    lengths = [(PROMPTS[n % 4], ANSWERS[(3 * n + n // 4) % 4]) for n in range(users)]
    draw.shuffle(lengths)
    pairs = zip(starts, lengths, strict=True)
    return [Ask(text[at : at + size], answer) for at, (size, answer) in pairs]


def round_of(asks: Sequence[Ask], ask: Callable[[Ask], Reply], cpu: Callable[[], float]) -> Round:
    with ThreadPoolExecutor(len(asks)) as pool:
        barrier = threading.Barrier(len(asks))

        def go(one: Ask) -> Reply:
            barrier.wait()
            return ask(one)

        before, started = cpu(), time.monotonic()
        replies = list(pool.map(go, asks))
        return Round(time.monotonic() - started, cpu() - before, replies)


def ask_engine(engine: Engine, ask: Ask) -> Reply:
    tokens: list[int] = []
    first = 0.0
    request = Request(
        ask.prompt,
        GREEDY,
        max_tokens=ask.answer,
        ignore_end=not ask.alone,
        remember=not ask.alone,
    )
    for event in engine.submit(request):
        match event:
            case Delta():
                tokens += event.tokens
            case Finish():
                first = event.usage.first_token_seconds
    return Reply(tokens, first)


def ask_server(port: int, ask: Ask) -> Reply:
    body = {
        "prompt": ask.prompt,
        "n_predict": ask.answer,
        "temperature": 0,
        "ignore_eos": not ask.alone,
        "cache_prompt": False,
        "return_tokens": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port)
    started, first = time.monotonic(), 0.0
    connection.request(
        "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
    )
    tokens: list[int] = []
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        tokens += json.loads(line[6:]).get("tokens", [])
        first = first or (time.monotonic() - started if tokens else 0.0)
    connection.close()
    return Reply(tokens, first)


_servers: dict[int, int] = {}


@contextmanager
def server(binary: Path, model: Path, users: int) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [binary, "-m", model, "-np", users, "-c", 1024 * users, "-t", settings.threads()]
    command += ["--host", "127.0.0.1", "--port", port, "--no-webui"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _servers[port] = process.pid
    try:
        while not healthy(port):
            assert process.poll() is None, "llama-server ended"
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def own_cpu() -> float:
    return time.process_time()


def server_cpu(port: int) -> float:
    stat = Path(f"/proc/{_servers[port]}/stat").read_text(encoding="utf-8")
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def show(what: str, ratios: list[float], goal: str) -> None:
    spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"{what:<48} {statistics.median(ratios):.3f} {spread:<18} {goal}")


if __name__ == "__main__":
    main()
