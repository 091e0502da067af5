"""Putting a report on disk: both files or neither, and nobody else's replaced."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from ggufkit.errors import DiskSpaceError, UsageError
from ggufkit.evaluate.report.html import GENERATOR
from ggufkit.store import write_atomically

_LOOKED_AT = 4096
"""The generator stands within so many bytes of the beginning."""


def twin_of(page: Path) -> Path:
    """The Markdown that belongs to a page."""
    return page.with_suffix(".md")


def check_targets(page: Path, *, force: bool) -> None:
    """Find out, before any work, whether a report may be written here.

    Args:
        page: the HTML file to be; the Markdown goes beside it.
        force: replace files that are no reports.

    Raises:
        UsageError: if it must not.
    """
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"{page} does not end with .html",
            f"Name the page, such as {page.with_suffix('.html')}; the Markdown goes beside it",
        )
    for path in (page, twin_of(page)):
        if path.is_dir():
            raise UsageError(f"{path} is a directory", "Name another file with -o")
        if path.exists() and not force and not _is_report(path):
            raise UsageError(
                f"{path} exists and is not a report of ggufkit",
                "Replace it with --force, or name another file with -o",
            )


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(_LOOKED_AT)
    except OSError:
        return False


def write_report(page: Path, html: str, markdown: str) -> None:
    """Write the page and its twin; the old ones stay if that fails.

    Raises:
        DiskSpaceError: if the disk is full.
        UsageError: if nothing can be written there.
    """
    texts = {page: html, twin_of(page): markdown}
    fresh = {path: path.with_name(f".{path.name}.new") for path in texts}
    try:
        for path, text in texts.items():
            write_atomically(fresh[path], text)
        for path, scratch in fresh.items():
            os.replace(scratch, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"the disk of {page.parent} is full: the report was not written",
                "Free some space, or name another place with -o",
            ) from error
        raise UsageError(
            f"the report cannot be written to {page}: {error.strerror}",
            "Name another place with -o",
        ) from error
    finally:
        for scratch in fresh.values():
            with suppress(OSError):  # where nothing can be written, nothing is left
                scratch.unlink(missing_ok=True)
