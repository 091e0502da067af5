"""Rendering a model's own chat template.

A template is a program that came with a download, so it runs in Jinja's
sandbox. What it finds there (tags, filters, functions) is what transformers
offers it (``utils/chat_template_utils.py``).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ggufkit.errors import GgufkitError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message = Mapping[str, Any]
"""``role`` (system, user or assistant), ``content``, and perhaps ``images``: paths."""


class TemplateError(GgufkitError):
    """A chat template that is broken, or that refuses these messages."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos: str = "",
    eos: str = "",
    **variables: Any,
) -> str:
    """The text of a conversation up to where the answer begins.

    Args:
        template: Jinja text.
        messages: the conversation; what else than role and content a message may
            have is the template's own affair.
        bos: text of the token that begins a sequence.
        eos: text of the token that ends one.
        variables: further names that the template may look at.

    Raises:
        TemplateError: if the template is broken or refuses the messages.
    """
    from jinja2 import TemplateError as JinjaError

    names = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, **variables}
    try:
        rendered: str = _compiled(template).render(messages=[dict(m) for m in messages], **names)
    except _RefusalError as error:
        raise TemplateError(f"the model's chat template refuses this: {error}") from error
    except (JinjaError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise TemplateError(
            f"the model's chat template does not work: {error}",
            "Give another one: --chat-template FILE",
        ) from error
    return rendered


class _RefusalError(Exception):
    """Raised by a template itself."""


def _refuse(message: str) -> None:
    raise _RefusalError(message)


@lru_cache(maxsize=4)
def _compiled(template: str) -> "Template":
    return _environment().from_string(template)


def _environment() -> "Environment":
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what a model writes, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's interface

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
