"""Rendering chat templates in a process that can be ended.

A sandbox keeps a template from reaching out, but not from looping for ever or
from filling the memory, and nothing stops a thread of Python for good. So the
template of a model that serves others is rendered in a process of its own, with
little memory, which is killed when its time is up.

Run as a module, it answers one line of JSON for each that it reads.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ggufkit.llamacpp.conversing import ChatTemplate
from ggufkit.llamacpp.template import RefusedError, TemplateError
from ggufkit.llamacpp.toolchain import start_worker

if TYPE_CHECKING:
    import subprocess

DEFAULT_SECONDS = 5.0
_PATIENCE = 10.0
"""A busy machine gives a process little of its time, so seconds on the clock are more."""
_MEMORY_NBYTES = 1 << 30
_LONGEST = 16 << 20
"""Characters of a prompt; no context takes more."""


class TemplateStoppedError(TemplateError):
    """A chat template that took too much time or memory."""


class Renderer:
    """Renders one chat template; for any thread, one conversation at a time.

    Args:
        template: the template.
        seconds: of the processor's time, in whole, after which it is stopped.
    """

    def __init__(self, template: ChatTemplate, seconds: float = DEFAULT_SECONDS) -> None:
        self.template = template
        self.seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._closed = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; see :meth:`ChatTemplate.render`.

        Args:
            messages: the conversation, of values that JSON has.
            tools: functions as JSON schemas; None if there are none.
            add_generation_prompt: whether it goes on to where the answer begins.
            variables: further names that the template may use.

        Raises:
            RefusedError: if the template refuses the messages.
            TemplateError: if it is broken, or cannot be given them.
            TemplateStoppedError: if it takes too much time or memory.
            UsageError: if it is one of llama.cpp's own and cannot take them.
        """
        template = self.template
        given = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        if template.library is not None:
            return template.render(messages, **given)
        own = {f.name: getattr(template, f.name) for f in fields(template) if f.name != "library"}
        question = {
            **{"template": own, "messages": list(messages), "given": given},
            "seconds": self.seconds,
        }
        line = json.dumps(question, default=str).encode() + b"\n"
        with self._lock:
            told = self._ask(line)
        if "error" in told:
            kind = RefusedError if told["refused"] else TemplateError
            raise kind(told["error"], told["hint"])
        text: str = told["text"]
        return text

    def _ask(self, line: bytes) -> dict[str, Any]:
        worker = self._ready()
        assert worker.stdin is not None
        assert worker.stdout is not None
        timer = threading.Timer(_PATIENCE * (self.seconds + 1), worker.kill)
        timer.daemon = True
        timer.start()
        reply = b""
        with suppress(OSError):  # a broken pipe: it was killed
            worker.stdin.write(line)
            worker.stdin.flush()
            reply = worker.stdout.readline()
        timer.cancel()
        if reply.endswith(b"\n"):
            told: dict[str, Any] = json.loads(reply)
            return told
        self._end()
        raise TemplateStoppedError(
            f"the model's chat template took more than {self.seconds:g} seconds, or too much "
            "memory, and was stopped",
            "Give another one: --chat-template FILE",
        )

    def _ready(self) -> "subprocess.Popen[bytes]":
        if self._closed:
            raise TemplateStoppedError("the model is being unloaded")
        if self._worker is not None and self._worker.poll() is not None:
            self._end()
        if self._worker is None:
            self._worker = start_worker(__spec__.name)
        return self._worker

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        for stream in (worker.stdin, worker.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        worker.wait()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        if self._worker is not None:
            self._worker.kill()
        with self._lock:
            self._end()


# The process.


def main() -> None:
    """Answer what comes on stdin, until it ends."""
    _limit_memory()
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        _limit_seconds(asked["seconds"])
        sys.stdout.buffer.write(json.dumps(_answer(asked)).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        template = _template(json.dumps(asked["template"]))
        text = template.render(asked["messages"], **asked["given"])
        if len(text) > _LONGEST:
            raise TemplateError(f"the model's chat template writes {len(text)} characters")
    except TemplateError as error:
        refused = isinstance(error, RefusedError)
        return {"error": error.message, "hint": error.hint, "refused": refused}
    except Exception as error:  # a template can raise whatever Python has
        told = f"the model's chat template does not work: {error!r}"
        return {"error": told, "hint": "", "refused": False}
    return {"text": text}


@lru_cache(maxsize=1)
def _template(spelled: str) -> ChatTemplate:
    """The same object for the same template: it remembers what that takes."""
    return ChatTemplate(**json.loads(spelled))


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_NBYTES, _MEMORY_NBYTES))


def _limit_seconds(seconds: float) -> None:
    """End this process when it has computed for so long from now on."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        end = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (end, hard))


if __name__ == "__main__":
    main()
