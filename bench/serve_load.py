"""``make bench-serve-load``: many clients at once, for minutes.

Each client asks what it can check: streams count upwards in the order of their
events, numbers of tokens add up, errors are none. Some clients go away in the
middle. The memory of the server is looked at all the while and must not grow.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx

from bench.serve import demo_model
from bench.servers import Server, ours

_CONTEXT = 512
_MIB = 1 << 20
_WARM_SHARE = 0.3
"""Of the time that memory may grow: caches fill, and so does the context."""
_GROWTH = 1.05


@dataclass
class Tally:
    """What has come of all requests."""

    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    memory: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.serve_load", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF instead of the demo model's")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    parser.add_argument("--parallel", type=int, default=8, help="answers written at once")
    options = parser.parse_args()
    tally = Tally()
    with ours(options.model or demo_model(), options.parallel, _CONTEXT) as server:
        asyncio.run(load(server, options, tally))
    tell(tally, options)
    raise SystemExit(1 if tally.problems else 0)


def tell(tally: Tally, options: argparse.Namespace) -> None:
    print(f"clients: {options.clients}, for {options.seconds:.0f} seconds")
    print(f"requests: {tally.done.total()}, of them {dict(tally.done)}")
    print(f"tokens: {tally.tokens}, {tally.tokens / options.seconds:.1f} per second")
    if tally.first_seconds:
        hundredths = statistics.quantiles(tally.first_seconds, n=100)
        told = ", ".join(f"{hundredths[n - 1]:.2f} s for {n} %" for n in (50, 90, 99))
        print(f"first token after {told}, {max(tally.first_seconds):.2f} s at worst")
    warm = tally.memory[int(_WARM_SHARE * len(tally.memory)) :]
    half = len(warm) // 2
    before, after = statistics.median(warm[:half]), statistics.median(warm[half:])
    print(f"memory of the server: {before:.0f} MiB, then {after:.0f} MiB")
    if after > before * _GROWTH:
        tally.problems.append("memory grows")
    print(f"problems: {len(tally.problems)}")
    for problem in tally.problems[:20]:
        print(f"  {problem}")


async def load(server: Server, options: argparse.Namespace, tally: Tally) -> None:
    end = time.monotonic() + options.seconds
    limits = httpx.Limits(max_connections=options.clients + 1)
    url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        watch = asyncio.create_task(watch_memory(server, tally))
        async with asyncio.TaskGroup() as group:
            for number in range(options.clients):
                group.create_task(client(http, server.model, number, end, options.tokens, tally))
        watch.cancel()
        health = await http.get("/health")
        if health.json() != {"status": "ok"}:
            tally.problems.append(f"health: {health.text}")
        await settled(http, tally)


async def watch_memory(server: Server, tally: Tally) -> None:
    while True:
        tally.memory.append(server.memory_nbytes() / _MIB)
        await asyncio.sleep(1)


async def settled(http: httpx.AsyncClient, tally: Tally) -> None:
    """Nothing may run when nobody asks any more."""
    for _ in range(100):
        lines = (await http.get("/metrics")).text.splitlines()
        running = [line for line in lines if line.startswith("ggufkit_running{")]
        if all(line.endswith(" 0.0") for line in running):
            return
        await asyncio.sleep(0.1)
    tally.problems.append("something still runs")


async def client(
    http: httpx.AsyncClient, model: str, number: int, end: float, tokens: int, tally: Tally
) -> None:
    draw = random.Random(number)
    while time.monotonic() < end:
        kind = draw.choices(["stream", "whole", "leave"], [6, 3, 1])[0]
        words = " ".join(draw.choices(["one", "two", "three", "four"], k=draw.randint(3, 60)))
        body = {
            "model": model,
            "prompt": f"Client {number}: {words}",
            "max_tokens": draw.randint(1, tokens),
            "ignore_eos": True,
            "seed": draw.randrange(1000),
        }
        try:
            await (whole if kind == "whole" else stream)(http, body, tally, leave=kind == "leave")
            tally.done[kind] += 1
        except Exception as error:
            tally.problems.append(f"client {number}, {kind}: {error!r}")


async def whole(http: httpx.AsyncClient, body: dict[str, object], tally: Tally, **_: bool) -> None:
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    written = answer.json()["usage"]["completion_tokens"]
    assert written == body["max_tokens"], f"{written} tokens instead of {body['max_tokens']}"
    tally.tokens += written


async def stream(
    http: httpx.AsyncClient, body: dict[str, object], tally: Tally, *, leave: bool
) -> None:
    asked = {**body, "stream": True, "logprobs": 0, "stream_options": {"include_usage": True}}
    started, place, tokens, usage, last = time.monotonic(), 0, 0, None, ""
    async with http.stream("POST", "/v1/completions", json=asked) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line:
                continue
            last = line.removeprefix("data: ")
            if last == "[DONE]":
                break
            event = json.loads(last)
            usage = event["usage"]
            for choice in event["choices"]:
                told = choice["logprobs"] or {"tokens": [], "text_offset": []}
                for name, offset in zip(told["tokens"], told["text_offset"], strict=True):
                    assert offset == place, f"an event out of order: {offset} after {place}"
                    if not tokens:
                        tally.first_seconds.append(time.monotonic() - started)
                    place += len(name)
                    tokens += 1
            if tokens and leave:
                return
    assert last == "[DONE]", f"a stream without an end: {last}"
    assert usage is not None
    written = usage["completion_tokens"]
    assert written == tokens == body["max_tokens"], f"{tokens} tokens came, {written} are told"
    tally.tokens += tokens


if __name__ == "__main__":
    main()
