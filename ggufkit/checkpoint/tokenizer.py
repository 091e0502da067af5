"""Does the tokenizer belong to the model?

The converter cuts off a SentencePiece vocabulary that is too long with a mere
log line, and stops with a bare assertion at one of the other kind. Added tokens
it reads from other files than transformers does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufkit.checkpoint.chat_template import read_templates
from ggufkit.checkpoint.config import text_config
from ggufkit.checkpoint.index import CheckpointIndex, read_json
from ggufkit.errors import CheckpointError

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
"""Ends of names of the matrix of embeddings."""
MOST_SURPLUS = 8
"""Added tokens past the embeddings that can be left out. Text-only Gemma 3 has one,
a place for pictures; fine-tunes have added a padding token."""
_NEEDED = ("bos_token", "eos_token", "unk_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that a tokenizer finds in text before anything else.

    Attributes:
        content: its text.
        special: whether it is a control token.
    """

    content: str
    special: bool


def check_tokenizer(index: CheckpointIndex) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    A few added tokens past the last embedding pass if no text can need them.

    Raises:
        CheckpointError: a token has no embedding, or a tokenizer file cannot be read.
    """
    surplus_tokens(index)


def surplus_tokens(index: CheckpointIndex) -> dict[int, AddedToken]:
    """Added tokens past the last embedding that can be left out, by id.

    Raises:
        CheckpointError: a token that text may need has no embedding, or a
            tokenizer file cannot be read.
    """
    rows = embedding_rows(index)
    if not rows:
        return {}
    for name, count in (("tokenizer.json", _count_json), ("tokenizer.model", count_model)):
        path = index.path / name
        if path.is_file():
            _refuse_more(path, _counted(path, count), rows)
    added = added_tokens(index.path)
    surplus = {number: token for number, token in added.items() if number >= rows}
    needed = _needed_texts(index.path) if surplus else []
    if max(surplus, default=0) >= rows + MOST_SURPLUS or any(
        token.content in text for token in surplus.values() for text in needed
    ):
        fast = index.path / "tokenizer.json"
        _refuse_more(fast if fast.is_file() else index.path, max(surplus) + 1, rows)
    return surplus


def _needed_texts(path: Path) -> list[str]:
    """Texts in which no token without an embedding may occur."""
    config = path / "tokenizer_config.json"
    content = read_json(config) if config.is_file() else {}
    named = [content.get(key) for key in _NEEDED] if isinstance(content, dict) else []
    texts = [name.get("content") if isinstance(name, dict) else name for name in named]
    return [
        *(text for text in texts if isinstance(text, str)),
        *read_templates(path).named.values(),
    ]


def _refuse_more(path: Path, tokens: int, rows: int) -> None:
    if tokens > rows:
        raise CheckpointError(
            f"{path} has {tokens:,} tokens, but the model has embeddings for {rows:,} only",
            "This is another model's tokenizer: take the files that belong to the model",
        )


def added_tokens(path: Path) -> dict[int, AddedToken]:
    """The added tokens of a checkpoint by id; ``tokenizer.json`` before older files.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[int, AddedToken] = {}
    older = path / "added_tokens.json"
    if older.is_file():
        names = _counted(older, lambda file: dict(read_json(file)))
        found |= _counted(
            older, lambda _: {int(n): AddedToken(str(t), False) for t, n in names.items()}
        )
    config = path / "tokenizer_config.json"
    if config.is_file():
        found |= _counted(config, lambda file: _decoder(read_json(file)))
    fast = path / "tokenizer.json"
    if fast.is_file():
        found |= _counted(fast, lambda file: _added(read_json(file).get("added_tokens") or []))
    return found


def _decoder(content: Any) -> dict[int, AddedToken]:
    decoder = content.get("added_tokens_decoder") or {}
    return _added({**row, "id": number} for number, row in decoder.items())


def _added(rows: Iterable[Any]) -> dict[int, AddedToken]:
    return {int(r["id"]): AddedToken(str(r["content"]), bool(r.get("special"))) for r in rows}


def vocabulary_texts(path: Path) -> dict[int, str]:
    """Texts of the tokens of ``tokenizer.json`` without added ones, by id.

    Raises:
        CheckpointError: the file cannot be read.
    """

    def read(file: Path) -> dict[int, str]:
        vocab = read_json(file)["model"]["vocab"]
        if isinstance(vocab, list):
            return {number: str(row[0]) for number, row in enumerate(vocab)}
        return {int(number): str(text) for text, number in vocab.items()}

    found: dict[int, str] = _counted(path / "tokenizer.json", read)
    return found


def _counted(path: Path, read: Any) -> Any:
    """What ``read`` finds in a file.

    Raises:
        CheckpointError: it finds something else than what such files hold.
    """
    try:
        return read(path)
    except (
        *(ValueError, KeyError, TypeError, AttributeError, IndexError),
        *(RuntimeError, RecursionError, OverflowError),
    ) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Fetch it again") from error


def embedding_rows(index: CheckpointIndex) -> int:
    """Rows of the embedding matrix; 0 if no tensor has one of the usual names."""
    found = [t for n, t in index.tensors.items() if n.endswith(EMBEDDINGS) and len(t.shape) == 2]
    size = text_config(index.config).get("vocab_size")
    # Models that see images or speak may have further ones.
    exact = [t for t in found if t.shape[0] == size]
    return (exact or found)[0].shape[0] if found else 0


def _count_json(path: Path) -> int:
    """One more than the highest id of tokens that are not added."""
    return max(vocabulary_texts(path.parent), default=-1) + 1


def count_model(path: Path) -> int:
    """Number of tokens of a ``tokenizer.model``."""
    raw = path.read_bytes()
    if not is_sentencepiece(raw):
        return len(raw.splitlines())
    return len(pieces_of(raw))


def is_sentencepiece(raw: bytes) -> bool:
    """Whether a ``tokenizer.model`` is SentencePiece's.

    Some checkpoints call a tiktoken table so: lines of base64 and rank.
    """
    return raw[:1] == b"\n"


def pieces_of(raw: bytes) -> list[tuple[str, bool]]:
    """Texts of a SentencePiece model, and whether each is a control token."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    numbers = range(model.get_piece_size())
    return [(model.id_to_piece(n), bool(model.is_control(n))) for n in numbers]
