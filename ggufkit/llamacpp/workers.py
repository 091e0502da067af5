"""Modules of this package as processes that answer questions: what breaks there, breaks there.

A worker reads a line of JSON and answers with one. It lives until this process ends, so
that a program which asks often pays its start once.
"""

import atexit
import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from ggufkit.errors import ToolError
from ggufkit.llamacpp.toolchain import start_worker

if TYPE_CHECKING:
    import subprocess

_TAIL_NBYTES = 4096


class WorkerEndedError(ToolError):
    """A worker that ended instead of answering."""


class Worker:
    """A module that answers questions, in a process of its own.

    Args:
        module: its name; see :func:`~ggufkit.llamacpp.toolchain.start_worker`.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a question; one is asked at a time.

        Raises:
            WorkerEndedError: if the process ends; with the last line that it printed.
        """
        with self._lock:
            process = self._ready()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    process.stdin.flush()
                reply = process.stdout.readline()
            except BaseException:
                self._end()
                raise
            if reply.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(reply)
                return answer
            raise WorkerEndedError(self._end())

    def warm_up(self) -> None:
        """Start the process, so that it imports what it needs before it is asked."""
        with self._lock:
            self._ready()

    def kill(self) -> None:
        """End the process, also while somebody waits for its answer."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process and wait for its end."""
        self.kill()
        with self._lock:
            self._end()

    def _ready(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
            self._process = start_worker(self.module, errors=self._errors)
        return self._process

    def _end(self) -> str:
        """End and reap the process; the last line that it printed."""
        process, self._process = self._process, None
        errors, self._errors = self._errors, None
        if process is None or errors is None:
            return ""
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        process.wait()
        with errors:
            size = errors.seek(0, 2)
            errors.seek(max(0, size - _TAIL_NBYTES))
            lines = errors.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")


def serve(answer: Callable[[Any], dict[str, Any]], prepare: Callable[[], None]) -> None:
    """The other side: answer questions on stdin until it ends, which also ends an answer.

    Args:
        answer: gives the answer to a question, both values of JSON.
        prepare: imports what takes time, while whoever will ask is still busy otherwise.
    """
    # Threads that wait by spinning would take the cores of others at work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            questions.put(line)
        os._exit(0)  # nobody is there any more

    threading.Thread(target=listen, daemon=True).start()
    prepare()
    while True:
        found = answer(json.loads(questions.get()))
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


@cache
def worker(module: str) -> Worker:
    """The worker of a module that all of this process shares; it ends with it."""
    shared = Worker(module)
    atexit.register(shared.close)
    return shared
