"""Why a program failed, out of what it printed last.

A log is full of words such as "error" and "unknown" that mean nothing (a key is
called ``tokenizer.ggml.unknown_token_id``), so only what is marked as an error
counts: a Python exception, llama.cpp's log level E, ``failed to quantize:``, a
failed assertion, or a line that begins with ``error:``. Programs say an error
first and then what failed because of it, so of the last unbroken run of errors
the first is the reason; an error further up was survived.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

_T = TypeVar("_T")

UNKNOWN = "it did not say why"

_FRAME = re.compile(r'^(\s*)File ".*", line \d+')
_STAMPED = re.compile(r"^[\d.]+ ([A-Z]) (.*)$")
_FUNCTION = re.compile(r"^(?:cmn +)?[A-Za-z]\w*: +")
_LOADING = re.compile(r"^(?:error loading model(?: \w+)?: )+")
_STAMPED_ERROR = re.compile(r"^[\d.]+ E .*(?:only \d+ tokens|failed|error|unable)")
_FAILED_TO = re.compile(r"(?:failed to quantize: |(?=failed to load imatrix from ))(.+)")
_READER = re.compile(r"^gguf_\w+: (.+)")
_ABORTED = re.compile(r"^\S+\.(?:c|cc|cpp|cu|m|h|hpp):\d+: (\D.+)")
_TERMINATED = re.compile(r"^\s*what\(\): +(.+)")
_MARKED = re.compile(
    r"^\s*(?:[\w./+-]+: )?(?:(?:fatal error|error|ERROR|Error|fatal|FATAL)(?: while [^:]*)?: *)+"
    r"(?:[\w.-]+:(?! ))?(\S.*)$"
)


def says_error(tail: Sequence[str]) -> bool:
    """Whether llama.cpp's logger got to say why the tool gave up."""
    return any(_STAMPED_ERROR.match(line) for line in tail)


def essential_line(tail: Sequence[str]) -> str:
    """The line that says why a program failed.

    Args:
        tail: the last lines that it printed.
    """
    finders = (exception_of, abort_reason, _quantize_error, _logged_error, _marked_error)
    lines = [line for line in tail if line.strip()]
    for find in finders:
        if reason := find(lines):
            return reason
    # What the logger wrote below level E is no reason, whatever words are in it.
    plain = [line.strip() for line in lines if not _STAMPED.match(line)]
    return plain[-1] if plain else UNKNOWN


def exception_of(lines: Sequence[str]) -> str:
    """The exception that the last Python traceback ends with; empty without one."""
    frames = [(n, len(found[1])) for n, line in enumerate(lines) if (found := _FRAME.match(line))]
    if not frames:
        return ""
    last, indented = frames[-1]
    margin = max(0, indented - 2)
    rest = list(lines[last + 1 :])
    for number, line in enumerate(rest):
        text = line.strip()
        if len(line) - len(line.lstrip()) <= margin and text:
            more = rest[number + 1 : number + 2] if text.endswith(":") else []
            return " ".join([text, *(part.strip() for part in more)])
    return ""


def abort_reason(lines: Sequence[str]) -> str:
    """What an assertion or an uncaught C++ exception says; empty if there was none."""
    for line in lines:
        if found := _ABORTED.match(line) or _TERMINATED.match(line):
            text = found[1]
            # A compiler's messages look alike; they are marked as errors.
            if not text.startswith(("error", "fatal error", "warning", "note")):
                return text
    return ""


_BROKEN_CONNECTION = re.compile(
    r"connection broken by '(?:.*0x[0-9a-f]+>: )?(.+?)(?:'?\))?'(?:: /|$)"
)


def connection_problem(lines: Sequence[str]) -> str:
    """What pip says of a network that failed it; empty if it did not."""
    found = [match[1] for line in lines if (match := _BROKEN_CONNECTION.search(line))]
    return found[-1] if found else ""


def _quantize_error(lines: Sequence[str]) -> str:
    """llama-quantize's reason, which may stand in the middle of another line."""
    for number in reversed(range(len(lines))):
        if found := _FAILED_TO.search(lines[number]):
            before = _READER.match(lines[number - 1]) if number else None
            return (before or found)[1]
    return ""


def _logged_error(lines: Sequence[str]) -> str:
    """The first of the last run of llama.cpp's log lines of level E."""
    stamped = [found for line in lines if (found := _STAMPED.match(line))]
    run = _last_run(stamped, lambda found: found[1] == "E")
    return _LOADING.sub("", _FUNCTION.sub("", run[0][2])) if run else ""


def _marked_error(lines: Sequence[str]) -> str:
    """The first of the last run of lines that begin with ``error:`` or the like."""
    run = _last_run([_MARKED.match(line) for line in lines], lambda found: found is not None)
    return str(run[0][1]) if run and run[0] else ""


def _last_run(items: Sequence[_T], belongs: Callable[[_T], bool]) -> list[_T]:
    """The last neighbours that belong together."""
    run: list[_T] = []
    for item in reversed(items):
        if belongs(item):
            run.append(item)
        elif run:
            break
    return run[::-1]


_COMPILER_ERROR = re.compile(
    r"^CMake Error|^\S+:\d+(?::\d+)?: (?:fatal )?error: |^\S+: fatal error: |undefined reference to"
    r"|^make.*\*\*\*|^ninja: (?:error|fatal)|^\S*nvcc\S* +(?:fatal|error)"
)


def build_error(text: str) -> str:
    """The first error in what cmake, ninja and compilers printed.

    CMake puts the reason on the lines after ``CMake Error at FILE:LINE``.
    """
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines):
        if _COMPILER_ERROR.search(line):
            return " ".join([line, *(_paragraph(lines[number + 1 :]) if line[-1] == ":" else [])])
    return essential_line(text.splitlines()[-40:])


def _paragraph(lines: Sequence[str]) -> list[str]:
    """The first lines that belong together."""
    found: list[str] = []
    for line in lines:
        if line:
            found.append(line)
        elif found:
            break
    return found
