"""What chat templates are given, held against transformers over published templates."""

import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ggufkit.checkpoint import CheckpointTemplates, read_templates
from ggufkit.errors import CheckpointError, UsageError
from ggufkit.llamacpp.building import fetch_archive
from ggufkit.llamacpp.conversing import (
    ChatTemplate,
    NoTemplateError,
    checkpoint_template,
    find_template,
    model_template,
)
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.pin import read_pin
from ggufkit.llamacpp.rendering import Renderer
from ggufkit.llamacpp.runtime import load_llama_cpp
from ggufkit.llamacpp.template import RefusedError, TemplateError
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.values import GGUFFile, Json
from tests.factory import CHAT_TEMPLATE, make_checkpoint

Message = Mapping[str, Any]
TOOL = {
    "type": "function",
    "function": {
        "name": "find_hedgehog",
        "description": "Finds one.",
        "parameters": {
            "type": "object",
            "properties": {"garden": {"type": "string", "description": "where"}},
            "required": ["garden"],
        },
    },
}
OBJECT = {"garden": "behind-the-house"}


def said(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(arguments: Any, **more: Any) -> list[Message]:
    """A question, a call of a function, and what it gave."""
    function = {"name": "find_hedgehog", "arguments": arguments}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    asked = {"role": "assistant", "tool_calls": calls, **more}
    answer = said("tool", "Under-leaves", tool_call_id="abcdefghi", name="find_hedgehog")
    return [said("user", "Where is it?"), asked, answer]


QUESTION = said("user", "Wo schläft <ein> Igel?")
ANSWER = said("assistant", "In-the-hay")
SAME: dict[str, list[Message]] = {
    "question": [QUESTION],
    "system": [said("system", "Be brief"), QUESTION],
    "turns": [QUESTION, ANSWER, said("user", " And\n\nthen? "), ANSWER, QUESTION],
    "answered": [QUESTION, ANSWER],
    "reasoning": [QUESTION, {**ANSWER, "reasoning_content": "It-is-cold"}, QUESTION],
    "reasoning by another name": [QUESTION, {**ANSWER, "reasoning": "It-is-cold"}, QUESTION],
    "nothing is None": [{**QUESTION, "name": None, "tool_calls": None}],
}
"""Conversations that no template needs to be helped with."""
OTHER: dict[str, list[Message]] = {
    "parts": [said("user", parts("Wo schläft ein Igel?"))],
    "two parts": [said("user", parts("Wo schläft", " ein Igel?"))],
    "parts of a system": [said("system", parts("Be brief")), QUESTION],
    "mixed": [said("user", parts("Hello-there")), ANSWER, QUESTION],
    "call": call(OBJECT, content=""),
    "call as text": call(json.dumps(OBJECT), content=""),
    "call and null": call(OBJECT, content=None),
    "call and nothing": call(OBJECT),
    "call and words": call(OBJECT, content="I-look-for-it"),
    "call after reasoning": call(OBJECT, content="", reasoning_content="It-may-be-hidden"),
}
"""Conversations that some templates take in one form only."""


@pytest.fixture(scope="module")
def published() -> dict[str, str]:
    """The chat templates that llama.cpp keeps for its own tests, by file name."""
    found = {}
    with tarfile.open(fetch_archive(read_pin())) as archive:
        for member in archive:
            name = Path(member.name)
            if name.parent.name == "templates" and name.suffix == ".jinja":
                file = archive.extractfile(member)
                assert file is not None
                found[name.name] = file.read().decode()
    assert len(found) >= 70
    return found


def theirs(
    template: str, messages: list[Message], tools: list[Any] | None = None, generate: bool = True
) -> str | None:
    """What transformers makes of it; None if that is an exception."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = object.__new__(PreTrainedTokenizerFast)
    tokenizer.__dict__.update(_special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.__dict__.update(chat_template=None, _extra_special_tokens=[])
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generate,
        )
    except Exception:
        return None
    return text


def ours(
    made: ChatTemplate,
    messages: list[Message],
    tools: list[Any] | None = None,
    generate: bool = True,
) -> str | None:
    try:
        return made.render(messages, tools=tools, add_generation_prompt=generate)
    except TemplateError:
        return None


def test_plain_conversations_are_what_transformers_makes_of_them(
    published: dict[str, str],
) -> None:
    rendered = 0
    for file, template in published.items():
        made = ChatTemplate(template, bos="<s>", eos="</s>")
        for (name, messages), tools in itertools.product(SAME.items(), (None, [TOOL])):
            generate = name != "answered"
            wanted = theirs(template, messages, tools, generate)
            assert ours(made, messages, tools, generate) == wanted, (file, name)
            rendered += wanted is not None
    assert rendered > 0.9 * len(published) * len(SAME) * 2, "most templates take all of them"


def _in_other_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The same conversation, with contents and arguments in each form that there is."""
    contents = (lambda c: c, lambda c: c if isinstance(c, str) else _joined(c), _as_parts)
    blanks: tuple[Message | None, ...] = (None, {}, {"content": None}, {"content": ""})
    arguments = (lambda a: a, lambda a: json.dumps(OBJECT), lambda a: OBJECT)
    for forms in itertools.product(contents, blanks, arguments):
        yield [_formed(message, *forms) for message in messages]


def _joined(content: list[dict[str, str]]) -> str:
    return "".join(part["text"] for part in content)


def _as_parts(content: Any) -> Any:
    return parts(content) if isinstance(content, str) else content


def _formed(message: Message, content: Any, blank: Message | None, arguments: Any) -> Message:
    made = dict(message)
    if made.get("content"):
        made["content"] = content(made["content"])
    elif blank is not None and "tool_calls" in made:
        made.pop("content", None)
        made |= blank
    if "tool_calls" in made:
        (one,) = made["tool_calls"]
        function = {**one["function"], "arguments": arguments(one["function"]["arguments"])}
        made["tool_calls"] = [{**one, "function": function}]
    return made


def _rendered(template: str, messages: list[Message], tools: list[Any] | None) -> str | None:
    """As transformers' own renderer does, to which a content may be None."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
    except Exception:
        return None
    return str(texts[0])


def _words(messages: list[Message]) -> set[str]:
    """What should be in a prompt: words, and arguments."""
    found = set()
    for message in messages:
        content = message.get("content") or ""
        found |= {content} if isinstance(content, str) else {p["text"] for p in content}
        found |= set(OBJECT.values()) if "tool_calls" in message else set()
    return {word.strip() for word in found if word.strip()}


def _is_garbled(text: str) -> bool:
    """Whether a list of parts or an object is printed as data, or text is quoted twice."""
    marks = ("'type': 'text'", '"type": "text"', '"type":"text"', '\\"garden\\"', str(OBJECT))
    return any(mark in text for mark in marks)


def test_where_it_is_another_text_transformers_fails_or_loses_words(
    published: dict[str, str],
) -> None:
    helped = dict.fromkeys(OTHER, 0)
    for template in published.values():
        made = ChatTemplate(template, bos="<s>", eos="</s>")
        for name, messages in OTHER.items():
            tools = [TOOL] if "call" in name else None
            wanted, text = theirs(template, messages, tools), ours(made, messages, tools)
            if text != wanted:
                helped[name] += 1
                _check_that_it_helps(template, messages, tools, wanted, text)
    # Templates of every kind are among them: those that take it, and those that do not.
    assert all(0 < n < len(published) for name, n in helped.items() if name != "call and words")


def _check_that_it_helps(
    template: str,
    messages: list[Message],
    tools: list[Any] | None,
    wanted: str | None,
    text: str | None,
) -> None:
    assert text is not None
    assert not _is_garbled(text)
    # It is what transformers writes for the same conversation in another form.
    forms = (_rendered(template, form, tools) for form in _in_other_forms(messages))
    assert any(text == form for form in forms)
    if wanted is not None and not _is_garbled(wanted):
        lost = {word for word in _words(messages) if word not in wanted}
        assert lost
        assert all(word in text for word in lost)


# What a template is given.

EITHER = (
    "{% for m in messages %}"
    "{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>{% endif %}"
    "{% endfor %}{% endfor %}"
)
TEXT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SYSTEM_IS_TEXT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '#' + m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
CALLS = (
    "{% for m in messages %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ ARGUMENTS }}{% endfor %}{% endfor %}"
)


def calling(arguments: str) -> ChatTemplate:
    return ChatTemplate(CALLS.replace("ARGUMENTS", arguments))


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (TEXT, "Hello", "<user>Hello"),
        (TEXT, parts("Hel", "lo"), "<user>Hello"),
        (TEXT, [], "<user>[]"),
        (TEXT, None, "<user>"),
        (PARTS, "Hello", "user:Hello"),
        (PARTS, parts("Hel", "lo"), "user:Hello"),
        (PARTS, [*parts("Hello"), {"type": "image"}], "user:Hello<image>"),
        (PARTS, None, "user:"),
        (EITHER, "Hello", "Hello"),
        (EITHER, parts("Hello"), "Hello"),
        ("{{ messages | tojson }}", parts("Hi"), '[{"role": "user", "content": "Hi"}]'),
        ("{{ '<' + messages[0].content }}", None, "<"),
    ],
)
def test_content_comes_in_the_form_that_the_template_takes(
    template: str, content: Any, text: str
) -> None:
    assert ChatTemplate(template).render([said("user", content)]) == text


def test_each_role_s_content_comes_in_the_form_that_is_taken_of_it() -> None:
    made = ChatTemplate(SYSTEM_IS_TEXT)
    assert made.render([said("system", "Brief"), said("user", "Hi")]) == "#BriefHi"
    assert made.render([said("system", parts("Brief")), said("user", parts("Hi"))]) == "#BriefHi"


def test_a_template_of_texts_is_given_no_image() -> None:
    with pytest.raises(TemplateError, match="no part of type 'image'"):
        ChatTemplate(TEXT).render([said("user", [*parts("Hello"), {"type": "image"}])])


@pytest.mark.parametrize("given", [OBJECT, json.dumps(OBJECT)])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("c.function.arguments | tojson", '{"garden": "behind-the-house"}'),
        ("'>' + c.function.arguments", '>{"garden": "behind-the-house"}'),
        ("c.function.arguments", '{"garden": "behind-the-house"}'),
        ("c.function.arguments.items() | list", "[('garden', 'behind-the-house')]"),
    ],
)
def test_arguments_come_in_the_form_that_the_template_takes(
    given: Any, arguments: str, text: str
) -> None:
    made = calling(arguments).render(call(given, content=None))
    assert made == f"Where is it?{text}Under-leaves"


def test_arguments_that_the_template_takes_either_way_stay_as_they_are() -> None:
    made = calling(
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson"
    )
    assert '{"garden":  1}' in made.render(call('{"garden":  1}'))
    assert '{"garden": 1}' in made.render(call({"garden": 1}))


@pytest.mark.parametrize("arguments", ["[1]", "{", "nothing", '"x"'])
def test_arguments_that_are_no_object_are_an_error_where_one_is_wanted(arguments: str) -> None:
    with pytest.raises(TemplateError, match="'find_hedgehog' are no JSON object"):
        calling("c.function.arguments | tojson").render(call(arguments))
    assert arguments in calling("'>' + c.function.arguments").render(call(arguments))


def test_a_call_is_written_also_by_templates_that_want_its_content_null() -> None:
    # As DeepSeek's R1: calls where the content is none, and words where it is not.
    only = (
        "{% for m in messages %}{% if m['content'] is none %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ '<' + m['content'] }}{% endif %}{% endfor %}"
    )
    named = only.replace(".name", ".name + m.tool_calls[0].function.arguments")
    for content in ({}, {"content": None}, {"content": ""}):
        text = ChatTemplate(named).render(call(OBJECT, **content))
        assert text == f"<Where is it?find_hedgehog{json.dumps(OBJECT)}<Under-leaves"


def test_functions_and_documents_are_none_where_there_are_none() -> None:
    template = "{{ tools is none and documents is none and tools is defined }}"
    assert ChatTemplate(template).render([QUESTION]) == "True"
    assert ChatTemplate("{{ tools | length }}").render([QUESTION], tools=[TOOL]) == "1"
    assert ChatTemplate("{{ documents[0] }}").render([QUESTION], documents=["x"]) == "x"


def test_a_template_for_functions_is_used_when_there_are_some() -> None:
    made = ChatTemplate("plain", tool_use="{{ tools[0].function.name }}")
    assert made.render([QUESTION]) == "plain"
    assert made.render([QUESTION], tools=[TOOL]) == "find_hedgehog"


def test_any_name_can_be_a_variable() -> None:
    names = {"text": 1, "template": 2, "self_": 3, "bos": 4}
    with pytest.raises(TypeError):
        ChatTemplate("x").render([QUESTION], **{"bos": 4})
    names.pop("bos")
    template = "{{ text }}{{ template }}{{ self_ }}"
    assert ChatTemplate(template).render([QUESTION], **names) == "123"


@pytest.mark.parametrize("template", [PARTS, TEXT, SYSTEM_IS_TEXT, calling("c.id").text])
def test_a_process_of_its_own_renders_the_same(template: str) -> None:
    made = ChatTemplate(
        template,
        bos="<s>",
        tool_use="{{ tools | tojson }}{{ pad_token }}",
        tokens={"pad_token": "<p>"},
    )
    renderer = Renderer(made)
    try:
        for messages in (*SAME.values(), *OTHER.values()):
            for given in ({}, {"tools": [TOOL]}, {"add_generation_prompt": False}):
                assert renderer.render(messages, **given) == made.render(messages, **given)
    finally:
        renderer.close()


def test_a_refusal_is_one_in_another_process_too() -> None:
    renderer = Renderer(ChatTemplate("{{ raise_exception('No') }}"))
    try:
        with pytest.raises(RefusedError, match="No"):
            renderer.render([QUESTION])
    finally:
        renderer.close()


# Where templates come from.


def gguf(**keys: Json) -> Metadata:
    named = {f"tokenizer.{key}": value for key, value in keys.items()}
    return Metadata(GGUFFile(Path("/m/x.gguf"), 3, 0, named, ()))


def test_a_gguf_s_templates_by_name(native: NativeBuild) -> None:
    library = load_llama_cpp(native)
    keys: dict[str, Json] = {"chat_template": "plain", "chat_template.tool_use": "with tools"}
    found = find_template(gguf(**keys), library, None)
    assert (found.text, found.tool_use) == ("plain", "with tools")
    assert find_template(gguf(**keys), library, "tool_use").text == "with tools"
    assert find_template(gguf(**keys), library, "chatml").library is not None
    with pytest.raises(NoTemplateError, match=r"\(rag\), but none for plain") as caught:
        find_template(gguf(**{"chat_template.rag": "x"}), library, None)
    assert "--chat-template rag" in caught.value.hint


def test_templates_of_llama_cpp_take_text_alone(native: NativeBuild) -> None:
    made = find_template(gguf(), load_llama_cpp(native), "chatml")
    text = made.render([said("user", parts("Hi", " there"))], add_generation_prompt=False)
    assert text == "<|im_start|>user\nHi there<|im_end|>\n"
    assert made.render([said("assistant", None)]).endswith("<|im_start|>assistant\n")
    with pytest.raises(UsageError, match="does not know functions"):
        made.render([QUESTION], tools=[TOOL])
    with pytest.raises(UsageError, match="does not know calls"):
        made.render(call(OBJECT))
    with pytest.raises(UsageError, match="does not know enable_thinking"):
        made.render([QUESTION], enable_thinking=False)


def test_a_checkpoint_s_template_renders_as_its_tokenizer_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = make_checkpoint(tmp_path / "made", hidden=32, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = "{{ bos_token }}{{ unk_token }}{{ pad_token }}" + CHAT_TEMPLATE + "{{ eos_token }}"
    (path / "chat_template.jinja").write_text(template)
    made = checkpoint_template(read_templates(path), tokenizer.special_tokens_map, name=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for generate in (True, False):
        assert made.render([QUESTION], add_generation_prompt=generate) == (
            tokenizer.apply_chat_template(
                [QUESTION], tokenize=False, add_generation_prompt=generate
            )
        )


def test_a_checkpoint_without_a_default_is_an_error_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"\(chat, rag\), but none that is called 'default'"):
        checkpoint_template(CheckpointTemplates("", {"chat": "x", "rag": "y"}), {}, name="model")
    with pytest.raises(CheckpointError, match="model has no chat template"):
        checkpoint_template(CheckpointTemplates(), {}, name="model")


def test_a_model_s_own_template_needs_no_library() -> None:
    keys: dict[str, Json] = {"chat_template": "plain", "chat_template.tool_use": "{{ tools[0] }}"}
    made = model_template(gguf(**keys))
    assert made.render([QUESTION]) == "plain"
    assert "find_hedgehog" in made.render([QUESTION], tools=[TOOL])
    with pytest.raises(NoTemplateError):
        model_template(gguf())
