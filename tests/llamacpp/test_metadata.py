from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import GGUFWriter

from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import END_NAMES, Metadata, split_count, split_parts
from ggufkit.llamacpp.runtime import load_llama_cpp
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.llamacpp.vocabulary import Vocabulary
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


FIM_NAMES = ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
"""Ends of an infill, which are no ends of an answer."""


def write_vocabulary(path: Path, tokens: Sequence[str], eos: int) -> None:
    """A GGUF of nothing but a vocabulary, all of it control tokens but the first."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["a", *tokens])
    writer.add_token_types([1, *[3] * len(tokens)])
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def ends_by_llama_cpp(path: Path) -> set[str]:
    """Texts of the tokens that llama.cpp itself takes for ends."""
    lib = load_llama_cpp()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model
    try:
        tokens = Metadata(read_gguf(path)).tokens
        return {tokens[number] for number in Vocabulary(lib, model).end_tokens}
    finally:
        lib.llama_model_free(model)


@pytest.mark.parametrize(
    "tokens",
    [
        *[(name,) for name in END_NAMES],
        (*END_NAMES, *FIM_NAMES),
        ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>", "<|message|>"),
        ("<|end|>", "<|return|>", "<|calls|>"),
        ("<|end|>", "<|calls|>", "<|flush|>"),
        ("<|end|>", "<|call|>", "<|flush|>"),
        ("<|end|>", "<|return|>", "<|flush|>"),
        ("<|end|>", "<|return|>"),
        ("<|end|>", "<|call|>"),
        ("</s>", "<|tool_response>"),
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|user|>", "<|eot|>"),
    ],
    ids=" ".join,
)
def test_end_tokens_are_those_of_llama_cpp(
    native: NativeBuild, tmp_path: Path, tokens: tuple[str, ...]
) -> None:
    path = tmp_path / "vocabulary.gguf"
    for eos in (1, len(tokens)):
        write_vocabulary(path, tokens, eos)
        ours = set(Metadata(read_gguf(path)).end_tokens)
        assert ours - set(FIM_NAMES) == ends_by_llama_cpp(path) - set(FIM_NAMES)


def test_the_table_of_end_tokens_is_complete(native: NativeBuild, tmp_path: Path) -> None:
    """Of all that is in the table, each is there; of what looks alike, nothing is missing."""
    alike = (
        *("<|end_of_turn|>", "<|eos|>", "<|eot|>", "<eot>", "<|EOT|>", "<|endofturn|>", "<|stop|>"),
        *("<EOS>", "<s>", "<|end_of_solution|>", "<|endofprompt|>", "<|begin_of_text|>", "<end>"),
        *("<|message|>", "<|channel|>", "<|final|>", "<unk>", "[SEP]", "[CLS]", "<|sep|>"),
    )
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path, (*END_NAMES, *alike), 1)
    taken_off = {"<|end|>", "</s>"}
    assert ends_by_llama_cpp(path) == set(END_NAMES) - taken_off


@pytest.mark.parametrize("name", ["<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>"])
def test_ends_of_turns_that_llama_cpp_does_not_know(name: str) -> None:
    keys = {"tokenizer__ggml__tokens": ["a", name], "tokenizer__ggml__token_type": [1, 3]}
    assert Metadata(gguf(**keys)).end_tokens == (name,)


def test_plamo_has_an_ordinary_s() -> None:
    keys = {
        "tokenizer__ggml__tokens": ["<|plamo:eos|>", "</s>"],
        "tokenizer__ggml__token_type": [3, 3],
        "tokenizer__ggml__eos_token_id": 0,
    }
    assert Metadata(gguf(**keys)).end_tokens == ("<|plamo:eos|>",)


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
