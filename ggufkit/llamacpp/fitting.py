"""Giving a chat template messages in the form that it takes.

Templates of models that see images want content as a list of parts and leave plain
text out in silence; others want text and print a list as Python would. Some put the
arguments of a call into the prompt as text, most want an object. None of them says
so, hence all of this is found by trying, with messages of a few words.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ggufkit.llamacpp.template import Message, TemplateError

Write = Callable[..., str]
"""Renders messages, perhaps with ``tools``; raises TemplateError if that does not work."""

_PROBE = "What-is-seen?"
_QUOTED = re.compile(rf"""text['"]: ?['"]{re.escape(_PROBE)}""")
"""A part printed as data, and not its text."""
_ID = "callprobe"
"""Mistral's templates refuse ids of another length than nine."""
_ARGUMENTS = {"probe_name": "probe-value"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "",
        "parameters": {"type": "object", "properties": {"probe_name": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Forms:
    """In which forms a template takes something.

    Attributes:
        text: as text.
        structured: as what JSON has: a list of parts, or an object.
    """

    text: bool
    structured: bool

    @property
    def known(self) -> bool:
        """Whether it takes it at all."""
        return self.text or self.structured


class Fitting:
    """What one template takes.

    Args:
        write: renders it.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._contents: dict[str, Forms] = {}

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation in the forms that the template takes.

        What it takes as it is stays so.

        Raises:
            TemplateError: if it cannot be given: an image to a template of texts, or
                arguments that are no object.
        """
        return [self._fit_message(message) for message in messages]

    def _fit_message(self, message: Message) -> Message:
        fitted = dict(message)
        if content := message.get("content"):
            role = str(message.get("role"))
            fitted["content"] = _content(content, self._of_content(role))
        if not (calls := message.get("tool_calls")):
            return fitted
        blank, forms = self._of_calls(message)
        if not content:
            fitted = {**{k: v for k, v in fitted.items() if k != "content"}, **blank}
        return {**fitted, "tool_calls": [_fit_call(call, forms) for call in calls]}

    def _of_calls(self, message: Message) -> tuple[Message, Forms]:
        """What stands for a content that is not there, and the form of arguments."""
        own = {"content": message["content"]} if "content" in message else {}
        found = [(blank, forms) for blank, forms in self._calls if forms.known]
        of_own = [(blank, forms) for blank, forms in found if blank == own]
        return next(iter([*of_own, *found]), (own, Forms(text=True, structured=True)))

    # Trying.

    def _of_content(self, role: str) -> Forms:
        if role not in self._contents:
            found = self._find_content(role)
            if not found.known and role != "user":
                # It refuses the role, or leaves it out: what it does then is its affair.
                found = self._of_content("user")
            self._contents[role] = found
        return self._contents[role]

    def _find_content(self, role: str) -> Forms:
        before, after = self._around(role)

        def written(content: Any) -> str:
            return self._try([*before, {"role": role, "content": content, **_extra(role)}, *after])

        as_parts = written(_as_parts(_PROBE))
        return Forms(
            text=_PROBE in written(_PROBE),
            structured=_PROBE in as_parts and not _QUOTED.search(as_parts),
        )

    def _around(self, role: str) -> tuple[list[Message], list[Message]]:
        """Messages before and after one of a role, so that templates take it."""
        if role == "user":
            return [], []
        if role == "assistant":
            return [self._user], [self._user]
        if role == "tool":
            blank, forms = self._of_calls({"content": ""})
            spelled = _ARGUMENTS if forms.structured else json.dumps(_ARGUMENTS)
            return [self._user, _call(blank, spelled)], []
        return [], [self._user]

    @property
    def _user(self) -> Message:
        return {"role": "user", "content": _content("x", self._of_content("user"))}

    @cached_property
    def _calls(self) -> list[tuple[Message, Forms]]:
        """In which forms arguments of calls are written, by what stands for no content.

        Some templates write calls only where content is null, and fail where it is
        not there; others fail where it is null.
        """
        spelled, printed = json.dumps(_ARGUMENTS), str(_ARGUMENTS)
        ((name, value),) = _ARGUMENTS.items()

        def forms(blank: Message) -> Forms:
            as_object = self._try_call(blank, _ARGUMENTS)
            return Forms(
                text=spelled in self._try_call(blank, spelled),
                structured=name in as_object and value in as_object and printed not in as_object,
            )

        blanks: tuple[Message, ...] = ({}, {"content": None}, {"content": ""})
        return [(blank, forms(blank)) for blank in blanks]

    def _try_call(self, blank: Message, arguments: Any) -> str:
        call = _call(blank, arguments)
        answer = {"role": "tool", "content": "x", "name": "probe", "tool_call_id": _ID}
        return self._try([self._user, call, answer]) or self._try([self._user, call])

    def _try(self, messages: Sequence[Message]) -> str:
        """What it writes; with functions, for those that speak of calls only then."""
        for tools in ({}, {"tools": [_TOOL]}):
            try:
                return self._write(messages, **tools)
            except TemplateError:
                continue
        return ""


def _call(blank: Message, arguments: Any) -> Message:
    function = {"name": "probe", "arguments": arguments}
    call = {"id": _ID, "type": "function", "function": function}
    return {"role": "assistant", **blank, "tool_calls": [call]}


def _fit_call(call: Any, forms: Forms) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": _arguments(function, forms)}}


def _extra(role: str) -> dict[str, str]:
    return {"name": "probe", "tool_call_id": _ID} if role == "tool" else {}


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def text_of(content: Any) -> str:
    """The text of a message's content.

    Args:
        content: text, parts, or None.

    Raises:
        TemplateError: if a part is something else than text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TemplateError(
                f"the model's chat template takes text alone, and no part of type '{kind}'"
            )
    return "".join(part["text"] for part in content)


def _content(content: Any, forms: Forms) -> Any:
    if isinstance(content, str):
        return content if forms.text or not forms.structured else _as_parts(content)
    return content if forms.structured or not forms.text else text_of(content)


def _arguments(function: Mapping[str, Any], forms: Forms) -> Any:
    given = function["arguments"]
    if isinstance(given, str) and forms.structured and not forms.text:
        try:
            read = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict):
            raise TemplateError(
                f"the arguments of a call of '{function.get('name')}' are no JSON object"
            )
        return read
    if not isinstance(given, str) and forms.text and not forms.structured:
        return json.dumps(given, ensure_ascii=False)
    return given
