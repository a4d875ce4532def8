"""One self-contained HTML page: no script, no network, light and dark, on paper and on a telephone.

Figures are embedded as SVG with real text and the page's colours, or as PNG if that is smaller.
"""

import base64
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from bayesrl.display.formatting import pluralize, sanitize
from bayesrl.display.tables import Markup, Table, join_html, table_html, tag
from bayesrl.report.style import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET = 2_700_000
"""Size limit of a page in characters; figures become coarser, largest first, until the page fits."""

MOST_ROWS, MOST_TEXT = 300, 20_000

DARK_GROUND = "#15181c"
"""The page's background in the dark."""

LARGEST = 250_000
"""An SVG with more characters than this is larger than a PNG."""

# The browser runs no script and fetches nothing, whatever text the page shows.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_CONTRAST = 4.0
_MANY_POINTS = 4_000
# A fixed salt gives the same figure the same ids at every run.
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "bayesrl", "svg.image_inline": True, "path.simplify": True}
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}(?!\d*e)")
_FONT = re.compile(r"font: [^;]*?([\d.]+px)[^;]*")
_FAMILY = re.compile(r"font-family: [^;]*;?")
_DROPPED = {"metadata", "style", "script", "a", "foreignObject"}


class CaptionedFigure(NamedTuple):
    """A figure with a sentence that says what a good result looks like."""

    figure: Any
    caption: str


type Content = Markup | Table | CaptionedFigure | str


class Cell(NamedTuple):
    """What a part of the report says about one fit; its name is shown if others stand beside it."""

    name: str
    contents: Sequence[Content]


class Part(NamedTuple):
    """A part of the report; its caption says what a good result looks like, and its cells stand side by side."""

    title: str
    caption: str
    cells: Sequence[Cell]


def html_page(title: str, subtitle: str, parts: Sequence[Part], footer: str) -> str:
    """Write a page of parts, from the top down, with a line below its title and another at its end."""
    names = [f"part{i}" for i in range(len(parts))]
    links = [tag("a", part.title, href=f"#{name}") for name, part in zip(names, parts, strict=True)]
    figures = list(_figures(parts))
    drawn = [embed_figure(one.figure, f"f{i}", one.caption) for i, one in enumerate(figures)]
    several = max((len(part.cells) for part in parts), default=1) > 1
    while True:
        # The page meets its figures in the same order as `_figures`.
        embedded = iter(drawn)
        sections = [_section(part, name, embedded) for part, name in zip(parts, names, strict=True)]
        header = tag("header", tag("h1", title), tag("p", subtitle, class_="subtitle"), tag("nav", *links))
        body = join_html(header, tag("main", *sections), tag("footer", footer))
        if len(body) <= BUDGET or not _shrink_largest(drawn, figures):
            return _document(title, body, several=several)


def _document(title: str, body: Markup, *, several: bool) -> str:
    dark = "".join(f"{name}:{value};" for name, value in dark_palette(body).items())
    screen = f"@media screen and (prefers-color-scheme:dark){{:root{{--ground:{DARK_GROUND};{dark}}}}}"
    head = join_html(
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Markup(STYLE + screen)),
    )
    page = tag("html", tag("head", head), tag("body", body, class_="several" if several else None), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _section(part: Part, name: str, embedded: Iterator[Markup]) -> Markup:
    cells = [_cell(cell, embedded, named=len(part.cells) > 1) for cell in part.cells]
    caption = [tag("p", part.caption, class_="good")] if part.caption else []
    return tag("section", tag("h2", part.title), *caption, tag("div", *cells, class_="cells"), id=name)


def _cell(cell: Cell, embedded: Iterator[Markup], *, named: bool) -> Markup:
    blocks: list[Markup] = [tag("h3", cell.name)] if named else []
    # Adjacent figures share a row.
    for _, contents in groupby(cell.contents, lambda content: isinstance(content, CaptionedFigure)):
        row: list[Markup] = []
        for content in contents:
            if isinstance(content, CaptionedFigure):
                row.append(tag("figure", next(embedded), tag("figcaption", content.caption)))
            else:
                blocks.append(_content_html(content))
        blocks += [tag("div", *row, class_="figures")] if row else []
    return tag("div", *blocks, class_="cell")


def _content_html(content: Markup | Table | str) -> Markup:
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        more = f" … {pluralize(len(content) - MOST_TEXT, 'more character')}" if len(content) > MOST_TEXT else ""
        return tag("p", content[:MOST_TEXT] + more, class_="text")
    table = table_html(content._replace(rows=content.rows[:MOST_ROWS], notes=content.notes[:MOST_ROWS]))
    left = len(content.rows) - MOST_ROWS
    return join_html(table, tag("p", f"… and {pluralize(left, 'more row')}", class_="note")) if left > 0 else table


def _figures(parts: Iterable[Part]) -> Iterator[CaptionedFigure]:
    for part in parts:
        for cell in part.cells:
            yield from (content for content in cell.contents if isinstance(content, CaptionedFigure))


def _shrink_largest(drawn: list[Markup], figures: Sequence[CaptionedFigure]) -> bool:
    """Make the largest figure smaller, and return whether that was possible."""
    for i in sorted(range(len(drawn)), key=lambda i: -len(drawn[i])):
        for dpi in (90, 60, 40):
            smaller = embed_png(figures[i].figure, figures[i].caption, dpi)
            if len(smaller) < 0.8 * len(drawn[i]):
                drawn[i] = smaller
                return True
    return False


# ---- figures ---------------------------------------------------------------------------------


def embed_figure(figure: "Figure", name: str, label: str) -> Markup:
    """Write a figure as an element of a page, without its background.

    Args:
        figure: the figure, whose size is in inches.
        name: prefix of every id, so that figures on one page share none.
        label: text for screen readers.
    """
    try:
        markup = _svg(figure, name, label)
        return markup if len(markup) <= LARGEST else embed_png(figure, label)
    except (ValueError, RuntimeError, ElementTree.ParseError) as error:
        return tag("p", f"This figure cannot be drawn: {error}", class_="missing")


def embed_png(figure: "Figure", label: str, dpi: int = 110) -> Markup:
    """Write a figure as a PNG on a light background."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    data = base64.b64encode(file.getvalue()).decode()
    width, height = (f"{round(side * 96)}" for side in figure.get_size_inches())
    opening = tag("img", src=f"data:image/png;base64,{data}", alt=label, width=width, height=height)
    # An image has no closing tag in HTML.
    return Markup(opening.removesuffix("</img>"))


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
    # Only ids that something refers to are kept.
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
        "style": "fill: var(--c000000, #000000)",  # Matplotlib writes no fill for black
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    return Markup(re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")))


def _rewrite(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Make ids unique to the page, and turn colours into variables of the page."""
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
            short = _LONG_NUMBER.sub(lambda match: f"{float(match.group()):.2f}", value)
            attributes[local] = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", short)
    style = attributes.get("style", "")
    if style:
        style = _FAMILY.sub("", _FONT.sub(r"font-size: \1", style))
        attributes["style"] = _COLOUR.sub(lambda match: f"var(--c{match.group()[1:]}, {match.group()})", style)
    element.attrib = attributes


def _rasterise(figure: "Figure") -> None:
    """Rasterise lines and collections with so many points that their paths would be larger than pixels."""
    for axes in figure.axes:
        if sum(np.size(line.get_xdata()) for line in axes.lines) > 4 * _MANY_POINTS:
            for line in axes.lines:
                line.set_rasterized(True)
        for collection in axes.collections:
            if np.size(collection.get_offsets()) > _MANY_POINTS:
                collection.set_rasterized(True)


def _local(name: str) -> str:
    """Strip the namespace from an XML name."""
    return name.rsplit("}", 1)[-1]


# ---- colours ---------------------------------------------------------------------------------


def dark_palette(page: str) -> Mapping[str, str]:
    """Map the CSS variables of a page's figures to their colours in the dark."""
    return {f"--c{hex_}": _dark_variant(hex_) for hex_ in sorted(set(re.findall(r"var\(--c([0-9a-f]{6}),", page)))}


def _dark_variant(colour: str) -> str:
    """Lighten a colour until it stands out from a dark background; greys are inverted."""
    from matplotlib.colors import to_hex

    rgb = _rgb(f"#{colour}")
    if _contrast(rgb) < _CONTRAST and np.ptp(rgb) < 0.08:
        rgb = (1 - 0.9 * rgb.mean()) * np.array([0.91, 0.92, 0.94])
    shares = np.arange(0.0, 1.0, 0.02)  # of white
    mixed = (rgb + share * (1 - rgb) for share in shares)
    return to_hex(tuple(next(one for one in mixed if _contrast(one) >= _CONTRAST)))


def _contrast(rgb: np.ndarray) -> float:
    """Contrast with the dark background (WCAG 2.1, 1.4.3)."""
    return (_luminance(rgb) + 0.05) / (_luminance(_rgb(DARK_GROUND)) + 0.05)


def _luminance(rgb: np.ndarray) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def _rgb(colour: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array(to_rgb(colour))
