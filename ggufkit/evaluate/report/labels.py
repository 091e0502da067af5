"""Names beside points, where they cover nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggufkit.evaluate.report.svg import FONT, INK, LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox


_DOT = 16
"""Width of a point with some room around it."""
_NEAR = 1.6
"""From this reach on a line leads from the label to its point."""
_LEADER = {
    "arrowstyle": "-",
    "color": INK["faint"],
    "linewidth": 0.8,
    "shrinkA": 1,
    "shrinkB": 5,
}


@dataclass(frozen=True)
class Spot:
    """A point to be named: its label, where it is, and how much it matters."""

    label: str
    x: float
    y: float
    chosen: bool
    on_front: bool


def label_points(axes: "Axes", spots: Sequence[Spot], reference: tuple[str, float] | None) -> None:
    """Write each point's name beside it.

    Args:
        axes: with all points drawn and all limits set.
        spots: the points.
        reference: label and ``x`` of the reference, which gets a line, or an arrow
            if it is farther to the right.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # places the axes, so that pixels can be asked for
    pixels = axes.transData.transform([(spot.x, spot.y) for spot in spots])
    taken = [Bbox.from_bounds(x - _DOT / 2, y - _DOT / 2, _DOT, _DOT) for x, y in pixels]
    frame = axes.get_window_extent()
    if reference:
        taken.append(_mark_reference(axes, *reference, frame))
    # The recommended one chooses first.
    order = sorted(range(len(spots)), key=lambda n: (not spots[n].chosen, spots[n].y))
    for n in order:
        spot, (x, y) = spots[n], pixels[n]
        side, box = _free_place(x, y, _text_width(spot.label), frame, taken)
        taken.append(box)
        far = side.reach > _NEAR
        axes.annotate(
            spot.label,
            (spot.x, spot.y),
            arrowprops=_LEADER if far else None,
            xytext=side.offset,
            textcoords="offset pixels",
            ha=side.across,
            va=side.up,
            fontsize=FONT,
            zorder=6,
            color=INK["good" if spot.chosen else "ink" if spot.on_front else "muted"],
            fontweight="bold" if spot.chosen else "normal",
            gid=LABEL,
        )


def _mark_reference(axes: "Axes", label: str, x: float, frame: "Bbox") -> "Bbox":
    """A line at the reference, or an arrow to where it would be."""
    from matplotlib.transforms import Bbox

    at = float(axes.transData.transform((x, axes.get_ylim()[0]))[0])
    if at > frame.x1:
        label, at = f"{label} →", frame.x1
    else:
        axes.axvline(x, color=INK["muted"], linewidth=1, linestyle=(0, (2, 3)))
    to_left = at > (frame.x0 + frame.x1) / 2
    axes.annotate(
        label, (at, frame.y1), xycoords="figure pixels",
        xytext=(-6 if to_left else 6, -4), textcoords="offset pixels",
        ha="right" if to_left else "left", va="top", fontsize=FONT - 1, color=INK["muted"],
    )  # fmt: skip
    width = _text_width(label)
    return Bbox.from_bounds(at - width if to_left else at, frame.y1 - 22, width, 22)


@dataclass(frozen=True)
class _Side:
    """Where a label is beside its point."""

    offset: tuple[float, float]
    across: str
    up: str
    reach: float

    def box(self, x: float, y: float, width: float) -> "Bbox":
        from matplotlib.transforms import Bbox

        height = FONT + 2
        left = {"left": 0, "center": -width / 2, "right": -width}[self.across]
        below = {"bottom": 0, "center": -height / 2, "top": -height}[self.up]
        return Bbox.from_bounds(
            x + self.offset[0] + left, y + self.offset[1] + below, width, height
        )


_SIDES = tuple(
    _Side((dx * reach, dy * reach), across, up, reach)
    for reach in (1.0, 1.5, 2.4, 3.4, 4.6)
    for dx, dy, across, up in (
        (10, 0, "left", "center"),
        (8, 7, "left", "bottom"),
        (-8, -7, "right", "top"),
        (-10, 0, "right", "center"),
        (0, 10, "center", "bottom"),
        (8, -7, "left", "top"),
        (-8, 7, "right", "bottom"),
        (0, -10, "center", "top"),
    )
)


def _free_place(
    x: float, y: float, width: float, frame: "Bbox", taken: "Sequence[Bbox]"
) -> "tuple[_Side, Bbox]":
    """The first side of a point where a label covers nothing, or the least covered."""

    def covered(side: _Side) -> float:
        box = side.box(x, y, width)
        outside = (
            max(0, frame.x0 - box.x0)
            + max(0, box.x1 - frame.x1)
            + max(0, frame.y0 - box.y0)
            + max(0, box.y1 - frame.y1)
        )
        overlap = sum(
            max(0, min(box.x1, other.x1) - max(box.x0, other.x0))
            * max(0, min(box.y1, other.y1) - max(box.y0, other.y0))
            for other in taken
        )
        return float(overlap + 100 * outside)

    side = min(_SIDES, key=covered)
    return side, side.box(x, y, width)


def _text_width(text: str) -> float:
    # The page's font is not known here; this is on the wide side for a sans serif.
    return 0.62 * FONT * len(text)
