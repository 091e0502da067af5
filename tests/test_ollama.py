import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
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


@given(
    from_=TEXT,
    template=st.none() | TEXT,
    system=st.none() | TEXT,
    parameters=st.lists(st.tuples(WORD, TEXT), max_size=3),
    license=st.lists(TEXT, max_size=2),
    adapters=st.lists(TEXT, max_size=2),
    messages=st.lists(
        st.tuples(st.sampled_from(("system", "user", "assistant")), TEXT), max_size=2
    ),
    comments=st.lists(TEXT, max_size=2),
)
def test_what_is_rendered_is_read_back_exactly_or_refused(
    from_: str,
    template: str | None,
    system: str | None,
    parameters: list[tuple[str, str]],
    license: list[str],
    adapters: list[str],
    messages: list[tuple[str, str]],
    comments: list[str],
) -> None:
    value = Modelfile(
        from_, template, system, *map(tuple, (parameters, license, adapters, messages, comments))
    )
    try:
        text = value.render()
    except UsageError:
        return  # what is refused, and what must not be, is tested below
    assert parse(text) == value
    assert parse(text).render() == Modelfile(*_fields(value)).render()


def _fields(value: Modelfile) -> Sequence[Json]:
    return [
        value.from_,
        value.template,
        value.system,
        value.parameters,
        value.license,
        value.adapters,
        value.messages,
    ]


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
        ("FROM x\nSYSTEM ", "SYSTEM has no value"),
        ("FROM x\nMESSAGE robot hi", "the role of a MESSAGE"),
        ("FROM x\nPARAMETER stop", "PARAMETER needs a name and a value"),
        ("FROM x\nRENDERER y", "RENDERER is not supported"),
    ],
)
def test_a_broken_modelfile_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


@pytest.mark.parametrize("text", ["", "a\0b", 'a """\nb', "a\u00a0b"])
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
