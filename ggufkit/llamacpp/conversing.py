"""How a model was taught to converse: its chat template, or one that was given instead."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ggufkit.checkpoint.chat_template import TOOL_USE, CheckpointTemplates
from ggufkit.errors import CheckpointError, UsageError
from ggufkit.llamacpp.fitting import Fitting, text_of
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.template import Message, RefusedError, TemplateError, normalized, render


class NoTemplateError(UsageError):
    """The model has no chat template, and none was given."""


@dataclass(frozen=True)
class ChatTemplate:
    """Turns a conversation into the text that a model goes on from.

    This is the one rule for what a template is given: chats, servers, files of
    questions, calibration and checks all render by it.

    Attributes:
        text: Jinja text, or the name of one that llama.cpp has built in.
        library: the binding, if it is such a name; else None.
        bos: text of the token that begins a sequence.
        eos: text of the token that ends one.
        tool_use: Jinja text for conversations with functions, of models that have
            one of its own for these; else empty.
        tokens: further special tokens by transformers' names, such as ``pad_token``.
    """

    text: str
    library: ModuleType | None = None
    bos: str = ""
    eos: str = ""
    tool_use: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict, hash=False)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation.

        It is what transformers' ``apply_chat_template`` makes of it, save where
        that would lose something or fail: content and arguments of calls are given
        in the form that the template takes (:mod:`ggufkit.llamacpp.fitting`), and a
        content of None becomes empty text where a template cannot do without.

        Args:
            messages: the conversation. Content is text, a list of parts, or None;
                arguments of calls are objects or JSON text.
            tools: functions as JSON schemas; None if there are none.
            add_generation_prompt: whether it goes on to where the answer begins.
            variables: further names that the template may use.

        Raises:
            RefusedError: if the template refuses the messages.
            TemplateError: if it is broken, or cannot be given them.
            UsageError: if one of llama.cpp's own cannot take them.
        """
        if self.library is not None:
            if tools or variables:
                unknown = "functions" if tools else sorted(variables)[0]
                raise UsageError(f"the chat template '{self.text}' does not know {unknown}")
            return _render_builtin(self.library, self.text, messages, add_generation_prompt)
        given = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        text = self.tool_use if tools is not None and self.tool_use else self.text
        fitting = self._fitting if text == self.text else self._fitting_tool_use
        fitted = fitting.fit([normalized(message) for message in messages])
        try:
            return self._write(text, fitted, **given)
        except RefusedError:
            raise
        except TemplateError:
            whole = [{**m, "content": ""} if m.get("content") is None else m for m in fitted]
            if whole == fitted:
                raise
            return self._write(text, whole, **given)

    def _write(self, text: str, messages: Sequence[Message], /, **given: Any) -> str:
        return render(text, messages, bos=self.bos, eos=self.eos, **{**self.tokens, **given})

    @cached_property
    def _fitting(self) -> Fitting:
        return Fitting(partial(self._write, self.text))

    @cached_property
    def _fitting_tool_use(self) -> Fitting:
        return Fitting(partial(self._write, self.tool_use))


def checkpoint_template(
    templates: CheckpointTemplates, special_tokens: Mapping[str, Any], *, name: str
) -> ChatTemplate:
    """The chat template of a checkpoint, with the tokens that it may write.

    Args:
        templates: of the checkpoint.
        special_tokens: ``special_tokens_map`` of its tokenizer in transformers.
        name: of the checkpoint, for errors.

    Raises:
        CheckpointError: if it has none for plain conversations.
    """
    if not templates.default:
        if templates.named:
            raise CheckpointError(
                f"{name} has chat templates ({', '.join(templates.named)}), but none that is "
                "called 'default', so transformers cannot converse with it either",
                "Put the one that you want into its chat_template.jinja",
            )
        raise CheckpointError(f"{name} has no chat template")
    tokens = {k: str(v) for k, v in special_tokens.items() if isinstance(v, str)}
    bos, eos = tokens.pop("bos_token", ""), tokens.pop("eos_token", "")
    tool_use = templates.named.get(TOOL_USE, "")
    return ChatTemplate(templates.default, None, bos, eos, tool_use, tokens)


def find_template(metadata: Metadata, library: ModuleType, given: str | None) -> ChatTemplate:
    """The model's own chat template, or the one that is given. Nothing is guessed.

    Args:
        metadata: of the model.
        library: the binding.
        given: a file with a Jinja template, or the name of one of the model's or
            of llama.cpp's; None for the model's default.

    Raises:
        NoTemplateError: if the model has none and none is given.
        UsageError: if what is given is neither.
    """
    if given is None:
        return model_template(metadata)
    plain = _with_tokens(metadata)
    if given in metadata.named_templates:
        return plain(metadata.named_templates[given])
    names = builtin_templates(library)
    if given in names:
        return ChatTemplate(given, library)
    try:
        return plain(Path(given).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"'{given}' is neither a readable file nor a chat template of llama.cpp",
            f"Those are: {', '.join(names)}",
        ) from error


def model_template(metadata: Metadata) -> ChatTemplate:
    """The chat template that a GGUF has for plain conversations, and that for functions.

    Raises:
        NoTemplateError: if it has none for plain ones.
    """
    if not metadata.chat_template:
        raise _no_template(metadata)
    tool_use = metadata.named_templates.get(TOOL_USE, "")
    return _with_tokens(metadata)(metadata.chat_template, tool_use=tool_use)


def _with_tokens(metadata: Metadata) -> "partial[ChatTemplate]":
    return partial(
        ChatTemplate,
        bos=metadata.special("bos"),
        eos=metadata.special("eos"),
        tokens=_tokens(metadata),
    )


def _no_template(metadata: Metadata) -> NoTemplateError:
    name, others = metadata.gguf.path.name, metadata.named_templates
    if others:
        return NoTemplateError(
            f"{name} has chat templates ({', '.join(others)}), but none for plain conversations",
            f"Name the one that you want: --chat-template {next(iter(others))}",
        )
    return NoTemplateError(
        f"{name} has no chat template, so nobody knows how it was taught to converse",
        "Let it go on with your text: --completion. Or give a template: "
        "--chat-template FILE, or the name of a usual one: --chat-template chatml",
    )


_TOKENS = {"unknown": "unk_token", "seperator": "sep_token", "padding": "pad_token"}
"""Special tokens by the names that templates know them by."""


def _tokens(metadata: Metadata) -> dict[str, str]:
    return {theirs: text for ours, theirs in _TOKENS.items() if (text := metadata.special(ours))}


def builtin_templates(library: ModuleType) -> tuple[str, ...]:
    """Names of the chat templates that llama.cpp has built in."""
    count = library.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    library.llama_chat_builtin_templates(names, count)
    return tuple(sorted(n.decode() for n in names if n))


def _render_builtin(
    library: ModuleType, name: str, messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    if any(message.get("tool_calls") for message in messages):
        raise UsageError(f"the chat template '{name}' does not know calls of functions")
    chat = (library.llama_chat_message * len(messages))(
        *((m["role"].encode(), text_of(m.get("content")).encode()) for m in messages)
    )

    def apply(buffer: object, size: int) -> int:
        return int(
            library.llama_chat_apply_template(
                name.encode(), chat, len(messages), add_generation_prompt, buffer, size
            )
        )

    length = apply(None, 0)
    if length < 0:
        raise UsageError(f"the chat template '{name}' cannot take this conversation")
    buffer = ctypes.create_string_buffer(length + 1)
    apply(buffer, len(buffer))
    return buffer.raw[:length].decode()
