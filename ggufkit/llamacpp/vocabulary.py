"""The vocabulary of a loaded model: from text to tokens, and from tokens to bytes."""

import ctypes
import re
import threading
from collections.abc import Callable
from functools import cached_property
from types import ModuleType
from typing import Any

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp.expressing import Expressing

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
        self._expressing = Expressing(library, self.pointer)
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

    @cached_property
    def closing(self) -> int | None:
        """The token that the tokenizer itself puts after a text, if it does.

        As ``llama_vocab::impl::tokenize`` with ``add_special``: BERT's vocabularies
        always end a text with their separator, others with EOS if the GGUF says so.
        """
        lib = self._library
        kind = lib.llama_vocab_type(self.pointer)
        if kind == lib.LLAMA_VOCAB_TYPE_WPM:
            token = int(lib.llama_vocab_sep(self.pointer))
        elif kind in _kinds_with_eos(lib) and lib.llama_vocab_get_add_eos(self.pointer):
            token = int(lib.llama_vocab_eos(self.pointer))
        else:
            return None
        return token if token >= 0 else None

    def tokenize(
        self, text: str, *, special: bool = True, begins: bool = True, ends: bool = False
    ) -> list[int]:
        """Tokens of a prompt; the BOS token comes first if the model wants it.

        Args:
            text: the prompt.
            special: whether spelled-out special tokens become tokens.
            begins: whether nothing comes before it; else there is no BOS token.
            ends: whether nothing comes after it, as in a text to embed; then the
                token that the tokenizer ends a text with comes last.

        Raises:
            UsageError: if it is longer than any prompt can be, or has characters
                that the vocabulary cannot express.
            ToolError: if llama.cpp cannot tokenize it.
        """
        lib = self._library
        if len(text) > _LONGEST:
            raise UsageError(f"the text has more than {_LONGEST} characters")
        self._expressing.check(text, special=special)
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
        if ends and self.closing is not None and found[-1:] != [self.closing]:
            found.append(self.closing)
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


def _kinds_with_eos(library: ModuleType) -> tuple[int, ...]:
    names = ("SPM", "BPE", "UGM")
    return tuple(int(getattr(library, f"LLAMA_VOCAB_TYPE_{name}")) for name in names)


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
