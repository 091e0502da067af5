"""``make bench-serve``: what serving costs, beside llama.cpp's own programs.

One user is held against llama-bench; many users over HTTP against llama-server
of the same commit and against the server that is packaged with llama-cpp-python.
Ways run in turn, so that a machine whose speed drifts does not favour one;
medians of ratios are shown, with the least and the greatest. Beside the clock
stands the processor's time, which says what the work costs even while something
else runs on the machine. Nothing here is a test: the goals stand beside the
figures.
"""

import argparse
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import servers
from bench.large import large_model
from bench.processes import GGUFKIT, checked
from bench.servers import Ask, Reply, Server
from ggufkit import settings
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.batching import BatchContext, ContextOptions, Model
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.requests import Finish, Request
from ggufkit.texts.load import load_text

GREEDY = SamplingParams(temperature=0)
CONTEXT = 1024
PROMPTS = (64, 128, 256, 512)
ANSWERS = (32, 64, 96, 128)
MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: of each way.
        scale: of lengths of prompts and answers.
        full: also what is measured with one model only.
        equal: prompts compared token by token.
        requests: that memory is watched over.
        idle: seconds that nothing is asked.
    """

    rounds: int
    scale: float = 1.0
    full: bool = True
    equal: int = 50
    requests: int = 2000
    idle: float = 10.0


@dataclass(frozen=True)
class Row:
    """One line of the report; ``met`` is None where there is no goal."""

    model: str
    what: str
    figure: str
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Round:
    """Some users at once."""

    seconds: float
    cpu_seconds: float
    cpu_began: float
    replies: list[Reply]

    @property
    def speed(self) -> float:
        """Tokens written per second, of all users together."""
        return sum(r.tokens for r in self.replies) / self.seconds

    @property
    def cost(self) -> float:
        """Processor seconds for a token."""
        return self.cpu_seconds / sum(r.tokens for r in self.replies)

    @property
    def firsts_cost(self) -> float:
        """Processor seconds until every user had some text."""
        return max(r.first_cpu_seconds for r in self.replies) - self.cpu_began

    @property
    def worst_first(self) -> float:
        """The longest that a user waited for text."""
        return max(r.first_seconds for r in self.replies)

    @property
    def middle_first(self) -> float:
        """How long the user in the middle waited for text."""
        return statistics.median(r.first_seconds for r in self.replies)


class Report:
    """The lines, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """A line."""
        self.rows.append(row)
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.model:<8}{row.what:<66}{row.figure:<32}{row.goal:<16}{verdict}", flush=True)

    def markdown(self) -> str:
        """The lines as a table."""
        head = ["| model | what | measured | goal |", "|---|---|---|---|"]
        return "\n".join(
            [
                *head,
                *(f"| {r.model} | {r.what.strip()} | {r.figure} | {r.goal} |" for r in self.rows),
            ]
        )

    def ratio(
        self, model: str, what: str, found: Sequence[float], least: float | None, most: float | None
    ) -> None:
        """A line with the median of ratios, and a goal if there is one."""
        middle = statistics.median(found)
        figure = f"{middle:.3f} ({min(found):.3f} to {max(found):.3f})"
        if least is not None:
            self.add(Row(model, what, figure, f"at least {least:.2f}", middle >= least))
        elif most is not None:
            self.add(Row(model, what, figure, f"at most {most:.2f}", middle <= most))
        else:
            self.add(Row(model, what, figure))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.serve", description=__doc__)
    parser.add_argument("--model", type=Path, help="GGUF instead of the demo model's")
    parser.add_argument("--server", type=Path, help="llama-server of the same commit")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--equal", type=int, default=50, help="prompts compared token by token")
    parser.add_argument("--no-large", action="store_true", help="leave out the larger model")
    parser.add_argument("--no-packaged", action="store_true", help="leave out llama_cpp.server")
    parser.add_argument("--quick", action="store_true", help="few rounds, few requests")
    parser.add_argument("--markdown", action="store_true", help="print a table in the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    binary = options.server or servers.build_llama_server()
    python = None if options.no_packaged else servers.packaged_python()
    small = options.model or demo_model()
    plan = Plan(options.rounds, equal=options.equal)
    if options.quick:
        plan = Plan(2, equal=min(8, options.equal), requests=200, idle=3)
    report = Report()
    print(f"llama.cpp {toolchain.find_build().commit}, {settings.threads()} threads")
    measure("small", small, binary, python, options.users, plan, report)
    if not options.no_large:
        place = settings.cache_dir() / "bench" / "random-1B-Q4_0.gguf"
        large = large_model(small, place)
        plan = Plan(1 if options.quick else 2, scale=0.25, full=False)
        measure("large", large, binary, python, options.users, plan, report)
    if options.markdown:
        print(report.markdown())
    if options.json:
        rows = [asdict(row) for row in report.rows]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def demo_model() -> Path:
    """The demo model in Q4_0, made once."""
    models = settings.cache_dir() / "bench" / "models"
    checked([*GGUFKIT, "--models-dir", models, "convert", "demo", "--type", "q4_0"])
    return next(models.glob("*/*-Q4_0.gguf"))


def measure(
    name: str,
    path: Path,
    binary: Path,
    python: Path | None,
    users: int,
    plan: Plan,
    report: Report,
) -> None:
    """All figures of one model."""
    with ExitStack() as stack:
        model = stack.enter_context(Model(path))
        found = load_text("stdlib-docstrings", cache=settings.cache_dir()).path
        text = model.vocabulary.tokenize(found.read_text(encoding="utf-8")[:400_000])
        room = ContextOptions(context=CONTEXT, sequences=2 * users, lanes=users)
        engine = Engine(BatchContext(model, room), EngineOptions(parallel=users))
        stack.callback(engine.close)
        ask = Asks(model, text, plan.scale, users)
        one_user(name, engine, path, text, plan, report)
        running = [
            stack.enter_context(servers.ours(path, users, CONTEXT)),
            stack.enter_context(servers.llama_server(binary, path, users, CONTEXT)),
        ]
        if plan.full:
            equality(name, engine, running[1], text, plan.equal, report)
        if python is not None:
            running.append(stack.enter_context(servers.packaged(python, path, CONTEXT)))
        many_users(name, engine, running, ask, plan, report)
        prefixes(name, running[:2], ask, report)
        if plan.full:
            idle(name, running, plan.idle, report)
            memory(name, running[0], ask, plan.requests, report)


class Asks:
    """Prompts out of a text, no two alike."""

    def __init__(self, model: Model, text: list[int], scale: float, users: int) -> None:
        self._words = model.vocabulary
        self._text = text
        self._scale = scale
        self._users = users

    def ask(self, start: int, length: int, answer: int) -> Ask:
        """A piece of the text, wherever it starts."""
        start %= len(self._text) - length
        tokens = self._text[start : start + length]
        spelled = b"".join(self._words.piece(token, special=True) for token in tokens)
        return Ask(spelled.decode("utf-8", "replace"), answer, tuple(tokens))

    def mixed(self, seed: int) -> list[Ask]:
        """One for each user, of mixed lengths."""
        draw = random.Random(seed)
        starts = draw.sample(range(0, len(self._text) - 512), self._users)
        lengths = [(PROMPTS[n % 4], ANSWERS[(3 * n + n // 4) % 4]) for n in range(self._users)]
        draw.shuffle(lengths)
        return [
            self.ask(at, int(size * self._scale), int(answer * self._scale))
            for at, (size, answer) in zip(starts, lengths, strict=True)
        ]


# One user.


def one_user(
    name: str, engine: Engine, path: Path, text: list[int], plan: Plan, report: Report
) -> None:
    written = max(16, int(128 * plan.scale))
    speed, cost, first = [], [], []
    for n in range(plan.rounds + 1):
        theirs = llama_bench(path, written)
        alone = Request(
            text[n : n + 1],
            sampling=GREEDY,
            max_tokens=written + 1,
            ignore_end=True,
            remember=False,
        )
        before = time.process_time()
        usage = engine.submit(alone).answer().finish.usage
        spent = time.process_time() - before
        prompt = text[1000 * n + 5 : 1000 * n + 517]
        read = engine.submit(
            Request(prompt, sampling=GREEDY, max_tokens=1, remember=False)
        ).answer()
        if n == 0:
            continue  # the first round warms up; llama-bench does so by itself
        speed.append(usage.tokens_per_second / theirs["tg"])
        cost.append(spent / settings.threads() * theirs["tg"] / written)
        first.append(read.finish.usage.first_token_seconds * theirs["pp"] / 512)
    report.ratio(name, "engine, one user: tokens/s / llama-bench", speed, 0.97, None)
    report.ratio(name, "  processor time / clock of llama-bench", cost, None, None)
    report.ratio(name, "  first token of 512 / llama-bench's evaluation", first, None, 1.05)


def llama_bench(path: Path, written: int) -> dict[str, float]:
    """Tokens per second of reading (pp) and writing (tg)."""
    tool = toolchain.find_build().tool("llama-bench")
    found: list[str] = []
    command: list[str | Path] = [tool, "-m", path, "-t", str(settings.threads()), "-r", "1"]
    command += ["-p", "512", "-n", str(written), "-o", "json"]
    ran = toolchain.run(command, on_text=found.append)
    if ran.returncode != 0:
        sys.exit("\n".join(["llama-bench failed:", *ran.tail]))
    whole = "".join(found)
    tests = json.loads(whole[whole.index("[\n") : whole.rindex("]") + 1])
    return {"pp" if t["n_prompt"] else "tg": t["avg_ts"] for t in tests}


def equality(
    name: str, engine: Engine, server: Server, text: list[int], count: int, report: Report
) -> None:
    """Greedy answers token by token: alone, and eight at a time."""

    def submit(n: int) -> list[int]:
        prompt = text[700 * n : 700 * n + 20 + 7 * n]
        request = Request(prompt, sampling=GREEDY, max_tokens=48, remember=False)
        return list(engine.submit(request).answer().tokens)

    alone = [submit(n) for n in range(count)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(submit, range(count)))
    same = 0
    for n, ours in enumerate(alone):
        theirs = server.tokens(text[700 * n : 700 * n + 20 + 7 * n], 48)
        same += bool(ours) and ours == theirs[: len(ours)] and len(theirs) - len(ours) <= 1
    what = "greedy answers equal to llama-server's, token by token"
    report.add(Row(name, what, f"{same} of {count}", "all", same == count))
    kept = sum(a == b for a, b in zip(alone, together, strict=True))
    report.add(Row(name, "  the same when eight are written at a time", f"{kept} of {count}"))


# Many users.


def many_users(
    name: str,
    engine: Engine,
    running: Sequence[Server],
    ask: Asks,
    plan: Plan,
    report: Report,
) -> None:
    rounds: dict[str, list[Round]] = {"engine": [], **{s.name: [] for s in running}}
    for n in range(plan.rounds + 1):
        asks = ask.mixed(n)
        ways: list[tuple[str, Callable[[Ask], Reply], Callable[[], float]]] = [
            ("engine", lambda one: ask_engine(engine, one), time.process_time),
            *((s.name, s.ask, s.cpu_seconds) for s in running),
        ]
        for way, go, cpu in ways if n % 2 else reversed(ways):
            found = round_of(asks, go, cpu)
            if n > 0:  # the first round warms up
                rounds[way].append(found)
    for way, found in rounds.items():
        middle, worst = (
            statistics.median(getattr(r, value) for r in found)
            for value in ("middle_first", "worst_first")
        )
        speed = statistics.median(r.speed for r in found)
        figure = f"{speed:.1f} tokens/s, {middle:.2f} and {worst:.2f} s"
        what = f"{len(asks)} users, {way}: speed, first token (median, worst)"
        report.add(Row(name, what, figure))
    for way in ("ggufkit serve", "engine"):
        for server in running[1:]:
            compare(name, way, rounds[way], server.name, rounds[server.name], report)


def compare(
    name: str,
    way: str,
    ours: Sequence[Round],
    other: str,
    theirs: Sequence[Round],
    report: Report,
) -> None:
    def each(value: str) -> list[float]:
        pairs = zip(ours, theirs, strict=True)
        return [getattr(a, value) / getattr(b, value) for a, b in pairs]

    least = {"llama-server": 1.0, "llama_cpp.server": 1.5}[other]
    report.ratio(name, f"{way} / {other}: tokens/s", each("speed"), least, None)
    report.ratio(name, "  processor time for a token", each("cost"), None, None)
    report.ratio(name, "  worst first token", each("worst_first"), None, 1.0)
    report.ratio(name, "  processor time until all have one", each("firsts_cost"), None, None)
    report.ratio(name, "  median first token", each("middle_first"), None, None)


def round_of(asks: Sequence[Ask], go: Callable[[Ask], Reply], cpu: Callable[[], float]) -> Round:
    with ThreadPoolExecutor(len(asks)) as pool:
        barrier = threading.Barrier(len(asks))

        def one(ask: Ask) -> Reply:
            barrier.wait()
            return go(ask)

        before, started = cpu(), time.monotonic()
        replies = list(pool.map(one, asks))
        return Round(time.monotonic() - started, cpu() - before, before, replies)


def ask_engine(engine: Engine, ask: Ask) -> Reply:
    request = Request(ask.tokens, sampling=GREEDY, max_tokens=ask.answer, ignore_end=True)
    ticket, spent = engine.submit(request), 0.0
    for event in ticket:
        spent = spent or time.process_time()
        if isinstance(event, Finish):
            usage = event.usage
    return Reply(usage.generated_tokens, usage.first_token_seconds, spent, usage.cached_tokens)


# What is known already, and what nothing costs.


def prefixes(name: str, running: Sequence[Server], ask: Asks, report: Report) -> None:
    """Two turns: the second begins with the first, which had a prompt of 900 tokens."""
    for server in running:
        first = ask.ask(20_000, 900, 16)
        begun = server.ask(first)
        more = ask.ask(40_000, 60, 16)
        went_on = server.ask(Ask(first.prompt + more.prompt, 16))
        figure = f"first token {begun.first_seconds:.2f}, then {went_on.first_seconds:.2f} s"
        if went_on.cached is not None:
            figure += f" ({went_on.cached} known)"
        report.add(Row(name, f"{server.name}: turns of 900 and 60 tokens", figure))


def idle(name: str, running: Sequence[Server], seconds: float, report: Report) -> None:
    before = [server.cpu_seconds() for server in running]
    time.sleep(seconds)
    for server, was in zip(running, before, strict=True):
        used = server.cpu_seconds() - was
        figure = f"{used:.2f} s of processor in {seconds:.0f} s"
        goal = "0" if server is running[0] else ""
        met = used < 0.005 * seconds if goal else None
        report.add(Row(name, f"{server.name}: idle", figure, goal, met))


def memory(name: str, server: Server, ask: Asks, requests: int, report: Report) -> None:
    """Memory over many short requests, eight at a time."""

    def some(numbers: range) -> None:
        with ThreadPoolExecutor(8) as pool:
            for reply in pool.map(lambda n: server.ask(ask.ask(37 * n, 16, 4)), numbers):
                assert reply.tokens == 4

    some(range(requests // 4))
    warm = server.memory_nbytes()
    some(range(requests // 4, requests))
    growth = (server.memory_nbytes() - warm) / MIB
    what = f"{server.name}: memory of its own over {requests} requests"
    figure = f"{warm / MIB:.0f} MiB after a quarter, then {growth:+.1f}"
    report.add(Row(name, what, figure, "flat", growth < 0.02 * warm / MIB))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
