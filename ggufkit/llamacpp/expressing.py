"""Whether a vocabulary can express a text, asked before llama.cpp is.

A vocabulary of kind ``llama`` writes what it has no token for byte by byte. If it has
no tokens for bytes either, llama.cpp raises an exception, which nothing between it and
Python catches: the whole process ends, with the answers of everybody else
(``llama_vocab::byte_to_token``). All other kinds have a token for what they do not
know, or leave it out.
"""

from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

from ggufkit.errors import UsageError

_SPACE = "\u2581"
"""What spaces become, the one before a text too."""


class Expressing:
    """What the tokens of a loaded vocabulary can express.

    Args:
        library: the binding.
        vocabulary: llama.cpp's handle of the vocabulary.
    """

    def __init__(self, library: ModuleType, vocabulary: Any) -> None:
        self._library = library
        self._vocabulary = vocabulary

    def check(self, text: str | bytes, *, special: bool) -> None:
        """Refuse a text that llama.cpp would end the process for.

        Args:
            text: what is to become tokens.
            special: whether spelled-out special tokens become tokens.

        Raises:
            UsageError: if there are neither tokens for a character nor for its bytes.
        """
        if not self._missing_bytes:
            return
        if isinstance(text, bytes):
            text = text.decode(errors="surrogateescape")
        if not self._unknown(text):
            return
        if unknown := self._unknown("".join(self._plain(text, special))):
            raise UsageError(
                f"the model's vocabulary has no token for {unknown!r}, and none for its bytes",
                "Leave it out, or use a model whose vocabulary has tokens for all bytes",
            )

    def _unknown(self, text: str) -> str:
        """The first character that cannot be expressed; empty if there is none."""
        if not text:
            return ""
        used = dict.fromkeys(_SPACE + text.replace(" ", _SPACE))
        return next((c for c in used if c not in self._characters and self._lacks(c)), "")

    def _lacks(self, character: str) -> bool:
        return not self._missing_bytes.isdisjoint(character.encode(errors="surrogateescape"))

    def _plain(self, text: str, special: bool) -> list[str]:
        """What is left of a text without special tokens, which llama.cpp finds first."""
        pieces = [text]
        for token, of_user in self._special:
            if special or of_user:
                pieces = [piece for whole in pieces for piece in whole.split(token)]
        return pieces

    @cached_property
    def _missing_bytes(self) -> frozenset[int]:
        """Bytes that no token stands for; none in kinds of vocabularies that need none."""
        lib = self._library
        if lib.llama_vocab_type(self._vocabulary) != lib.LLAMA_VOCAB_TYPE_SPM:
            return frozenset()
        names = {f"<0x{byte:02X}>".encode(): byte for byte in range(256)}
        names |= {bytes([byte]): byte for byte in range(128)}
        missing = set(range(256))
        for text in self._texts():
            missing.discard(names.get(text, -1))
            if not missing:  # they stand at the beginning of most vocabularies
                break
        return frozenset(missing)

    @cached_property
    def _characters(self) -> frozenset[str]:
        texts = (text.decode(errors="surrogateescape") for text in self._texts())
        return frozenset(text for text in texts if len(text) == 1)

    @cached_property
    def _special(self) -> list[tuple[str, bool]]:
        """Special tokens and whether they are a user's, the longest first, as llama.cpp goes."""
        lib = self._library
        kinds = (
            lib.LLAMA_TOKEN_ATTR_CONTROL
            | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
            | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        )
        found = list[tuple[str, bool]]()
        for token, text in enumerate(self._texts()):
            kind = int(lib.llama_vocab_get_attr(self._vocabulary, token))
            if text and kind & kinds:
                of_user = not kind & ~lib.LLAMA_TOKEN_ATTR_USER_DEFINED & kinds
                found.append((text.decode(errors="surrogateescape"), of_user))
        return sorted(found, key=lambda row: -len(row[0]))

    def _texts(self) -> Iterator[bytes]:
        lib, vocabulary = self._library, self._vocabulary
        for token in range(lib.llama_vocab_n_tokens(vocabulary)):
            yield lib.llama_vocab_get_text(vocabulary, token) or b""
