"""Texts that a vocabulary cannot express, and what a tokenizer adds to those it can."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ggufkit.errors import UsageError
from ggufkit.llamacpp.expressing import Expressing
from ggufkit.llamacpp.runtime import load_llama_cpp
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.vocabularies import (
    BYTE,
    CONTROL,
    NORMAL,
    OF_USER,
    UNKNOWN,
    by_llama_cpp,
    loaded_vocabulary,
    write_vocabulary,
)

pytestmark = pytest.mark.usefixtures("native")

SPECIAL = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
PIECES = [*SPECIAL, *((text, NORMAL) for text in ("\u2581", "a", "b", "\u2581a"))]
LACKING = [*PIECES, ("<|é|>", CONTROL), ("ü-ü", OF_USER), ("\n", NORMAL)]
BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
NUMBERS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}

EXPRESSED = ["", " ", "a", "ab ba  b\n", "a<|é|>b", "ü-ü", "ü-üa<|é|>", "<s>a</s>"]
NOT_EXPRESSED = ["c", "a b c", "é", "a\tb", "<|é|", "ü-", "a ü-ü é", "ü<|é|>-ü", "\0", "漢"]


@pytest.fixture
def lacking(native: NativeBuild, tmp_path: Path) -> Path:
    return write_vocabulary(tmp_path / "lacking.gguf", "llama", LACKING, **NUMBERS)


@pytest.mark.parametrize("text", EXPRESSED)
def test_what_can_be_expressed_is_tokenized_as_ever(lacking: Path, text: str) -> None:
    with loaded_vocabulary(lacking) as words:
        own = [] if text.startswith("<s>") else [1]
        assert words.tokenize(text) == own + by_llama_cpp(words, text)


@pytest.mark.parametrize("text", NOT_EXPRESSED)
def test_what_cannot_is_an_error_that_names_it(lacking: Path, text: str) -> None:
    with (
        loaded_vocabulary(lacking) as words,
        pytest.raises(UsageError, match=r"no token for '.*', and none for its bytes"),
    ):
        words.tokenize(text)


def test_control_tokens_are_plain_characters_where_they_are_not_looked_for(lacking: Path) -> None:
    with loaded_vocabulary(lacking) as words:
        assert words.tokenize("a<|é|>", special=True)
        with pytest.raises(UsageError, match="'<'"):
            words.tokenize("a<|é|>", special=False)
        # A user's own tokens are always found.
        assert words.tokenize("aü-ü", special=False) == [1, *by_llama_cpp(words, "aü-ü")]
        check = Expressing(load_llama_cpp(), words.pointer).check
        check("aü-ü".encode(), special=False)
        with pytest.raises(UsageError):
            check(b"a\xff", special=False)


def test_a_vocabulary_with_all_bytes_expresses_everything(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "bytes.gguf", "llama", [*PIECES, *BYTES], **NUMBERS)
    with loaded_vocabulary(path) as words:
        for text in (*EXPRESSED, *NOT_EXPRESSED):
            assert words.tokenize(text)[1:] == by_llama_cpp(words, text.removeprefix("<s>"))


_ENDS_THE_PROCESS = """
import sys
from pathlib import Path
from tests.vocabularies import by_llama_cpp, loaded_vocabulary
with loaded_vocabulary(Path(sys.argv[1])) as words:
    print("loaded", flush=True)
    print(by_llama_cpp(words, sys.argv[2]))
"""


@pytest.mark.parametrize("text", ["é", "a\tb"])
def test_llama_cpp_ends_the_process_for_these(lacking: Path, text: str) -> None:
    # If this fails, llama.cpp has learnt to say no, and the check can go.
    done = subprocess.run(
        [sys.executable, "-c", _ENDS_THE_PROCESS, str(lacking), text],
        capture_output=True,
        text=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    assert done.stdout == "loaded\n"
    assert done.returncode < 0
    assert "out_of_range" in done.stderr


# What a tokenizer adds.

BPE = [("<|end|>", CONTROL), *((text, NORMAL) for text in ("a", "b", "ab", "Ġ"))]
WORDPIECES = [
    *(("[PAD]", CONTROL), ("[UNK]", UNKNOWN), ("[CLS]", CONTROL), ("[SEP]", CONTROL)),
    *((text, NORMAL) for text in ("\u2581a", "\u2581b", "b")),
]
BERT = {"bos_token_id": 2, "seperator_token_id": 3, "eos_token_id": 3, "unknown_token_id": 1}
KINDS: dict[str, tuple[str, list[tuple[str, int]], dict[str, Any], int | None]] = {
    "llama": ("llama", PIECES, NUMBERS, None),
    "llama with EOS": ("llama", PIECES, {**NUMBERS, "add_eos_token": True}, 2),
    "gpt2": ("gpt2", BPE, {"bos_token_id": 0, "eos_token_id": 0}, None),
    "gpt2 with EOS": (
        "gpt2",
        BPE,
        {"bos_token_id": 0, "eos_token_id": 0, "add_eos_token": True},
        0,
    ),
    "t5": ("t5", PIECES, {**NUMBERS, "add_eos_token": True}, 2),
    "t5 without EOS": ("t5", PIECES, {**NUMBERS, "add_eos_token": False}, None),
    "bert": ("bert", WORDPIECES, BERT, 3),
    "bert, whatever is said of EOS": ("bert", WORDPIECES, {**BERT, "add_eos_token": False}, 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_text_ends_as_llama_cpp_ends_it(tmp_path: Path, name: str) -> None:
    kind, tokens, keys, closing = KINDS[name]
    merges = ["a b"] if kind == "gpt2" else []
    path = write_vocabulary(tmp_path / "words.gguf", kind, tokens, merges, **keys)
    with loaded_vocabulary(path) as words:
        assert words.closing == closing
        for text in ("ab", "a b", ""):
            whole = by_llama_cpp(words, text, add_special=True)
            assert words.tokenize(text, ends=True) == whole
            # Prompts stay open.
            assert words.tokenize(text) == (whole if closing is None else whole[:-1])


def test_an_end_that_is_there_already_is_not_doubled(tmp_path: Path) -> None:
    keys = {**NUMBERS, "add_eos_token": True}
    path = write_vocabulary(tmp_path / "words.gguf", "llama", PIECES, **keys)
    with loaded_vocabulary(path) as words:
        assert words.tokenize("ab</s>", ends=True) == words.tokenize("ab", ends=True)
        assert words.tokenize("ab", ends=True)[-1] == 2
