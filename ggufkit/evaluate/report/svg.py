"""SVG as matplotlib writes it, made fit to live inside a page.

Colours are drawn as placeholders and become CSS variables, so that a plot follows
the page's light and dark scheme without a script. Fonts are the page's own: text
stays text. Each plot comes in two shapes, for wide and for narrow places.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from io import StringIO
from itertools import count
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT = 12
"""Pixels, at the shape's own width."""
NARROW = 344
"""Width in pixels of a plot on a telephone."""
SERIES = 6
"""How many series have a colour of their own."""

LABEL = "label"
"""Id to draw labels with; they may have it in common, as it becomes a class."""

_COLOURS = (
    *("ink", "muted", "grid", "card", "accent", "good", "faint"),
    *(f"series-{n}" for n in range(1, SERIES + 1)),
)
INK = {name: f"#00{number:02x}fe" for name, number in zip(_COLOURS, count(1), strict=False)}
"""Placeholders to draw with, by the name of the CSS variable that they become."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_FONT_STYLE = re.compile(r"font:\s*(?:\w+\s+)*?(?P<size>[\d.]+px)[^;]*")
_REFERENCE = re.compile(r"#([^\")]+)[\")]")
_PLACEHOLDERS = {colour: f"var(--{name})" for name, colour in INK.items()}


def in_shapes(
    name: str,
    draw: "Callable[[Axes, bool], None]",
    wide: int,
    height: Callable[[bool], int],
    *,
    what: str,
    titles: Mapping[str, str] | None = None,
) -> str:
    """Draw a plot for wide and for narrow places; the page shows one of the two.

    Args:
        name: of the plot, unique in the page.
        draw: fills the axes; told whether the place is narrow.
        wide: width in pixels in a wide place.
        height: in pixels, by whether the place is narrow.
        what: what the plot shows, for who cannot see it.
        titles: what is told when a group is pointed at, by its id.

    Returns:
        Two ``svg`` elements, of the classes ``wide`` and ``narrow``.
    """
    shapes = []
    for css, width in (("wide", wide), ("narrow", NARROW)):
        own, narrow = f"{name}-{css}", css == "narrow"
        svg = _drawn(own, width, height(narrow), draw, narrow)
        shapes.append(inlined(svg, name=own, css=css, what=what, titles=titles or {}))
    return "\n".join(shapes)


def _drawn(
    name: str, width: int, height: int, draw: "Callable[[Axes, bool], None]", narrow: bool
) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": FONT,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.parse_math": False,
        "axes.edgecolor": INK["grid"],
        "axes.labelcolor": INK["muted"],
        "axes.labelsize": FONT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": INK["grid"],
        "grid.linewidth": 1,
        "text.color": INK["ink"],
        "xtick.color": INK["grid"],
        "ytick.color": INK["grid"],
        "xtick.labelcolor": INK["muted"],
        "ytick.labelcolor": INK["muted"],
    }
    with rc_context(style), warnings.catch_warnings():
        # Names may have letters that matplotlib's font lacks; the page's font draws them.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        # At 72 dots per inch a point is a pixel.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes, narrow)
        for text in axes.texts:
            text.set_in_layout(False)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def inlined(svg: str, *, name: str, css: str, what: str, titles: Mapping[str, str]) -> str:
    """The ``svg`` element of a drawing, for use inside HTML.

    Ids get the plot's name, so that no two plots share one; placeholders become
    CSS variables; the size is left to the page; fonts are the page's own; and
    whatever would be fetched or would change the page around it is dropped.

    Args:
        svg: the whole file.
        name: of the plot, unique in the page.
        css: classes of the element.
        what: what the plot shows, for who cannot see it.
        titles: what is told when a group is pointed at, by its id.
    """
    # The text was drawn by a library of ours a moment ago: it can be trusted.
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(_REFERENCE.findall(svg))
    for element in list(root.iter()):
        group = element.attrib.pop("id", "")
        if group in used:
            element.set("id", f"{name}-{group}")
        if group == LABEL:
            element.set("class", LABEL)
        if group in titles:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = titles[group]
            element.insert(0, title)
        _clean(element, name)
    view = root.get("viewBox", "")
    root.attrib = {"viewBox": view, "class": css, "role": "img", "aria-label": what}
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, name: str) -> None:
    link = element.attrib.pop(f"{{{_XLINK}}}href", None)
    if link:
        element.set("href", f"#{name}-{link.removeprefix('#')}")
    for key, value in list(element.attrib.items()):
        if key == "style":
            element.set(key, _style(value))
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _style(style: str) -> str:
    style = _FONT_STYLE.sub(r"font-size: \g<size>", style)
    for colour, variable in _PLACEHOLDERS.items():
        style = style.replace(colour, variable)
    return style
