"""GGUFs that hold a vocabulary and nothing else, and vocabularies loaded from them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ggufkit.llamacpp.runtime import load_llama_cpp
from ggufkit.llamacpp.vocabulary import Vocabulary

UNKNOWN, CONTROL, NORMAL, OF_USER, BYTE = 2, 3, 1, 4, 6
"""Types of tokens, as GGUF numbers them."""


def write_vocabulary(
    path: Path,
    kind: str,
    tokens: Sequence[tuple[str, int]],
    merges: Sequence[str] = (),
    **keys: Any,
) -> Path:
    """Write a vocabulary.

    Args:
        path: where to.
        kind: ``tokenizer.ggml.model``.
        tokens: texts and types.
        merges: of byte-pair encoding.
        keys: further keys, without ``tokenizer.ggml.``.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([type for _, type in tokens])
    writer.add_token_scores([-float(n) for n in range(len(tokens))])
    if merges:
        writer.add_token_merges(list(merges))
        writer.add_tokenizer_pre("gpt-2")
    for key, value in keys.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def loaded_vocabulary(path: Path) -> Iterator[Vocabulary]:
    """The vocabulary of a GGUF, as llama.cpp loads it."""
    library = load_llama_cpp()
    options = library.llama_model_default_params()
    options.vocab_only = True
    model = library.llama_model_load_from_file(str(path).encode(), options)
    assert model
    try:
        yield Vocabulary(library, model)
    finally:
        library.llama_model_free(model)


def by_llama_cpp(
    words: Vocabulary, text: str, *, add_special: bool = False, special: bool = True
) -> list[int]:
    """What llama.cpp itself makes of a text."""
    library, spelled = load_llama_cpp(), text.encode()
    tokens = (library.llama_token * (len(spelled) + 8))()
    count = library.llama_tokenize(
        words.pointer, spelled, len(spelled), tokens, len(tokens), add_special, special
    )
    return list(tokens[:count])
