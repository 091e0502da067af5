import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufkit.errors import UsageError
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.template import Message, TemplateError, render
from ggufkit.ollama import Modelfile, modelfile_for, parse, shape_of
from ggufkit.progress import Silent
from ggufkit.values import GGUFFile, Json

# Rendering and parsing.

TEXT = st.text(
    st.sampled_from("ab \"'#\n\t{}.:\\é") | st.characters(codec="utf-8"), min_size=1, max_size=20
)
WORD = st.from_regex(r"[A-Za-z0-9_]+", fullmatch=True)


TEXTS = st.lists(TEXT, max_size=2).map(tuple)
MODELFILES = st.builds(
    Modelfile,
    from_=TEXT,
    template=st.none() | TEXT,
    system=st.none() | TEXT,
    parameters=st.lists(st.tuples(WORD, TEXT), max_size=3).map(tuple),
    license=TEXTS,
    adapters=TEXTS,
    messages=st.lists(
        st.tuples(st.sampled_from(("system", "user", "assistant")), TEXT), max_size=2
    ).map(tuple),
    comments=TEXTS,
    further_from=TEXTS,
    drafts=TEXTS,
    renderer=st.none() | TEXT,
    parser=st.none() | TEXT,
    requires=st.none() | st.from_regex(r"v?[0-9]{1,2}\.[0-9]\.[1-9]", fullmatch=True),
)


@settings(max_examples=300)
@given(MODELFILES)
def test_what_is_rendered_is_read_back_exactly_or_refused(value: Modelfile) -> None:
    try:
        text = value.render()
    except UsageError:
        return  # what is refused, and what must not be, is tested below
    assert parse(text) == value
    assert parse(text.encode()) == value
    assert parse(text).render() == dataclasses.replace(value, comments=()).render()


PLAIN = st.text(st.characters(categories=("L", "N", "P", "S")) | st.sampled_from(" \n\t")).map(
    lambda text: text.replace('"', "'")
)


@settings(max_examples=300)
@given(
    st.builds(
        Modelfile,
        from_=PLAIN,
        template=st.none() | PLAIN,
        system=st.none() | PLAIN,
        parameters=st.lists(st.tuples(st.just("stop"), PLAIN), max_size=3).map(tuple),
        messages=st.lists(st.tuples(st.just("user"), PLAIN), max_size=2).map(tuple),
        further_from=st.lists(PLAIN, max_size=2).map(tuple),
        drafts=st.lists(PLAIN, max_size=2).map(tuple),
        renderer=st.none() | PLAIN,
        parser=st.none() | PLAIN,
        requires=st.none() | st.just("0.14.0"),
    )
)
def test_usual_modelfiles_are_never_refused(value: Modelfile) -> None:
    assert parse(value.render()) == value


@given(text=st.text(st.characters(categories=("L", "N", "P", "S")) | st.sampled_from(" \n\t")))
def test_usual_texts_are_never_refused(text: str) -> None:
    text = text.replace('"', "'").strip() or "x"
    assert parse(Modelfile("m", system=text).render()).system == text


def test_reads_what_people_write() -> None:
    text = """\ufeff# a comment
from ./my model.gguf
  PARAMETER stop "<|user|> "
Parameter temperature 0.5   # no comment here

SYSTEM \"\"\"You say "hello".
# no comment either
\"\"\"
message user   hi there
LICENSE "one
two"
"""
    assert parse(text) == Modelfile(
        from_="./my model.gguf",
        system='You say "hello".\n# no comment either\n',
        parameters=(("stop", "<|user|> "), ("temperature", "0.5   # no comment here")),
        license=("one\ntwo",),
        messages=(("user", "hi there"),),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SYSTEM x", "needs a FROM line"),
        ("FROM x\nFORM y", "line 2 of the Modelfile does not begin with an instruction"),
        ('FROM x\nSYSTEM "open', "the quotes of SYSTEM are never closed"),
        ("FROM x\nSYSTEM", "SYSTEM needs a blank and a value"),
        ("FROM x\nSYSTEM\n", "SYSTEM needs a blank and a value"),
        ("FROM", "FROM needs a blank and a value"),
        ("FROM: x", "line 1 of the Modelfile: FROM needs a blank"),
        ("FROM x\r\n\r\nFORM y", "line 3 of the Modelfile does not begin"),
        ("FROM x\nMESSAGE robot hi", "the role of a MESSAGE"),
        ("FROM x\nMESSAGE User hi", "the role of a MESSAGE"),
        ("FROM x\nMESSAGE  user hi", "the role of a MESSAGE"),
        ("FROM x\nMESSAGE user", "MESSAGE user needs a blank and a value"),
        ("FROM x\nPARAMETER stop", "PARAMETER stop needs a blank and a value"),
        ("FROM x\nPARAMETER stop\n", "PARAMETER stop needs a blank and a value"),
        ("FROM x\nPARAMETER top-k 1", "PARAMETER top needs a blank and a value"),
        # Its parser takes these; what it makes of them is then refused.
        ("FROM x\nPARAMETER  stop y", "PARAMETER needs a name"),
        ("FROM x\nPARAMETER message hi", "the role of a MESSAGE"),
        ('FROM x\nSYSTEM """open"', "the quotes of SYSTEM are never closed"),
        ('FROM x\nSYSTEM "a" b', "the quotes of SYSTEM are never closed"),
        ('FROM x\nSYSTEM "', "the quotes of SYSTEM are never closed"),
        ("", "needs a FROM line"),
        ("# FROM x", "needs a FROM line"),
        ("1FROM x", "line 1 of the Modelfile does not begin"),
    ],
)
def test_a_broken_modelfile_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


READ = (
    # Blank values end at their line.
    ("FROM m\nSYSTEM ", {"system": ""}),
    ("FROM m\nSYSTEM \n", {"system": ""}),
    ("FROM m\nSYSTEM \t \nPARAMETER top_k 1", {"system": "", "parameters": (("top_k", "1"),)}),
    ('FROM m\nSYSTEM ""', {"system": ""}),
    ('FROM m\nSYSTEM """"""', {"system": ""}),
    ('FROM m\nSYSTEM """\n"""', {"system": "\n"}),
    ("FROM \n\nSYSTEM x", {"from_": "", "system": "x"}),
    ("FROM ", {"from_": ""}),
    ("FROM m\nPARAMETER stop \nPARAMETER top_k 1", {"parameters": (("stop", ""), ("top_k", "1"))}),
    ("FROM m\nMESSAGE user \n", {"messages": (("user", ""),)}),
    ("FROM m\nLICENSE \nLICENSE x", {"license": ("", "x")}),
    ("FROM m\nTEMPLATE \n# no text", {"template": ""}),
    ("FROM m\nDRAFT \n", {"drafts": ("",)}),
    # Several of one kind: some are all kept, of others the last counts.
    ("FROM m\nFROM mmproj.gguf", {"further_from": ("mmproj.gguf",)}),
    ("FROM m\nFROM b\nFROM m", {"further_from": ("b", "m")}),
    ("FROM m\nDRAFT a\nDRAFT b", {"drafts": ("a", "b")}),
    ("FROM m\nADAPTER a\nADAPTER b", {"adapters": ("a", "b")}),
    ("FROM m\nLICENSE a\nLICENSE b", {"license": ("a", "b")}),
    ("FROM m\nPARAMETER stop a\nPARAMETER stop b", {"parameters": (("stop", "a"), ("stop", "b"))}),
    ("FROM m\nSYSTEM a\nSYSTEM b", {"system": "b"}),
    ("FROM m\nTEMPLATE a\nTEMPLATE b", {"template": "b"}),
    ("FROM m\nRENDERER a\nRENDERER b", {"renderer": "b"}),
    ("FROM m\nPARSER a\nPARSER b", {"parser": "b"}),
    ("FROM m\nREQUIRES 0.1\nREQUIRES 0.14.0", {"requires": "0.14.0"}),
    # The newer instructions.
    ("FROM m\nRENDERER qwen3-coder", {"renderer": "qwen3-coder"}),
    ("FROM m\nparser harmony", {"parser": "harmony"}),
    ("FROM m\nRequires v0.14.0-rc1", {"requires": "v0.14.0-rc1"}),
    ("FROM m\nDRAFT ./small.gguf", {"drafts": ("./small.gguf",)}),
    # Where things begin and end.
    ("SYSTEM x\nFROM m", {"system": "x"}),
    ("  \n\t\r\n  FROM m", {}),
    ("FROM m\rSYSTEM x", {"system": "x"}),
    ("FROM m\r\nSYSTEM x\r\n", {"system": "x"}),
    ("FROM\tm\nPARAMETER\tstop\tx", {"parameters": (("stop", "x"),)}),
    ("FROM    m   ", {}),
    ("FROM m # not a comment", {"from_": "m # not a comment"}),
    ("#FROM a\n# b\rFROM m", {}),
    ("FROM m\n  # indented\nSYSTEM x", {"system": "x"}),
    ("\u00a0FROM m\n\0SYSTEM x", {"system": "x"}),
    ("FROM m\nMESSAGE user   hi: there ", {"messages": (("user", "hi: there"),)}),
    ("FROM m\nMESSAGE user : x", {"messages": (("user", ": x"),)}),
    ("FROM m\nPARAMETER stop  user: ", {"parameters": (("stop", "user:"),)}),
    ("FROM m\nPARAMETER num_ctx 1\nPARAMETER 9 x", {"parameters": (("num_ctx", "1"), ("9", "x"))}),
    # Quotes.
    ('FROM m\nSYSTEM "x y "', {"system": "x y "}),
    ("FROM m\nSYSTEM 'x'", {"system": "'x'"}),
    ('FROM m\nSYSTEM x "y"', {"system": 'x "y"'}),
    ('FROM m\nSYSTEM "a"b"', {"system": 'a"b'}),
    ('FROM m\nSYSTEM "a\n\nb"', {"system": "a\n\nb"}),
    ('FROM m\nSYSTEM "a\r\nb"', {"system": "a\r\nb"}),
    ('FROM m\nSYSTEM """a"""  \nLICENSE x', {"system": "a", "license": ("x",)}),
    ('FROM m\nSYSTEM """a""" b\n"""', {"system": 'a""" b\n'}),
    ('FROM m\nSYSTEM """a\n# b\nFROM c\n"""', {"system": "a\n# b\nFROM c\n"}),
    ('FROM m\nSYSTEM "" \nLICENSE x', {"system": "", "license": ("x",)}),
    ('FROM m\nSYSTEM """" \n"""', {"system": '" \n'}),
    ('FROM m\nMESSAGE user "a\nb"', {"messages": (("user", "a\nb"),)}),
    ('FROM m\nPARAMETER stop "<|x|> "', {"parameters": (("stop", "<|x|> "),)}),
    # What cannot be printed is dropped, and so it does not part words.
    ("FROM m\nSYSTEM a\u00a0b\u200bc\0", {"system": "abc"}),
    ("FROM m\nSYSTEM a\tb\u3000", {"system": "a\tb"}),
    ("FROM m\nSYSTEM \u00e9 \u4e2d \U0001f600", {"system": "\u00e9 \u4e2d \U0001f600"}),
    ("FROM m\nSYSTEM \ufeff", {"system": ""}),
    # One set of names holds instructions and parameters.
    ("FROM m\nPARAMETER system x", {"system": "x"}),
    ("FROM m\nPARAMETER model b", {"further_from": ("b",)}),
    ("PARAMETER model m", {}),
    ("FROM m\nPARAMETER message user: hi", {"messages": (("user", "hi"),)}),
    ("FROM m\nPARAMETER SYSTEM x", {"parameters": (("SYSTEM", "x"),)}),
    ("FROM m\nPARAMETER from x", {"parameters": (("from", "x"),)}),
)
"""Modelfiles, and what Ollama's own parser (commit fb30760) reads in them."""


@pytest.mark.parametrize(("text", "fields"), READ)
def test_reads_what_ollama_reads(text: str, fields: dict[str, Json]) -> None:
    read = parse(text)
    assert read == Modelfile(**{"from_": "m", **fields})
    assert parse(text.encode()) == read
    assert parse(read.render()) == read


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_decides_the_encoding(encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("e") else ""
    text = (mark + "FROM m\r\nSYSTEM \u4e2d \U0001f600\r\n").encode(encoding)
    assert parse(text) == Modelfile("m", system="\u4e2d \U0001f600")


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert parse(b"FROM m\nSYSTEM a\xffb").system == "a\ufffdb"
    assert parse("\ufeffFROM m") == Modelfile("m")


@pytest.mark.parametrize("version", ["0.14.0", "v1", "1.2", "1.2.3-rc.1+build.5"])
def test_versions_that_ollama_takes(version: str) -> None:
    assert parse(Modelfile("m", requires=version).render()).requires == version


@pytest.mark.parametrize("version", ["", "new", "01.2", "1.2.3.4", "1.2-rc1", "1.2.3-01"])
def test_a_version_that_ollama_does_not_take_is_not_written(version: str) -> None:
    with pytest.raises(UsageError, match="REQUIRES names a version"):
        Modelfile("m", requires=version).render()


@pytest.mark.parametrize("name", ["system", "model", "draft", "message", "a b", ""])
def test_a_parameter_that_would_be_read_as_something_else_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a parameter"):
        Modelfile("m", parameters=((name, "x"),)).render()


@pytest.mark.parametrize("text", ["a\0b", 'a """\nb', "a\u00a0b"])
def test_what_no_modelfile_can_hold_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot hold this SYSTEM"):
        Modelfile("m", system=text).render()


# From Jinja to Go.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA_3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}"
    "{% endif %}{{ c }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}"
    "{% endfor %}"
)

FAMILIES = {
    "ChatML": (
        CHATML,
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n<|im_start|>user\n'
        "{{ end }}{{ end }}",
        "",
    ),
    "ChatML with a system message of its own": (
        CHATML_WITH_DEFAULT,
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}<|im_end|>\n'
        '<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n'
        "<|im_start|>user\n{{ end }}{{ end }}",
        "Be good.",
    ),
    "Llama 3": (
        LLAMA_3,
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{{ else }}"
        "<|start_header_id|>user<|end_header_id|>\n\n{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}{{ .Content }}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\n{{ end }}{{ end }}",
        "",
    ),
    "Llama 2": (
        LLAMA_2,
        "{{ if .System }}[INST] <<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ else }}[INST] {{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }} [/INST]'
        '{{ else if eq .Role "assistant" }} {{ .Content }} </s><s>[INST] {{ end }}{{ end }}',
        "",
    ),
    "Gemma": (
        GEMMA,
        '<start_of_turn>user\n{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
        '<end_of_turn>\n<start_of_turn>model\n{{ else if eq .Role "assistant" }}{{ .Content }}'
        "<end_of_turn>\n<start_of_turn>user\n{{ end }}{{ end }}",
        "",
    ),
    "Mistral": (
        MISTRAL,
        '[INST] {{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }} [/INST]'
        '{{ else if eq .Role "assistant" }}{{ .Content }}</s>[INST] {{ end }}{{ end }}',
        "",
    ),
    "Phi 3": (
        PHI_3,
        "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n<|user|>\n{{ else }}<|user|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}<|end|>\n<|assistant|>\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|end|>\n<|user|>\n{{ end }}{{ end }}',
        "",
    ),
    "Zephyr": (
        ZEPHYR,
        "{{ if .System }}<|system|>\n{{ .System }}</s>\n<|user|>\n{{ else }}<|user|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}</s>\n<|assistant|>\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}</s>\n<|user|>\n{{ end }}{{ end }}',
        "",
    ),
}


def run_go(template: str, messages: Sequence[Message]) -> str:
    """Execute the part of Go's template language that is used here, as Ollama does."""
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    head, _, body = template.partition("{{ range .Messages }}")
    choice = re.fullmatch(r"\{\{ if \.System }}(.*)\{\{ else }}(.*)\{\{ end }}", head, re.DOTALL)
    if choice:
        head = choice[1] if system else choice[2]
    branches = re.fullmatch(
        r'\{\{ if eq \.Role "user" }}(.*)\{\{ else if eq \.Role "assistant" }}(.*)'
        r"\{\{ end }}\{\{ end }}",
        body,
        re.DOTALL,
    )
    assert branches
    branch = {"system": "", "user": branches[1], "assistant": branches[2]}
    text = head.replace("{{ .System }}", system)
    for message in messages:
        text += branch[message["role"]].replace("{{ .Content }}", message["content"])
    return text.replace('{{ "{{" }}', "{{")


def conversation(*contents: str, system: str = "") -> list[Message]:
    said = [
        {"role": ("user", "assistant")[n % 2], "content": content}
        for n, content in enumerate(contents)
    ]
    return [*([{"role": "system", "content": system}] if system else []), *said]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_become_go_templates(name: str) -> None:
    template, expected, default = FAMILIES[name]
    shape = shape_of(template, bos="<s>", eos="</s>")
    assert shape
    assert shape.go_template() == expected
    assert shape.default_system == default


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", ["", "Answer in French."])
def test_go_templates_write_what_jinja_writes(name: str, system: str) -> None:
    shape = shape_of(FAMILIES[name][0], bos="<s>", eos="</s>")
    assert shape
    if system and not shape.takes_system:
        return
    for contents in [("Hi",), ("Hi", "Hello!", "How are\nyou?")]:
        messages = conversation(*contents, system=system)
        wanted = render(FAMILIES[name][0], messages, bos="<s>", eos="</s>").removeprefix("<s>")
        assert run_go(shape.go_template(), messages) == wanted


def test_a_bos_token_stays_where_the_tokenizer_adds_none() -> None:
    shape = shape_of(MISTRAL, bos="<s>", eos="</s>", keep_bos=True)
    assert shape
    assert shape.head == "<s>[INST] "


def test_braces_of_a_template_are_not_gos() -> None:
    shape = shape_of(CHATML.replace("<|im_end|>", "{{ '{{' }}"))
    assert shape
    assert run_go(shape.go_template(), conversation("Hi")) == (
        "<|im_start|>user\nHi{{\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        # numbers its turns
        "{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}",
        # drops what was thought
        "{% for m in messages %}[{{ m.role }}]{{ m.content.split('e')[-1] }}{% endfor %}",
        # keeps the last message alone
        "{{ messages[-1].content }}",
        # repeats
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_does_more_has_no_shape(template: str) -> None:
    assert shape_of(template) is None


def test_a_broken_template_is_told() -> None:
    with pytest.raises(TemplateError, match="does not work"):
        shape_of("{% for %}")


# Making one for a model.


class Warnings(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, message: str) -> None:
        self.told.append(message)


def model(**more: Json) -> GGUFFile:
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 131072,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<|im_end|>", "<|end|>", "a"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": CHATML,
    }
    return GGUFFile(Path("/m/a/x.gguf"), 3, 0, metadata | more, ())


def test_a_modelfile_says_what_the_model_says() -> None:
    made = modelfile_for(
        model(),
        directory=Path("/m/b"),
        system="Be brief.",
        generation_config={"temperature": 0.7, "top_k": 20, "eos_token_id": 1},
    )
    assert made.from_ == "../a/x.gguf"
    assert made.system == "Be brief."
    assert made.template == FAMILIES["ChatML"][1]
    assert made.parameters == (
        ("num_ctx", "8192"),
        ("temperature", "0.7"),
        ("top_k", "20"),
        ("stop", "</s>"),
        ("stop", "<|im_end|>"),
    )
    assert any("trained with 131072" in comment for comment in made.comments)
    assert parse(made.render()) == made


def test_nothing_is_said_that_the_model_does_not_say() -> None:
    made = modelfile_for(model(), directory=Path("/m/a"))
    assert made.from_ == "./x.gguf"
    assert {name for name, _ in made.parameters} == {"num_ctx", "stop"}
    assert made.system is None


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [(2048, None, "2048"), (131072, None, "8192"), (131072, 65536, "65536"), (None, None, None)],
)
def test_context(trained: int | None, asked: int | None, expected: str | None) -> None:
    made = modelfile_for(
        model(**{"llama.context_length": trained}), directory=Path("/m/a"), context=asked
    )
    assert dict(made.parameters).get("num_ctx") == expected


def test_sampling_of_the_gguf_and_of_the_checkpoint() -> None:
    file = model(**{"general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 5})
    made = modelfile_for(file, directory=Path("/m/a"), generation_config={"top_k": 7})
    assert dict(made.parameters) | {"stop": ""} == {
        "num_ctx": "8192",
        "temperature": "0.6",
        "top_k": "7",
        "stop": "",
    }


def test_a_model_that_does_not_sample() -> None:
    config = {"do_sample": False, "temperature": 0.9}
    made = modelfile_for(model(), directory=Path("/m/a"), generation_config=config)
    assert dict(made.parameters)["temperature"] == "0"


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        ("", "no chat template"),
        ("{{ messages[-1].content }}", "has no TEMPLATE, and Ollama will look"),
        ("{% for %}", "does not work"),
    ],
)
def test_without_an_exact_template_there_is_none_and_it_is_told(
    template: str, warning: str
) -> None:
    told = Warnings()
    file = model(**{"tokenizer.chat_template": template})
    made = modelfile_for(file, directory=Path("/m/a"), progress=told)
    assert made.template is None
    assert len(told.told) == 1
    assert warning in told.told[0]


def test_a_system_message_that_the_template_cannot_take_is_told() -> None:
    told = Warnings()
    file = model(**{"tokenizer.chat_template": GEMMA})
    modelfile_for(file, directory=Path("/m/a"), system="Be brief.", progress=told)
    assert "no system message" in told.told[0]


def test_parts_of_a_split_model_are_refused() -> None:
    with pytest.raises(UsageError, match="one of several parts"):
        modelfile_for(model(**{"split.count": 3}), directory=Path("/m/a"))


def test_the_demo(demo_gguf: Path) -> None:
    told = Warnings()
    made = modelfile_for(read_gguf(demo_gguf), directory=demo_gguf.parent, progress=told)
    assert told.told == []
    assert made.from_ == f"./{demo_gguf.name}"
    assert made.system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert ("stop", "<|im_end|>") in made.parameters
    assert ("num_ctx", "8192") in made.parameters
    assert made.template
    messages = conversation("Hi", "Hello!", "Bye")
    template = read_gguf(demo_gguf).metadata["tokenizer.chat_template"]
    assert run_go(made.template, messages) == render(template, messages)
