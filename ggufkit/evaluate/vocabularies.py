"""Whether two models read and predict the same tokens."""

from collections.abc import Sequence
from typing import Any

from ggufkit.llamacpp.metadata import Metadata

_SETTINGS = {
    "tokenizer.ggml.model": "kind of tokenizer",
    "tokenizer.ggml.pre": "pre-tokenizer",
    "tokenizer.ggml.add_space_prefix": "space before the text",
    "tokenizer.ggml.remove_extra_whitespaces": "removal of spaces",
}
_LISTS = {
    "tokenizer.ggml.tokens": "token",
    "tokenizer.ggml.token_type": "type of token",
    "tokenizer.ggml.merges": "merge",
    "tokenizer.ggml.scores": "score of token",
}


def difference(reference: Metadata, model: Metadata) -> str:
    """In what a model's vocabulary differs from the reference's; empty if in nothing.

    What counts is what changes the tokens of a text, or what an output stands for.
    The end of a text, the chat template and such are not read here.

    Args:
        reference: of a GGUF, read with its arrays.
        model: of another.
    """
    theirs, ours = model.tokens, reference.tokens
    if len(theirs) != len(ours):
        return f"it has {len(theirs):,} tokens, the reference {len(ours):,}"
    for key, name in _SETTINGS.items():
        if model.get(key) != reference.get(key):
            return f"its {name} is {_told(model.get(key))}, not {_told(reference.get(key))}"
    for key, name in _LISTS.items():
        if told := _first_difference(name, reference.get(key) or [], model.get(key) or []):
            return told
    if _first(model) != _first(reference):
        return (
            f"it begins a text with {_told(_first(model))}, "
            f"the reference with {_told(_first(reference))}"
        )
    return ""


def _first(metadata: Metadata) -> str | None:
    """The token that is put before a text."""
    return metadata.special("bos") if metadata.adds_bos else None


def _told(value: Any) -> str:
    return "none" if value is None else repr(value)


def _first_difference(name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    if ours == theirs:
        return ""
    if len(ours) != len(theirs):
        return f"it has {len(theirs):,} entries of the list '{name}', the reference {len(ours):,}"
    place = next(n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    return f"its {name} {place:,} is {theirs[place]!r}, not {ours[place]!r}"
