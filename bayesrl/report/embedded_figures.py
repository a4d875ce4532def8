"""Figures as pictures inside a page: SVG with real text and the page's colours, or PNG where that is smaller."""

import base64
import io
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from bayesrl.display.formatting import sanitize
from bayesrl.display.tables import Markup, tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DARK_GROUND = "#15181c"
"""The page's ground in the dark."""

LARGEST = 250_000
"""Characters of an SVG beyond which a PNG is smaller."""

_CONTRAST = 4.0
_MANY_POINTS = 4_000
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "bayesrl", "svg.image_inline": True, "path.simplify": True}
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}(?!\d*e)")
_FONT = re.compile(r"font: [^;]*?([\d.]+px)[^;]*")
_FAMILY = re.compile(r"font-family: [^;]*;?")
_DROPPED = {"metadata", "style", "script", "a", "foreignObject"}


def embed_svg(figure: "Figure", name: str, label: str) -> Markup:
    """Write a figure as an element for a page.

    Args:
        figure: with its size in inches; its ground is left out.
        name: goes before every id, so that pictures on one page do not share any.
        label: what a screen reader says.
    """
    try:
        markup = _svg(figure, name, label)
        return markup if len(markup) <= LARGEST else embed_png(figure, label)
    except (ValueError, RuntimeError, ElementTree.ParseError) as error:
        return tag("p", f"This picture cannot be drawn: {error}", class_="missing")


def embed_png(figure: "Figure", label: str, dpi: int = 110) -> Markup:
    """Write a figure as a PNG on a light ground."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    data = base64.b64encode(file.getvalue()).decode()
    width, height = (round(side * 96) for side in figure.get_size_inches())
    opening = tag("img", src=f"data:image/png;base64,{data}", alt=label, width=f"{width}", height=f"{height}")
    return Markup(opening.removesuffix("</img>"))


def dark_palette(page: str) -> Mapping[str, str]:
    """Give, for each colour that pictures on a page use, the one for the dark.

    Args:
        page: HTML with pictures.

    Returns:
        Names of CSS variables and their values.
    """
    return {f"--c{found}": _for_the_dark(found) for found in sorted(set(re.findall(r"var\(--c([0-9a-f]{6}),", page)))}


# ---- SVG -------------------------------------------------------------------------------------


def _svg(figure: "Figure", name: str, label: str) -> Markup:
    import matplotlib as mpl

    file = io.StringIO()
    _rasterise(figure)
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())  # noqa: S314  (Matplotlib wrote it)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in _DROPPED:
                parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    for element in root.iter():
        element.tag = _local(element.tag)
        _rewrite(element, name, used)
    width, height = (round(side * 96) for side in figure.get_size_inches())
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": f"{width}",
        "height": f"{height}",
        "role": "img",
        "aria-label": sanitize(label),
        "style": "fill: var(--c000000, #000000)",  # Matplotlib leaves black out
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    return Markup(re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")))


def _rewrite(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Make ids the page's own, and colours variables of the page."""
    attributes = {}
    for key, value in element.attrib.items():
        local = _local(key)
        if local == "id":
            if value in used:
                attributes["id"] = f"{name}-{value}"
        elif local == "href":
            if value.startswith("#"):
                attributes["href"] = f"#{name}-{value[1:]}"
            elif value.startswith("data:image/png"):
                attributes["href"] = value
        elif not local.startswith("on"):
            short = _LONG_NUMBER.sub(lambda found: f"{float(found.group()):.2f}", value)
            attributes[local] = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", short)
    style = attributes.get("style", "")
    if style:
        style = _FAMILY.sub("", _FONT.sub(r"font-size: \1", style))
        attributes["style"] = _COLOUR.sub(lambda found: f"var(--c{found.group()[1:]}, {found.group()})", style)
    element.attrib = attributes


def _rasterise(figure: "Figure") -> None:
    """Mark as pixels whatever has so many points that its paths would be larger."""
    for axes in figure.axes:
        points = [np.size(line.get_xdata()) for line in axes.lines]
        if sum(points) > 4 * _MANY_POINTS:
            for line in axes.lines:
                line.set_rasterized(True)
        for collection in axes.collections:
            if np.size(collection.get_offsets()) > _MANY_POINTS:
                collection.set_rasterized(True)


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


# ---- colours ---------------------------------------------------------------------------------


def _for_the_dark(colour: str) -> str:
    """Lighten a colour until it can be told from a dark ground; greys are turned around."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    if _contrast(rgb) >= _CONTRAST:
        return f"#{colour}"
    if max(rgb) - min(rgb) < 0.08:
        light = 1 - 0.9 * sum(rgb) / 3
        return _hex([light * part for part in (0.91, 0.92, 0.94)])
    share = 0.0
    mixed = rgb
    while _contrast(mixed) < _CONTRAST:
        share += 0.02
        mixed = [part + share * (1 - part) for part in rgb]
    return _hex(mixed)


def _contrast(rgb: list[float]) -> float:
    """Contrast to the dark ground (WCAG 2.1, 1.4.3)."""
    ground = [int(DARK_GROUND[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (_luminance(rgb) + 0.05) / (_luminance(ground) + 0.05)


def _luminance(rgb: list[float]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(rgb: list[float]) -> str:
    return "#" + "".join(f"{round(255 * min(part, 1.0)):02x}" for part in rgb)
