"""Axes as the report's plots want them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ggufkit.evaluate.report import words
from ggufkit.evaluate.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FAR = 1.6
"""From this ratio on the reference is only pointed at, so that the others have room."""
_SIZE_STEPS = ((1,), (1, 1.5), (1, 1.25, 1.5, 1.75), tuple(1 + n / 16 for n in range(16)))
"""Ticks within a doubling of the size, from coarse to fine."""


def row_axis(axes: "Axes", rows: Sequence[tuple[str, bool]], x: str) -> None:
    """Rows of models, each with its label and whether it is the recommended one."""
    axes.set_xlabel(x)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK["ink"])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    for text, (_, chosen) in zip(axes.get_yticklabels(), rows, strict=True):
        if chosen:
            text.set_color(INK["good"])
            text.set_fontweight("bold")


def cost_axis(axes: "Axes", heights: Sequence[float], log: bool) -> None:
    """The axis of divergence or perplexity, upwards."""
    if log:
        log_axis(axes, "y", heights)
        return
    room = 0.15 * ((max(heights) - min(heights)) or max(heights) or 1)
    axes.set_ylim(min(heights) - room, max(heights) + room)


def log_axis(axes: "Axes", which: str, values: Sequence[float]) -> None:
    """A logarithmic axis around values, with numbers that people write."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = min(values), max(values)
    room = max(0.06 * math.log10(high / low), 0.08)
    ends = low * 10**-room, high * 10**room
    decades = math.log10(ends[1] / ends[0])
    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(*ends)
    else:
        axes.set_yscale("log")
        axes.set_ylim(*ends)
    marks = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1e-4 else f"{value:.0e}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def across(
    axes: "Axes", values: Sequence[float], reference: float | None, sizes: bool, narrow: bool
) -> None:
    """The axis of sizes or rates; a reference far off does not stretch it."""
    if reference and max(values) / _FAR < reference < max(values) * _FAR:
        values = [*values, reference]
    if not sizes:
        axes.set_xlim(0, 1.12 * max(values))
        return
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    room = max(1.04, (max(values) / min(values)) ** 0.12)
    ends = min(values) / room, max(values) * room
    axes.set_xlim(*ends)
    for steps in _SIZE_STEPS:
        ticks = [step * 2.0**power for power in range(10, 50) for step in steps]
        within = [t for t in ticks if ends[0] <= t <= ends[1]]
        if len(within) >= (2 if narrow else 3):
            break
    axes.set_xticks(within)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: words.size(value).replace(".0 ", " "))
