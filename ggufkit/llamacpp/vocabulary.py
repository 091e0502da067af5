"""The vocabulary of a loaded model: from text to tokens, and from tokens to bytes."""

import ctypes
import re
import threading
from collections.abc import Callable
from functools import cached_property
from types import ModuleType
from typing import Any

from ggufkit.errors import ToolError, UsageError

_PIECE_NBYTES = 256
_MARGIN = 8
"""Tokens that a tokenizer may add to a text: special ones, a leading space."""
_LONGEST = 4 << 20
"""Characters of a text; no context takes more."""
_SHORT = 1000
"""Bytes of a word that any stack has room for."""
_STACK_NBYTES = 1024
"""For each byte of a word; GCC's library takes 324 of them for a character."""
_RUN = re.compile(rb"\s+|\S+")
_one_stack_size = threading.Lock()


class Vocabulary:
    """What llama.cpp knows of a model's tokens. Only read, so any thread may ask.

    Args:
        library: the binding, as :func:`~ggufkit.llamacpp.runtime.load_llama_cpp` gives it.
        model: the loaded model's pointer; it must outlive this.
        stops: tokens that end an answer though llama.cpp does not know it.

    Attributes:
        size: number of tokens.
        pointer: llama.cpp's own handle.
    """

    def __init__(
        self, library: ModuleType, model: Any, stops: frozenset[int] = frozenset()
    ) -> None:
        self._library = library
        self._stops = stops
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
        known = frozenset(t for t in range(self.size) if is_end(self.pointer, t))
        return known | {t for t in self._stops if t < self.size}

    @cached_property
    def bos(self) -> int:
        """The token that begins a text; -1 if there is none."""
        return int(self._library.llama_vocab_bos(self.pointer))

    @cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest token. A text has at least its bytes by this many tokens."""
        return max(len(self.piece(token, special=True)) for token in range(self.size))

    def tokenize(self, text: str, *, special: bool = True, begins: bool = True) -> list[int]:
        """Tokens of a prompt; the BOS token comes first if the model wants it.

        Args:
            text: the prompt.
            special: whether spelled-out special tokens become tokens.
            begins: whether nothing comes before it; else there is no BOS token.

        Raises:
            UsageError: if it is longer than any prompt can be.
            ToolError: if llama.cpp cannot tokenize it.
        """
        lib = self._library
        if len(text) > _LONGEST:
            raise UsageError(f"the text has more than {_LONGEST} characters")
        spelled = text.encode()
        room = len(spelled) + _MARGIN
        tokens = (lib.llama_token * room)()
        asked = (self.pointer, spelled, len(spelled), tokens, room, False, special)
        count = on_a_deep_stack(lambda: int(lib.llama_tokenize(*asked)), spelled)
        if count < 0:
            raise ToolError(f"llama.cpp cannot tokenize a text of {len(spelled)} bytes")
        found = list(tokens[:count])
        # Most templates write the BOS token themselves; two of them confuse a model.
        wants_bos = begins and lib.llama_vocab_get_add_bos(self.pointer)
        if wants_bos and found[:1] != [self.bos]:
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


def on_a_deep_stack(tokenize: Callable[[], int], text: bytes) -> int:
    """Let llama.cpp tokenize a text, whatever words there are in it.

    Many vocabularies split text by ``std::regex``, which calls itself once for
    each character of a word: a word of 10,000 would end the process on a common
    stack. What is not used of a stack takes no memory.

    Args:
        tokenize: does it, and gives what llama.cpp returns.
        text: what it tokenizes.

    Raises:
        ToolError: if there is no room for a stack.
    """
    length = len(text)
    if length > _SHORT:
        # A word may take the spaces around it along.
        length = min(length, 2 * max(len(run[0]) for run in _RUN.finditer(text)))
    if length <= _SHORT:
        return tokenize()
    found = list[int]()
    thread = threading.Thread(target=lambda: found.append(tokenize()), name="ggufkit-tokenize")
    with _one_stack_size:
        before = threading.stack_size((length * _STACK_NBYTES + (1 << 20)) & -(1 << 16))
        try:
            thread.start()
        except RuntimeError as error:
            raise ToolError(f"no memory to tokenize words of {length} bytes") from error
        finally:
            threading.stack_size(before)
    thread.join()
    return found[0]
