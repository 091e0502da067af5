"""The vocabulary of a loaded model: from text to tokens, and from tokens to bytes."""

import ctypes
from functools import cached_property
from types import ModuleType
from typing import Any

from ggufkit.errors import ToolError

_PIECE_NBYTES = 256
_MARGIN = 8
"""Tokens that a tokenizer may add to a text: special ones, a leading space."""


class Vocabulary:
    """What llama.cpp knows of a model's tokens. Only read, so any thread may ask.

    Args:
        library: the binding, as :func:`~ggufkit.llamacpp.runtime.load_llama_cpp` gives it.
        model: the loaded model's pointer; it must outlive this.

    Attributes:
        size: number of tokens.
        pointer: llama.cpp's own handle.
    """

    def __init__(self, library: ModuleType, model: Any) -> None:
        self._library = library
        self.pointer = library.llama_model_get_vocab(model)
        self.size = int(library.llama_vocab_n_tokens(self.pointer))
        self._pieces: tuple[list[bytes | None], list[bytes | None]] = (
            [None] * self.size,
            [None] * self.size,
        )

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        is_end = self._library.llama_vocab_is_eog
        return frozenset(t for t in range(self.size) if is_end(self.pointer, t))

    @cached_property
    def bos(self) -> int:
        """The token that begins a text; -1 if there is none."""
        return int(self._library.llama_vocab_bos(self.pointer))

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a prompt; the BOS token comes first if the model wants it.

        Args:
            text: the prompt.
            special: whether spelled-out special tokens become tokens.

        Raises:
            ToolError: if llama.cpp cannot tokenize it.
        """
        lib = self._library
        spelled = text.encode()
        room = len(spelled) + _MARGIN
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(
            self.pointer, spelled, len(spelled), tokens, room, False, special
        )
        if count < 0:
            raise ToolError(f"llama.cpp cannot tokenize a text of {len(spelled)} bytes")
        found = list(tokens[:count])
        # Most templates write the BOS token themselves; two of them confuse a model.
        if lib.llama_vocab_get_add_bos(self.pointer) and found[:1] != [self.bos]:
            found.insert(0, self.bos)
        return found

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token, which need not be whole characters.

        Args:
            token: its id.
            special: whether control tokens are spelled out; they are empty otherwise.
        """
        known = self._pieces[special]
        found = known[token]
        if found is None:
            found = known[token] = self._read_piece(token, special)
        return found

    def _read_piece(self, token: int, special: bool) -> bytes:
        size = _PIECE_NBYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_token_to_piece(
                self.pointer, token, buffer, size, 0, special
            )
            if length >= 0:
                return buffer.raw[:length]
            size = -length
