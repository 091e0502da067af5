"""Does the tokenizer belong to the model?

The converter cuts off a SentencePiece vocabulary that is too long with a mere
log line, and stops with a bare assertion at one of the other kind.
"""

import json
from pathlib import Path

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError

_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)


def check_tokenizer(index: CheckpointIndex) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        CheckpointError: a token has no embedding, or a tokenizer file cannot be read.
    """
    rows = _embedding_rows(index)
    for name, count in (("tokenizer.json", _count_json), ("tokenizer.model", _count_model)):
        path = index.path / name
        if not rows or not path.is_file():
            continue
        try:
            tokens = count(path)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", "Fetch it again") from error
        if tokens > rows:
            raise CheckpointError(
                f"{path} has {tokens:,} tokens, but the model has embeddings for {rows:,} only",
                "This is another model's tokenizer: take the files that belong to the model",
            )


def _embedding_rows(index: CheckpointIndex) -> int:
    """Rows of the embedding matrix; 0 if no tensor has one of the usual names."""
    rows = (t.shape[0] for n, t in index.tensors.items() if n.endswith(_EMBEDDINGS))
    return next(rows, 0)


def _count_json(path: Path) -> int:
    """One more than the highest id."""
    content = json.loads(path.read_bytes())
    vocab = content["model"]["vocab"]
    # A unigram model has a list of pieces, others a mapping to ids.
    highest = len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values(), default=-1)
    added = (int(token["id"]) for token in content.get("added_tokens") or [])
    return max([int(highest), *added]) + 1


def _count_model(path: Path) -> int:
    # Some checkpoints call a tiktoken table tokenizer.model: lines of base64 and rank.
    raw = path.read_bytes()
    if raw[:1] != b"\n":
        return len(raw.splitlines())
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=raw).get_piece_size())
