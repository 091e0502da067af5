"""Predictions of a GGUF as exactly as llama.cpp computes them.

No flash attention, keys and values in float32, one batch: whoever compares two
implementations of a model does not want to measure these.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ggufkit.errors import GgufkitError, ToolError, UsageError
from ggufkit.llamacpp import devices, toolchain
from ggufkit.llamacpp.blocks import TYPE_NUMBERS
from ggufkit.llamacpp.runtime import drain_errors, load_llama_cpp
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.llamacpp.vocabulary import Vocabulary, on_a_deep_stack


class ExactModel:
    """A GGUF that is opened to be compared.

    Args:
        path: the GGUF; of one in parts, the first.
        threads: how many to use.
        build: the native build.

    Attributes:
        vocabulary: its tokens.

    Raises:
        ToolError: if the library cannot be used, or cannot load the model.
    """

    def __init__(self, path: Path, *, threads: int, build: NativeBuild | None = None) -> None:
        self.path = path
        self._threads = threads
        self._build = build or toolchain.find_build()
        self._library = lib = load_llama_cpp(self._build)
        drain_errors()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        # Weights stay as the file has them, mapped: repacking them costs a copy.
        params.use_extra_bufts = False
        held = devices.limit_to(params, self._build, ())
        self._model: Any = lib.llama_model_load_from_file(os.fsencode(path), params)
        del held
        if not self._model:
            raise ToolError(f"llama.cpp cannot open {path.name}: {drain_errors()}")
        self.vocabulary = Vocabulary(lib, self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free its memory."""
        model, self._model = self._model, None
        if model:
            self._library.llama_model_free(model)

    @property
    def window(self) -> int:
        """Tokens of the sliding window that llama.cpp computes with; 0 if there is none."""
        return int(self._library.llama_model_n_swa(self._model))

    @property
    def predicts(self) -> bool:
        """Whether it is a model that predicts the next token."""
        lib = self._library
        return not lib.llama_model_has_encoder(self._model) and bool(
            lib.llama_model_has_decoder(self._model)
        )

    def tokens(self, text: str) -> list[int] | None:
        """Tokens of a text with nothing put around it; None if it cannot be expressed."""
        try:
            return self._tokenize(text, around=False)
        except GgufkitError:
            return None

    def around(self) -> tuple[list[int], list[int]]:
        """Tokens that llama.cpp puts before and after a text."""
        bare, whole = (self._tokenize("a b", around=around) for around in (False, True))
        at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
        return whole[:at], whole[at + len(bare) :]

    def _tokenize(self, text: str, *, around: bool) -> list[int]:
        spelled = text.encode()
        room = (self._library.llama_token * (len(spelled) + 16))()
        asked = (self.vocabulary.pointer, spelled, len(spelled), room, len(room), around, True)
        count = on_a_deep_stack(lambda: int(self._library.llama_tokenize(*asked)), spelled)
        if count < 0:
            raise ToolError(f"llama.cpp cannot tokenize a text of {len(spelled)} bytes")
        return list(room[:count])

    def logits(self, tokens: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float32]:
        """Predictions after some positions of a text.

        Args:
            tokens: ids of the text, from its beginning.
            positions: from 0 on, in rising order.

        Returns:
            float32, shape (positions, vocabulary).

        Raises:
            ToolError: if llama.cpp fails.
            UsageError: if the model predicts no tokens.
        """
        lib = self._library
        if not self.predicts:
            raise UsageError(f"{self.path.name} is no model that predicts the next token")
        context = self._context(len(tokens), len(positions))
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            chosen = set(positions)
            for at, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = int(token), at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = at in chosen
            status = lib.llama_decode(context, batch)
            if status != 0:
                raise ToolError(
                    f"llama.cpp cannot run {self.path.name} (status {status}): {drain_errors()}"
                )
            pointer = lib.llama_get_logits(context)
            shape = (len(positions), self.vocabulary.size)
            return np.ctypeslib.as_array(
                ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape
            ).copy()
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)

    def _context(self, tokens: int, outputs: int) -> Any:
        lib = self._library
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(tokens, 32)
        params.n_outputs_max = outputs
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = TYPE_NUMBERS["F32"]
        params.flash_attn_type = 0
        params.no_perf = True
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ToolError(f"llama.cpp makes no context of {self.path.name}: {drain_errors()}")
        return context
