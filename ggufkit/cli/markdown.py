"""Markdown on a terminal while it is still being written.

What is finished is printed and never touched again, so it scrolls away like any
output. Only the end of the last block is drawn anew as text comes.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Self

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment, SegmentLines
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

_WIDEST = 100
"""Longer lines are hard to read."""
_INTERVAL_SECONDS = 0.07
_SHARE = 6
"""Drawing may take one part in so many of the time."""
_SURE = 3
"""So many characters show what kind of block a line begins."""


THEME = Theme({"markdown.code": "cyan"})
"""Without rich's black background, which a light terminal does not have."""


class _LeftHeading(Heading):
    LEVEL_ALIGN: ClassVar = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Code(CodeBlock):
    """Code in the terminal's own colours, indented, without a box around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(
            code,
            self.lexer_name,
            theme="ansi_dark",
            background_color="default",
            word_wrap=True,
            padding=(0, 2),
        )


class _ChatMarkdown(Markdown):
    """As people and models write it: each line break counts, and tags are text."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, text: str) -> None:
        # Links are shown whole, so that one sees where they lead.
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = _parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def _parse(text: str) -> list[Token]:
    # With HTML, everything between <think> and the next empty line would be lost.
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    return parser.parse(text)


def split_finished(text: str) -> tuple[str, str]:
    """Blocks to which nothing can be added any more, and the rest."""
    starts = [t.map[0] for t in _parse(text) if t.level == 0 and t.map and t.nesting >= 0]
    if len(starts) < 2:
        return "", text
    lines = text.split("\n")
    last = starts[-1]
    if len(lines[last].strip()) <= _SURE:
        return "", text
    return "\n".join(lines[:last]) + "\n", "\n".join(lines[last:])


class StreamedMarkdown:
    """Shows Markdown that comes piece by piece.

    Args:
        console: a terminal.
        status: text of a line below it while it is being written.
    """

    def __init__(self, console: Console, status: Callable[[], str]) -> None:
        self._console = console
        self._status = status
        self._open = ""
        self._printed = 0
        self._begun = False
        self._due = 0.0
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._width = min(_WIDEST, console.width)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.update(Text(""))
        self._live.stop()
        self._print(self._lines(self._open)[self._printed :])

    def feed(self, text: str) -> None:
        """Add text, and draw it if the last drawing was a while ago."""
        self._open += text
        started = time.monotonic()
        if started < self._due:
            return
        self._draw()
        done = time.monotonic()
        self._due = done + max(_INTERVAL_SECONDS, _SHARE * (done - started))

    def _draw(self) -> None:
        finished, rest = split_finished(self._open)
        if finished:
            self._print([*self._lines(finished)[self._printed :], []])
            self._open, self._printed = rest, 0
            self._width = min(_WIDEST, self._console.width)
        lines = self._lines(self._open)
        # What would be drawn above the top of the screen could not be drawn over.
        settled = len(lines) - max(1, self._console.height - 3)
        if settled > self._printed:
            self._print(lines[self._printed : settled])
            self._printed = settled
        status = Text(self._status(), style="dim", no_wrap=True, overflow="ellipsis")
        shown = [*lines[self._printed :], [], *self._console.render_lines(status, pad=False)]
        self._live.update(SegmentLines(shown, new_lines=True), refresh=True)

    def _lines(self, text: str) -> list[list[Segment]]:
        options = self._console.options.update(width=self._width)
        lines = self._console.render_lines(_ChatMarkdown(text), options, pad=False)
        lines = [_without_padding(line) for line in lines]
        full = [n for n, line in enumerate(lines) if line]
        return lines[full[0] : full[-1] + 1] if full else []

    def _print(self, lines: list[list[Segment]]) -> None:
        if lines:
            self._console.print(SegmentLines(lines, new_lines=True), end="")


def _without_padding(line: list[Segment]) -> list[Segment]:
    """Without the spaces at its end, which would be copied from the terminal."""
    kept = list(line)
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        last = kept[-1]
        kept[-1] = Segment(last.text.rstrip(), last.style, last.control)
    return kept
