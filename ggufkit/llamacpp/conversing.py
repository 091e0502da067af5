"""How a model was taught to converse: its chat template, or one that was given instead."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from ggufkit.errors import UsageError
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.template import Message, TemplateError, render


class NoTemplateError(UsageError):
    """The model has no chat template, and none was given."""


@dataclass(frozen=True)
class ChatTemplate:
    """Turns a conversation into the text that a model goes on from.

    Attributes:
        text: Jinja text, or the name of one that llama.cpp has built in.
        library: the binding, if it is such a name; else None.
        bos: text of the token that begins a sequence.
        eos: text of the token that ends one.
    """

    text: str
    library: ModuleType | None = None
    bos: str = ""
    eos: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, up to where the answer begins.

        Raises:
            TemplateError: if the template is broken or refuses the messages.
            UsageError: if one of llama.cpp's own refuses them.
        """
        if self.library is not None:
            return _render_builtin(self.library, self.text, messages)
        if self._wants_parts:
            messages = [{**m, "content": _as_parts(m["content"])} for m in messages]
        return render(self.text, messages, bos=self.bos, eos=self.eos)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether content must be a list of parts; templates of models that see want that.

        Found out by trying, because such a template leaves plain text out in silence.
        """

        def renders(content: object) -> bool:
            said = [{"role": "user", "content": content}]
            try:
                return _PROBE in render(self.text, said, bos=self.bos, eos=self.eos)
            except TemplateError:
                return False

        return not renders(_PROBE) and renders(_as_parts(_PROBE))


_PROBE = "What-is-seen?"


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def find_template(metadata: Metadata, library: ModuleType, given: str | None) -> ChatTemplate:
    """The model's own chat template, or the one that is given. Nothing is guessed.

    Args:
        metadata: of the model.
        library: the binding.
        given: a file with a Jinja template, or the name of one of llama.cpp's
            own; None for the model's.

    Raises:
        NoTemplateError: if the model has none and none is given.
        UsageError: if what is given is neither.
    """
    bos, eos = metadata.special("bos"), metadata.special("eos")
    if given is None:
        if not metadata.chat_template:
            raise NoTemplateError(
                f"{metadata.gguf.path.name} has no chat template, so nobody knows how it was "
                "taught to converse",
                "Let it go on with your text: --completion. Or give a template: "
                "--chat-template FILE, or the name of a usual one: --chat-template chatml",
            )
        return ChatTemplate(metadata.chat_template, bos=bos, eos=eos)
    names = builtin_templates(library)
    if given in names:
        return ChatTemplate(given, library)
    try:
        return ChatTemplate(Path(given).read_text(encoding="utf-8"), bos=bos, eos=eos)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"'{given}' is neither a readable file nor a chat template of llama.cpp",
            f"Those are: {', '.join(names)}",
        ) from error


def builtin_templates(library: ModuleType) -> tuple[str, ...]:
    """Names of the chat templates that llama.cpp has built in."""
    count = library.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    library.llama_chat_builtin_templates(names, count)
    return tuple(sorted(n.decode() for n in names if n))


def _render_builtin(library: ModuleType, name: str, messages: Sequence[Message]) -> str:
    chat = (library.llama_chat_message * len(messages))(
        *((m["role"].encode(), m["content"].encode()) for m in messages)
    )

    def apply(buffer: object, size: int) -> int:
        return int(
            library.llama_chat_apply_template(
                name.encode(), chat, len(messages), True, buffer, size
            )
        )

    length = apply(None, 0)
    if length < 0:
        raise UsageError(f"the chat template '{name}' cannot take this conversation")
    buffer = ctypes.create_string_buffer(length + 1)
    apply(buffer, len(buffer))
    return buffer.raw[:length].decode()
