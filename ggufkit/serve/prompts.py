"""From a conversation as clients send it to the text that a model goes on from."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ggufkit.errors import UsageError
from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.llamacpp.fitting import text_of
from ggufkit.llamacpp.rendering import Renderer, TemplateStoppedError
from ggufkit.llamacpp.template import TemplateError
from ggufkit.serve.toolcalls import Dialect, Tool, dialect_of

ChatMessage = Mapping[str, Any]
"""``role``, ``content`` (text, parts or None), ``reasoning_content``, and what calls of
functions need besides: ``tool_calls`` (whose arguments are objects, or JSON text of them),
``tool_call_id``, ``name``."""

_INSTRUCTION = """\
You can call functions. These are there, as JSON, one a line:
{tools}
To call one, answer with this alone: {opening}{{"name": ..., "arguments": {{...}}}}{closing}"""


class PromptMaker:
    """Makes prompts with a model's chat template.

    Args:
        renderer: renders the template: here, or in a process of its own.

    Attributes:
        dialect: how the model writes calls of functions.
        knows_tools: whether the template tells the model of functions. If not, a
            system message does, in the words of :data:`_INSTRUCTION`; or the first
            user's message, where the template takes no system message.
    """

    def __init__(self, renderer: Renderer | ChatTemplate) -> None:
        self._renderer = renderer
        template = renderer if isinstance(renderer, ChatTemplate) else renderer.template
        own = "" if template.library is not None else template.text + template.tool_use
        self.dialect: Dialect = dialect_of(own)
        self.knows_tools = re.search(r"\btools\b", own) is not None

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: the conversation.
            tools: functions that the model may call.
            variables: further names that the template may use.

        Raises:
            TemplateError: if the template refuses the conversation, or is stopped.
            UsageError: if a name is the template's own.
        """
        given = dict(variables or {})
        if taken := sorted(_TAKEN & set(given)):
            raise UsageError(f"chat_template_kwargs cannot set {taken[0]}")
        if not self.knows_tools:
            messages = self._plain(messages, tools)
        elif tools:
            given["tools"] = [tool.described() for tool in tools]
        return self._renderer.render(messages, **given)

    def close(self) -> None:
        """End the process that renders, if there is one."""
        if not isinstance(self._renderer, ChatTemplate):
            self._renderer.close()

    def _plain(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
        """The conversation for a template that knows system, user and assistant alone."""
        plain = [self._spelled(message) for message in messages]
        if not tools:
            return plain
        instruction = _INSTRUCTION.format(
            tools="\n".join(json.dumps(t.described(), ensure_ascii=False) for t in tools),
            opening=self.dialect.opening,
            closing=self.dialect.closing,
        )
        if plain and plain[0]["role"] == "system":
            first = {**plain[0], "content": _joined(plain[0].get("content"), instruction)}
            return [first, *plain[1:]]
        if self._takes_system:
            return [{"role": "system", "content": instruction}, *plain]
        first_user = next((n for n, m in enumerate(plain) if m["role"] == "user"), None)
        if first_user is None:
            return [{"role": "user", "content": instruction}, *plain]
        asked = plain[first_user]
        plain[first_user] = {**asked, "content": _joined(instruction, asked.get("content"))}
        return plain

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template hands a system message on; some refuse it, some leave it out."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
        try:
            return _PROBE in self._renderer.render(messages)
        except TemplateStoppedError:
            raise
        except TemplateError:
            return False

    def _spelled(self, message: ChatMessage) -> ChatMessage:
        """A message whose calls, or whose answer to one, are part of its content."""
        content = message.get("content")
        if message["role"] == "tool":
            return {
                "role": "user",
                "content": f"<tool_response>\n{text_of(content)}\n</tool_response>",
            }
        if not (calls := message.get("tool_calls")):
            return message
        spelled = [
            f"{self.dialect.opening}"
            f"{json.dumps(_with_object(call['function']), ensure_ascii=False)}"
            f"{self.dialect.closing}"
            for call in calls
        ]
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        said = [text_of(content)] if content else []
        return {**rest, "content": "\n".join([*said, *spelled])}


def _with_object(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """A called function with its arguments as an object, where they are JSON text of one."""
    try:
        read = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return function
    return {**function, "arguments": read} if isinstance(read, dict) else function


def _joined(*contents: Any) -> Any:
    """Contents with a blank line between them; parts if one of them is."""
    given = [content for content in contents if content]
    if all(isinstance(content, str) for content in given):
        return "\n\n".join(given)
    parts = list[Any]()
    for content in given:
        blank = [{"type": "text", "text": "\n\n"}] if parts else []
        own = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts += [*blank, *own]
    return parts


_PROBE = "What-is-said-first"
_TAKEN = {"messages", "tools", "template", "bos", "eos", "bos_token", "eos_token", "variables"}
