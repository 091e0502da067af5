"""Conversations and functions, as templates get to see them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from ggufkit.errors import UsageError
from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.llamacpp.template import TemplateError
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

    def __init__(self, template: str, tool_use: str = "") -> None:
        self.template = ChatTemplate(template, tool_use=tool_use)

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


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_functions_are_told_by_the_user_where_there_is_no_system_message(template: str) -> None:
    made = maker(template)
    text = made.render(TALK, [TOOL])
    assert text.startswith("<user>You can call functions.")
    assert "</tool_call>\n\ndo<assistant>" in text
    assert made.render(TALK[1:2], [TOOL]).startswith("<user>You can call functions.")
    assert made.render(TALK[:1]) == "<user>do"


def test_a_system_message_that_the_template_refuses_stays_refused() -> None:
    with pytest.raises(TemplateError, match="no system"):
        maker(NO_SYSTEM).render([{"role": "system", "content": "Be brief"}, *TALK], [TOOL])


PARTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [PLAIN, PARTS])
@pytest.mark.parametrize("content", ["do", [{"type": "text", "text": "do"}]])
def test_content_may_be_text_or_parts(template: str, content: Any) -> None:
    made = maker(template)
    talk = [{"role": "user", "content": content}, *TALK[1:]]
    assert made.render(talk[:1]) == "<user>do"
    assert made.render(talk, [TOOL]).startswith("<system>You can call functions.")
    system = [{"role": "system", "content": content}, *talk]
    assert made.render(system, [TOOL]).startswith("<system>do\n\nYou can call functions.")
    tool = {"role": "tool", "content": content}
    assert made.render([tool]) == "<user><tool_response>\ndo\n</tool_response>"


def test_parts_are_joined_to_the_words_about_functions() -> None:
    made = maker(
        "{% if messages[0].role == 'system' %}{{ raise_exception('') }}{% endif %}" + PARTS
    )
    talk = [{"role": "user", "content": [{"type": "text", "text": "do"}]}]
    text = made.render(talk, [TOOL])
    assert text.startswith("<user>You can call functions.")
    assert text.endswith("</tool_call>\n\ndo")


def test_reasoning_and_null_content_reach_the_template(plain: PromptMaker) -> None:
    reasoning = PLAIN.replace("{{ m.content }}", "{{ m.reasoning_content }}|{{ m.content }}")
    answer = {**TALK[1], "content": None, "reasoning_content": "because"}
    assert "<assistant>because|" in maker(reasoning).render([TALK[0], answer])
    assert "<assistant>because|" in maker(reasoning + "{{ tools }}").render([TALK[0], answer])
    assert plain.render([TALK[0], answer]).endswith(
        '<assistant><tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    )


def test_a_template_for_functions_is_the_one_that_knows_them() -> None:
    made = PromptMaker(InProcess(PLAIN, tool_use="{{ tools[0].function.name }}[TOOL_CALLS]"))  # type: ignore[arg-type]
    assert made.knows_tools
    assert made.dialect is MISTRAL
    assert made.render(TALK, [TOOL]) == "f[TOOL_CALLS]"
    assert made.render(TALK[:1]) == "<user>do"


def test_a_template_may_render_here_and_arguments_may_be_text() -> None:
    made = PromptMaker(ChatTemplate(PLAIN))
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    talk = [TALK[0], {**TALK[1], "tool_calls": [call]}, TALK[2]]
    assert made.render(talk) == made.render(TALK)
    assert '{"name": "f", "arguments": {"x": 1}}' in made.render(talk)
    made.close()
