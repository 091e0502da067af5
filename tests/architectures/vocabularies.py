"""The tokenizers that the recipes have: SentencePiece and byte-level BPE."""

import json
from pathlib import Path

from tests import factory

_END = "<|endoftext|>"
SENTENCEPIECE: dict[str, tuple[bool, tuple[str, ...]]] = {
    "spm": (True, (_END,)),
    "gemma": (False, (_END,)),
    "images": (True, (_END, *factory.IMAGE_CONTROL)),
}
"""Whether a space is put before a text, and control tokens."""
BYTE_LEVEL = {"bpe": "gpt-2", "qwen2": "qwen2", "qwen35": "qwen35"}
"""How llama.cpp names the rule by which text is split."""
KINDS = (*BYTE_LEVEL, *SENTENCEPIECE)
SPECIAL = (
    _END,
    "<s>",
    "</s>",
    *factory.CONTROL,
    "<unk>",
    "[gMASK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|system|>",
    "</assistant>",
    "[EOS]",
    "[PAD]",
    "<|eot|>",
    "<|startoftext|>",
)
"""Names that the converter asks of byte-level tokenizers, of one architecture or another.

Numbers 0, 1 and 2 are padding, BOS and EOS.
"""
RULE = "llama_cpp_pre_tokenizer"
"""Key of ``tokenizer_config.json`` for the rule; only the tests read it."""
_LETTERS = {"qwen2": r"\p{L}", "qwen35": r"\p{L}\p{M}"}
"""What Qwen's rules take for letters; transformers splits so whatever the file says."""


def write(kind: str, directory: Path, size: int) -> None:
    """Write the files of a tokenizer.

    Args:
        kind: one of ``KINDS``.
        directory: where to.
        size: of the vocabulary.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "tokenizer_config.json"
    if kind in SENTENCEPIECE:
        prefix_space, control = SENTENCEPIECE[kind]
        factory._write_tokenizer(directory, size, prefix_space, control)
        named = json.loads(config.read_text())
        named["additional_special_tokens"] = [*factory.CONTROL, *control]
    else:
        (directory / "tokenizer.json").write_text(_byte_level(kind, size), encoding="utf-8")
        named = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": _END,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "chat_template": factory.CHAT_TEMPLATE,
            RULE: BYTE_LEVEL[kind],
        }
    config.write_text(json.dumps(named))


def _byte_level(kind: str, size: int) -> str:
    """Byte-level BPE, trained on Python's own documentation."""
    from pydoc_data.topics import topics

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as splitting
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting.ByteLevel(add_prefix_space=False)
    if kind in _LETTERS:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = splitting.Sequence(
            [
                splitting.Split(Regex(_qwen_split(_LETTERS[kind])), "isolated"),
                splitting.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(splitting.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name][:2000] for name in sorted(topics)], trainer)
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


def _qwen_split(letters: str) -> str:
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|\p{{N}}"
        rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
