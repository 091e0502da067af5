"""Exceptions of libraries, turned into errors of ours where they enter.

transformers, tokenizers, safetensors, sentencepiece, torch and the hubs' clients
raise whatever comes their way on a broken file, often a plain ``Exception``. A
user needs the file and the next step, and no traceback; a mistake of our own
must keep its traceback.
"""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ggufkit.errors import CheckpointError, DiskSpaceError, GgufkitError

_OURS = Path(__file__).parent
_MISTAKES = (
    *(AssertionError, AttributeError, NameError, TypeError, LookupError, ArithmeticError),
    *(ImportError, NotImplementedError, RecursionError),
)
"""Raised in a line of ours, these are a mistake there; compiled libraries, which
have no lines, raise other kinds."""
_LONGEST = 300


@contextmanager
def foreign(what: str, hint: str, *, error: type[GgufkitError] = CheckpointError) -> Iterator[None]:
    """Let a library do something, and tell its failure as an error of ours.

    Errors of ours, interruptions and mistakes in our own code pass unchanged.

    Args:
        what: what failed, with the file, such as ``transformers cannot load X``.
        hint: what to do next.
        error: the kind of error to raise.
    """
    try:
        yield
    except GgufkitError:
        raise
    except Exception as caught:
        if is_ours(caught):
            raise
        raise error(f"{what}: {reason_of(caught)}", hint) from caught
    except BaseException as caught:
        # Rust's panics (tokenizers, safetensors) are no Exception.
        if type(caught).__module__ != "pyo3_runtime":
            raise
        raise error(f"{what}: {reason_of(caught)}", hint) from caught


def writing(path: Path) -> AbstractContextManager[None]:
    """For a library that writes a file: a full disk is the common reason to fail."""
    hint = "Look whether the disk is full, and whether the directory may be written to"
    return foreign(f"{path} cannot be written", hint, error=DiskSpaceError)


def is_ours(error: BaseException) -> bool:
    """Whether an exception is one of this package's, or a mistake in its code.

    What comes from a function of ours that the library called back is ours too.
    """
    if type(error).__module__.partition(".")[0] == _OURS.name:
        return True
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [_OURS in file.parents for file in files if file.name != "contextlib.py"]
    if all(ours):  # raised by a line of ours, or by a compiled library that it calls
        return isinstance(error, _MISTAKES)
    return any(ours[ours.index(False) :])


def reason_of(error: BaseException) -> str:
    """An exception in one line; with its kind where the text alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    # "Validation error for field 'x':" goes on in the next line.
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    # The text of a KeyError is the key alone, that of some others is empty.
    if not text or isinstance(error, LookupError | AttributeError | TypeError):
        return f"{type(error).__name__}: {text}".rstrip(": ")
    return text
