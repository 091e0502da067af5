"""Chat templates, held against what transformers makes of them."""

import pytest

from ggufkit.llamacpp.template import Message, RefusedError, TemplateError, normalized, render

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ message.content | trim ~ ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
"""
TOOLS = """\
{% if tools %}never{% endif %}
{{ messages | tojson(indent=2) }}
{%- set ns = namespace(count=0) %}
{%- for m in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}
{{ ns.count }}{{ 'x' if messages[-1].content is string }}
    {% if true %}
indented
    {% endif %}
"""

OFFERED = """\
{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}{{ 'é<' | tojson }}
{{ messages[0] | tojson(ensure_ascii=true, indent=' ') }}
{{ strftime_now(format='%Y') }}{{ strftime_now('%m') }}
{%- set ns = namespace(dict(a=1), self=2) %}{% set ns.b = 3 %}{{ ns.a }}{{ ns.self }}{{ ns.b }}
{{ dict.fromkeys(['x'], 0) }}{{ dict([('y', 1)], z=2) }}{{ tools is none }}{{ documents }}
{%- set inside = 'before' %}
{%- for message in messages %}
    {%- generation %}{% set inside = 'after' %}{{ loop.index }}{{ message.role }}{% endgeneration %}
    {{- inside }}{% if loop.index == 2 %}{% break %}{% endif %}
{%- endfor %}
"""

CONVERSATION: list[Message] = [
    {"role": "system", "content": "Be <b>brief</b>"},
    {"role": "user", "content": " Grüß dich \U0001f600 "},
    {"role": "assistant", "content": "Hi & bye"},
    {"role": "user", "content": "{{ bos_token }} and\nmore"},
]


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize(
    "template",
    [CHATML, LLAMA2, TOOLS, OFFERED],
    ids=["chatml", "llama2", "tools", "all that is offered"],
)
def test_renders_as_transformers_does(template: str, length: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = CONVERSATION[-length:]
    theirs, _ = render_jinja_template(
        conversations=[[dict(m) for m in messages]],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert render(template, messages, bos="<s>", eos="</s>") == theirs[0]


def test_a_message_loses_what_is_none_and_has_its_reasoning_under_each_name() -> None:
    from transformers.utils.chat_template_utils import _alias_reasoning_fields

    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "x", name: "because"}
        assert [normalized(message)] == _alias_reasoning_fields([message])
    assert normalized({"role": "user", "content": None, "reasoning": None}) == {"role": "user"}


def test_a_message_is_text_and_no_template() -> None:
    assert "{{ bos_token }} and\nmore" in render(CHATML, CONVERSATION, bos="<s>")


def test_further_names_reach_the_template() -> None:
    assert render("{{ enable_thinking }}", [], enable_thinking=False) == "False"


def test_a_refusal_is_told_in_the_template_s_words() -> None:
    template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(RefusedError, match="refuses this: Roles must alternate") as caught:
        render(template, CONVERSATION)
    assert caught.value.hint == ""


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ messages | nosuchfilter }}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ dict.mro() }}",
        "{{ messages | tojson(nosuchoption=1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_broken_or_wicked_template_is_an_error(template: str) -> None:
    with pytest.raises(TemplateError, match="does not work") as caught:
        render(template, CONVERSATION)
    assert "--chat-template" in caught.value.hint
