"""The plots, drawn by matplotlib as SVG that lives inside a page.

Colours are drawn as placeholders and become CSS variables, so that a plot follows
the page's light and dark scheme without a script. Fonts are the page's own: text
stays text. Each plot comes in two shapes, for wide and for narrow places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ggufkit.errors import UsageError
from ggufkit.evaluate.report import words
from ggufkit.evaluate.report.axes import across, cost_axis, log_axis, row_axis
from ggufkit.evaluate.report.labels import Spot, label_points
from ggufkit.evaluate.report.svg import FONT, INK, SERIES, in_shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HALF, _FULL = 540, 1060
"""Widths in pixels: of a plot that shares a row, and of one that has it."""
_NORMAL_95 = 1.96
_HEAD_WIDTH = 36
_NEGLIGIBLE = 1e-4
"""Nats per token that nobody will ever notice."""


@dataclass(frozen=True)
class Point:
    """A model in a plot of quality against something.

    Attributes:
        label: its short name.
        x: size in bytes, or tokens per second.
        y: divergence or perplexity.
        error: standard error of ``y``.
        on_front: whether it is on the Pareto front.
        chosen: whether it is the recommended one.
        told: what is shown when it is pointed at.
    """

    label: str
    x: float
    y: float
    error: float
    on_front: bool
    chosen: bool
    told: str


@dataclass(frozen=True)
class Row:
    """A model in a plot of rows.

    Attributes:
        label: its short name.
        values: by name of the series.
        chosen: whether it is the recommended one.
        ends: of the interval of each value, by name of the series.
    """

    label: str
    values: Mapping[str, float]
    chosen: bool = False
    ends: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def require_matplotlib() -> None:
    """Find out whether plots can be drawn.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the report's plots are drawn by matplotlib, which is not installed",
            "Install it: pip install 'ggufkit[report]'",
        ) from error


def tradeoff(
    name: str,
    points: Sequence[Point],
    *,
    x: str,
    y: str,
    log_y: bool,
    sizes: bool,
    reference: tuple[str, float] | None = None,
) -> str:
    """Quality against size or speed.

    Args:
        name: unique in the page, for ids.
        points: the models; steps join those on the front.
        x: what is across.
        y: what is up; less is better.
        log_y: whether that axis is logarithmic.
        sizes: ``x`` is bytes, less being better; else a rate, more being better.
        reference: label and ``x`` of the reference, which has no cost to draw.

    Returns:
        SVG elements, one for each shape.
    """
    least = _least([p.y for p in points]) if log_y else -float("inf")
    heights = [max(p.y, least) for p in points]

    def draw(axes: "Axes", narrow: bool) -> None:
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        cost_axis(axes, heights, log_y)
        across(axes, [p.x for p in points], reference[1] if reference else None, sizes, narrow)
        front = sorted((p.x, h) for p, h in zip(points, heights, strict=True) if p.on_front)
        axes.step(
            [at for at, _ in front],
            [height for _, height in front],
            where="post" if sizes else "pre",
            color=INK["accent"],
            linewidth=1.5,
            alpha=0.5,
            zorder=2,
        )
        for number, (point, height) in enumerate(zip(points, heights, strict=True)):
            _mark(axes, point, height, least, f"point-{number}")
        spots = [
            Spot(p.label, p.x, height, p.chosen, p.on_front)
            for p, height in zip(points, heights, strict=True)
        ]
        label_points(axes, spots, reference)

    told = {f"point-{number}": point.told for number, point in enumerate(points)}
    return in_shapes(name, draw, _HALF, lambda narrow: 330 if narrow else 380,
                      what=f"{y} against {x}", titles=told)  # fmt: skip


def _least(values: Sequence[float]) -> float:
    """Where a logarithmic axis of divergences begins: what is below is drawn there.

    Equal files have 0, which such an axis does not have, and 16-bit floats are so
    near to it that they would leave little room to all others.
    """
    most = max(values, default=0) or 1.0
    seen = [value for value in values if value > min(_NEGLIGIBLE, most / 100)]
    least = min(seen, default=most)
    return least if len(seen) == len(values) else least / 3


def _mark(axes: "Axes", point: Point, height: float, least: float, gid: str) -> None:
    colour = INK["good" if point.chosen else "accent" if point.on_front else "faint"]
    if point.y < least:
        axes.annotate(
            "↓",
            (point.x, height),
            xytext=(0, -5),
            textcoords="offset pixels",
            ha="center",
            va="top",
            color=colour,
        )
    elif point.error:
        below = min(_NORMAL_95 * point.error, 0.9 * height)
        above = _NORMAL_95 * point.error
        axes.vlines(point.x, height - below, height + above, color=colour, linewidth=1.3, zorder=3)
    axes.scatter(
        [point.x],
        [height],
        s=110 if point.chosen else 50,
        marker="D" if point.chosen else "o",
        facecolor=colour if point.on_front or point.chosen else INK["card"],
        edgecolor=colour,
        linewidth=1.6,
        zorder=7,  # over the labels, whose halo would hide it
        clip_on=False,
        gid=gid,
    )


def spread(name: str, rows: Sequence[Row], *, x: str, middle: str) -> str:
    """Percentiles of each model on a logarithmic axis: one row each, one dot for each.

    Args:
        name: unique in the page, for ids.
        rows: values by name of the percentile, the least first.
        x: what is across.
        middle: name of the series that is a mean and drawn apart.
    """
    series = [s for s in rows[0].values if s != middle]
    values = [v for row in rows for v in row.values.values()]
    least = _least(values)

    def draw(axes: "Axes", narrow: bool) -> None:
        row_axis(axes, [(row.label, row.chosen) for row in rows], x)
        log_axis(axes, "x", [least, max(values)])
        for number, row in enumerate(rows):
            colour = INK["good" if row.chosen else "accent"]
            at = [max(row.values[s], least) for s in series]
            axes.hlines(number, at[0], at[-1], color=colour, linewidth=2, alpha=0.35, zorder=2)
            sizes = [18 + 46 * (1 - n / max(1, len(at) - 1)) for n in range(len(at))]
            axes.scatter(at, [number] * len(at), s=sizes, color=colour, zorder=3, clip_on=False)
            if middle in row.values:
                axes.vlines(max(row.values[middle], least), number - 0.3, number + 0.3,
                            color=INK["ink"], linewidth=2, zorder=4)  # fmt: skip
        axes.set_ylim(len(rows) - 0.4, -1)
        _head(axes, [(of, max(rows[0].values[of], least)) for of in series])

    return in_shapes(name, draw, _FULL, lambda narrow: 32 * len(rows) + 86,
                      what=f"{x}: percentiles by model")  # fmt: skip


def _head(axes: "Axes", marks: Sequence[tuple[str, float]]) -> None:
    """Names of the dots, above those of the first row; none over another."""
    from matplotlib.figure import Figure

    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # places the axes, so that pixels can be asked for
    taken = -float("inf")
    for of, value in marks:
        x = float(axes.transData.transform((value, 0))[0])
        if x - taken > _HEAD_WIDTH:
            taken = x
            axes.annotate(
                of,
                (value, 0),
                xytext=(0, 12),
                textcoords="offset pixels",
                ha="center",
                fontsize=FONT - 2,
                color=INK["muted"],
            )


def bars(name: str, rows: Sequence[Row], *, x: str, log: bool = True) -> str:
    """A group of bars for each model, one for each series.

    Args:
        name: unique in the page, for ids.
        rows: values by name of the series.
        x: what is across.
        log: whether that axis is logarithmic.
    """
    series = list(dict.fromkeys(s for row in rows for s in row.values))
    values = [v for row in rows for v in row.values.values()]
    thick = 0.8 / len(series)

    def draw(axes: "Axes", narrow: bool) -> None:
        row_axis(axes, [(row.label, row.chosen) for row in rows], x)
        left, right = _least(values) / 2, max(values)
        if log:
            log_axis(axes, "x", [left, right * (4 if narrow else 1.6)])
            left = axes.get_xlim()[0]
        else:
            left = 0
            axes.set_xlim(0, right * (1.3 if narrow else 1.1))
        for number, row in enumerate(rows):
            for place, of in enumerate(series):
                if of not in row.values:
                    continue
                y = number - 0.4 + thick * (place + 0.5)
                value = max(row.values[of], left)
                axes.barh(y, value - left, left=left, height=0.82 * thick,
                          color=INK[f"series-{place % SERIES + 1}"])  # fmt: skip
                axes.annotate(words.figures(row.values[of]), (value, y), xytext=(4, 0),
                              textcoords="offset pixels", va="center", fontsize=FONT - 2,
                              color=INK["muted"])  # fmt: skip
        axes.set_ylim(len(rows) - 0.45, -0.55)

    return in_shapes(name, draw, _FULL,
                      lambda narrow: len(rows) * (15 * len(series) + 10) + 60,
                      what=f"{x} by model and text")  # fmt: skip


def intervals(
    name: str, rows: Sequence[Row], *, x: str, of: str, chance: float | None = None
) -> str:
    """A share with its interval for each model, between 0 and 1.

    Args:
        name: unique in the page, for ids.
        rows: with the ends of the intervals.
        x: what is across.
        of: name of the series.
        chance: the share that guessing gives, if known.
    """

    def draw(axes: "Axes", narrow: bool) -> None:
        row_axis(axes, [(row.label, row.chosen) for row in rows], x)
        for number, row in enumerate(rows):
            colour = INK["good" if row.chosen else "accent"]
            low, high = row.ends[of]
            axes.hlines(number, low, high, color=colour, linewidth=2, alpha=0.5)
            axes.scatter([row.values[of]], [number], s=46, color=colour, zorder=3)
        if chance is not None:
            axes.axvline(chance, color=INK["muted"], linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate("guessing", (chance, 1), xycoords=("data", "axes fraction"),
                          xytext=(4, -2), textcoords="offset pixels", va="top",
                          fontsize=FONT - 2, color=INK["muted"])  # fmt: skip
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_ylim(len(rows) - 0.4, -0.9)

    return in_shapes(name, draw, _HALF, lambda narrow: 26 * len(rows) + 84,
                      what=f"{x} by model")  # fmt: skip
