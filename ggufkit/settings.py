"""The environment settings, all in one place.

==================  ======================================================
``GGUFKIT_MODELS``    models directory (default ``./models``)
``GGUFKIT_CACHE``     where native builds and fetched archives are kept
``GGUFKIT_HUB``       hub of a bare ``ORG/NAME``: ``huggingface`` or ``modelscope``
``GGUFKIT_TEXT_DIR``  offline copies of named texts such as ``wikitext``
``GGUFKIT_THREADS``   threads for native tools and searches (default: all cores)
``GGUFKIT_NATIVE``    one native build to use, as ``ggufkit build`` printed its place
==================  ======================================================
"""

import os
from pathlib import Path

from ggufkit.errors import UsageError

HUBS = ("huggingface", "modelscope")


def models_dir() -> Path:
    """The models directory."""
    return Path(os.environ.get("GGUFKIT_MODELS") or "models")


def cache_dir() -> Path:
    """The directory of things that can be rebuilt and are shared by projects."""
    if given := os.environ.get("GGUFKIT_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ggufkit"


def state_dir() -> Path:
    """The directory of what a user did, such as the history of a chat."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "ggufkit"


def native_build() -> Path | None:
    """The native build that the user wants, if one is named."""
    given = os.environ.get("GGUFKIT_NATIVE")
    return Path(given) if given else None


def hub() -> str:
    """The hub that a bare ``ORG/NAME`` is looked up in."""
    name = (os.environ.get("GGUFKIT_HUB") or HUBS[0]).lower()
    if name not in HUBS:
        raise UsageError(
            f"GGUFKIT_HUB is '{name}', which is not a hub", f"Use one of: {', '.join(HUBS)}"
        )
    return name


def text_dir() -> Path | None:
    """The directory of offline texts, if one is set."""
    given = os.environ.get("GGUFKIT_TEXT_DIR")
    return Path(given) if given else None


def threads() -> int:
    """How many threads heavy work may use.

    Raises:
        UsageError: if ``GGUFKIT_THREADS`` is not a positive number.
    """
    given = os.environ.get("GGUFKIT_THREADS")
    if not given:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if not given.isdigit() or int(given) < 1:
        raise UsageError(f"GGUFKIT_THREADS is '{given}', which is not a positive number")
    return int(given)
