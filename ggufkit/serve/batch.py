"""Answering a file of prompts: many at once, offline, and to be gone on with.

Each answer is one line of the output, written when it is complete. What an
answer depends on is kept in its line as a key, so that a later run knows what is
answered already, and notices when the question has changed.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ggufkit.errors import GgufkitError, UsageError
from ggufkit.llamacpp import host, runtime
from ggufkit.llamacpp.batching import (
    MAX_SEQUENCES,
    BatchContext,
    ContextOptions,
    Model,
    ModelOptions,
)
from ggufkit.llamacpp.conversing import ChatTemplate, find_template
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.progress import SILENT, Progress
from ggufkit.serve.answers import AnswerFile, digest
from ggufkit.serve.chat import Style
from ggufkit.serve.drafting import DraftOptions, open_engine
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.model import Sampling, cache_nbytes
from ggufkit.serve.prompts import PromptMaker
from ggufkit.serve.requests import Adapters, Delta, Finish, Request, Ticket
from ggufkit.serve.rows import FaultError, Row, read_rows, tell_faults

DEFAULT_MAX_TOKENS = 1024
"""Length of an answer if nothing is said; a model that never ends would fill its context."""
_UNREAD = 1 << 30
_SHOWN = 10


@dataclass(frozen=True)
class BatchOptions:
    """How a file of prompts is answered.

    Attributes:
        system: system message of rows that have none.
        sampling: how answers are chosen where a row says nothing.
        style: whether prompts are bare text, and what surrounds them.
        model: how the model is loaded.
        context: the context of one answer; its size fits the rows if it is None.
        scales: of LoRA adapters, by name; 1 where nothing is said.
        chat_template: a Jinja file, or the name of one of llama.cpp's own;
            None for the model's.
        parallel: answers that are written at once.
        draft: a small model that guesses ahead.
    """

    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    style: Style = field(default_factory=Style)
    model: ModelOptions = field(default_factory=ModelOptions)
    context: ContextOptions = field(default_factory=ContextOptions)
    scales: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    parallel: int = 8
    draft: DraftOptions | None = None

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters with their scales."""
        return tuple((name, self.scales.get(name, 1.0)) for name in sorted(self.model.adapters))


@dataclass(frozen=True)
class BatchReport:
    """A run in numbers.

    Attributes:
        rows: questions in the file.
        reused: of these, answered by an earlier run.
        answered: answered by this one.
        failed: of these, with an error instead of an answer.
        prompt_tokens: tokens of the questions answered now.
        cached_tokens: how many of them needed no computing.
        generated_tokens: tokens written now.
        guessed_tokens: tokens that a draft model guessed.
        right_tokens: guesses that were right.
        seconds: time that it took, without loading the model.
    """

    rows: int
    reused: int = 0
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    right_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens written in a second, of all answers together."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Job:
    """A question as the engine takes it.

    Attributes:
        row: the question.
        key: digest of all that its answer depends on.
        tokens: the prompt.
        params: how tokens are chosen.
    """

    row: Row
    key: str
    tokens: tuple[int, ...]
    params: SamplingParams

    @property
    def need(self) -> int:
        """Tokens of context that it may take; 0 if there is no limit."""
        limit = self.row.sampling.max_tokens
        return len(self.tokens) + limit if limit else 0


def prepare(
    rows: Iterable[Row],
    model: Model,
    template: ChatTemplate | None,
    *,
    name: str,
    identity: Mapping[str, Any],
    context: int,
) -> list[Job]:
    """Turn questions into tokens, and see that all can be answered.

    Args:
        rows: the questions.
        model: whose tokens are meant.
        template: its chat template, if conversations are asked.
        name: of the file, for errors.
        identity: whatever else an answer depends on.
        context: tokens that a question and its answer may have.

    Raises:
        UsageError: if there are rows that cannot be answered; all are named.
    """
    jobs, faults = list[Job](), list[str]()
    prompts = PromptMaker(template) if template is not None else None
    for row in rows:
        try:
            text = row.prompt if row.prompt is not None else _rendered(row, prompts)
            tokens = model.vocabulary.tokenize(text) or [max(0, model.vocabulary.bos)]
            if len(tokens) >= context:
                raise FaultError(
                    f"it has {len(tokens)} tokens, and the context {context}, answer included"
                )
        except (FaultError, GgufkitError) as error:
            faults.append(f"line {row.line}: {error}")
            continue
        params = row.sampling.resolve(model.metadata)
        depends = {
            **identity,
            "prompt": text,
            "sampling": asdict(params),
            "max_tokens": row.sampling.max_tokens,
            "stop": list(row.sampling.stop),
        }
        jobs.append(Job(row, digest(depends), tuple(tokens), params))
    tell_faults(name, faults)
    return jobs


def _rendered(row: Row, prompts: PromptMaker | None) -> str:
    assert prompts is not None
    assert row.messages is not None
    return prompts.render(row.messages)


def still_to_do(jobs: Sequence[Job], answers: AnswerFile) -> list[Job]:
    """The questions that have no answer yet.

    Raises:
        UsageError: if there are answers to what is asked differently now.
    """
    known = answers.known
    changed = [j for j in jobs if j.row.id in known and known[j.row.id] != j.key]
    if changed:
        named = ", ".join(f"{j.row.id!r} (line {j.row.line})" for j in changed[:_SHOWN])
        raise UsageError(
            f"{answers.path} has {len(changed)} answers to other questions, of another model, "
            f"or with other settings: {named}",
            "Name another file with -o, or ask as before",
        )
    return [j for j in jobs if j.row.id not in known]


def answer_all(
    engine: Engine,
    jobs: Sequence[Job],
    write: Callable[[Mapping[str, Any]], None],
    *,
    adapters: Adapters = (),
    progress: Progress = SILENT,
) -> BatchReport:
    """Answer questions, as many at once as the engine does, in the order of completion.

    Args:
        engine: the model.
        jobs: the questions.
        write: takes each answer when it is complete.
        adapters: LoRA adapters to apply, with their scales.
        progress: told the rate, and how long it will take.

    Raises:
        ClosedError: if the engine has failed.
    """
    started = time.monotonic()
    left, total = iter(jobs), BatchReport(rows=len(jobs))
    ready: SimpleQueue[tuple[Job, Ticket]] = SimpleQueue()
    texts: dict[Ticket, list[str]] = {}

    def submit() -> None:
        if (job := next(left, None)) is None:
            return
        ticket = engine.submit(_request(job, adapters))
        texts[ticket] = []
        ticket.on_ready(lambda: ready.put((job, ticket)))

    with progress.task(f"{len(jobs)} prompts", total=len(jobs)) as task:
        # One that waits for each that runs: the engine is never idle.
        for _ in range(2 * engine.parallel):
            submit()
        while texts:
            job, ticket = ready.get()
            for event in ticket.take():
                if isinstance(event, Delta):
                    texts[ticket].append(event.text)
                elif isinstance(event, Finish):
                    write(_answer(job, "".join(texts.pop(ticket)), event))
                    total = _added(total, event, time.monotonic() - started)
                    task.update(total.answered, f"{total.tokens_per_second:.1f} tokens/s")
                    submit()
    return total


def _request(job: Job, adapters: Adapters) -> Request:
    return Request(
        prompt=job.tokens,
        sampling=job.params,
        max_tokens=job.row.sampling.max_tokens,
        stop=job.row.sampling.stop,
        adapters=adapters,
    )


def _answer(job: Job, text: str, finish: Finish) -> dict[str, Any]:
    usage = finish.usage
    answer: dict[str, Any] = {
        "id": job.row.id,
        "answer": text,
        "finish_reason": finish.reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "generated_tokens": usage.generated_tokens,
        },
        "key": job.key,
    }
    if finish.reason not in ("stop", "length"):
        reason = finish.error.message if finish.error else f"given up: {finish.reason}"
        answer |= {"finish_reason": "error", "error": reason}
    return answer


def _added(total: BatchReport, finish: Finish, seconds: float) -> BatchReport:
    usage = finish.usage
    return replace(
        total,
        answered=total.answered + 1,
        failed=total.failed + (finish.reason not in ("stop", "length")),
        prompt_tokens=total.prompt_tokens + usage.prompt_tokens,
        cached_tokens=total.cached_tokens + usage.cached_tokens,
        generated_tokens=total.generated_tokens + usage.generated_tokens,
        guessed_tokens=total.guessed_tokens + usage.guessed_tokens,
        right_tokens=total.right_tokens + usage.right_tokens,
        seconds=seconds,
    )


def fitting_context(
    jobs: Sequence[Job], metadata: Metadata, options: ContextOptions, *, limit: int, parallel: int
) -> ContextOptions:
    """A context as large as these questions need, within the memory that there is.

    Args:
        jobs: the questions.
        metadata: of the model.
        options: what the user wants of it.
        limit: tokens of a question and its answer at most.
        parallel: answers at once.
    """
    needs = sorted((min(limit, j.need or limit) for j in jobs), reverse=True)
    context = options.context or needs[0]
    per_token = cache_nbytes(metadata, options)
    cells = sum(needs[:parallel])
    if (available := host.available_memory_nbytes()) and per_token:
        cells = min(cells, int(available / 2 / per_token))
    # A few more than run: what they leave behind is what later ones may begin with.
    sequences = min(MAX_SEQUENCES, parallel + max(2, parallel // 2))
    return replace(options, context=context, cells=max(cells, context), sequences=sequences)


def check_grammars(context: BatchContext, jobs: Sequence[Job], name: str) -> None:
    """See that llama.cpp takes the grammar of each question.

    Raises:
        UsageError: if there are some that it does not take; all are named.
    """
    told: dict[str, str] = {}
    for job in jobs:
        if (grammar := job.params.grammar) and grammar not in told:
            told[grammar] = ""
            try:
                context.sampler(job.params).close()
            except UsageError as error:
                told[grammar] = error.message
    bad = ((j.row.line, told.get(j.params.grammar)) for j in jobs)
    tell_faults(name, [f"line {line}: {fault}" for line, fault in bad if fault])


# The whole.


def run(
    model: Path,
    prompts: bytes,
    out: Path | Callable[[Mapping[str, Any]], None],
    *,
    name: str,
    options: BatchOptions,
    file_digest: Callable[[Path], str],
    progress: Progress = SILENT,
) -> BatchReport:
    """Answer prompts; see :func:`ggufkit.pipeline.run`.

    Args:
        model: the GGUF.
        prompts: JSON Lines.
        out: file that answers are added to as they come, or what takes them.
        name: what to call the prompts in errors.
        options: how.
        file_digest: gives the SHA-256 of a file.
        progress: told the rate, and how long it will take.

    Raises:
        UsageError: if there are rows that cannot be answered, or answers in the
            file to other questions.
    """
    rows = read_rows(
        prompts,
        name=name,
        sampling=_limited(options.sampling),
        style=options.style,
        system=options.system,
        grammar=runtime.schema_grammar,
    )
    with ExitStack() as stack:
        loaded = stack.enter_context(Model(model, options.model, progress=progress))
        limit = _limit(loaded.metadata, options.context.context, progress)
        template = None
        if not options.style.completion:
            template = find_template(loaded.metadata, loaded.library, options.chat_template)
        identity = _identity(model, options, file_digest)
        jobs = todo = prepare(rows, loaded, template, name=name, identity=identity, context=limit)
        if isinstance(out, Path):
            answers = stack.enter_context(AnswerFile(out))
            todo, out = still_to_do(jobs, answers), answers.append
        if not todo:
            return BatchReport(rows=len(jobs), reused=len(jobs))
        engine = _engine(loaded, todo, options, name=name, limit=limit, progress=progress)
        stack.callback(engine.close, drain=False)
        report = answer_all(engine, todo, out, adapters=options.adapters, progress=progress)
    return replace(report, rows=len(jobs), reused=len(jobs) - len(todo))


def _engine(
    model: Model,
    jobs: Sequence[Job],
    options: BatchOptions,
    *,
    name: str,
    limit: int,
    progress: Progress,
) -> Engine:
    room = fitting_context(
        jobs, model.metadata, options.context, limit=limit, parallel=options.parallel
    )
    _check_room(model, room, progress)
    return open_engine(
        model,
        room,
        EngineOptions(parallel=options.parallel, unread=_UNREAD),
        draft=options.draft,
        loading=options.model,
        check=lambda context: check_grammars(context, jobs, name),
        progress=progress,
    )


def _limit(metadata: Metadata, wanted: int | None, progress: Progress) -> int:
    """Tokens of a question and its answer at most."""
    if wanted is None:
        return metadata.trained_context or runtime.DEFAULT_CONTEXT
    return runtime.context_size(metadata, wanted, progress)


def _check_room(model: Model, options: ContextOptions, progress: Progress) -> None:
    nbytes = cache_nbytes(model.metadata, options) if model.gpu_layers == 0 else 0
    assert options.cells
    runtime.check_room(model.metadata, options.cells, cache_nbytes=nbytes, progress=progress)


def _limited(sampling: Sampling) -> Sampling:
    return replace(sampling, max_tokens=sampling.max_tokens or DEFAULT_MAX_TOKENS)


def _identity(
    model: Path, options: BatchOptions, file_digest: Callable[[Path], str]
) -> dict[str, Any]:
    """What all answers depend on."""
    adapters = options.model.adapters
    return {
        "model": file_digest(model),
        "adapters": [[file_digest(adapters[name]), scale] for name, scale in options.adapters],
        "cache": [options.context.key_type, options.context.value_type],
    }
