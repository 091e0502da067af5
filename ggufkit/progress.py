"""How work tells what it is doing, without knowing who listens.

Rooms take a :class:`Progress`; the command line passes one that draws bars on
stderr, a library user passes nothing and gets :class:`Silent`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of long work under way."""

    def update(self, done: float, note: str = "") -> None:
        """Set how much is done (in the task's unit, not a difference).

        ``note`` is a short text shown beside the bar, such as a running
        estimate; an empty one leaves the last in place.
        """

    def set_total(self, total: float) -> None:
        """Set the total once it is known."""


class Progress(Protocol):
    """A listener for messages and long work."""

    def say(self, message: str) -> None:
        """Tell something worth knowing."""

    def warn(self, message: str) -> None:
        """Tell something that the user should act on or be aware of."""

    def task(
        self, title: str, total: float | None = None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Begin long work; ``unit`` is one of ``bytes``, or a plural noun."""


class SilentTask:
    """A task nobody watches."""

    def update(self, done: float, note: str = "") -> None:
        """Do nothing."""

    def set_total(self, total: float) -> None:
        """Do nothing."""


class Silent:
    """The listener that ignores everything."""

    def say(self, message: str) -> None:
        """Do nothing."""

    def warn(self, message: str) -> None:
        """Do nothing."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """Yield a task that ignores its updates."""
        yield SilentTask()


SILENT = Silent()
