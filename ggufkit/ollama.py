"""The Modelfile, Ollama's recipe for a model: a value, rendered and parsed.

The grammar is that of Ollama's ``parser/parser.go`` (read at its commit
fb30760). Its quotes have no escape: a quoted text ends at the first line that
ends with the closing quotes, so a few texts cannot be written at all. Rendering
therefore reads each text back, and refuses what Ollama would read otherwise.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ggufkit.errors import UsageError
from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.llamacpp.metadata import Metadata, split_count
from ggufkit.llamacpp.template import Message, TemplateError
from ggufkit.progress import SILENT, Progress
from ggufkit.values import GGUFFile, Json

DEFAULT_CONTEXT = 8192
"""``num_ctx`` if none is asked for and the model could do more. Ollama sets aside
memory for the whole context when it loads a model: 128k tokens of a model of
eight billion parameters are 16 GiB."""

ROLES = ("system", "user", "assistant")
_TEXTS = ("template", "system", "renderer", "parser", "requires")
"""Instructions of which Ollama keeps the last."""
_LISTS = {"license": "license", "adapter": "adapters", "draft": "drafts", "from": "from"}
_COMMANDS = frozenset({"parameter", "message", *_TEXTS, *_LISTS})
_SPACE = " \t"
_NEWLINE = "\r\n"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_VERSION = re.compile(
    r"v?(0|[1-9]\d*)(\.(0|[1-9]\d*)(\.(0|[1-9]\d*)"
    r"(-(0|[1-9]\d*|\d*[A-Za-z-][\dA-Za-z-]*)(\.(0|[1-9]\d*|\d*[A-Za-z-][\dA-Za-z-]*))*)?"
    r"(\+[\dA-Za-z-]+(\.[\dA-Za-z-]+)*)?)?)?",
    re.ASCII,
)
"""What Ollama takes for REQUIRES: a semantic version, the last numbers optional."""
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Names in ``generation_config.json`` to Ollama's."""


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        from_: the model: a path relative to the Modelfile, or a name.
        template: Go template of a prompt; None leaves it to Ollama.
        system: the system message; None for none.
        parameters: name and value, in order; a name such as ``stop`` may come often.
        license: texts of licences.
        adapters: paths of LoRA adapters.
        messages: role and content of an exchange to begin with.
        comments: lines to show at the top; no part of the value.
        further_from: what further FROM lines name. Ollama takes the files of all of
            them (a projector beside its model); of names, the last.
        drafts: models that guess ahead for this one.
        renderer: which of Ollama's own renderers makes prompts.
        parser: which of Ollama's own parsers reads answers.
        requires: the oldest version of Ollama that will do, such as ``0.14.0``.
    """

    from_: str
    template: str | None = None
    system: str | None = None
    parameters: tuple[tuple[str, str], ...] = ()
    license: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    comments: tuple[str, ...] = field(default=(), compare=False)
    further_from: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None

    def render(self) -> str:
        """The file's text, which :func:`parse` and Ollama read back as this value.

        Raises:
            UsageError: if a value cannot be written in a Modelfile.
        """
        lines = [f"# {' '.join(comment.split())}" for comment in self.comments]
        lines += [f"{head} {_quoted(head, value)}" for head, value in self._instructions()]
        return "\n".join(lines) + "\n"

    def _instructions(self) -> Iterator[tuple[str, str]]:
        for model in (self.from_, *self.further_from):
            yield "FROM", model
        for path in self.drafts:
            yield "DRAFT", path
        for path in self.adapters:
            yield "ADAPTER", path
        if self.requires is not None and not _VERSION.fullmatch(self.requires):
            raise UsageError(
                f"REQUIRES names a version of Ollama, such as 0.14.0, not '{self.requires}'"
            )
        for head in _TEXTS:
            if (text := getattr(self, head)) is not None:
                yield head.upper(), text
        for name, value in self.parameters:
            # Ollama keeps instructions and parameters under one set of names.
            if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in _SHADOWED:
                raise UsageError(f"'{name}' cannot be the name of a parameter of a Modelfile")
            yield f"PARAMETER {name}", value
        for role, content in self.messages:
            if role not in ROLES:
                raise UsageError(f"'{role}' is no role; a Modelfile knows {', '.join(ROLES)}")
            yield f"MESSAGE {role}", content
        for text in self.license:
            yield "LICENSE", text


def _quoted(head: str, value: str) -> str:
    """The first spelling of a value that is read back as that value."""
    # A blank at the end of a line is easily lost, so nothing at all is quoted too.
    for spelled in (value, f'"""{value}"""', f'"{value}"') if value else ('""',):
        # A line after it shows whether the value ends where it should.
        try:
            if list(_commands(f"{head} {spelled}\nFROM x\n")) == [
                (*_head_parts(head), value),
                ("from", "", "x"),
            ]:
                return spelled
        except UsageError:
            continue
    raise UsageError(
        f"a Modelfile cannot hold this {head}: {value[:60]!r}",
        'It must not hold unprintable characters, or """ at a line\'s end',
    )


def _head_parts(head: str) -> tuple[str, str]:
    command, _, name = head.partition(" ")
    return command.lower(), name


_SHADOWED = {"model": "from", **{name: name for name in _COMMANDS - {"from", "parameter"}}}
"""Names of parameters that Ollama takes for an instruction, and for which."""


def parse(text: str | bytes) -> Modelfile:
    """Read a Modelfile as Ollama does; instructions in any case, comments left out.

    Args:
        text: its text, or its bytes: UTF-8, or what a byte order mark says
            (UTF-16 of either order).

    Raises:
        UsageError: if Ollama would not take it.
    """
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {name: [] for name in _LISTS.values()}
    parameters, messages = [], []
    for command, name, value in _commands(_decoded(text)):
        if command == "parameter":
            parameters.append((name, value))
        elif command == "message":
            messages.append((name, value))
        elif command in _LISTS:
            lists[_LISTS[command]].append(value)
        else:
            values[command] = value
    if not lists["from"]:
        raise UsageError("a Modelfile needs a FROM line")
    first, *further = lists["from"]
    return Modelfile(
        from_=first,
        template=values.get("template"),
        system=values.get("system"),
        renderer=values.get("renderer"),
        parser=values.get("parser"),
        requires=values.get("requires"),
        further_from=tuple(further),
        parameters=tuple(parameters),
        license=tuple(lists["license"]),
        adapters=tuple(lists["adapters"]),
        drafts=tuple(lists["drafts"]),
        messages=tuple(messages),
    )


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if text.startswith(mark):
            return text.removeprefix(mark).decode(encoding, "replace")
    return text.decode("utf-8", "replace")


def _commands(text: str) -> Iterator[tuple[str, str, str]]:
    """Command in lower case, name of a parameter or role, value."""
    at = 0
    while (start := _skip_blank(text, at)) < len(text):
        # Whatever comes first belongs to the word; what cannot be printed is dropped.
        letters, at = _word(text, start + 1, _is_letter)
        command = ((text[start] if text[start].isprintable() else "") + letters).lower()
        line = len(re.findall(r"\r\n|\r|\n", text[:start])) + 1
        if command not in _COMMANDS:
            raise UsageError(f"line {line} of the Modelfile does not begin with an instruction")
        at = _after_space(text, at, f"line {line} of the Modelfile: {command.upper()}")
        name = ""
        if command == "parameter":
            name, at = _word(text, at, lambda c: c == "_" or _is_letter(c) or c in "0123456789")
            if not name:
                raise UsageError(f"line {line} of the Modelfile: PARAMETER needs a name")
            at = _after_space(text, at, f"line {line} of the Modelfile: PARAMETER {name}")
        elif command == "message":
            name, at = _word(text, at, _is_letter)
            if name not in ROLES:
                raise UsageError(
                    f"line {line} of the Modelfile: the role of a MESSAGE is one of "
                    f"{', '.join(ROLES)}"
                )
            at = _after_space(text, at, f"line {line} of the Modelfile: MESSAGE {name}")
        value, at = _value(text, at, command)
        yield _as_ollama_files_it(command, name, value)


def _as_ollama_files_it(command: str, name: str, value: str) -> tuple[str, str, str]:
    """A parameter named like an instruction is that instruction to Ollama."""
    if command != "parameter" or name not in _SHADOWED:
        return command, name, value
    if name != "message":
        return _SHADOWED[name], "", value
    role, _, content = value.partition(": ")
    if role not in ROLES:
        raise UsageError(f"the role of a MESSAGE is one of {', '.join(ROLES)}")
    return "message", role, content


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _skip_blank(text: str, at: int) -> int:
    """Where the next instruction begins."""
    blank = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
    found = blank.match(text, at)
    return found.end() if found else at


def _word(text: str, at: int, belongs: Callable[[str], bool]) -> tuple[str, int]:
    end = at
    while end < len(text) and belongs(text[end]):
        end += 1
    return text[at:end], end


def _after_space(text: str, at: int, what: str) -> int:
    """Where a value begins: after one blank, without which there is none."""
    if text[at : at + 1] not in (*_SPACE,):
        raise UsageError(f"{what} needs a blank and a value after it")
    return at + 1


def _value(text: str, at: int, command: str) -> tuple[str, int]:
    """A value and where it ends: the first line's end at which no quotes are open.

    A value that is blank ends at its line.
    """
    for end in re.finditer(r"[\r\n]|\Z", text[at:]):
        read = "".join(
            c for c in text[at : at + end.start()] if c.isprintable() or c in _SPACE + _NEWLINE
        )
        unquoted = _unquote(read.strip(_SPACE + _NEWLINE))
        if unquoted is not None:
            return unquoted, at + end.start()
    raise UsageError(f"the quotes of {command.upper()} are never closed")


def _unquote(text: str) -> str | None:
    """What stands between quotes; None as long as they are open."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


# Making one for a model.


def modelfile_for(
    gguf: GGUFFile,
    *,
    directory: Path,
    system: str | None = None,
    generation_config: Mapping[str, Json] | None = None,
    context: int | None = None,
    progress: Progress = SILENT,
) -> Modelfile:
    """The Modelfile of a GGUF, out of what the model itself says.

    Args:
        gguf: its header, read with arrays.
        directory: where the Modelfile will lie; FROM is relative to it.
        system: the system message; None for the chat template's own.
        generation_config: the checkpoint's ``generation_config.json``.
        context: ``num_ctx``; None for the trained context, at most
            :data:`DEFAULT_CONTEXT`.
        progress: told what could not be carried over.
    """
    if split_count(gguf) > 1:
        raise UsageError(
            f"{gguf.path.name} is one of several parts, which Ollama does not take",
            f"Merge them: llama-gguf-split --merge {gguf.path.name} MERGED.gguf",
        )
    metadata = Metadata(gguf)
    shape = _shape_or_warning(metadata, progress)
    if shape and not shape.takes_system and system is not None:
        progress.warn("the model's chat template has no system message; Ollama will leave it out")
    comments = ["Made by ggufkit. Use it with: ollama create NAME -f Modelfile"]
    if shape and "tools" in metadata.chat_template:
        comments.append("TEMPLATE is for conversations; the model's own also knows tool calls.")
    number, why = _context(metadata, context)
    if why:
        comments.append(why)
    parameters = [("num_ctx", str(number))] if number else []
    parameters += _sampling(metadata, generation_config or {})
    parameters += [("stop", token) for token in metadata.end_tokens]
    if system is None and shape:
        system = shape.default_system or None
    return Modelfile(
        from_=_relative(gguf.path, directory),
        template=shape.go_template() if shape else None,
        system=system,
        parameters=tuple(parameters),
        comments=tuple(comments),
    )


def _relative(path: Path, directory: Path) -> str:
    try:
        relative = Path(os.path.relpath(path.absolute(), directory.absolute())).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()
    return relative if relative.startswith("../") else f"./{relative}"


def _context(metadata: Metadata, asked: int | None) -> tuple[int | None, str]:
    trained = metadata.trained_context
    if asked is not None:
        return asked, ""
    if trained and trained > DEFAULT_CONTEXT:
        return DEFAULT_CONTEXT, (
            f"num_ctx: the model was trained with {trained}; {DEFAULT_CONTEXT} keeps the memory "
            "that Ollama sets aside small. For more: ggufkit modelfile --num-ctx N"
        )
    return trained, ""


def _sampling(metadata: Metadata, config: Mapping[str, Json]) -> list[tuple[str, str]]:
    """Only what the model's own files recommend; the checkpoint's word comes first."""
    found = dict(metadata.sampling)
    if config.get("do_sample") is False:
        return [("temperature", "0")]
    for name, ollama in _PARAMETERS.items():
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[ollama] = value
    order = [name for name in _PARAMETERS.values() if name in found]
    return [(name, f"{found[name]:.6g}") for name in order]


# From the model's Jinja template to Ollama's Go template.


@dataclass(frozen=True)
class Shape:
    """A chat template as what it writes around the contents.

    Attributes:
        head: before the first user's content, without a system message.
        before_system: before the system message.
        after_system: between it and the first user's content.
        answer: after a user's content, up to where the model goes on.
        lead: what the template puts before an assistant's content beyond that.
        turn: between an assistant's content and the next user's.
        takes_system: whether it has a system message at all.
        default_system: system message that it writes if none is given.
    """

    head: str
    before_system: str
    after_system: str
    answer: str
    lead: str
    turn: str
    takes_system: bool
    default_system: str

    def write(self, messages: Iterable[Message]) -> str:
        """What Ollama would make of messages, for comparison with Jinja's result."""
        messages = list(messages)
        text = self.head
        if messages[0]["role"] == "system":
            text = self.before_system + messages[0]["content"] + self.after_system
        for message in messages:
            if message["role"] == "user":
                text += message["content"] + self.answer
            elif message["role"] == "assistant":
                text += self.lead + message["content"] + self.turn
        return text

    def go_template(self) -> str:
        """The same as a Go template in Ollama's names."""
        head = _go(self.head)
        if self.takes_system:
            with_system = f"{_go(self.before_system)}{{{{ .System }}}}{_go(self.after_system)}"
            head = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{head}{{{{ end }}}}"
        return (
            f"{head}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{_go(self.answer)}'
            f'{{{{ else if eq .Role "assistant" }}}}{_go(self.lead)}{{{{ .Content }}}}'
            f"{_go(self.turn)}{{{{ end }}}}{{{{ end }}}}"
        )


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


_PROBES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Why is the sky blue?"},),
    (
        {"role": "user", "content": "One\n\ntwo"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Four; [five]"},
        {"role": "assistant", "content": "Six\nseven"},
        {"role": "user", "content": "Eight"},
    ),
)


def _shape_or_warning(metadata: Metadata, progress: Progress) -> Shape | None:
    if not metadata.chat_template:
        progress.warn("the model has no chat template; Ollama will complete texts, not converse")
        return None
    try:
        shape = shape_of(
            metadata.chat_template,
            bos=metadata.special("bos"),
            eos=metadata.special("eos"),
            keep_bos=not metadata.adds_bos,
        )
    except TemplateError as error:
        progress.warn(f"{error.message}; the Modelfile has no TEMPLATE")
        return None
    if shape is None:
        progress.warn(
            "the model's chat template does more than to put words around messages, so it has "
            "no exact Go template; the Modelfile has no TEMPLATE, and Ollama will look at the "
            "GGUF's own"
        )
    return shape


def shape_of(
    template: str, *, bos: str = "", eos: str = "", keep_bos: bool = False
) -> Shape | None:
    """Find out what a Jinja chat template writes around contents, by running it.

    Nothing is guessed from its text: the pieces are cut out of what it writes
    for marked contents, and then must write other conversations, with and
    without a system message, just as the template does. It gets no date, because
    a Modelfile does not change; most templates have one of their own for that.

    Args:
        template: the Jinja text.
        bos: text of the token that begins a sequence.
        eos: text of the token that ends one.
        keep_bos: keep a BOS token that the template writes; else it is left out,
            because the tokenizer puts it there.

    Returns:
        The shape; None if the template does more than a shape can.

    Raises:
        TemplateError: if it does not work at all.
    """
    from jinja2 import Undefined

    rendered = ChatTemplate(template, bos=bos, eos=eos)

    def jinja(*messages: Message) -> str:
        text = rendered.render(messages, strftime_now=Undefined())
        return text if keep_bos or not bos else text.removeprefix(bos)

    def marked(role: str, number: int) -> Message:
        return {"role": role, "content": f"Mark{role}{number}mark"}

    def cut(text: str, *messages: Message) -> list[str] | None:
        pieces = []
        for message in messages:
            if text.count(message["content"]) != 1:
                return None
            before, _, text = text.partition(message["content"])
            pieces.append(before)
        return [*pieces, text]

    turns = [marked("user", 1), marked("assistant", 1), marked("user", 2)]
    plain = cut(jinja(*turns), *turns)
    if plain is None:
        return None
    head, between, turn, answer = plain
    if not between.startswith(answer):
        return None
    lead = between.removeprefix(answer)
    system = marked("system", 1)
    try:
        led = cut(jinja(system, *turns), system, *turns)
    except TemplateError:
        led = None
    before, after, default = "", "", ""
    if led:
        before, after = led[0], led[1]
        if head.startswith(before) and head.endswith(after) and before and after:
            default = head[len(before) : len(head) - len(after)].strip()
    shape = Shape(head, before, after, answer, lead, turn, led is not None, default)
    said: Message = {"role": "system", "content": "You are brief.\nAnd kind."}
    for probe in _PROBES:
        for messages in [probe, (said, *probe)] if led else [probe]:
            if shape.write(messages) != jinja(*messages):
                return None
    return shape
