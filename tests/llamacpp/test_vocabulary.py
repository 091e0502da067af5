"""Text to tokens and back, through the real library."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ggufkit.errors import UsageError
from ggufkit.llamacpp import vocabulary
from ggufkit.llamacpp.batching import Model
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.llamacpp.vocabulary import Vocabulary
from tests.chatting import splitting_by_regex


@pytest.fixture(scope="module")
def words(
    native: NativeBuild, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Vocabulary]:
    """A vocabulary that splits text as Falcon's does, by ``std::regex``."""
    copy = tmp_path_factory.mktemp("falcon") / "falcon.gguf"
    model = Model(splitting_by_regex(demo_gguf, copy))
    yield model.vocabulary
    model.close()


@pytest.mark.parametrize("text", ["!" * 200_000, "a" * 200_000, "so it goes, on and on; " * 500])
def test_long_texts_and_long_words_go_there_and_back(words: Vocabulary, text: str) -> None:
    tokens = words.tokenize(text)
    assert b"".join(words.piece(token) for token in tokens).decode() == text


def test_a_text_longer_than_any_prompt_is_refused(words: Vocabulary) -> None:
    with pytest.raises(UsageError, match="characters"):
        words.tokenize("a" * (vocabulary._LONGEST + 1))


def test_no_token_is_longer_than_the_longest(words: Vocabulary) -> None:
    text = " " * 5000
    assert len(words.tokenize(text)) * words.longest_piece >= len(text)
    assert any(len(words.piece(n, special=True)) == words.longest_piece for n in range(words.size))
