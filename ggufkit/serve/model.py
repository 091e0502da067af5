"""One model for one conversation: the engine with a single sequence."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self

from ggufkit.errors import GgufkitError, SourceError, UsageError
from ggufkit.llamacpp.batching import ContextOptions, Model, ModelOptions
from ggufkit.llamacpp.blocks import TYPE_SIZES
from ggufkit.llamacpp.conversing import ChatTemplate, NoTemplateError, find_template
from ggufkit.llamacpp.images import Projector, Prompt
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.runtime import (
    ContextError,
    cache_nbytes_per_token,
    check_room,
    context_size,
    drain_errors,
)
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.llamacpp.template import Message
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT, Progress
from ggufkit.serve.drafting import DraftOptions, open_engine
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.grammars import check_grammar
from ggufkit.serve.requests import Adapters, Delta, Finish, FinishReason, Request, Ticket

_MAX_IMAGE_NBYTES = 64 << 20
_UNREAD = 1 << 30
"""A terminal may be held with Ctrl-S for as long as somebody likes."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen; None is the model's recommendation, or llama.cpp's.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_k: choose among this many; 0 for all.
        top_p: choose among the most likely that sum up to this.
        min_p: leave out tokens less likely than this share of the likeliest.
        repeat_penalty: above 1, tokens of late become less likely.
        max_tokens: length of an answer at most.
        presence_penalty: taken off the logit of a token that occurred.
        frequency_penalty: taken off for each time that it occurred.
        seed: of the draw; None for another one each time.
        grammar: GBNF that the answer must follow; empty for none.
        stop: strings that end an answer and are not part of it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    grammar: str = ""
    stop: tuple[str, ...] = ()

    def resolve(self, metadata: Metadata | None = None) -> SamplingParams:
        """With numbers in the place of each None.

        Raises:
            UsageError: if a number makes no sense, or the grammar would take
                llama.cpp all memory.
        """
        if self.grammar:
            check_grammar(self.grammar)
        wanted = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_CHOOSING
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        recommended = dict[str, float](metadata.sampling) if metadata else {}
        if "top_k" in recommended:
            recommended["top_k"] = int(recommended["top_k"])
        return replace(SamplingParams(), **{**recommended, **given})


_NOT_CHOOSING = ("max_tokens", "stop")


@dataclass
class Statistics:
    """One answer in numbers.

    Attributes:
        context: size of the context.
        prompt_tokens: tokens of the conversation before the answer.
        cached_tokens: how many of them were still known from the last answer.
        prompt_seconds: time to the first token.
        generated_tokens: tokens of the answer.
        generate_seconds: time from the first token to the last.
        guessed_tokens: tokens that a draft model guessed.
        right_tokens: guesses that were right.
        context_used: tokens of the context that conversation and answer take.
        stopped: why the answer ended: ``end`` is the model's own decision or a
            stop string; empty if it failed or was never begun.
    """

    context: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generate_seconds: float = 0.0
    guessed_tokens: int = 0
    right_tokens: int = 0
    context_used: int = 0
    stopped: Literal["", "end", "limit", "context", "interrupted"] = ""

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing after the first token."""
        more = self.generated_tokens - 1
        return more / self.generate_seconds if more > 0 and self.generate_seconds else 0.0


class ChatModel:
    """A GGUF that is loaded and answers one conversation at a time.

    Args:
        path: the GGUF; of one in parts, the first.
        options: how the model is loaded. All its LoRA adapters are applied.
        context: the context and how it is computed; for one sequence.
        scales: of LoRA adapters, by name; 1 where nothing is said.
        chat_template: a file with a Jinja template, or the name of one that
            llama.cpp has built in; None for the model's own.
        template_needed: whether a model without a chat template is an error.
        mmproj: GGUF of the projector that it sees images with, if it can.
        draft: a small model that guesses ahead for it.
        build: the native build.
        progress: told warnings.

    Attributes:
        statistics: the last answer in numbers, also while it is being written.

    Raises:
        ToolError: if the library cannot be used, or cannot load the model.
        NoTemplateError: if there is no chat template.
        IntegrityError: if the file is broken.
    """

    def __init__(
        self,
        path: Path,
        *,
        options: ModelOptions | None = None,
        context: ContextOptions | None = None,
        scales: Mapping[str, float] | None = None,
        chat_template: str | None = None,
        template_needed: bool = True,
        mmproj: Path | None = None,
        draft: DraftOptions | None = None,
        build: NativeBuild | None = None,
        progress: Progress = SILENT,
    ) -> None:
        options = options or ModelOptions()
        self.path = path
        self._progress = progress
        self._ticket: Ticket | None = None
        self._files: dict[str, bytes] = {}
        context = context or ContextOptions()
        with ExitStack() as stack:
            self._model = stack.enter_context(Model(path, options, build=build, progress=progress))
            self.metadata = self._model.metadata
            self._template = self._find_template(chat_template, template_needed)
            self._projector: Projector | None = None
            if mmproj is not None:
                threads = context.batch_threads or context.threads
                projector = Projector(self._model, mmproj, threads=threads)
                self._projector = stack.enter_context(projector)
            self._engine = self._open(context, options, draft)
            self._parts = stack.pop_all()
        self._adapters: Adapters = tuple(
            (name, (scales or {}).get(name, 1.0)) for name in sorted(options.adapters)
        )
        self.context = self._engine.context
        self.statistics = Statistics(self.context)
        self._tell_errors()

    def _find_template(self, given: str | None, needed: bool) -> ChatTemplate | None:
        try:
            return find_template(self.metadata, self._model.library, given)
        except NoTemplateError:
            if needed:
                raise
            return None

    def _open(
        self, options: ContextOptions, loading: ModelOptions, draft: DraftOptions | None
    ) -> Engine:
        size = context_size(self.metadata, options.context, self._progress)
        on_host = self._model.gpu_layers == 0
        nbytes = cache_nbytes(self.metadata, options) if on_host else 0
        check_room(self.metadata, size, cache_nbytes=nbytes, progress=self._progress)
        one = replace(options, context=size, cells=size, sequences=1)
        return open_engine(
            self._model,
            one,
            EngineOptions(unread=_UNREAD),
            draft=draft,
            loading=loading,
            projector=self._projector,
            progress=self._progress,
        )

    def _tell_errors(self) -> None:
        if told := drain_errors():
            self._progress.warn(f"llama.cpp: {told}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory; an answer that is being written is given up."""
        self._engine.close(drain=False)
        self._parts.close()

    # From messages to tokens.

    @property
    def has_template(self) -> bool:
        """Whether it can converse, and not only go on with a text."""
        return self._template is not None

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that a conversation becomes, by the chat template.

        Raises:
            UsageError: if there is no template, or a message is not text.
            TemplateError: if the template refuses the messages.
        """
        if self._template is None:
            raise UsageError(f"{self.path.name} has no chat template")
        for message in messages:
            _check_encodable(message["content"])
        marker = self._projector.marker if self._projector else ""
        shown = [_with_markers(message, marker) for message in messages]
        text = self._template.render(shown)
        if marker and text.count(marker) != len(_paths(messages)):
            raise UsageError(f"the chat template of {self.path.name} leaves images out")
        return text

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a prompt; the BOS token comes first if the model wants it."""
        return self._model.vocabulary.tokenize(text)

    # Images.

    def look(self, path: Path) -> tuple[int, int]:
        """See that an image can be shown; its width and height in pixels.

        It is kept, so that it stays the same when the file changes.

        Raises:
            UsageError: if the model cannot see, or this is no image.
            SourceError: if the file cannot be read.
        """
        if self._projector is None:
            beside = sorted(self.path.parent.glob("*mmproj*.gguf"))
            name = beside[0] if beside else "FILE"
            raise UsageError(
                "images need the model's projector, a file of its own (mmproj)",
                f"If it has one, begin with: ggufkit chat {self.path} --mmproj {name}",
            )
        if str(path) not in self._files:
            image = _read_image(path)
            try:
                self._projector.size(image)
            except UsageError as error:
                raise UsageError(f"{path}: {error.message}", error.hint) from error
            self._files[str(path)] = image
        return self._projector.size(self._files[str(path)])

    def _tokens(self, messages: Sequence[Message]) -> Prompt:
        """Tokens of a conversation, and the images in it."""
        text, paths = self.prompt(messages), _paths(messages)
        if not paths:
            return Prompt(tuple(self.tokenize(text)), {})
        for path in paths:
            self.look(Path(path))
        assert self._projector is not None
        return self._projector.tokenize(text, [self._files[path] for path in paths])

    # Answering.

    def stream(
        self, messages: Sequence[Message], sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Write the answer to a conversation, piece by piece.

        Raises:
            ContextError: if the conversation, or its answer, does not fit.
            TemplateError: if the chat template refuses the messages.
            UsageError: if a message is not text, an image cannot be shown, or
                sampling makes no sense.
        """
        self._begin()
        yield from self._answer(self._tokens(messages), sampling or Sampling())

    def complete(self, text: str, sampling: Sampling | None = None) -> Iterator[str]:
        """Go on with a text, piece by piece; errors as in :meth:`stream`."""
        self._begin()
        _check_encodable(text)
        prompt = Prompt(tuple(self.tokenize(text)), {})
        yield from self._answer(prompt, sampling or Sampling())

    def stop(self) -> None:
        """End the answer that is being written; safe in a signal handler."""
        if self._ticket is not None:
            self._ticket.cancel()

    def _begin(self) -> None:
        # What does not even fit leaves the context as it was.
        self.statistics = Statistics(self.context, context_used=self.statistics.context_used)

    def _answer(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        told, tokens = self.statistics, prompt.tokens
        told.prompt_tokens = len(tokens)
        self._check_fits(len(tokens))
        told.context_used = len(tokens)
        request = Request(
            # A model that begins texts with nothing still needs something to go on from.
            prompt=tokens or [max(0, self._model.vocabulary.bos)],
            sampling=sampling.resolve(self.metadata),
            max_tokens=sampling.max_tokens,
            stop=sampling.stop,
            adapters=self._adapters,
            images=prompt.images,
        )
        self._ticket = ticket = self._engine.submit(request)
        try:
            yield from self._read(ticket, told, sampling.max_tokens)
        except (KeyboardInterrupt, GeneratorExit):
            # The engine notices within a token, and serves nobody else until then.
            ticket.cancel()
            told.stopped = "interrupted"
            raise
        finally:
            self._ticket = None
            self._tell_errors()
        if told.stopped == "context":
            raise ContextError(
                f"the answer filled the context of {self.context} tokens", self._hint
            )

    def _check_fits(self, count: int) -> None:
        if count >= self.context:
            raise ContextError(
                f"the conversation has {count} tokens, and the context {self.context}", self._hint
            )

    @property
    def _hint(self) -> str:
        return f"Begin anew with /reset, or give more room: -c {2 * self.context}"

    def _read(self, ticket: Ticket, told: Statistics, limit: int | None) -> Iterator[str]:
        started = first = time.monotonic()
        for event in ticket:
            match event:
                case Delta():
                    now = time.monotonic()
                    if not told.generated_tokens:
                        first, told.prompt_seconds = now, now - started
                    told.generated_tokens += len(event.tokens)
                    told.context_used = told.prompt_tokens + told.generated_tokens
                    told.generate_seconds = now - first
                    if event.text:
                        yield event.text
                case Finish():
                    if event.error is not None:
                        raise event.error
                    self._note_end(told, event, limit)

    def _note_end(self, told: Statistics, finish: Finish, limit: int | None) -> None:
        usage = finish.usage
        told.cached_tokens = usage.cached_tokens
        told.prompt_seconds = usage.first_token_seconds
        told.generated_tokens = usage.generated_tokens
        told.generate_seconds = usage.generate_seconds
        told.guessed_tokens, told.right_tokens = usage.guessed_tokens, usage.right_tokens
        told.context_used = told.prompt_tokens + told.generated_tokens
        reasons: dict[FinishReason, Literal["end", "interrupted"]] = {
            "stop": "end",
            "cancelled": "interrupted",
        }
        if finish.reason == "length":
            told.stopped = "limit" if told.generated_tokens == limit else "context"
        elif finish.reason in reasons:
            told.stopped = reasons[finish.reason]
        else:
            raise GgufkitError(f"the answer was given up: {finish.reason}")


def cache_nbytes(metadata: Metadata, options: ContextOptions) -> float:
    """Bytes of keys and values of one token of context; 0 where that is not known."""

    def width(type: str) -> float:
        elements, nbytes = TYPE_SIZES[type.upper()]
        return nbytes / elements

    halves = width(options.key_type) + width(options.value_type)
    return cache_nbytes_per_token(metadata) / 2 * halves / 2


def _paths(messages: Sequence[Message]) -> list[str]:
    return [path for message in messages for path in message.get("images", ())]


def _with_markers(message: Message, marker: str) -> Message:
    """The message as text alone; images come before what is said of them."""
    images = marker * len(message.get("images", ()))
    rest = {name: value for name, value in message.items() if name != "images"}
    return {**rest, "content": images + message["content"]}


def _read_image(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_IMAGE_NBYTES:
            raise UsageError(f"{path} is larger than {_MAX_IMAGE_NBYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error


def _check_encodable(text: str) -> None:
    """Python hands over bytes that are not UTF-8 as characters that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the message is not UTF-8 text", "Convert it with: iconv") from error
