"""The two tokenizers that the recipes have: SentencePiece and byte-level BPE."""

import json
from pathlib import Path

from tests import factory

CONTROL = ("<|endoftext|>", *factory.IMAGE_CONTROL)
SPECIAL = (
    "<|endoftext|>",
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
PRE_TOKENIZER = "gpt-2"
"""How llama.cpp names the rule by which the byte-level one splits text."""


def write(kind: str, directory: Path, size: int) -> None:
    """Write the files of a tokenizer.

    Args:
        kind: ``spm`` or ``bpe``.
        directory: where to.
        size: of the vocabulary.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "spm":
        factory._write_tokenizer(directory, size, control=CONTROL)
        return
    (directory / "tokenizer.json").write_text(_byte_level(size), encoding="utf-8")
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": factory.CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


def _byte_level(size: int) -> str:
    """Byte-level BPE that splits as GPT-2's, trained on Python's own documentation."""
    from pydoc_data.topics import topics

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name][:2000] for name in sorted(topics)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()
