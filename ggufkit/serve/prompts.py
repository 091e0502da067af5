"""From a conversation as clients send it to the text that a model goes on from."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ggufkit.errors import UsageError
from ggufkit.llamacpp.rendering import Renderer
from ggufkit.serve.toolcalls import Dialect, Tool, dialect_of

ChatMessage = Mapping[str, Any]
"""``role``, ``content``, and what calls of functions need besides: ``tool_calls``
(whose arguments are objects), ``tool_call_id``, ``name``."""

_INSTRUCTION = """\
You can call functions. These are there, as JSON, one a line:
{tools}
To call one, answer with this alone: {opening}{{"name": ..., "arguments": {{...}}}}{closing}"""


class PromptMaker:
    """Makes prompts with a model's chat template.

    Args:
        renderer: renders the template.

    Attributes:
        dialect: how the model writes calls of functions.
        knows_tools: whether the template tells the model of functions. If not, a
            system message does, in the words of :data:`_INSTRUCTION`.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        template = renderer.template
        own = template.text if template.library is None else ""
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
            variables: further names that the template may look at.

        Raises:
            TemplateError: if the template refuses the conversation, or is stopped.
            UsageError: if a name is the template's own.
        """
        given = dict(variables or {})
        if taken := sorted(_TAKEN & set(given)):
            raise UsageError(f"chat_template_kwargs cannot set {taken[0]}")
        if self.knows_tools:
            if tools:
                given["tools"] = [tool.described() for tool in tools]
        else:
            messages = self._plain(messages, tools)
        return self._renderer.render(messages, **given)

    def close(self) -> None:
        """End the process that renders."""
        self._renderer.close()

    def _plain(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
        """The conversation for a template that knows system, user and assistant alone."""
        plain = [self._spelled(message) for message in messages]
        if not tools:
            return plain
        told = _INSTRUCTION.format(
            tools="\n".join(json.dumps(t.described(), ensure_ascii=False) for t in tools),
            opening=self.dialect.opening,
            closing=self.dialect.closing,
        )
        if plain and plain[0]["role"] == "system":
            first = {**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}
            return [first, *plain[1:]]
        return [{"role": "system", "content": told}, *plain]

    def _spelled(self, message: ChatMessage) -> ChatMessage:
        content = message["content"]
        if message["role"] == "tool":
            told = f"<tool_response>\n{content}\n</tool_response>"
            return {"role": "user", "content": told}
        calls = [
            f"{self.dialect.opening}{json.dumps(c['function'], ensure_ascii=False)}"
            f"{self.dialect.closing}"
            for c in message.get("tool_calls", ())
        ]
        parts = [content, *calls] if content else calls
        return {"role": message["role"], "content": "\n".join(parts) if calls else content}


_TAKEN = {"messages", "tools", "template", "bos", "eos", "bos_token", "eos_token", "variables"}
