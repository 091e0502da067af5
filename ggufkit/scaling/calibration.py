"""From a calibration text, chats or question/answer pairs to token ids.

Chats are rendered with the model's own template, so that it sees what it will
see in use. Long documents are cut into pieces, short ones joined; what was used
is told. Some pieces are held back: nothing looks at them until the end, when
they show whether the result is good.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit.checkpoint.chat_template import read_templates
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError, GgufkitError
from ggufkit.foreign import foreign
from ggufkit.llamacpp.conversing import ChatTemplate, checkpoint_template
from ggufkit.llamacpp.template import TemplateError
from ggufkit.progress import SILENT, Progress
from ggufkit.texts.documents import Conversations, read_for_calibration
from ggufkit.texts.rows import Conversation
from ggufkit.values import Json

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

    with foreign(
        f"transformers cannot load the tokenizer of {index.path.name}",
        "Fetch tokenizer.json, tokenizer_config.json, tokenizer.model and config.json again",
    ):
        tokenizer = AutoTokenizer.from_pretrained(index.path, trust_remote_code=trust_remote_code)
    # The warning about texts beyond the context does not apply: they are cut.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def read_documents(
    path: Path,
    index: CheckpointIndex,
    *,
    column: str | None = None,
    name: str = "",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> tuple[list[str], str]:
    """The documents of a calibration file.

    Args:
        path: UTF-8 text, which is one document; or a file of rows with text, chats,
            or questions and answers, in any container that
            :mod:`ggufkit.texts.files` knows.
        index: the checkpoint whose template renders chats.
        column: the column that holds the text or the chat; None to choose one by
            the rules of :mod:`ggufkit.texts.columns`.
        name: what messages call the file; by default its own name.
        trust_remote_code: let transformers run the checkpoint's own code.
        progress: warned of rows that are left out, and of what the template leaves out.

    Returns:
        The documents, and what they are: ``text``, ``chats`` or ``pairs``.

    Raises:
        CheckpointError: if there are chats and the model has no template, or it
            refuses one.
        GgufkitError: if the file cannot be read, or a row is no chat and no question
            with an answer; names it.
    """
    found = read_for_calibration(path, column, progress)
    if isinstance(found, str):
        return [found], "text"
    name = name or path.name
    templates = read_templates(index.path)
    if not templates.named:
        if found.kind == "pairs":
            return [conversation.bare_text() for _, conversation in found.rows], found.kind
        raise CheckpointError(
            f"{name} holds chats, but {index.path.name} has no chat template",
            "Give a plain text with --calibration",
        )
    special = _tokenizer(index, trust_remote_code).special_tokens_map
    template = checkpoint_template(templates, special, name=index.path.name)
    _warn_of_what_is_left_out(found, template, name, progress)
    documents = []
    for number, conversation in found.rows:
        try:
            documents.append(
                template.render(
                    conversation.messages,
                    tools=conversation.tools or None,
                    add_generation_prompt=False,
                )
            )
        except TemplateError as error:
            raise CheckpointError(
                f"{index.path.name}, {found.unit} {number} of {name}: {error.message}",
                "Change or remove that row; some templates take no system message, or want "
                "user and assistant in turn",
            ) from error
    return documents, found.kind


_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of reasoning in turns; a template gets it under each."""


def _warn_of_what_is_left_out(
    found: Conversations, template: ChatTemplate, name: str, progress: Progress
) -> None:
    """Warn of what conversations hold and the template never mentions."""
    for what, keys in (
        ("tools", ("tools",)),
        ("calls", ("tool_calls",)),
        ("reasoning", _REASONING),
    ):
        count = 0
        for _, conversation in found.rows:
            text = template.tool_use if conversation.tools and template.tool_use else template.text
            if not any(key in text for key in keys):
                count += _has(conversation, what, keys)
        if count:
            progress.warn(
                f"{name}: {count} of {len(found.rows)} conversations have {what}, which the "
                "chat template leaves out"
            )


def _has(conversation: Conversation, what: str, keys: Sequence[str]) -> bool:
    if what == "tools":
        return bool(conversation.tools)
    return any(message.get(key) for message in conversation.messages for key in keys)


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
