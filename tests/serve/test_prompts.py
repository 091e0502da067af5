"""Conversations and functions, as templates get to see them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from ggufkit.errors import UsageError
from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.serve.prompts import PromptMaker
from ggufkit.serve.toolcalls import HERMES, MISTRAL, Tool

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOL = Tool("f", "does it", {"type": "object"})
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
TALK: list[Mapping[str, Any]] = [
    {"role": "user", "content": "do"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
]


class InProcess:
    """Renders where the test runs."""

    def __init__(self, template: str) -> None:
        self.template = ChatTemplate(template)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        return self.template.render(messages, **variables)

    def close(self) -> None:
        pass


@pytest.fixture
def plain() -> PromptMaker:
    return maker(PLAIN)


def maker(template: str) -> PromptMaker:
    return PromptMaker(InProcess(template))  # type: ignore[arg-type]


def test_a_template_that_knows_functions_gets_them() -> None:
    made = maker(PLAIN + "{{ tools[0].function.name }}{{ messages[1].tool_calls | length }}")
    assert made.knows_tools
    assert made.render(TALK, [TOOL]) == "<user>do<assistant><tool>42f1"


def test_a_template_that_knows_none_is_helped(plain: PromptMaker) -> None:
    assert not plain.knows_tools
    assert plain.dialect is HERMES
    text = plain.render(TALK, [TOOL])
    system, _, rest = text.partition("<user>do")
    assert system.startswith("<system>You can call functions.")
    assert '"name": "f"' in system
    assert '<tool_call>{"name": ..., "arguments": {...}}</tool_call>' in system
    assert rest == (
        '<assistant><tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
        "<user><tool_response>\n42\n</tool_response>"
    )


def test_the_system_message_stays(plain: PromptMaker) -> None:
    talk = [{"role": "system", "content": "Be brief"}, *TALK]
    assert plain.render(talk, [TOOL]).startswith("<system>Be brief\n\nYou can call functions.")
    assert plain.render(talk).startswith("<system>Be brief<user>do")


def test_templates_may_look_at_further_names_but_not_at_changed_ones() -> None:
    made = maker(PLAIN + "{{ thinking }}")
    assert made.render(TALK[:1], variables={"thinking": False}) == "<user>doFalse"
    for name in ("messages", "tools", "bos_token"):
        with pytest.raises(UsageError, match=name):
            made.render(TALK, variables={name: "x"})


def test_the_dialect_is_the_templates() -> None:
    assert maker("[TOOL_CALLS] {{ tools }}").dialect is MISTRAL
