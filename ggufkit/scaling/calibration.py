"""From a calibration text, chats or question/answer pairs to token ids.

Chats are rendered with the model's own template, so that it sees what it will
see in use. Long documents are cut into pieces, short ones joined; what was used
is told. Some pieces are held back: nothing looks at them until the end, when
they show whether the result is good.
"""

import json
import random
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError, GgufkitError
from ggufkit.values import CHAT_KEYS, PAIR_KEYS, Json, row_kind

if TYPE_CHECKING:
    import torch

HELD_BACK = 8
"""Sequences held back, beside those asked for; fewer if the text is short."""
_CHARACTERS_PER_TOKEN = 64
"""A text with more characters than this per token needed is read in windows."""
_WINDOWS_PER_TOKEN = (8, _CHARACTERS_PER_TOKEN)
"""Characters of a window per token of a sequence: enough in any script, but
not for drawings and tables, whose long runs of one character are one token."""
_LONG_WORD = 64
"""A window begins with a whole word, unless it has none for so many characters."""
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
"""Other names for roles, in ShareGPT's files and in OpenAI's newer ones."""
_ROLES_KNOWN = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Sequences:
    """Calibration text as token ids.

    Attributes:
        tokens: int64, shape (sequences, length).
        held_back: pieces of the same text between them, int64, shape
            (pieces, length).
        facts: what was used, for the manifest.
    """

    tokens: "torch.Tensor"
    held_back: "torch.Tensor"
    facts: dict[str, Json]


def _tokenizer(index: CheckpointIndex, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(index.path, trust_remote_code=trust_remote_code)
    # The warning about texts beyond the context does not apply: they are cut.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def read_documents(
    path: Path, index: CheckpointIndex, *, trust_remote_code: bool = False
) -> tuple[list[str], str]:
    """The documents of a calibration file.

    Args:
        path: UTF-8 text, which is one document; or JSON lines with chats
            (``messages`` or ``conversations``) or pairs (question and answer).
        index: the checkpoint whose template renders them.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        The documents, and what they are: ``text``, ``chats`` or ``pairs``.

    Raises:
        CheckpointError: if there are chats and the model has no template.
        GgufkitError: if a line is not what the first one is; names it.
    """
    kind = _kind_of(path)
    if kind == "text":
        return [path.read_text(encoding="utf-8")], kind
    tokenizer = _tokenizer(index, trust_remote_code)
    template = bool(tokenizer.chat_template)
    if kind == "chats" and not template:
        raise CheckpointError(
            f"{path.name} holds chats, but {index.path.name} has no chat template",
            "Give a plain text with --calibration",
        )
    documents = []
    for number, row in _rows(path):
        try:
            turns = _turns(row, kind)
        except (KeyError, TypeError, ValueError) as error:
            raise GgufkitError(
                f"line {number} of {path.name} is not like the first: {_reason(error)}",
                f"Every line needs one of {', '.join(CHAT_KEYS)}, or a pair such as "
                f"{' and '.join(PAIR_KEYS[0])}",
            ) from error
        if not template:
            documents.append("\n".join(turn["content"] for turn in turns))
            continue
        try:
            documents.append(tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError as error:
            raise CheckpointError(
                f"the chat template of {index.path.name} refuses line {number} of {path.name}: "
                f"{error}",
                "Change or remove that line; some templates take no system message, or want "
                "user and assistant in turn",
            ) from error
    return documents, kind


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _kind_of(path: Path) -> str:
    if path.suffix.lower() not in _JSON_SUFFIXES:
        return "text"
    return next((row_kind(row) for _, row in _rows(path)), "text")


def _rows(path: Path) -> Iterator[tuple[int, Json]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(BOM_UTF8) if number == 1 else raw
            if line.strip():
                try:
                    yield number, json.loads(line.decode())
                except (ValueError, RecursionError) as error:
                    raise GgufkitError(
                        f"line {number} of {path.name} is not JSON: {error}",
                        "One JSON object on each line is needed, in UTF-8",
                    ) from error


def _turns(row: Json, kind: str) -> list[dict[str, str]]:
    if not isinstance(row, dict):
        raise TypeError("no JSON object")
    return _chat(row) if kind == "chats" else _pair(row)


def _chat(row: Json) -> list[dict[str, str]]:
    turns = next((row[key] for key in CHAT_KEYS if key in row), None)
    if not turns or not isinstance(turns, list):
        raise ValueError("a chat without turns")
    return [_turn(turn) for turn in turns]


def _turn(turn: Json) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise TypeError("a turn that is no object")
    role = turn["from"] if "from" in turn else turn["role"]
    role = _ROLES.get(role, role)
    if role not in _ROLES_KNOWN:
        raise ValueError(f"unknown role '{role}' (known are {', '.join((*_ROLES_KNOWN, *_ROLES))})")
    content = turn["value"] if "value" in turn else turn["content"]
    return {"role": role, "content": _text(content, "a turn whose content")}


def _pair(row: Json) -> list[dict[str, str]]:
    asked, answered = next((p for p in PAIR_KEYS if set(p) <= row.keys()), PAIR_KEYS[0])
    context = row.get("input") or ""
    parts = _text(row[asked], f"'{asked}'"), _text(context, "'input'")
    return [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": _text(row[answered], f"'{answered}'")},
    ]


def _text(value: Json, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a surrogate pair") from error
    return value


def cut_sequences(
    documents: Sequence[str],
    index: CheckpointIndex,
    *,
    samples: int,
    length: int,
    seed: int | None = None,
    trust_remote_code: bool = False,
) -> Sequences:
    """Cut documents into sequences of one length.

    Args:
        documents: they are joined in their order.
        index: the checkpoint whose tokenizer reads them.
        samples: how many sequences to take at most.
        length: tokens of each; it begins with BOS if the tokenizer adds one.
        seed: choose pieces by chance; None to spread them evenly.
        trust_remote_code: let transformers run the checkpoint's own code.

    Raises:
        GgufkitError: if there are fewer than two sequences in them.
    """
    import torch

    tokenizer = _tokenizer(index, trust_remote_code)
    prefix = [t for t in tokenizer("").input_ids if t == tokenizer.bos_token_id]
    body = length - len(prefix)
    tokens, characters = _read(documents, tokenizer, samples + HELD_BACK, length)
    available = len(tokens) // body
    if available < 2:
        raise GgufkitError(
            f"the calibration text has only {len(tokens)} tokens; at least {2 * body} are needed",
            "Give a longer text with --calibration, or a smaller --calibration-length",
        )
    held = max(1, min(HELD_BACK, available // 3))
    count = min(samples + held, available)
    if seed is None:
        starts = [round(i * (len(tokens) - body) / (count - 1)) for i in range(count)]
    else:
        starts = [body * i for i in random.Random(seed).sample(range(available), count)]
    cut = torch.tensor([prefix + tokens[start : start + body] for start in starts])
    aside = torch.zeros(count, dtype=torch.bool)
    aside[[(2 * i + 1) * count // (2 * held) for i in range(held)]] = True
    used = cut[~aside]
    facts = {
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "characters_read": characters,
        "tokens_available": len(tokens),
        "sequences": len(used),
        "held_back": held,
    }
    return Sequences(used, cut[aside], facts)


def _read(
    documents: Sequence[str], tokenizer: Any, wanted: int, length: int
) -> tuple[list[int], int]:
    """The documents as tokens, and how many characters were read for them.

    Of documents that are many times too long, as many evenly spread windows are
    read as sequences are wanted.
    """
    total = sum(map(len, documents))
    if total <= _CHARACTERS_PER_TOKEN * wanted * length:
        return _tokens(documents, tokenizer), total
    text = "".join(documents)
    for per_token in _WINDOWS_PER_TOKEN:
        size = per_token * length
        starts = [round(i * (total - size) / (wanted - 1)) for i in range(wanted)]
        windows = [_from_a_word(text[start : start + size]) for start in starts]
        tokens = _tokens(windows, tokenizer)
        if len(tokens) >= wanted * length:
            break
    return tokens, sum(map(len, windows))


def _tokens(pieces: Sequence[str], tokenizer: Any) -> list[int]:
    return [t for piece in pieces for t in tokenizer(piece, add_special_tokens=False).input_ids]


def _from_a_word(text: str) -> str:
    """The text from its first whole word on; as it is in scripts that write no spaces."""
    part, _, rest = text.partition(" ")
    return rest if len(part) <= _LONG_WORD else text


def text_of(
    tokens: "torch.Tensor", index: CheckpointIndex, *, trust_remote_code: bool = False
) -> str:
    """Sequences as text, with a blank line between them."""
    pieces = _tokenizer(index, trust_remote_code).batch_decode(tokens, skip_special_tokens=True)
    return "\n\n".join(pieces)
