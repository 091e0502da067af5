"""Python's own documentation as a text: its language reference and its docstrings."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_MIN_DOCSTRING = 80
"""Shorter docstrings say little more than the name they stand under."""
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}


def _topics() -> dict[str, str]:
    """The language reference that ``help()`` shows, by topic, sorted."""
    from pydoc_data.topics import topics

    return {k: v.replace("\r\n", "\n").replace("\r", "\n") for k, v in sorted(topics.items())}


def pydoc(*_: object) -> tuple[str, str]:
    """The whole language reference, and where it comes from."""
    return "\n".join(_topics().values()), "Python's own pydoc_data.topics"


def pydoc_calibration(*_: object) -> tuple[str, str]:
    """One half of the language reference, and where it comes from."""
    topics = list(_topics().values())
    return "\n".join(topics[::2]), "Python's own pydoc_data.topics, every other topic"


def pydoc_measure(*_: object) -> tuple[str, str]:
    """The other topics, without paragraphs that stand in the calibration half as well."""
    topics = list(_topics().values())
    seen = {_words(p) for p in _paragraphs("\n".join(topics[::2]))}
    kept = ["\n\n".join(p for p in _paragraphs(t) if _words(p) not in seen) for t in topics[1::2]]
    source = "Python's own pydoc_data.topics, the topics that pydoc-calibration leaves out"
    return "\n\n".join(t for t in kept if t) + "\n", source


def _paragraphs(text: str) -> list[str]:
    return [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]


def _words(text: str) -> str:
    """The text without regard to how it is indented and wrapped."""
    return " ".join(text.split())


def stdlib_docstrings(*_: object) -> tuple[str, str]:
    """The longer docstrings of the standard library, each once, and where they come from."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = dict.fromkeys(
        doc for path in _library_files(root) for doc in _docstrings(path) if doc.isascii()
    )
    long = [doc for doc in found if len(doc) >= _MIN_DOCSTRING]
    return "\n\n".join(long) + "\n", "docstrings of Python's own standard library"


def _library_files(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts[:-1])
    )


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings in a file's source, which is not run."""
    raw = path.read_bytes()
    if b'"""' not in raw and b"'''" not in raw:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(raw)
    except (SyntaxError, ValueError):
        return  # templates and deliberately broken samples; nothing to read there
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (doc := ast.get_docstring(node)):
            yield doc
