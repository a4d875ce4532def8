"""One HTML page that needs nothing but itself: no script, no network, light and dark, on paper and on a telephone."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bayesrl.display.tables import Markup, Table, join_html, table_html, tag
from bayesrl.report.embedded_figures import DARK_GROUND, dark_palette, embed_png, embed_svg
from bayesrl.report.style import STYLE

BUDGET = 2_700_000
"""Characters of a page; pictures become coarser, largest first, until it keeps to them."""

MOST_ROWS, MOST_TEXT = 300, 20_000

# No script is run and nothing is fetched, whatever text the page shows.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class CaptionedFigure(NamedTuple):
    """A figure with the sentence that says what good looks like."""

    figure: Any
    caption: str


type Content = Markup | Table | CaptionedFigure | str


class Cell(NamedTuple):
    """What a part of the report says of one fit; without a name where it speaks of all of them."""

    name: str
    contents: Sequence[Content]


class Part(NamedTuple):
    """A part of the report.

    Attributes:
        title: its heading.
        caption: a sentence that says what good looks like.
        cells: one for each fit, side by side, or a single one.
    """

    title: str
    caption: str
    cells: Sequence[Cell]


def html_page(title: str, subtitle: str, parts: Sequence[Part], footer: str) -> str:
    """Write a page of parts.

    Args:
        title: of the page.
        subtitle: one line below it.
        parts: from the top down.
        footer: the last line.
    """
    names = [f"part{i}" for i in range(len(parts))]
    links = [tag("a", part.title, href=f"#{name}") for name, part in zip(names, parts, strict=True)]
    figures = list(_figures(parts))
    drawn = [embed_svg(pictured.figure, f"f{i}", pictured.caption) for i, pictured in enumerate(figures)]
    several = max((len(part.cells) for part in parts), default=1) > 1
    while True:
        pictures = iter(drawn)
        sections = [_section(part, name, pictures) for part, name in zip(parts, names, strict=True)]
        header = tag("header", tag("h1", title), tag("p", subtitle, class_="subtitle"), tag("nav", *links))
        body = join_html(header, tag("main", *sections), tag("footer", footer))
        if len(body) <= BUDGET or not _coarser(drawn, figures):
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


def _section(part: Part, name: str, pictures: Iterator[Markup]) -> Markup:
    cells = [_cell(cell, pictures) for cell in part.cells]
    caption = [tag("p", part.caption, class_="good")] if part.caption else []
    body = tag("div", *cells, class_="cells")
    return tag("section", tag("h2", part.title), *caption, body, id=name)


def _cell(cell: Cell, pictures: Iterator[Markup]) -> Markup:
    blocks: list[Markup] = [tag("h3", cell.name)] if cell.name else []
    row: list[Markup] = []
    for content in cell.contents:
        if isinstance(content, CaptionedFigure):
            row.append(tag("figure", next(pictures), tag("figcaption", content.caption)))
            continue
        if row:
            blocks.append(tag("div", *row, class_="pictures"))
            row = []
        blocks.append(_written(content))
    if row:
        blocks.append(tag("div", *row, class_="pictures"))
    return tag("div", *blocks, class_="cell")


def _written(content: Markup | Table | str) -> Markup:
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        more = f" … {len(content) - MOST_TEXT:,} more characters" if len(content) > MOST_TEXT else ""
        return tag("p", content[:MOST_TEXT] + more, class_="text")
    shown = content._replace(rows=content.rows[:MOST_ROWS], notes=content.notes[:MOST_ROWS])
    table = table_html(shown)
    left = len(content.rows) - MOST_ROWS
    return join_html(table, tag("p", f"… and {left:,} more rows", class_="note")) if left > 0 else table


def _figures(parts: Iterable[Part]) -> Iterator[CaptionedFigure]:
    for part in parts:
        for cell in part.cells:
            yield from (content for content in cell.contents if isinstance(content, CaptionedFigure))


def _coarser(drawn: list[Markup], figures: Sequence[CaptionedFigure]) -> bool:
    """Make the largest picture smaller, and tell whether that was possible."""
    for i in sorted(range(len(drawn)), key=lambda i: -len(drawn[i])):
        for dpi in (90, 60, 40):
            smaller = embed_png(figures[i].figure, figures[i].caption, dpi)
            if len(smaller) < 0.8 * len(drawn[i]):
                drawn[i] = smaller
                return True
    return False
