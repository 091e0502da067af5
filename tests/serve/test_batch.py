"""Answering many prompts: the loop without a model, and the whole of it with one."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufkit import pipeline
from ggufkit.errors import GgufkitError, UsageError
from ggufkit.llamacpp import host
from ggufkit.llamacpp.batching import ContextOptions
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.batch import BatchOptions, BatchReport, Job, answer_all, fitting_context
from ggufkit.serve.chat import Style
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.model import Sampling
from ggufkit.serve.requests import ClosedError
from ggufkit.serve.rows import Row
from tests.chatting import without_template
from tests.serve.backends import FakeBackend, expected

# The loop.


def job(name: str, prompt: list[int], limit: int | None = 5, *, seed: int = 0) -> Job:
    row = Row(1, name, None, name, Sampling(max_tokens=limit))
    return Job(row, f"key of {name}", tuple(prompt), SamplingParams(seed=seed))


@pytest.fixture
def engine() -> Iterator[Callable[..., tuple[Engine, FakeBackend]]]:
    opened: list[Engine] = []

    def make(**options: Any) -> tuple[Engine, FakeBackend]:
        backend = FakeBackend(**options)
        opened.append(Engine(backend, EngineOptions(parallel=3)))
        return opened[-1], backend

    yield make
    for made in opened:
        made.close(drain=False)


def test_every_question_gets_its_own_answer(
    engine: Callable[..., tuple[Engine, FakeBackend]],
) -> None:
    running, _ = engine()
    jobs = [job(f"q{n}", [1, 2, 3 + n], 3 + n % 4) for n in range(20)]
    written: list[Mapping[str, Any]] = []
    report = answer_all(running, jobs, written.append)
    assert (report.rows, report.answered, report.failed) == (20, 20, 0)
    assert report.generated_tokens == sum(3 + n % 4 for n in range(20))
    assert report.prompt_tokens == 60
    assert report.tokens_per_second > 0
    answers = {a["id"]: a for a in written}
    assert len(answers) == len(written)
    for one in jobs:
        told = answers[one.row.id]
        limit = one.row.sampling.max_tokens or 0
        assert told["answer"] == bytes(expected(one.tokens, limit)).decode()
        assert (told["finish_reason"], told["key"]) == ("length", one.key)
        assert told["usage"]["generated_tokens"] == limit


def test_an_answer_is_written_as_soon_as_it_is_complete(
    engine: Callable[..., tuple[Engine, FakeBackend]],
) -> None:
    running, backend = engine(gated=True)
    written: list[Any] = []

    def hold_the_long_one_back() -> None:
        backend.allow(20)
        while len(written) < 2:
            time.sleep(0.001)
        backend.allow(1000)

    gate = threading.Thread(target=hold_the_long_one_back, daemon=True)
    gate.start()
    answer_all(
        running,
        [job("long", [1], 40), job("short", [2], 2), job("later", [3], 2)],
        lambda answer: written.append(answer["id"]),
    )
    gate.join()
    assert written[-1] == "long"


def test_a_failure_is_told_in_its_row_and_the_others_go_on(
    engine: Callable[..., tuple[Engine, FakeBackend]],
) -> None:
    running, backend = engine()
    backend.failing = 1
    written: list[Mapping[str, Any]] = []
    report = answer_all(running, [job(f"q{n}", [n + 1]) for n in range(9)], written.append)
    failed = [a for a in written if a["finish_reason"] == "error"]
    assert report.answered == len(written) == 9
    assert 1 <= len(failed) == report.failed < 9
    assert failed[0]["error"] == "the computation failed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_is_gone_ends_it(
    engine: Callable[..., tuple[Engine, FakeBackend]],
) -> None:
    running, backend = engine()
    backend.crashing = True
    with pytest.raises(ClosedError, match="the engine has failed"):
        answer_all(running, [job(f"q{n}", [n + 1]) for n in range(9)], lambda answer: None)


def test_the_context_fits_the_questions(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = Metadata(read_gguf(demo_gguf))
    jobs = [job("a", [1] * 10, 20), job("b", [1] * 50, 50), job("c", [1] * 5, 5)]

    def fit(options: ContextOptions | None = None, parallel: int = 2) -> tuple[int, int, int]:
        made = fitting_context(
            jobs, metadata, options or ContextOptions(), limit=80, parallel=parallel
        )
        assert made.context
        assert made.cells
        return made.context, made.cells, made.sequences

    monkeypatch.setattr(host, "available_memory_nbytes", lambda: None)
    assert fit() == (80, 110, 4)
    assert fit(parallel=256) == (80, 120, 256)
    assert fit(ContextOptions(context=64))[0] == 64
    jobs.append(job("endless", [1], None))
    assert fit() == (80, 160, 4)
    per_token = 30 * 3 * (64 + 64) * 2
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 200 * per_token)
    assert fit() == (80, 100, 4)
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 1)
    assert fit() == (80, 80, 4)


# With the demo model.

GREEDY = BatchOptions(sampling=Sampling(temperature=0, max_tokens=8), parallel=4)


def lines(*rows: object) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def answers_in(path: Path) -> dict[str | int, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({a["id"] for a in found}) == len(found), "an answer is doubled"
    return {a["id"]: a for a in found}


@pytest.fixture
def run(demo_gguf: Path, native: NativeBuild, shared_models: Path) -> Callable[..., BatchReport]:
    def answer(
        prompts: Path | bytes, out: Any, options: BatchOptions = GREEDY, model: Path = demo_gguf
    ) -> BatchReport:
        return pipeline.run(model, prompts, out, options=options, models_dir=shared_models)

    return answer


def test_a_file_is_answered_and_asking_again_is_free(
    run: Callable[..., BatchReport], demo_gguf: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    talk = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    prompts.write_bytes(
        lines(
            {"id": "france", "messages": talk, "max_tokens": 32},
            {"id": "colour", "prompt": "Name a colour", "grammar": 'root ::= "red" | "blue"'},
            {"id": "stop", "messages": talk, "stop": ["Paris"]},
            *({"prompt": f"Count from {n}"} for n in range(5)),
        )
    )
    report = run(prompts, out)
    assert (report.rows, report.reused, report.answered, report.failed) == (8, 0, 8, 0)
    answers = answers_in(out)
    assert "Paris" in answers["france"]["answer"]
    assert answers["colour"]["answer"] in ("red", "blue")
    assert "Paris" not in answers["stop"]["answer"]
    assert answers["stop"]["finish_reason"] == "stop"
    counted = [a for row_id, a in answers.items() if len(str(row_id)) == 16]
    assert all(a["usage"]["generated_tokens"] == 8 for a in counted)
    before = out.read_bytes()
    report = run(prompts, out)
    assert (report.rows, report.reused, report.answered) == (8, 8, 0)
    assert out.read_bytes() == before
    # More rows, in another order: only the new ones are answered.
    rows = prompts.read_bytes().split(b"\n")
    report = run(b"\n".join([lines({"prompt": "New"}), *reversed(rows)]), out)
    assert (report.reused, report.answered) == (8, 1)
    assert out.read_bytes().startswith(before)


def test_an_answer_to_another_question_is_not_taken_for_this_one(
    run: Callable[..., BatchReport], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(lines({"id": "a", "prompt": "Hi"}), out)
    before = out.read_bytes()
    colder = replace(GREEDY, sampling=Sampling(temperature=0, max_tokens=4))
    for prompts, options in (
        (lines({"id": "a", "prompt": "Ho"}), GREEDY),
        (lines({"id": "a", "prompt": "Hi", "top_k": 3}), GREEDY),
        (lines({"id": "a", "prompt": "Hi"}), colder),
        (lines({"id": "a", "prompt": "Hi"}), replace(GREEDY, system="Be brief")),
    ):
        with pytest.raises(UsageError, match="1 answers to other questions"):
            run(prompts, out, options)
    assert out.read_bytes() == before


def test_rows_that_do_not_fit_are_named_before_any_work(
    run: Callable[..., BatchReport], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    prompts = lines(
        {"prompt": "Hi"},
        {"prompt": "word " * 9000},
        {"prompt": "Hi", "json_schema": {"type": "nothing"}},
    )
    with pytest.raises(UsageError, match="line 3: the JSON schema cannot become a grammar"):
        run(prompts, out)
    with pytest.raises(UsageError, match=r"line 2: it has \d+ tokens, and the context 8192"):
        run(prompts.rpartition(b"\n")[0], out)
    assert not out.exists()
    with pytest.raises(UsageError, match=r"line 2: llama\.cpp cannot read the grammar"):
        run(lines({"prompt": "Hi"}, {"prompt": "Hi", "grammar": "root ::= gone"}), out)
    assert out.read_bytes() == b""


def test_a_model_without_a_template(
    run: Callable[..., BatchReport], demo_gguf: Path, tmp_path: Path
) -> None:
    mute, found = without_template(demo_gguf, tmp_path / "mute.gguf"), list[Any]()
    with pytest.raises(UsageError, match="no chat template"):
        run(lines({"prompt": "Hi"}), found.append, model=mute)
    options = replace(GREEDY, style=Style(completion=True))
    run(lines({"prompt": "1, 2, 3, 4, 5,"}, {"prompt": ""}), found.append, options, model=mute)
    assert any(answer["answer"].startswith(" 6") for answer in found)


def test_answers_in_a_batch_are_those_given_alone(
    run: Callable[..., BatchReport], tmp_path: Path
) -> None:
    grammar = 'root ::= [0-9] [0-9] [0-9] "\\n"'
    rows = [{"id": n, "prompt": f"Say {n}", "grammar": grammar} for n in range(6)]
    together, alone = dict[int, str](), dict[int, str]()
    run(lines(*rows), lambda a: together.update({a["id"]: a["answer"]}))
    run(
        lines(*rows),
        lambda a: alone.update({a["id"]: a["answer"]}),
        replace(GREEDY, parallel=1),
    )
    assert sorted(together) == sorted(alone) == list(range(6))
    assert all(len(text) == 4 for text in together.values())


def test_the_prompts_are_not_written_over(run: Callable[..., BatchReport], tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_bytes(lines({"prompt": "Hi"}))
    with pytest.raises(UsageError, match="holds the prompts"):
        run(prompts, prompts)
    with pytest.raises(UsageError, match="cannot be read"):
        run(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert prompts.read_bytes() == lines({"prompt": "Hi"})
    with pytest.raises(GgufkitError):
        run(prompts, tmp_path / "out.jsonl", model=tmp_path / "none.gguf")
