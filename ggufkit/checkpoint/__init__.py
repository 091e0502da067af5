"""Hugging Face checkpoints: look into them, stream their tensors, write them."""

from ggufkit.checkpoint.chat_template import CheckpointTemplates, read_templates
from ggufkit.checkpoint.index import (
    CheckpointIndex,
    TensorEntry,
    checkpoint_files,
    digest_checkpoint,
    open_checkpoint,
    open_config,
)
from ggufkit.checkpoint.tensors import TensorReader
from ggufkit.checkpoint.tokenizer import check_tokenizer
from ggufkit.checkpoint.write import write_checkpoint

__all__ = [
    "CheckpointIndex",
    "CheckpointTemplates",
    "TensorEntry",
    "TensorReader",
    "check_tokenizer",
    "checkpoint_files",
    "digest_checkpoint",
    "open_checkpoint",
    "open_config",
    "read_templates",
    "write_checkpoint",
]
