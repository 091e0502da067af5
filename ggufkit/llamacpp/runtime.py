"""Talking to a model through llama-cpp-python. The only importer of it.

Its C interface is used, not its ``Llama`` class: that one falls back to a
Llama-2 chat format in silence, replaces templates it believes to recognise,
and cuts tokens that are longer than 32 bytes.
"""

import codecs
import ctypes
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

from ggufkit import settings
from ggufkit.errors import GgufkitError, ToolError, UsageError
from ggufkit.llamacpp import host, toolchain
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata, split_count, split_parts
from ggufkit.llamacpp.pin import COMMIT_LENGTH, read_pin
from ggufkit.llamacpp.template import Message, render
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.llamacpp.vocabulary import Vocabulary
from ggufkit.progress import SILENT, Progress

DEFAULT_CONTEXT = 8192
"""Context if none is asked for: a trained context of 128k would take many
gigabytes of memory that a chat does not need."""
ALL_LAYERS = -1
_BATCH = 512
_CELL_NBYTES = 48
"""What llama.cpp writes down about each token of context (``llama-kv-cells.h``)."""
_GIB = 1 << 30
_PENALTY_WINDOW = 64
_RANDOM_SEED = 0xFFFFFFFF
_ERROR_LEVEL = 4
"""``GGML_LOG_LEVEL_ERROR`` of ggml.h; the binding's own table is an older one."""
_BUILD_HINT = "Run: ggufkit build"

_errors: deque[str] = deque(maxlen=8)
_kept: list[Any] = []
"""C callbacks: ctypes would free them while the library still calls them."""


class ContextError(GgufkitError):
    """The conversation does not fit into the context."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; None is the model's recommendation, or llama.cpp's.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_k: choose among this many; 0 for all.
        top_p: choose among the most likely that sum up to this.
        min_p: leave out tokens less likely than this share of the likeliest.
        repeat_penalty: above 1, tokens of late become less likely.
        max_tokens: length of an answer at most.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None


_DEFAULTS = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
}
"""llama.cpp's own (``common_params_sampling``)."""


@dataclass
class Statistics:
    """One answer in numbers.

    Attributes:
        prompt_tokens: tokens of the conversation before the answer.
        cached_tokens: how many of them were still known from the last answer.
        prompt_seconds: time to read the rest.
        generated_tokens: tokens of the answer.
        generate_seconds: time to write them.
        context_used: tokens in the context after the answer.
        context: size of the context.
        stopped: why the answer ended: ``end`` is the model's own decision;
            empty if it failed or was never begun.
    """

    context: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generate_seconds: float = 0.0
    context_used: int = 0
    stopped: Literal["", "end", "limit", "context", "interrupted"] = ""

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing."""
        return self.generated_tokens / self.generate_seconds if self.generate_seconds else 0.0


def load_llama_cpp(build: NativeBuild | None = None) -> ModuleType:
    """Import llama-cpp-python so that it runs on the native build.

    Its structures mirror one commit of llama.cpp by hand; on any other, calls
    would corrupt memory. So both must be exactly the pin's.

    Raises:
        ToolError: if the binding or the build is missing or another than the pin's.
    """
    build = build or toolchain.find_build()
    pin = read_pin()
    try:
        version = packages.version(pin.package)
    except packages.PackageNotFoundError as error:
        raise ToolError(f"{pin.package} is not installed", _BUILD_HINT) from error
    if version != pin.version:
        raise ToolError(f"{pin.package} is {version}, but {pin.version} is needed", _BUILD_HINT)
    if build.commit[:COMMIT_LENGTH] != pin.commit:
        raise ToolError(
            f"{pin.package} {version} fits llama.cpp {pin.commit} alone, "
            f"but the native build is of {build.commit}",
            "Chat with the pinned build: unset GGUFKIT_NATIVE, then run: ggufkit build",
        )
    wanted = str(build.bin)
    if "llama_cpp" in sys.modules and os.environ.get("LLAMA_CPP_LIB_PATH") != wanted:
        raise ToolError(
            "llama_cpp was imported before, with other libraries than those of the native build",
            f"Import it through ggufkit, or set LLAMA_CPP_LIB_PATH={wanted} first",
        )
    os.environ["LLAMA_CPP_LIB_PATH"] = wanted
    import llama_cpp
    from llama_cpp import llama_cpp as library

    if not _kept:
        callback = library.llama_log_callback(_log)
        _kept.append(callback)
        library.llama_log_set(callback, ctypes.c_void_p(0))
        library.llama_backend_init()
    assert llama_cpp.__version__ == version
    module: ModuleType = library
    return module


def _log(level: int, text: bytes, _: Any) -> None:
    """Keep errors; llama.cpp prints a hundred lines for a model otherwise."""
    if level == _ERROR_LEVEL and text.strip():
        _errors.append(text.decode("utf-8", "replace").strip())


def drain_errors() -> str:
    """What llama.cpp told as errors since it was last asked."""
    told = "; ".join(dict.fromkeys(_errors))
    _errors.clear()
    return told


def supports_gpu_offload(build: NativeBuild | None = None) -> bool:
    """Whether the native build can put layers on a GPU that is here."""
    return bool(load_llama_cpp(build).llama_supports_gpu_offload())


class ChatModel:
    """A GGUF that is loaded and answers conversations.

    Args:
        path: the GGUF; of one in parts, the first.
        gpu_layers: layers to put on a GPU; :data:`ALL_LAYERS` for all.
        context: tokens of context; None for the trained one, at most
            :data:`DEFAULT_CONTEXT`.
        threads: None for the setting's.
        seed: of the sampling; None for a new one each time.
        chat_template: a file with a Jinja template, or the name of one that
            llama.cpp has built in; None for the model's own.
        build: the native build.
        progress: told warnings.

    Raises:
        ToolError: if the library cannot be used, or cannot load the model.
        UsageError: if there is no chat template.
        IntegrityError: if the file is broken.
    """

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int = 0,
        context: int | None = None,
        threads: int | None = None,
        seed: int | None = None,
        chat_template: str | None = None,
        build: NativeBuild | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.path = path
        self.metadata = Metadata(read_gguf(path))
        self._model: Any = None
        self._context: Any = None
        self._vocabulary: Vocabulary
        self._memory: Any = None
        check_parts(self.metadata)
        self._progress = progress
        self._seed = _RANDOM_SEED if seed is None else seed
        build = build or toolchain.find_build()
        self._library = lib = load_llama_cpp(build)
        self.template = self._find_template(chat_template)
        if gpu_layers and not lib.llama_supports_gpu_offload():
            progress.warn(no_gpu_message(build.backend))
        self.context = self._context_size(context)
        self._check_room(on_host=gpu_layers == 0)
        self._load(gpu_layers, threads or settings.threads())
        self._known: list[int] = []
        self.statistics = Statistics(self.context)

    def _find_template(self, given: str | None) -> str:
        """Jinja text, or the name of one of llama.cpp's own."""
        names = self._builtin_templates()
        if given is None:
            if not self.metadata.chat_template:
                raise UsageError(
                    f"{self.path.name} has no chat template, so nobody knows how it was "
                    "taught to converse",
                    "Give one: --chat-template FILE, or the name of a usual one: "
                    "--chat-template chatml",
                )
            return self.metadata.chat_template
        if given in names:
            return given
        try:
            return Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"'{given}' is neither a readable file nor a chat template of llama.cpp",
                f"Those are: {', '.join(names)}",
            ) from error

    def _builtin_templates(self) -> tuple[str, ...]:
        count = self._library.llama_chat_builtin_templates(None, 0)
        names = (ctypes.c_char_p * count)()
        self._library.llama_chat_builtin_templates(names, count)
        return tuple(sorted(n.decode() for n in names if n))

    def _context_size(self, wanted: int | None) -> int:
        trained = self.metadata.trained_context
        if wanted is None:
            return min(trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if trained and wanted > trained:
            self._progress.warn(
                f"a context of {wanted} tokens is more than the {trained} that the model "
                "was trained with; answers may get worse"
            )
        return wanted

    def _check_room(self, *, on_host: bool) -> None:
        """Forecast, because a system that is out of memory ends programs without a word."""
        per_token = _CELL_NBYTES + (cache_nbytes_per_token(self.metadata) if on_host else 0)
        need = self.context * per_token
        total, available = host.total_memory_nbytes(), host.available_memory_nbytes()
        told = f"a context of {self.context} tokens takes {need / _GIB:.1f} GiB of memory"
        if total and need > total:
            raise ToolError(
                f"{told}, and this machine has {total / _GIB:.1f} GiB",
                f"Ask for a smaller one: -c {total // 2 // per_token}",
            )
        if available and need > available:
            self._progress.warn(f"{told}, and only {available / _GIB:.1f} GiB are free")

    def _load(self, gpu_layers: int, threads: int) -> None:
        lib = self._library
        _errors.clear()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self._model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise ToolError(f"llama.cpp cannot load {self.path}: {drain_errors()}")
        settings_ = lib.llama_context_default_params()
        settings_.n_ctx = self.context
        settings_.n_batch = settings_.n_ubatch = min(_BATCH, self.context)
        settings_.n_threads = settings_.n_threads_batch = threads
        settings_.no_perf = True
        self._context = lib.llama_init_from_model(self._model, settings_)
        if not self._context:
            told = drain_errors()
            self.close()
            raise ToolError(
                f"there is no room for a context of {self.context} tokens: {told}",
                "Ask for a smaller one: -c 2048",
            )
        self._vocabulary = Vocabulary(lib, self._model)
        self._memory = lib.llama_get_memory(self._context)
        # llama.cpp rounds up; what was asked for stays the limit.
        self.context = min(self.context, int(lib.llama_n_ctx(self._context)))
        self._tell_errors()

    def _tell_errors(self) -> None:
        if told := drain_errors():
            self._progress.warn(f"llama.cpp: {told}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory."""
        context, self._context = self._context, None
        if context:
            self._library.llama_free(context)
        model, self._model = self._model, None
        if model:
            self._library.llama_model_free(model)

    # From messages to tokens and back.

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that a conversation becomes, by the chat template."""
        if self.template in self._builtin_templates():
            return self._render_builtin(messages)
        special = self.metadata.special
        return render(self.template, messages, bos=special("bos"), eos=special("eos"))

    def _render_builtin(self, messages: Sequence[Message]) -> str:
        lib = self._library
        chat = (lib.llama_chat_message * len(messages))(
            *((m["role"].encode(), m["content"].encode()) for m in messages)
        )
        name = self.template.encode()
        length = lib.llama_chat_apply_template(name, chat, len(messages), True, None, 0)
        buffer = ctypes.create_string_buffer(max(0, length) + 1)
        length = lib.llama_chat_apply_template(name, chat, len(messages), True, buffer, len(buffer))
        if length < 0:
            raise UsageError(f"the chat template '{self.template}' cannot take this conversation")
        return buffer.raw[:length].decode()

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a prompt; the BOS token comes first if the model wants it."""
        return self._vocabulary.tokenize(text)

    def _piece(self, token: int) -> bytes:
        return self._vocabulary.piece(token)

    # Answering.

    def stream(
        self, messages: Sequence[Message], sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Write the answer to a conversation, piece by piece.

        Afterwards, also after an interruption, :attr:`statistics` tells about it.

        Raises:
            ContextError: if the conversation, or its answer, does not fit.
            TemplateError: if the chat template refuses the messages.
            UsageError: if a message is not text.
        """
        sampling = sampling or Sampling()
        self.statistics = told = Statistics(self.context)
        _check_encodable(messages)
        tokens = self.tokenize(self.prompt(messages))
        told.prompt_tokens = len(tokens)
        if len(tokens) >= self.context:
            raise ContextError(
                f"the conversation has {len(tokens)} tokens, and the context {self.context}",
                "Begin anew with /reset, or give more room: -c " + str(2 * self.context),
            )
        sampler = self._sampler(sampling)
        try:
            started = time.monotonic()
            try:
                told.cached_tokens = self._read(tokens)
            finally:
                told.prompt_seconds = time.monotonic() - started
                told.context_used = len(self._known)
            yield from self._write(sampler, sampling.max_tokens, told)
        except (KeyboardInterrupt, GeneratorExit):
            told.stopped = "interrupted"
            raise
        finally:
            self._library.llama_sampler_free(sampler)
            self._tell_errors()
        if told.stopped == "context":
            raise ContextError(
                f"the answer filled the context of {self.context} tokens",
                "Begin anew with /reset, or give more room: -c " + str(2 * self.context),
            )

    def _sampler(self, sampling: Sampling) -> Any:
        lib = self._library
        recommended = self.metadata.sampling

        def value(name: str) -> Any:
            given = getattr(sampling, name)
            return given if given is not None else recommended.get(name, _DEFAULTS[name])

        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        parts = []
        if value("repeat_penalty") != 1:
            size = self._vocabulary.size
            parts.append(
                lib.llama_sampler_init_penalties(
                    size, _PENALTY_WINDOW, value("repeat_penalty"), 0.0, 0.0
                )
            )
        if value("temperature") <= 0:
            parts.append(lib.llama_sampler_init_greedy())
        else:
            parts += [
                lib.llama_sampler_init_top_k(int(value("top_k"))),
                lib.llama_sampler_init_top_p(value("top_p"), 1),
                lib.llama_sampler_init_min_p(value("min_p"), 1),
                lib.llama_sampler_init_temp(value("temperature")),
                lib.llama_sampler_init_dist(self._seed),
            ]
        for part in parts:
            lib.llama_sampler_chain_add(chain, part)
        return chain

    def _read(self, tokens: list[int]) -> int:
        """Bring the context to exactly these tokens; how many were there already."""
        common = 0
        # The last token is always read again: its logits are what sampling needs.
        for old, new in zip(self._known, tokens[:-1], strict=False):
            if old != new:
                break
            common += 1
        if not self._library.llama_memory_seq_rm(self._memory, 0, common, -1):
            # Recurrent models cannot forget a part.
            self._library.llama_memory_clear(self._memory, True)
            common = 0
        self._known = self._known[:common]
        for start in range(common, len(tokens), _BATCH):
            self._decode(tokens[start : start + _BATCH])
        return common

    def _decode(self, tokens: list[int]) -> None:
        lib = self._library
        batch = (lib.llama_token * len(tokens))(*tokens)
        status = lib.llama_decode(self._context, lib.llama_batch_get_one(batch, len(tokens)))
        if status != 0:
            self._library.llama_memory_clear(self._memory, True)
            self._known = []
            raise ToolError(f"llama.cpp failed to compute (status {status}): {drain_errors()}")
        self._known += tokens

    def _write(self, sampler: Any, limit: int | None, told: Statistics) -> Iterator[str]:
        lib = self._library
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        started = time.monotonic()
        try:
            while True:
                if limit is not None and told.generated_tokens >= limit:
                    told.stopped = "limit"
                    break
                token = int(lib.llama_sampler_sample(sampler, self._context, -1))
                if lib.llama_vocab_is_eog(self._vocabulary.pointer, token):
                    told.stopped = "end"
                    break
                told.generated_tokens += 1
                if text := decoder.decode(self._piece(token)):
                    yield text
                if len(self._known) >= self.context:
                    told.stopped = "context"
                    break
                self._decode([token])
            if rest := decoder.decode(b"", final=True):
                yield rest
        finally:
            told.generate_seconds = time.monotonic() - started
            told.context_used = len(self._known)


def cache_nbytes_per_token(metadata: Metadata) -> int:
    """Bytes of keys and values (F16) of one token; 0 where attention is of another kind."""
    layers = metadata.of_architecture("block_count")
    heads = metadata.of_architecture("attention.head_count_kv")
    width = metadata.of_architecture("embedding_length")
    queries = metadata.of_architecture("attention.head_count")
    other = ("attention.kv_lora_rank", "ssm.state_size", "wkv.head_size")
    if any(metadata.of_architecture(key) for key in other):
        return 0
    if not all(isinstance(n, int) and n > 0 for n in (layers, heads, width, queries)):
        return 0
    key = metadata.of_architecture("attention.key_length") or width // queries
    value = metadata.of_architecture("attention.value_length") or width // queries
    return int(layers * heads * (key + value) * 2)


def no_gpu_message(backend: str) -> str:
    """Why layers cannot go to a GPU, and what would help."""
    if backend == "cpu":
        return (
            "this is a CPU-only build of llama.cpp, so -ngl changes nothing; "
            "for a GPU: ggufkit build --backend cuda (or vulkan, metal, hip)"
        )
    return (
        f"this build of llama.cpp is for {backend}, but sees no such GPU here, "
        "so -ngl changes nothing; what is seen: ggufkit doctor"
    )


def _check_encodable(messages: Sequence[Message]) -> None:
    """Python hands over bytes that are not UTF-8 as characters that cannot be encoded."""
    try:
        for message in messages:
            message["content"].encode()
    except UnicodeEncodeError as error:
        raise UsageError("the message is not UTF-8 text", "Convert it with: iconv") from error


def check_parts(metadata: Metadata) -> None:
    """A model in parts is loaded by its first, and needs all."""
    if split_count(metadata.gguf) < 2:
        return
    parts = split_parts(metadata.gguf)
    if metadata.get("split.no"):
        raise UsageError(
            f"{metadata.gguf.path.name} is a later part", f"Name the first: {parts[0]}"
        )
    missing = [p.name for p in parts if not p.exists()]
    if missing:
        raise UsageError(f"parts of the model are missing: {', '.join(missing)}")
