"""Reading a text with a model, for the logits: llama-perplexity's procedure, in this process.

Chunks, the BOS token, the scored half, the batches and the context's settings are
those of ``tools/perplexity/perplexity.cpp`` at the pinned commit, so the logits are
the ones that llama-perplexity sees. They are not copied: what is given out is a
view on llama.cpp's own buffer.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ggufkit import settings
from ggufkit.errors import GgufkitError, ToolError, UsageError
from ggufkit.llamacpp import devices, toolchain
from ggufkit.llamacpp.expressing import Expressing
from ggufkit.llamacpp.ggml import load_library
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.runtime import check_parts, drain_errors, load_llama_cpp
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.llamacpp.vocabulary import on_a_deep_stack
from ggufkit.values import GGUFFile

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

_BATCH = 512
"""Tokens computed at once. It is the physical batch of llama-perplexity; its logical
batch is four times that, which changes no number and needs four times the memory."""
_LOGITS_NBYTES = 256 << 20
"""Logits of one decoder call at most. llama.cpp holds them twice: as it computes
them and as it gives them out."""
_MIN_BATCH = 32
"""A physical batch of fewer tokens makes matrix products inefficient."""
_F32 = 0


@dataclass(frozen=True)
class Layout:
    """How chunks are given to the decoder.

    It depends on the context and the vocabulary alone, never on how many models
    are at work: so a chunk's logits are the same in every run.

    Attributes:
        context: tokens per chunk.
        sequences: chunks in one decoder call.
        batch: tokens of each chunk in one call.
        rows: positions in one call whose logits are asked for, at most.
    """

    context: int
    sequences: int
    batch: int
    rows: int

    def calls(self, length: int, first: int) -> Iterator["Call"]:
        """The decoder calls that read chunks of some length, scored from a position on."""
        for start in range(0, length, self.batch):
            end = min(start + self.batch, length)
            begin = min(max(first, start), end)
            yield Call(start, end, begin, max(begin, min(end, length - 1)))


@dataclass(frozen=True)
class Call:
    """Positions of one decoder call, the same in each of its chunks.

    The last position of a chunk is never scored, because nothing follows it; its
    logits are asked for all the same, as llama-perplexity does, so that products
    of the same shapes are computed.

    Attributes:
        start: the first position read.
        end: behind the last position read.
        begin: the first position whose logits are asked for.
        scored: behind the last position that is scored.
    """

    start: int
    end: int
    begin: int
    scored: int


def layout_for(context: int, vocabulary: int, *, whole_chunks: bool = False) -> Layout:
    """As much as llama-perplexity computes at once, or less where its logits would be huge.

    Args:
        context: tokens per chunk.
        vocabulary: tokens that the model knows.
        whole_chunks: chunks come one by one, and any position may be scored.
    """
    room = max(_MIN_BATCH, _LOGITS_NBYTES // (4 * vocabulary))
    scored = context if whole_chunks else context - context // 2
    batch = min(context, _BATCH)
    while min(batch, scored) > room:
        batch = max(_MIN_BATCH, batch // 2)
    sequences = 1 if whole_chunks else max(1, min(_BATCH // context, room // scored))
    return Layout(context, sequences, batch, sequences * min(batch, scored))


@dataclass(frozen=True)
class Block:
    """Logits of neighbouring positions of one chunk.

    Attributes:
        first: the position of the first row in its chunk; the row is what the
            model says of the token after it.
        logits: shape (positions, vocabulary); a view that is valid until the
            model decodes again.
    """

    first: int
    logits: Logits


class Scorer:
    """A GGUF that is loaded and reads chunks.

    Args:
        path: the GGUF; of one in parts, the first.
        context: tokens per chunk.
        gpu_layers: layers to put on a GPU; negative for all.
        threads: None for the setting's.
        whole_chunks: every position may be scored, not only the second half, and
            chunks come one by one.
        build: the native build.

    Raises:
        ToolError: if the library cannot be used, or cannot load the model.
        GgufkitError: if the model is none that predicts the next token.
        UsageError: if the context is longer than the positions that the model knows.
        IntegrityError: if the file is broken.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        gpu_layers: int = 0,
        threads: int | None = None,
        whole_chunks: bool = False,
        build: NativeBuild | None = None,
    ) -> None:
        self.path = path
        self._build = build or toolchain.find_build()
        self._library = load_llama_cpp(self._build)
        self._threads = threads or settings.threads()
        self._model: Any = None
        self._context: Any = None
        header = read_gguf(path, arrays=False)
        check_parts(Metadata(header))
        _check_positions(header, context)
        self._load(gpu_layers)
        try:
            self._vocabulary = self._library.llama_model_get_vocab(self._model)
            self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))
            self.layout = layout_for(context, self.vocabulary, whole_chunks=whole_chunks)
            self._context = self._new_context()
        except BaseException:
            self.close()
            raise

    def _load(self, gpu_layers: int) -> None:
        lib = self._library
        drain_errors()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        held = devices.limit_to(params, self._build, devices.places_for_layers(self._build))
        self._model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        del held
        if not self._model:
            raise ToolError(f"llama.cpp cannot load {self.path}: {drain_errors()}")
        if lib.llama_model_has_encoder(self._model) or not lib.llama_model_has_decoder(self._model):
            self.close()
            raise GgufkitError(
                f"{self.path.name} is no model that predicts the next token",
                "Perplexity and divergence are of language models that write from left to right",
            )

    def _new_context(self, watch: Any = None) -> Any:
        """A context with llama-perplexity's settings; ``watch`` sees every tensor."""
        lib, layout = self._library, self.layout
        params = lib.llama_context_default_params()
        params.n_ctx = layout.sequences * layout.context
        params.n_seq_max = layout.sequences
        params.n_batch = layout.sequences * layout.batch
        params.n_ubatch = params.n_batch
        params.n_outputs_max = layout.rows
        params.n_threads = params.n_threads_batch = self._threads
        params.swa_full = False
        params.no_perf = True
        if watch is not None:
            params.cb_eval = watch
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ToolError(
                f"llama.cpp has no room to read {self.path.name} with a context of "
                f"{layout.context} tokens: {drain_errors()}",
                "Ask for a smaller one: --context 512",
            )
        return context

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory. Logits that were given out are no longer valid."""
        context, self._context = self._context, None
        if context:
            self._library.llama_free(context)
        model, self._model = self._model, None
        if model:
            self._library.llama_model_free(model)

    # Tokens.

    def tokenize(self, text: bytes) -> Tokens:
        """The tokens of a text, as llama-perplexity gets them from a file of it.

        Special tokens spelled in the text are plain characters; a newline at the
        very end is not read; the BOS token comes first where the vocabulary wants it.

        Raises:
            UsageError: if it has characters that the vocabulary cannot express.
            ToolError: if llama.cpp cannot tokenize it.
        """
        lib = self._library
        text = text.removesuffix(b"\n")
        Expressing(lib, self._vocabulary).check(text, special=False)
        found = np.empty(len(text) + 2, np.int32)
        room = found.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        asked = (self._vocabulary, text, len(text), room, len(found), True, False)
        count = on_a_deep_stack(lambda: int(lib.llama_tokenize(*asked)), text)
        if count < 0:
            raise ToolError(f"llama.cpp cannot tokenize a text of {len(text):,} bytes")
        return found[:count].copy()

    @property
    def bos(self) -> int | None:
        """The token that stands in for a chunk's first, if the vocabulary wants one."""
        lib = self._library
        wanted = lib.llama_vocab_get_add_bos(self._vocabulary)
        return int(lib.llama_vocab_bos(self._vocabulary)) if wanted else None

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a control token."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_token_to_piece(
                self._vocabulary, token, buffer, size, 0, False
            )
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    # Logits.

    def read(self, chunks: Sequence[Tokens], first: int | None = None) -> Iterator[list[Block]]:
        """Read some chunks, from an empty context, and give their logits call by call.

        Each step gives one block for each chunk; they are valid until the next step.

        Args:
            chunks: at most as many as the layout has sequences, all of one length
                not above the context.
            first: the position whose logits are the first to be given; None for
                the middle of the context. The last position has none: what would
                come after it is not in the chunk.

        Raises:
            ToolError: if llama.cpp fails.
        """
        assert 1 <= len(chunks) <= self.layout.sequences
        first = self.layout.context // 2 if first is None else first
        yield from self._read(self._context, chunks, first)

    def _read(self, context: Any, chunks: Sequence[Tokens], first: int) -> Iterator[list[Block]]:
        lib = self._library
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for call in self.layout.calls(len(chunks[0]), first):
            self._decode(context, np.stack([c[call.start : call.end] for c in chunks]), call)
            rows, used = call.end - call.begin, call.scored - call.begin
            if used:
                logits = self._logits(context, len(chunks) * rows)
                starts = range(0, len(chunks) * rows, rows)
                yield [Block(call.begin, logits[at : at + used]) for at in starts]

    def _decode(self, context: Any, tokens: Tokens, call: Call) -> None:
        lib, (sequences, length) = self._library, tokens.shape
        if call.start == 0 and self.bos is not None:
            tokens[:, 0] = self.bos
        positions = np.tile(np.arange(call.start, call.end, dtype=np.int32), sequences)
        wanted = (positions >= call.begin).astype(np.int8)
        ones = np.ones(tokens.size, np.int32)
        numbers = np.repeat(np.arange(sequences, dtype=np.int32), length)
        addresses = (numbers.ctypes.data + 4 * np.arange(tokens.size)).astype(np.uintp)
        batch = lib.llama_batch()
        batch.n_tokens = tokens.size
        for name, values in (
            ("token", tokens),
            ("pos", positions),
            ("n_seq_id", ones),
            ("seq_id", addresses),
            ("logits", wanted),
        ):
            pointer = dict(batch._fields_)[name]
            setattr(batch, name, ctypes.cast(values.ctypes.data, pointer))
        status = lib.llama_decode(context, batch)
        if status != 0:
            raise ToolError(
                f"llama.cpp failed to read with {self.path.name} (status {status}): "
                f"{drain_errors()}"
            )

    def _logits(self, context: Any, rows: int) -> Logits:
        pointer = self._library.llama_get_logits(context)
        if not pointer:
            raise GgufkitError(
                f"{self.path.name} gives no logits",
                "It may be a model that makes embeddings only",
            )
        logits = np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))
        logits.flags.writeable = False
        return logits

    # What is wrong with a model that gives no numbers.

    def first_broken_tensor(self, chunk: Tokens) -> str | None:
        """The first result that is not a finite number when a chunk is read again.

        Returns:
            llama.cpp's name of it, such as ``ffn_out-3`` (of the block 3); None if all are
            finite now.
        """
        watch = _Watch(self._build)
        callback = self._library.ggml_backend_sched_eval_callback(watch)
        context = self._new_context(callback)
        try:
            for _ in self._read(context, [chunk], len(chunk) // 2):
                pass
        finally:
            self._library.llama_free(context)
        return watch.found


def _check_positions(header: GGUFFile, context: int) -> None:
    """Learned positions end somewhere, and llama.cpp aborts the process behind them."""
    for tensor in header.tensors:
        if tensor.name == "position_embd.weight" and tensor.shape[-1] < context:
            raise UsageError(
                f"{header.path.name} has learned {tensor.shape[-1]} positions, and a context of "
                f"{context} tokens needs as many",
                f"Ask for a shorter one: --context {tensor.shape[-1]}",
            )


class _Watch:
    """llama.cpp's eval callback: remembers the first tensor with a NaN or an infinity."""

    def __init__(self, build: NativeBuild) -> None:
        self.found: str | None = None
        self._ggml = lib = load_library(build.bin)
        lib.ggml_get_name.restype = ctypes.c_char_p
        lib.ggml_get_name.argtypes = (ctypes.c_void_p,)
        lib.ggml_nbytes.restype = ctypes.c_size_t
        lib.ggml_nbytes.argtypes = (ctypes.c_void_p,)
        lib.ggml_is_contiguous.restype = ctypes.c_bool
        lib.ggml_is_contiguous.argtypes = (ctypes.c_void_p,)
        lib.ggml_backend_tensor_get.restype = None
        lib.ggml_backend_tensor_get.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_size_t, ctypes.c_size_t),
        )

    def __call__(self, tensor: int, ask: bool, _: Any) -> bool:
        # An asked tensor is computed and shown at once; others only in passing.
        if ask:
            return self.found is None
        if self.found is None and not self._is_finite(tensor):
            self.found = self._ggml.ggml_get_name(tensor).decode(errors="replace")
        return True

    def _is_finite(self, tensor: int) -> bool:
        # A ggml_tensor begins with its type.
        kind = ctypes.c_int32.from_address(tensor).value
        if kind != _F32 or not self._ggml.ggml_is_contiguous(tensor):
            return True
        values = np.empty(self._ggml.ggml_nbytes(tensor) // 4, np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        return bool(np.isfinite(values).all())
