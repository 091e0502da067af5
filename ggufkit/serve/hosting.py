"""A model that is loaded and serves many: engine, prompts, and what else belongs to it."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ggufkit.errors import UsageError
from ggufkit.llamacpp import host
from ggufkit.llamacpp.batching import ContextOptions, Model, ModelOptions
from ggufkit.llamacpp.conversing import NoTemplateError, find_template
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.rendering import Renderer
from ggufkit.llamacpp.runtime import ContextError, check_room, context_size
from ggufkit.progress import SILENT, Progress
from ggufkit.serve.drafting import DraftOptions, open_engine
from ggufkit.serve.engine import Engine, EngineOptions
from ggufkit.serve.model import cache_nbytes
from ggufkit.serve.prompts import PromptMaker
from ggufkit.serve.requests import Adapters
from ggufkit.serve.scoring import Scorer, TextScorer

_THREADS = 2
"""Threads that get requests of a model ready: its slow template must not stop others."""
_SHARE = 0.25
"""Of the free memory that keys and values take, unless the context needs more."""
_SURELY_LONG = 64
"""Bytes for each token of the context: no text of that length fits, or hardly any."""


@dataclass(frozen=True)
class HostOptions:
    """How a model is loaded to serve many.

    Attributes:
        model: how weights are loaded.
        context: ``context`` is the tokens of one user at most.
        scales: of LoRA adapters, by name; 1 where nothing is said.
        chat_template: a Jinja file, or the name of one of llama.cpp's own; None
            for the model's.
        parallel: answers that are written at once.
        queue: requests that may wait.
        draft: a small model that guesses ahead; all models that are served with it
            must have its vocabulary.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    context: ContextOptions = field(default_factory=ContextOptions)
    scales: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    parallel: int = 4
    queue: int = 256
    draft: DraftOptions | None = None

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters with their scales."""
        return tuple((name, self.scales.get(name, 1.0)) for name in sorted(self.model.adapters))


class Words(Protocol):
    """The vocabulary, as far as serving needs it."""

    size: int

    @property
    def longest_piece(self) -> int:
        """Bytes of the longest token."""

    def tokenize(self, text: str, *, special: bool = True, ends: bool = False) -> list[int]:
        """Tokens of a text."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of a token."""


@dataclass
class Hosted:
    """A model that serves.

    Attributes:
        name: what clients call it.
        engine: writes answers.
        words: its tokens.
        prompts: turns conversations into text; None without a chat template.
        scorer: says how likely a given text is; None if it cannot.
        recommended: sampling parameters that its file recommends.
        adapters: LoRA adapters that all its answers are written with.
        free: frees what lies below, when all else is closed.
    """

    name: str
    engine: Engine
    words: Words
    prompts: PromptMaker | None = None
    scorer: TextScorer | None = None
    recommended: dict[str, float] = field(default_factory=dict)
    adapters: Adapters = ()
    free: Callable[[], None] = lambda: None
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, "ggufkit-prepare")
    )
    scoring: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "ggufkit-score")
    )

    def tokenize(self, text: str, *, special: bool = True, ends: bool = False) -> list[int]:
        """Tokens of a prompt, at least one.

        Args:
            text: the prompt.
            special: whether spelled-out special tokens become tokens.
            ends: whether the token comes last that the tokenizer ends a text with.

        Raises:
            UsageError: if there are none, or the vocabulary cannot express the text.
        """
        tokens = self.words.tokenize(text, special=special, ends=ends)
        if not tokens:
            raise UsageError("the prompt is empty")
        return tokens

    def tokens_of(
        self, prompt: str | list[int], *, room: int | None = None, ends: bool = False
    ) -> list[int]:
        """Tokens of a prompt that is text, or is tokens already.

        Args:
            prompt: what a client sent.
            room: tokens that there may be; None for those of the context.
            ends: whether the token comes last that the tokenizer ends a text with;
                tokens are taken as they are.

        Raises:
            UsageError: if there are none, or some that the model does not know.
            ContextError: if there are too many.
        """
        room = self.engine.context if room is None else room
        if isinstance(prompt, str):
            self._check_length(prompt, room)
            tokens = self.tokenize(prompt, ends=ends)
        else:
            tokens = prompt
        if not tokens:
            raise UsageError("the prompt is empty")
        if not (min(tokens) >= 0 and max(tokens) < self.words.size):
            raise UsageError(f"a token of the prompt is not among the model's {self.words.size}")
        if len(tokens) > room:
            raise ContextError(f"the prompt has {len(tokens)} tokens, and the context {room}")
        return tokens

    def _check_length(self, text: str, room: int) -> None:
        """Refuse what cannot fit before it is tokenized, which may take a minute."""
        nbytes = len(text.encode())
        # It is rarely asked for, so that nothing waits for a look at all tokens.
        if nbytes > room * _SURELY_LONG and nbytes > room * self.words.longest_piece:
            raise ContextError(f"the prompt has {nbytes} bytes, too many for {room} tokens")

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Free its memory.

        Args:
            drain: finish what runs and waits first.
            timeout: seconds after which the rest is cancelled.
        """
        self.engine.close(drain=drain, timeout=timeout)
        if self.prompts is not None:
            self.prompts.close()
        if self.scorer is not None:
            self.scorer.close()
        self.threads.shutdown(cancel_futures=True)
        self.scoring.shutdown(cancel_futures=True)
        self.free()


def load(
    name: str, path: Path, options: HostOptions | None = None, progress: Progress = SILENT
) -> Hosted:
    """Load a model to serve many.

    Args:
        name: what clients call it.
        path: the GGUF.
        options: how.
        progress: told what is not as asked for.

    Raises:
        ToolError: if it cannot be loaded, or memory does not suffice.
        IntegrityError: if the file is broken.
        UsageError: if the chat template that is given cannot be used.
    """
    options = options or HostOptions()
    model = Model(path, options.model, progress=progress)
    try:
        room = sized(model.metadata, options, on_host=model.gpu_layers == 0, progress=progress)
        prompts = _prompts(model, options.chat_template, progress)
        engine = open_engine(
            model,
            room,
            EngineOptions(parallel=options.parallel, queue=options.queue),
            draft=options.draft,
            loading=options.model,
            progress=progress,
        )
    except BaseException:
        model.close()
        raise
    return Hosted(
        name=name,
        engine=engine,
        words=model.vocabulary,
        prompts=prompts,
        scorer=Scorer(model, room),
        recommended=dict(model.metadata.sampling),
        adapters=options.adapters,
        free=model.close,
    )


def _prompts(model: Model, given: str | None, progress: Progress) -> PromptMaker | None:
    try:
        return PromptMaker(Renderer(find_template(model.metadata, model.library, given)))
    except NoTemplateError:
        progress.warn(
            f"{model.path.name} has no chat template, so /v1/chat/completions cannot serve it"
        )
        return None


def sized(
    metadata: Metadata,
    options: HostOptions,
    *,
    on_host: bool = True,
    progress: Progress = SILENT,
) -> ContextOptions:
    """The context with numbers in the place of each None.

    All users together have room for as many whole contexts as answers are written
    at once, as long as that takes a quarter of the free memory at most, and for
    one context in any case. As many sequences again can be remembered; those lie
    in plain memory, or in the same room if it does not hold all contexts whole.

    Args:
        metadata: of the model.
        options: what was asked for.
        on_host: whether keys and values lie in this machine's memory.
        progress: warned if memory is short.
    """
    asked = options.context
    size = context_size(metadata, asked.context, progress)
    per_token = cache_nbytes(metadata, asked) if on_host else 0
    cells = asked.cells or size * options.parallel
    free = host.available_memory_nbytes()
    if asked.cells is None and per_token and free:
        cells = max(size, min(cells, int(free * _SHARE / per_token)))
    check_room(metadata, cells, cache_nbytes=per_token, progress=progress)
    # A whole context for each is the faster way, where there is memory for it.
    lanes = options.parallel if cells == size * options.parallel else None
    return replace(asked, context=size, cells=cells, sequences=2 * options.parallel, lanes=lanes)


def needed_nbytes(metadata: Metadata, path_nbytes: int, options: HostOptions) -> int:
    """Memory that a model will take, roughly: its weights, keys and values.

    Args:
        metadata: of the model.
        path_nbytes: size of its files.
        options: how it will be loaded.
    """
    room = sized(metadata, options)
    cells = room.cells or 0
    if room.lanes:
        cells *= 2  # as much again may be remembered in plain memory
    return int(path_nbytes + cells * cache_nbytes(metadata, options.context))
