"""Rendering a model's own chat template.

A template is a program that came with a download, so it runs in Jinja's
sandbox. What it finds there (tags, filters, functions) is what transformers
offers it (``utils/chat_template_utils.py``).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ggufkit.errors import GgufkitError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message = Mapping[str, Any]
"""``role``, ``content`` (text, parts or None), and what a conversation has besides:
``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content``; in a chat, ``images``
(paths)."""


class TemplateError(GgufkitError):
    """A chat template that is broken, or that refuses these messages."""


class RefusedError(TemplateError):
    """A chat template that says itself that it does not take these messages."""


def render(
    template: str,
    messages: Sequence[Message],
    /,
    *,
    bos: str = "",
    eos: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """What a template writes for a conversation, given just this.

    What a template should be given is said by
    :meth:`ggufkit.llamacpp.conversing.ChatTemplate.render`.

    Args:
        template: Jinja text.
        messages: the conversation; what else than role and content a message may
            have is the template's own affair.
        bos: text of the token that begins a sequence.
        eos: text of the token that ends one.
        tools: functions as JSON schemas; None, which templates may ask for, if
            there are none.
        documents: texts to answer from; likewise.
        add_generation_prompt: whether the text goes on to where the answer begins.
        variables: further names that the template may use.

    Raises:
        RefusedError: if the template refuses the messages.
        TemplateError: if it is broken.
    """
    from jinja2 import TemplateError as JinjaError

    names = {
        **{"bos_token": bos, "eos_token": eos, "tools": tools, "documents": documents},
        **{"add_generation_prompt": add_generation_prompt, **variables},
        "messages": [dict(message) for message in messages],
    }
    try:
        rendered: str = _compiled(template).render(names)
    except _RefusalError as error:
        raise RefusedError(f"the model's chat template refuses this: {error}") from error
    except (JinjaError, *_OF_PYTHON) as error:
        raise TemplateError(
            f"the model's chat template does not work: {error}",
            "Give another one: --chat-template FILE",
        ) from error
    return rendered


_OF_PYTHON = (
    *(TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError),
)
"""What expressions in a template can raise."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What templates call what was thought before an answer; the first is the usual one."""


def normalized(message: Message) -> dict[str, Any]:
    """A message as transformers gives it to templates.

    It loses what is None, and reasoning is there under each of its names
    (``apply_chat_template`` and ``render_jinja_template`` of transformers 5.23.0).
    """
    told = {name: value for name, value in message.items() if value is not None}
    thought = next((told[name] for name in _REASONING if name in told), None)
    if thought is not None:
        told = {"thinking": thought, **told, "reasoning_content": thought}
    return told


class _RefusalError(Exception):
    """Raised by a template itself."""


def _refuse(message: str) -> None:
    raise _RefusalError(message)


@lru_cache(maxsize=4)
def _compiled(template: str) -> "Template":
    return _environment().from_string(template)


def _environment() -> "Environment":
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what a model writes, for training.

        Here it changes nothing but that, as in transformers, what is set inside it
        is not known outside.
        """

        tags = {"generation"}  # noqa: RUF012 - jinja2's interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_written"), [], [], body, lineno=line)

        def _written(self, caller: Any) -> Any:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dictionaries()
    environment.globals["namespace"] = _namespaces()
    return environment


class StoppedClock:
    """Stands in for ``datetime`` where renderings are compared, which take seconds."""

    @staticmethod
    def now() -> datetime:
        """Always the same moment."""
        return datetime(2026, 2, 3, 16, 5, 6)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dictionaries:
    """``dict`` for templates: it makes dictionaries, and is no class to climb out by."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


@lru_cache(maxsize=1)
def _namespaces() -> type:
    """``namespace`` for templates: Jinja's, without names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(names: Iterable[object]) -> None:
        if hidden := [n for n in names if isinstance(n, str) and n.startswith("_")]:
            raise SecurityError(f"a namespace cannot have a name such as {hidden[0]!r}")

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **items: Any) -> None:  # so that an item may be called self
            own, *given = args
            values = dict(*given, **items)
            check(values)
            Namespace.__init__(own, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check([name])
            super().__setitem__(name, value)

    return PublicNamespace
