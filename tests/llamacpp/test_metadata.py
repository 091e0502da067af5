from pathlib import Path

import pytest

from ggufkit.llamacpp.metadata import Metadata, split_count, split_parts
from ggufkit.values import GGUFFile, Json


def gguf(path: str = "/m/x.gguf", **keys: Json) -> GGUFFile:
    named = {key.replace("__", "."): value for key, value in keys.items()}
    return GGUFFile(Path(path), 3, 0, {"general.architecture": "llama"} | named, ())


def test_keys_of_the_architecture() -> None:
    look = Metadata(gguf(llama__context_length=4096, qwen2__context_length=1))
    assert look.trained_context == 4096
    assert Metadata(gguf()).trained_context is None


def test_special_tokens_have_text_where_the_vocabulary_has_them() -> None:
    ids = {"tokenizer__ggml__bos_token_id": 0, "tokenizer__ggml__eos_token_id": 7}
    look = Metadata(gguf(tokenizer__ggml__tokens=["<s>", "a"], **ids))
    assert look.special_tokens == {"bos": (0, "<s>"), "eos": (7, "")}
    assert (look.special("bos"), look.special("eos"), look.special("eot")) == ("<s>", "", "")


def test_end_tokens_are_those_set_and_well_known_control_tokens() -> None:
    look = Metadata(
        gguf(
            tokenizer__ggml__tokens=["</s>", "<|im_end|>", "<|end|>", "<|other|>"],
            tokenizer__ggml__token_type=[3, 3, 1, 3],  # <|end|> is an ordinary word here
            tokenizer__ggml__eos_token_id=0,
        )
    )
    assert look.end_tokens == ("</s>", "<|im_end|>")


@pytest.mark.parametrize(
    ("keys", "adds"),
    [
        ({"tokenizer__ggml__model": "llama"}, True),
        ({"tokenizer__ggml__model": "llama", "tokenizer__ggml__add_bos_token": False}, False),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "qwen2"}, False),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "llama-bpe"}, True),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__add_bos_token": True}, True),
    ],
)
def test_whether_the_bos_token_is_added(keys: dict[str, Json], adds: bool) -> None:
    assert Metadata(gguf(**keys)).adds_bos is adds


def test_recommended_sampling_has_only_what_is_given() -> None:
    look = Metadata(gguf(general__sampling__temp=0.5, general__sampling__penalty_repeat=1.1))
    assert look.sampling == {"temperature": 0.5, "repeat_penalty": 1.1}


def test_parts_of_a_split_model() -> None:
    part = gguf("/m/big-00002-of-00003.gguf", split__count=3, split__no=1)
    assert split_count(part) == 3
    assert [p.name for p in split_parts(part)] == [f"big-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    renamed = gguf("/m/renamed.gguf", split__count=3)
    assert split_parts(renamed) == (renamed.path,)
    assert split_count(gguf()) == 1
