"""What every command shares: the models directory, stdout, stderr, progress."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from ggufkit.progress import Progress, SilentTask, Task
from ggufkit.values import to_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)


@dataclass
class Session:
    """One run of the command line."""

    models_dir: Path
    quiet: bool = False

    @cached_property
    def console(self) -> "Console":
        """Where results go: stdout. In a file or pipe, lines are not broken."""
        from rich.console import Console

        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        return Console(highlight=False, width=width)

    @cached_property
    def talk(self) -> "Console":
        """Where talk goes: stderr."""
        from rich.console import Console

        return Console(stderr=True, highlight=False)

    @cached_property
    def progress(self) -> Progress:
        """A listener that draws on stderr: bars on a terminal, else lines."""
        if self.talk.is_terminal and not self.quiet:
            return TerminalProgress(self.talk)
        return LineProgress(quiet=self.quiet)

    def emit(self, as_json: bool, value: Any, human: Callable[[], None]) -> None:
        """Print a result, as JSON or for people."""
        if as_json:
            click.echo(json.dumps(to_json(value), indent=2, ensure_ascii=False))
        else:
            human()


_PIPE_WIDTH = 200

pass_session = click.make_pass_decorator(Session)


class LineProgress:
    """Progress as plain lines on stderr, for logs and pipes."""

    interval_seconds = 10.0

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    def say(self, message: str) -> None:
        """Print a line."""
        if not self._quiet:
            print(message, file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Print a line that stands out, also when quiet."""
        print(f"warning: {message}", file=sys.stderr, flush=True)

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """Print the title now, and how far it is every ten seconds."""
        if self._quiet:
            yield SilentTask()
            return
        yield _LineTask(title, total, self.interval_seconds)


class _LineTask:
    def __init__(self, title: str, total: float | None, interval: float) -> None:
        self._title = title
        self._total = total
        self._interval = interval
        self._started = self._spoken = monotonic()
        print(f"{title} ...", file=sys.stderr, flush=True)

    def set_total(self, total: float) -> None:
        self._total = total

    def update(self, done: float, note: str = "") -> None:
        now = monotonic()
        if now - self._spoken < self._interval:
            return
        self._spoken = now
        line = f"{self._title}: "
        if self._total:
            left = (now - self._started) * (self._total - done) / done if done else None
            line += f"{100 * done / self._total:.0f} %"
            line += f", {_duration(left)} left" if left is not None else ""
        else:
            line += f"{done:g}"
        print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)


class TerminalProgress:
    """Progress as rich bars on a terminal."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._bars: RichBars | None = None

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        from rich.text import Text

        self._console.print(Text(message, style="dim"))

    def warn(self, message: str) -> None:
        """Print a line that stands out above the bars."""
        from rich.text import Text

        self._console.print(Text(f"warning: {message}", style="yellow"))

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """Draw a bar with the share done and the time left."""
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBars

        outermost = self._bars is None
        if self._bars is None:
            self._bars = RichBars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        bar = self._bars.add_task(title, total=total, note="")
        started = monotonic()
        try:
            yield _BarTask(self._bars, bar)
            self.say(f"{title}: {_duration(monotonic() - started)}")
        finally:
            self._bars.remove_task(bar)
            if outermost:
                self._bars.stop()
                self._bars = None


class _BarTask:
    def __init__(self, bars: "RichBars", bar: "TaskID") -> None:
        self._bars = bars
        self._bar = bar

    def set_total(self, total: float) -> None:
        self._bars.update(self._bar, total=total)

    def update(self, done: float, note: str = "") -> None:
        if note:
            self._bars.update(self._bar, completed=done, note=note)
        else:
            self._bars.update(self._bar, completed=done)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


def nbytes_text(nbytes: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
