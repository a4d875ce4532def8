"""How objects display themselves: a few lines and small tables, as HTML in a notebook and as text in a terminal.

Everything is escaped: text that looks like markup stays text. The columns of a fit's numbers, for terminals, notebooks
and reports alike, are in `evidence_cells.py`.
"""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bayesrl.display.formatting import UNKNOWN, format_beta, format_estimate, sanitize
from bayesrl.statistics.estimates import Estimate, Estimates
from bayesrl.statistics.regularizer_names import regularizer_symbol

if TYPE_CHECKING:
    from rich.table import Table as RichTable

WIDTH = 80
MARKS = {"pass": "✓", "warn": "!", "fail": "✗", "unknown": "?"}
"""Marks before an outcome, so that colour is not the only signal."""

_ALIGN = {"l": "text-align:left", "r": "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"}


class Markup(str):
    """HTML that can go into a page unchanged."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | None) -> Markup:
    """Make an element: attributes are escaped, and so are children that are not `Markup`.

    Args:
        name: name of the element.
        *children: text or elements.
        **attributes: a trailing underscore is dropped (`class_`), other underscores become hyphens; None omits one.

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
    """Concatenate children, escaping those that are not `Markup`."""
    return Markup("".join(child if isinstance(child, Markup) else escape(sanitize(child)) for child in children))


class Table(NamedTuple):
    """A small table.

    Attributes:
        headings: headings of the columns.
        rows: rows of cells, as many as headings.
        alignment: `l` or `r` for each column; by default the first is left and the others are right.
        notes: one sentence per row: a last column in HTML, lines below the row as text; or empty.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    alignment: str = ""
    notes: Sequence[str] = ()

    @property
    def alignments(self) -> str:
        """One letter per column."""
        return self.alignment or "l" + "r" * (len(self.headings) - 1)

    def __str__(self) -> str:
        return format_text([self])

    def transpose(self) -> "Table":
        """Return the table with rows and columns exchanged, without notes."""
        columns = list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.headings)
        headings = (self.headings[0], *columns[0])
        return Table(headings, [(name, *column) for name, column in zip(self.headings[1:], columns[1:], strict=True)])


def estimates_table(beta: Any, estimates: Estimates, regularizer: tuple[str, float | None] = ("kl", None)) -> Table:
    """List what the best restart achieves at each temperature; estimates are [*beta, restart]."""
    betas = [None] if beta is None else [float(b) for b in np.atleast_1d(beta)]
    best = np.asarray(estimates.objective.mean).reshape(len(betas), -1).argmax(-1)

    def cell(estimate: Estimate, i: int) -> str:
        mean, se = (np.reshape(part, (len(betas), -1))[i, best[i]] for part in estimate)
        return format_estimate(Estimate(mean, se))

    rows = []
    for i, one in enumerate(betas):
        reward = UNKNOWN if one is None else cell(estimates.reward, i)
        other = [] if estimates.divergence is None else [cell(estimates.divergence, i)]
        rows.append(
            (format_beta(one), cell(estimates.objective, i), reward, *other, cell(estimates.kl, i), str(best[i]))
        )
    symbol = [] if estimates.divergence is None else [regularizer_symbol(*regularizer)]
    return Table(("β", "J", "E[R]", *symbol, "KL", "best restart"), rows)


class Line(NamedTuple):
    """A line of text, with the mark of an outcome before it if there is one."""

    text: str
    outcome: Literal["", "pass", "warn", "fail", "unknown"] = ""


type DisplayBlock = Line | Table


class Displayable(ABC):
    """Displays itself as HTML in a notebook, and as text of 80 columns elsewhere."""

    @abstractmethod
    def _blocks(self) -> Sequence[DisplayBlock]:
        """Return what to show, from the top down."""

    def __str__(self) -> str:
        return format_text(self._blocks())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return tag("div", *(_block_html(block) for block in self._blocks()))


# ---- HTML ------------------------------------------------------------------------------------


def table_html(table: Table, kind: str = "") -> Markup:
    """Write a table as HTML that scrolls sideways if it is wide; a page may style one kind in its own way."""
    headings, alignments, rows = table.headings, table.alignments, table.rows
    if table.notes:
        headings, alignments = [*headings, "advice"], alignments + "l"
        rows = [[*row, note] for row, note in zip(rows, table.notes, strict=True)]
    styles = [_ALIGN[side] for side in alignments]
    head = tag("tr", *(tag("th", text, style=style, scope="col") for text, style in zip(headings, styles, strict=True)))
    body = [tag("tr", *(tag("td", text, style=s) for text, s in zip(row, styles, strict=True))) for row in rows]
    grid = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", grid, style="overflow-x:auto", class_=f"wide {kind}".rstrip(), tabindex="0")


def _block_html(block: DisplayBlock) -> Markup:
    if isinstance(block, Table):
        return table_html(block)
    if not block.outcome:
        return tag("p", block.text)
    return tag("p", tag("strong", f"{MARKS[block.outcome]} {block.outcome.upper()}"), f"  {block.text}")


# ---- text ------------------------------------------------------------------------------------


def format_text(blocks: Sequence[DisplayBlock], width: int = WIDTH) -> str:
    """Write blocks as text; a table that is too wide becomes several that repeat its first column."""
    parts: list[str] = []
    for block in blocks:
        if isinstance(block, Table):
            parts += [f"\n{_table_text(part, width)}" for part in split_columns(block, width)]
        else:
            mark = f"{MARKS[block.outcome]} {block.outcome.upper()}: " if block.outcome else ""
            parts.append(_filled(mark + block.text, width))
    return sanitize("\n".join(parts).removeprefix("\n"))


def _filled(text: str, width: int, indent: str = "") -> str:
    """Break text into lines, but not between β and its value."""
    tied = text.replace("β = ", "β\xa0=\xa0")
    lines = textwrap.fill(tied, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
    return lines.replace("β\xa0=\xa0", "β = ")


def _on_one_line(text: str, longest: int) -> str:
    """Shorten a cell to one line of at most `longest` characters."""
    from rich.text import Text

    line = Text(" ".join(text.split()))
    line.truncate(longest, overflow="ellipsis")
    return line.plain


def split_columns(table: Table, width: int, repeated: int = 1) -> Iterator[Table]:
    """Cut a table by columns into parts of at most `width` characters, which all repeat the first columns."""
    from rich.cells import cell_len

    # At least two columns must fit side by side, however long the names in a table are.
    longest = (width - 2) // 2
    headings = [_on_one_line(text, longest) for text in table.headings]
    rows = [[_on_one_line(cell, longest) for cell in row] for row in table.rows]
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    start, notes = repeated, table.notes
    while start == repeated or start < len(widths):
        end, total = start, sum(widths[:repeated]) + 2 * (repeated - 1)
        while end < len(widths) and (end == start or total + 2 + widths[end] <= width):
            total += 2 + widths[end]
            end += 1
        shown = [*range(repeated), *range(start, end)]
        alignment = "".join(table.alignments[i] for i in shown)
        yield Table([headings[i] for i in shown], [[row[i] for i in shown] for row in rows], alignment, notes)
        # Notes appear once, below the first part.
        start, notes = end, ()


def rich_table(table: Table, *, wrap_last: bool = False) -> "RichTable":
    """Make a Rich table without lines; its cells are plain text, even if they look like markup.

    Each cell stays on one line; the last column may wrap instead.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, side in zip(table.headings, table.alignments, strict=True):
        justify: Any = "right" if side == "r" else "left"
        grid.add_column(Text(sanitize(heading)), justify=justify, no_wrap=True, overflow="fold")
    grid.columns[-1].no_wrap = not wrap_last
    for row in table.rows:
        grid.add_row(*(Text(sanitize(cell)) for cell in row))
    return grid


def _table_text(table: Table, width: int) -> str:
    from rich.console import Console

    file = StringIO()
    # Otherwise Rich would print HTML in a notebook, and colour codes in some terminals.
    Console(file=file, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(
        rich_table(table)
    )
    head, *rows = (line.rstrip() for line in file.getvalue().rstrip("\n").split("\n"))
    lines = [head]
    for i, row in enumerate(rows):
        lines += [row, *([_filled(table.notes[i], width, "    ")] if table.notes and table.notes[i] else [])]
    return "\n".join(lines)
