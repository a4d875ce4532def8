"""How objects show themselves: a few lines and small tables, as HTML in a notebook and as text in a terminal.

Whatever is shown is escaped: text that looks like markup is text.
"""

import textwrap
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np

from bayesrl.display.formatting import UNKNOWN, format_beta, format_estimate, sanitize
from bayesrl.statistics.estimates import Estimate, Estimates

WIDTH = 80
MARKS = {"pass": "✓", "warn": "!", "fail": "✗", "unknown": "?"}
"""What stands before an outcome, so that it is not told by colour alone."""


class Markup(str):
    """HTML that is safe to put into a page as it is."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | None) -> Markup:
    """Make an element: children that are not `Markup` are escaped, and so are attributes.

    Args:
        name: of the element.
        *children: text or elements.
        **attributes: a trailing underscore is dropped (`class_`), others become hyphens; None leaves one out.

    Example:
        >>> tag("p", "1 < 2 ", tag("b", "so"), class_="x")
        '<p class="x">1 &lt; 2 <b>so</b></p>'
    """
    given = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{escape(sanitize(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join_html(*children)}</{name}>")


def join_html(*children: str) -> Markup:
    """Put children one after another, escaping those that are not `Markup`."""
    return Markup("".join(child if isinstance(child, Markup) else escape(sanitize(child)) for child in children))


class Table(NamedTuple):
    """A small table.

    Attributes:
        headings: of the columns.
        rows: cells, as many as headings.
        alignment: `l` or `r` for each column; by default the first is left and the others are right.
        notes: a sentence to each row: a last column in HTML, lines below the row as text; or nothing.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    alignment: str = ""
    notes: Sequence[str] = ()

    @property
    def alignments(self) -> str:
        """One letter for each column."""
        return self.alignment or "l" + "r" * (len(self.headings) - 1)

    def transpose(self) -> "Table":
        """The same with rows and columns exchanged, without notes."""
        columns = list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.headings)
        headings = (self.headings[0], *columns[0])
        return Table(headings, [(name, *column) for name, column in zip(self.headings[1:], columns[1:], strict=True)])


def estimates_table(beta: Any, estimates: Estimates) -> Table:
    """List what the best restart achieves at each temperature.

    Args:
        beta: temperatures, [*beta], or None without rewards.
        estimates: [*beta, restart].
    """
    betas = [None] if beta is None else [float(b) for b in np.atleast_1d(beta)]
    best = np.asarray(estimates.objective.mean).reshape(len(betas), -1).argmax(-1)

    def cell(estimate: Estimate, i: int) -> str:
        mean, se = (np.reshape(part, (len(betas), -1))[i, best[i]] for part in estimate)
        return format_estimate(Estimate(mean, se))

    told = (estimates.objective, estimates.reward, estimates.kl)
    cells = [[cell(e, i) for e in told] for i in range(len(betas))]
    if beta is None:
        cells = [[objective, UNKNOWN, kl] for objective, _, kl in cells]
    rows = [(format_beta(b), *cells[i], str(best[i])) for i, b in enumerate(betas)]
    return Table(("β", "J", "E[R]", "KL", "best restart"), rows)


class Line(NamedTuple):
    """A line of text, with the mark of an outcome before it where there is one."""

    text: str
    outcome: Literal["", "pass", "warn", "fail", "unknown"] = ""


type DisplayBlock = Line | Table


class Displayable(ABC):
    """Shows itself as HTML in a notebook, and as text of 80 columns elsewhere."""

    @abstractmethod
    def _blocks(self) -> Sequence[DisplayBlock]:
        """Say what to show, from the top down."""

    def __str__(self) -> str:
        return format_text(self._blocks())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return tag("div", *(_block_html(block) for block in self._blocks()))


# ---- HTML ------------------------------------------------------------------------------------


def outcome_badge(outcome: str, text: str | None = None) -> Markup:
    """Write an outcome as a mark with its word."""
    return tag("span", f"{MARKS[outcome]} {outcome if text is None else text}", class_=f"badge {outcome}")


def table_html(listing: Table, class_: str | None = None) -> Markup:
    """Write a listing as an HTML table, which can be scrolled sideways where it is wide."""
    headings = [*listing.headings, *(["advice"] if listing.notes else [])]
    sides = listing.alignments + ("l" if listing.notes else "")
    head = tag(
        "tr", *(tag("th", text, style=_side(side), scope="col") for text, side in zip(headings, sides, strict=True))
    )
    rows = []
    for i, cells in enumerate(listing.rows):
        row = [*cells, *([listing.notes[i]] if listing.notes else [])]
        rows.append(tag("tr", *(tag("td", text, style=_side(side)) for text, side in zip(row, sides, strict=True))))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_=class_)
    return tag("div", table, style="overflow-x:auto", class_="wide", tabindex="0")


def _side(side: str) -> str | None:
    if side == "r":
        return "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
    return "text-align:left"


def _block_html(block: DisplayBlock) -> Markup:
    if isinstance(block, Table):
        return table_html(block)
    if not block.outcome:
        return tag("p", block.text)
    return tag("p", tag("strong", f"{MARKS[block.outcome]} {block.outcome.upper()}"), f"  {block.text}")


# ---- text ------------------------------------------------------------------------------------


def format_text(blocks: Sequence[DisplayBlock], width: int = WIDTH) -> str:
    """Write blocks as text; tables too wide are cut into several that repeat their first column."""
    parts: list[str] = []
    for block in blocks:
        if isinstance(block, Table):
            for part in split_columns(block, width):
                parts += [*([""] if parts else []), _table_text(part, width)]
        else:
            mark = f"{MARKS[block.outcome]} {block.outcome.upper()}: " if block.outcome else ""
            parts.append(_filled(mark + block.text, width))
    return sanitize("\n".join(parts))


def _filled(text: str, width: int, indent: str = "") -> str:
    """Break text into lines, none between β and its value."""
    tied = text.replace("β = ", "β\xa0=\xa0")
    lines = textwrap.fill(tied, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
    return lines.replace("β\xa0=\xa0", "β = ")


def _on_a_line(text: str, longest: int) -> str:
    """Keep a cell to one line, and to its share of it."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _widths(listing: Table) -> list[int]:
    columns = zip(listing.headings, *listing.rows, strict=True)
    return [max(_places(cell) for cell in column) for column in columns]


def _places(text: str) -> int:
    """Count the places that text takes on a line: marks over letters take none, wide letters two."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in ("W", "F")) for c in text)


def split_columns(listing: Table, width: int, repeated: int = 1) -> Iterator[Table]:
    """Cut a listing by columns into parts that are narrow enough.

    Args:
        listing: of any width.
        width: of a line, in places.
        repeated: how many of the first columns stand in every part.
    """
    # Two columns are to fit beside each other, however long the names that a table is given.
    longest = (width - 2) // 2
    rows = [[_on_a_line(cell, longest) for cell in row] for row in listing.rows]
    listing = listing._replace(headings=[_on_a_line(text, longest) for text in listing.headings], rows=rows)
    widths, sides = _widths(listing), listing.alignments
    first = list(range(repeated))
    start = repeated
    while True:
        end, total = start, sum(widths[:repeated]) + 2 * (repeated - 1)
        while end < len(widths) and (end == start or total + 2 + widths[end] <= width):
            total += 2 + widths[end]
            end += 1
        chosen = [*first, *range(start, end)]
        rows = [[row[i] for i in chosen] for row in listing.rows]
        notes = listing.notes if start == repeated else ()
        yield Table([listing.headings[i] for i in chosen], rows, "".join(sides[i] for i in chosen), notes)
        start = end
        if start >= len(widths):
            return


def _table_text(listing: Table, width: int) -> str:
    widths = _widths(listing)

    def line(cells: Sequence[str]) -> str:
        placed = [
            " " * (size - _places(cell)) * (side == "r") + cell + " " * (size - _places(cell)) * (side != "r")
            for cell, size, side in zip(cells, widths, listing.alignments, strict=True)
        ]
        return "  ".join(placed).rstrip()

    lines = [line(listing.headings)]
    for i, cells in enumerate(listing.rows):
        lines.append(line(cells))
        if listing.notes and listing.notes[i]:
            lines.append(_filled(listing.notes[i], width, "    "))
    return "\n".join(lines)
