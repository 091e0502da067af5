"""One model, many conversations at once: llama.cpp's batches without its overhead in Python.

A :class:`Model` holds weights and vocabulary; a :class:`BatchContext` holds the
keys and values of many sequences in one pool of cells, computes batches that
mix them, and makes samplers. Arrays that llama.cpp reads are allocated once.
Who drives a context must do so from one thread: OpenMP keeps its threads for
the thread that calls, and llama.cpp's contexts are not locked.
"""

import ctypes
import ctypes.util
import enum
import math
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from ggufkit import settings
from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp import devices, toolchain
from ggufkit.llamacpp.blocks import TYPE_NUMBERS
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.images import Projector, Seen
from ggufkit.llamacpp.lanes import Lanes
from ggufkit.llamacpp.metadata import Metadata, split_parts, warn_of_vocabulary
from ggufkit.llamacpp.runtime import (
    ALL_LAYERS,
    DEFAULT_CONTEXT,
    cache_nbytes_per_token,
    check_parts,
    drain_errors,
    load_llama_cpp,
    no_gpu_message,
)
from ggufkit.llamacpp.sampling import Logits, Sampler, SamplingParams, holding
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.llamacpp.vocabulary import Vocabulary
from ggufkit.progress import SILENT, Progress

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""What llama.cpp stores keys and values as (``kv_cache_types`` of common/arg.cpp)."""
MAX_SEQUENCES = 256
"""``LLAMA_MAX_SEQ`` of llama-cparams.h."""
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_POOLING_NONE, _POOLING_MEAN = 0, 1
_EMBEDDING_CONTEXT = 2048
_ABORTED = 2
_FULL = 1

_connected: Counter[str] = Counter()
"""RPC servers that models of this process have layers on, and how many models."""

Adapters = tuple[tuple[str, float], ...]
"""LoRA adapters to apply, by name, with the scale of each; in order of names."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded.

    Attributes:
        gpu_layers: layers on GPUs and RPC servers; ``all``, or ``auto`` for as
            many as fit into their free memory; None for all if there are RPC
            servers, else for none.
        split: how much of them each device gets, RPC servers first; empty for
            shares by free memory.
        adapters: LoRA adapters (GGUF) by name; each request says which it wants.
        rpc: ``HOST:PORT`` of llama.cpp's RPC servers to spread layers over.
        mmap: whether weights are mapped from the file instead of read.
        mlock: whether weights are kept from being swapped out.
    """

    gpu_layers: int | Literal["all", "auto"] | None = None
    split: tuple[float, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    rpc: tuple[str, ...] = ()
    mmap: bool = True
    mlock: bool = False


@dataclass(frozen=True)
class ContextOptions:
    """The room that sequences share, and how it is computed.

    Attributes:
        context: tokens of one sequence at most; None for the trained length, at
            most :data:`~ggufkit.llamacpp.runtime.DEFAULT_CONTEXT`.
        cells: tokens that all sequences together may hold; None for ``context``,
            or that for each lane.
        sequences: how many sequences there may be, running or remembered.
        batch: tokens that are computed at once at most.
        threads: for single tokens; None for the setting's.
        batch_threads: for prompts; None for ``threads``.
        flash_attention: ``auto`` lets llama.cpp decide.
        key_type: how keys are stored, one of :data:`CACHE_TYPES`.
        value_type: how values are stored; other than floats needs flash attention.
        lanes: sequences that are computed at once at most, each with ``context``
            cells of its own; others lie aside meanwhile. None for one pool of
            cells for all, in which a shared beginning is stored once: less memory,
            and slower the more it holds. Models whose sequences cannot be copied
            whole (recurrent ones, sliding windows) have one pool in any case.
        outputs: places of one sequence in a batch that something may be sampled at.
    """

    context: int | None = None
    cells: int | None = None
    sequences: int = 16
    batch: int = 512
    threads: int | None = None
    batch_threads: int | None = None
    flash_attention: Literal["auto", "on", "off"] = "auto"
    key_type: str = "f16"
    value_type: str = "f16"
    lanes: int | None = None
    outputs: int = 1

    def __post_init__(self) -> None:
        for name in ("key_type", "value_type"):
            if getattr(self, name) not in CACHE_TYPES:
                raise UsageError(
                    f"the KV cache cannot be of type '{getattr(self, name)}'",
                    f"Use one of: {', '.join(CACHE_TYPES)}",
                )
        if not 1 <= self.sequences <= MAX_SEQUENCES:
            raise UsageError(
                f"{self.sequences} sequences are asked for; llama.cpp can do 1 to {MAX_SEQUENCES}"
            )
        for name in ("context", "cells", "batch", "threads", "batch_threads", "lanes", "outputs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, and must be at least 1")


class Decoded(enum.Enum):
    """How a batch went."""

    DONE = enum.auto()
    FULL = enum.auto()
    """No cells left for it; nothing has changed."""
    ABORTED = enum.auto()
    """Ended by :meth:`BatchContext.abort`; sequences may hold a part of it."""


class Model:
    """Weights and vocabulary of a GGUF.

    Args:
        path: the GGUF; of one in parts, the first.
        options: how to load it.
        build: the native build.
        progress: told what is not as asked for.

    Attributes:
        metadata: what the file says.
        vocabulary: its tokens; any thread may use it.
        gpu_layers: layers that were asked to be on a GPU; -1 for all.
        adapters: the LoRA adapters loaded.

    Raises:
        ToolError: if the library cannot be used, or cannot load the model.
        UsageError: if an adapter or address cannot be used.
        IntegrityError: if the file is broken.
    """

    def __init__(
        self,
        path: Path,
        options: ModelOptions | None = None,
        *,
        build: NativeBuild | None = None,
        progress: Progress = SILENT,
    ) -> None:
        options = options or ModelOptions()
        self.path = path
        self.metadata = Metadata(read_gguf(path))
        check_parts(self.metadata)
        warn_of_vocabulary(self.metadata.gguf, progress)
        self.build = build or toolchain.find_build()
        self.library = load_llama_cpp(self.build)
        self._progress = progress
        self.pointer: Any = None
        self._adapters: dict[str, Any] = {}
        devices.add_rpc_servers(self.build, options.rpc, _connected)
        self._places = devices.places_for_layers(self.build, options.rpc)
        wanted = options.gpu_layers
        if wanted is None:
            wanted = "all" if options.rpc else 0
        self.gpu_layers = self._gpu_layers(wanted)
        self._servers = Counter(options.rpc)
        _connected.update(self._servers)
        try:
            self._load(options)
            self.vocabulary = Vocabulary(self.library, self.pointer, self.metadata.stop_token_ids)
            for name, file in options.adapters.items():
                self._load_adapter(name, file)
        except BaseException:
            self.close()
            raise

    @property
    def adapters(self) -> Mapping[str, Any]:
        """LoRA adapters by name."""
        return MappingProxyType(self._adapters)

    @property
    def trained_context(self) -> int:
        """Tokens of context that it was trained with."""
        return int(self.library.llama_model_n_ctx_train(self.pointer))

    @property
    def forgets_parts(self) -> bool:
        """Whether the end of a sequence can be taken back; recurrent models cannot."""
        lib = self.library
        return not (
            lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer)
        )

    @property
    def on_gpu(self) -> bool:
        """Whether layers lie on a GPU of this machine."""
        return self.gpu_layers != 0 and any(place.kind != "rpc" for place in self._places)

    @property
    def remembers_all(self) -> bool:
        """Whether a copy of a sequence holds all of it; sliding windows leave out a part."""
        return int(self.library.llama_model_n_swa(self.pointer)) == 0

    def _gpu_layers(self, wanted: int | Literal["all", "auto"]) -> int:
        if not self._places:
            if wanted not in (0, "auto"):
                self._progress.warn(no_gpu_message(self.build.backend))
            return 0
        if wanted == "all":
            return ALL_LAYERS
        if wanted != "auto":
            return wanted
        count = self.metadata.of_architecture("block_count")
        layers = count if isinstance(count, int) else 0
        fit = devices.fitting_layers(
            sum(place.free_nbytes for place in self._places),
            model_nbytes=sum(p.stat().st_size for p in split_parts(self.metadata.gguf)),
            layers=layers,
            cache_nbytes=DEFAULT_CONTEXT * cache_nbytes_per_token(self.metadata),
        )
        names = ", ".join(place.name for place in self._places)
        self._progress.say(f"{fit} of {layers + 1} layers fit on {names}")
        return fit

    def _load(self, options: ModelOptions) -> None:
        lib = self.library
        drain_errors()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = self.gpu_layers
        params.load_mode = _load_mode(lib, options)
        held = devices.limit_to(params, self.build, self._places)
        if options.split:
            params.tensor_split = self._shares(options.split)
        self.pointer = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        del held
        if not self.pointer:
            raise ToolError(f"llama.cpp cannot load {self.path}: {drain_errors()}")
        if not lib.llama_model_has_decoder(self.pointer) and not self._embeds_only():
            raise ToolError(f"{self.path.name} is not a model that writes text")

    def _shares(self, split: tuple[float, ...]) -> Any:
        if len(split) > len(self._places):
            raise UsageError(
                f"layers are split {len(split)} ways, and there are {len(self._places)} devices",
                f"Those are: {', '.join(place.name for place in self._places) or 'none'}",
            )
        if not (all(math.isfinite(n) and n >= 0 for n in split) and sum(split) > 0):
            raise UsageError("shares of layers must be numbers from 0 on, not all 0")
        return (ctypes.c_float * int(self.library.llama_max_devices()))(*split)

    def _embeds_only(self) -> bool:
        return bool(self.library.llama_model_has_encoder(self.pointer))

    def _load_adapter(self, name: str, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"there is no LoRA adapter at {path}")
        drain_errors()
        adapter = self.library.llama_adapter_lora_init(self.pointer, os.fsencode(path))
        if not adapter:
            raise UsageError(f"llama.cpp cannot use the LoRA adapter {path}: {drain_errors()}")
        self._adapters[name] = adapter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free its memory. Contexts must be closed before. Adapters go with it."""
        self._adapters.clear()
        pointer, self.pointer = self.pointer, None
        if pointer:
            self.library.llama_model_free(pointer)
        _connected.subtract(self._servers)
        self._servers.clear()
        for endpoint in [e for e, models in _connected.items() if not models]:
            del _connected[endpoint]


def _load_mode(library: Any, options: ModelOptions) -> int:
    if options.mmap:
        name = "mmap+mlock" if options.mlock else "auto"
    else:
        name = "mlock" if options.mlock else "none"
    return int(library.llama_load_mode_from_str(name.encode()))


class BatchContext:
    """The sequences of one model, and the batch that is computed next.

    A round is: :meth:`add` tokens of sequences, :meth:`decode`, and a sampler's
    ``sample`` for each place that asked for an output.

    Args:
        model: the model; close the context first.
        options: room and speed.
        projector: what it sees with; close it after the context.

    Attributes:
        context: tokens of one sequence at most.
        cells: tokens of all sequences together at most.
        sequences: number of sequences; they are named 0, 1, ...
        at_once: how many of them may be in one batch.
        batch: tokens of one batch at most.
        can_trim: whether :meth:`forget` can take back the end of a sequence.
        can_share: whether :meth:`copy` can let sequences share a beginning.
        vocabulary: the model's.

    Raises:
        ToolError: if there is no room for it.
    """

    def __init__(
        self,
        model: Model,
        options: ContextOptions | None = None,
        projector: Projector | None = None,
    ) -> None:
        options = options or ContextOptions()
        self.model = model
        self.vocabulary = model.vocabulary
        self.can_trim = model.forgets_parts
        self.can_share = self.can_trim
        self._library = lib = model.library
        lanes = options.lanes if self.can_share and model.remembers_all else None
        self.at_once = min(lanes or options.sequences, options.sequences)
        self._stop = ctypes.create_string_buffer(2)
        self._adapters: Adapters = ()
        self._embedder: _Embedder | None = None
        self.context = options.context or min(
            model.trained_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT
        )
        params = self._params(options, self.at_once if lanes else 0)
        self._pointer = _open(model, params)
        self.sequences = options.sequences
        self.cells = int(lib.llama_n_ctx(self._pointer))
        self.context = min(self.context, int(lib.llama_n_ctx_seq(self._pointer)))
        self.batch = int(lib.llama_n_batch(self._pointer))
        self._threads = int(params.n_threads_batch)
        self._elsewhere = model.gpu_layers != 0
        self._projector = projector
        self._memory = lib.llama_get_memory(self._pointer)
        self._logits = Logits(lib, self._pointer, self.vocabulary)
        self._lanes = Lanes(lib, self._pointer, self.at_once, self.cells) if lanes else None
        self._forget = holding(lib, "llama_memory_seq_rm")
        self._copy = holding(lib, "llama_memory_seq_cp")
        self._arrays()

    def _params(self, options: ContextOptions, lanes: int) -> Any:
        params = self._library.llama_context_default_params()
        params.n_ctx = self.context * lanes if lanes else max(self.context, options.cells or 0)
        params.n_batch = params.n_ubatch = min(options.batch, params.n_ctx)
        params.n_seq_max = lanes or options.sequences
        params.n_outputs_max = min(params.n_batch, options.sequences * options.outputs)
        params.n_threads = options.threads or settings.threads()
        params.n_threads_batch = options.batch_threads or params.n_threads
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attention]
        params.type_k = TYPE_NUMBERS[options.key_type.upper()]
        params.type_v = TYPE_NUMBERS[options.value_type.upper()]
        params.kv_unified = not lanes
        # Otherwise what a sliding window has passed is lost, and no prefix can be reused.
        params.swa_full = True
        params.no_perf = True
        _set_abort(params, self._library, self._stop)
        return params

    def _arrays(self) -> None:
        lib, size = self._library, self.batch
        self._size = 0
        self._tokens = (lib.llama_token * size)()
        self._positions = (lib.llama_pos * size)()
        self._owners = (lib.llama_seq_id * size)()
        self._outputs = (ctypes.c_int8 * size)()
        width = ctypes.sizeof(lib.llama_seq_id)
        pointer = ctypes.POINTER(lib.llama_seq_id)
        start = ctypes.addressof(self._owners)
        self._owner_places = (pointer * size)(
            *(ctypes.cast(start + n * width, pointer) for n in range(size))
        )
        self._owner_counts = (ctypes.c_int32 * size)(*([1] * size))
        self._batch = lib.llama_batch(
            0,
            ctypes.cast(self._tokens, ctypes.POINTER(lib.llama_token)),
            None,
            ctypes.cast(self._positions, ctypes.POINTER(lib.llama_pos)),
            ctypes.cast(self._owner_counts, ctypes.POINTER(ctypes.c_int32)),
            ctypes.cast(self._owner_places, ctypes.POINTER(pointer)),
            ctypes.cast(self._outputs, ctypes.POINTER(ctypes.c_int8)),
        )

    # Batches.

    @property
    def room(self) -> int:
        """Tokens that still fit into the batch."""
        return self.batch - self._size

    def clear(self) -> None:
        """Begin an empty batch."""
        self._size = 0
        if self._lanes is not None:
            self._lanes.begin()

    def rank(self, sequence: int) -> int:
        """Where a sequence lies: single tokens are computed fastest in this order."""
        return sequence if self._lanes is None else self._lanes.rank(sequence)

    def add(self, sequence: int, position: int, tokens: Sequence[int], *, output: bool) -> int:
        """Put the next tokens of a sequence into the batch.

        Args:
            sequence: whose tokens they are.
            position: of the first of them in the sequence.
            tokens: as many as :attr:`room` at most.
            output: whether something will be sampled after the last of them.

        Returns:
            The place to sample at.
        """
        start, count = self._size, len(tokens)
        end = start + count
        if end > self.batch:
            raise ValueError(f"{count} tokens do not fit into a batch that has {start}")
        if self._lanes is not None:
            sequence = self._lanes.place(sequence)
        if count == 1:
            self._tokens[start] = tokens[0]
            self._positions[start] = position
            self._owners[start] = sequence
            self._outputs[start] = output
        else:
            self._tokens[start:end] = tokens
            self._positions[start:end] = range(position, position + count)
            self._owners[start:end] = [sequence] * count
            self._outputs[start:end] = [0] * count
            self._outputs[end - 1] = output
        self._size = end
        return end - 1

    def decode(self) -> Decoded:
        """Compute the batch. Python's lock is free meanwhile.

        Raises:
            ToolError: if llama.cpp fails; what sequences hold is then unknown.
        """
        if self._lanes is not None and self._lanes.full:
            return Decoded.FULL
        self._batch.n_tokens = self._size
        return self._outcome(self._library.llama_decode(self._pointer, self._batch))

    def see(self, sequence: int, position: int, image: Seen) -> Decoded:
        """Compute a part of an image as the next positions of a sequence, by itself.

        Raises:
            ToolError: if llama.cpp fails, or there is no projector.
        """
        if self._projector is None:
            raise ToolError("the model has no projector for images")
        self.clear()
        place = sequence
        if self._lanes is not None:
            place = self._lanes.place(sequence)
            if self._lanes.full:
                return Decoded.FULL
        status = self._projector.compute(
            self._pointer, image, sequence=place, start=position, batch=self.batch
        )
        if status == _FULL:
            self.forget(sequence, position)  # a part of it may have found room
        return self._outcome(status)

    def _outcome(self, status: int) -> Decoded:
        if status == 0:
            if self._elsewhere:
                # GPUs and servers are not done yet. Whoever looks at the outputs
                # would wait for them, and hold Python's lock meanwhile.
                self._library.llama_synchronize(self._pointer)
            return Decoded.DONE
        if status == _FULL:
            return Decoded.FULL
        if status == _ABORTED:
            return Decoded.ABORTED
        raise ToolError(f"llama.cpp failed to compute (status {status}): {drain_errors()}")

    def abort(self) -> None:
        """End what is being computed as soon as possible, from any thread, for good."""
        self._stop[0] = b"\1"

    def warm_up(self) -> None:
        """Compute one token, so that weights are in memory and threads exist."""
        self.clear()
        self.add(0, 0, [max(self.vocabulary.bos, 0)], output=True)
        self.decode()
        self.forget_all()
        self.clear()

    # Memory of sequences.

    def forget(self, sequence: int, start: int = 0) -> bool:
        """Take back the tokens of a sequence from a position on; False if it cannot."""
        if self._lanes is not None:
            return self._lanes.forget(sequence, start)
        return bool(self._forget(self._memory, sequence, start, -1))

    def copy(self, source: int, target: int, count: int) -> None:
        """Let an empty sequence begin with another's first tokens.

        In one pool they share the cells; otherwise the cells are copied.
        """
        if self._lanes is not None:
            self._lanes.copy(source, target, count)
            return
        self._copy(self._memory, source, target, 0, count)

    def forget_all(self) -> None:
        """Empty all sequences."""
        if self._lanes is not None:
            self._lanes.forget_all()
            return
        self._library.llama_memory_clear(self._memory, False)

    # What belongs to one answer.

    def sampler(self, params: SamplingParams) -> Sampler:
        """A sampler for one answer; any thread may make one.

        Raises:
            UsageError: if the grammar or a biased token cannot be.
        """
        return Sampler(self._library, self._pointer, self._logits, self.vocabulary, params)

    def use_adapters(self, adapters: Adapters) -> None:
        """Apply these LoRA adapters, and no others, to the batches to come."""
        if adapters == self._adapters:
            return
        lib, count = self._library, len(adapters)
        handles = (lib.llama_adapter_lora_p_ctypes * count)(
            *(self.model.adapters[name] for name, _ in adapters)
        )
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        if lib.llama_set_adapters_lora(self._pointer, handles, count, scales) != 0:
            raise ToolError(f"llama.cpp cannot apply LoRA adapters: {drain_errors()}")
        self._adapters = adapters

    def check_adapters(self, adapters: Adapters) -> None:
        """Say if there is no such adapter, or its scale is no number.

        Raises:
            UsageError: if so.
        """
        for name, scale in adapters:
            if name not in self.model.adapters:
                known = ", ".join(self.model.adapters) or "none"
                raise UsageError(f"there is no LoRA adapter '{name}'", f"There are: {known}")
            if not math.isfinite(scale):
                raise UsageError(f"the scale of the LoRA adapter '{name}' is {scale}")

    # Embeddings.

    @property
    def embedding_context(self) -> int:
        """Tokens of a text to embed at most."""
        return min(self.model.trained_context or _EMBEDDING_CONTEXT, _EMBEDDING_CONTEXT)

    def embed(self, tokens: Sequence[int]) -> "array[float]":
        """The embedding of a text: pooled as its model says, or else the mean; not normalized.

        Raises:
            ToolError: if llama.cpp fails.
        """
        if self._embedder is None:
            self._embedder = _Embedder(self.model, self.embedding_context, self._threads)
        return self._embedder.embed(tokens)

    def close(self) -> None:
        """Free its memory; samplers must be closed before."""
        if self._embedder is not None:
            self._embedder.close()
            self._embedder = None
        pointer, self._pointer = self._pointer, None
        if pointer:
            self._library.llama_free(pointer)


class _Embedder:
    """A context of its own for embeddings, so that it cannot disturb what is written."""

    def __init__(self, model: Model, size: int, threads: int) -> None:
        self._library = lib = model.library
        params = lib.llama_context_default_params()
        # A text is pooled within one batch, and may look ahead in it.
        params.n_ctx = params.n_batch = params.n_ubatch = size
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.no_perf = True
        self._pointer = _open(model, params)
        if lib.llama_pooling_type(self._pointer) == _POOLING_NONE:
            lib.llama_free(self._pointer)
            params.pooling_type = _POOLING_MEAN
            self._pointer = _open(model, params)
        self._width = int(lib.llama_model_n_embd_out(model.pointer))

    def embed(self, tokens: Sequence[int]) -> "array[float]":
        lib = self._library
        memory = lib.llama_get_memory(self._pointer)
        if memory:
            lib.llama_memory_clear(memory, False)
        spelled = (lib.llama_token * len(tokens))(*tokens)
        status = lib.llama_decode(self._pointer, lib.llama_batch_get_one(spelled, len(tokens)))
        place = lib.llama_get_embeddings_seq(self._pointer, 0) if status == 0 else None
        if not place:
            raise ToolError(f"llama.cpp cannot embed (status {status}): {drain_errors()}")
        return array("f", place[: self._width])

    def close(self) -> None:
        self._library.llama_free(self._pointer)


def _open(model: Model, params: Any) -> Any:
    drain_errors()
    pointer = model.library.llama_init_from_model(model.pointer, params)
    if not pointer:
        raise ToolError(
            f"there is no room for a context of {params.n_ctx} tokens: {drain_errors()}",
            "Ask for a smaller one: -c 2048",
        )
    return pointer


def _set_abort(params: Any, library: Any, flag: ctypes.Array[ctypes.c_char]) -> None:
    """Let llama.cpp look at a byte of ours before each operation.

    A callback in Python would take Python's lock hundreds of times per token.
    ``strlen`` of the C library answers the same question: is the first byte set?
    """
    strlen = ctypes.CDLL(ctypes.util.find_library("c") or None).strlen
    place = ctypes.cast(strlen, ctypes.c_void_p).value
    assert place is not None
    params.abort_callback = library.ggml_abort_callback(place)
    params.abort_callback_data = ctypes.cast(flag, ctypes.c_void_p)
