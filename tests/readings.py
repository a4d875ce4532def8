"""Reads reports and printed tables as a person does: every place that tells a quantity of a fit, by name and β."""

import html
import re
from collections import defaultdict
from html.parser import HTMLParser

QUANTITIES = ("J", "J*", "gap", "relative gap", "E[R]", "KL", "log Z", "log p(y)", "ESS", "k̂", "KL(q‖p*)")
_OTHER_WORDS = {
    "gap J* − J": "gap",
    "of what there was to gain": "relative gap",
    "J of the fit": "J",
    "optimum J*": "J*",
    "Pareto k̂": "k̂",
    "effective draws (ESS)": "ESS",
}
type Told = dict[tuple[str, str], set[str]]
"""Texts by quantity and β."""


class _Reader(HTMLParser):
    """Takes a page apart: sections with their tables, definitions and text."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: dict[str, list[list[list[str]]]] = {}
        self.definitions: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self._title = ""
        self._cell = ""
        self._term = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._open.append(tag)
        if tag in ("td", "th", "dt", "dd", "h2"):
            self._cell = ""
        elif tag == "table":
            self.sections.setdefault(self._title, []).append([])
        elif tag == "tr":
            self.sections[self._title][-1].append([])

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "h2":
            self._title = self._cell
        elif tag in ("td", "th"):
            self.sections[self._title][-1][-1].append(self._cell.strip())
        elif tag == "dt":
            self._term = self._cell
        elif tag == "dd":
            self.definitions.append((self._term, self._cell))
        self.text += " " if tag in ("p", "td", "th", "dd", "figcaption", "h2") else ""

    def handle_data(self, data: str) -> None:
        if "style" not in self._open and "svg" not in self._open:
            self._cell += data
            self.text += data


def read_report(page: str) -> tuple[Told, str]:
    """Give what a report of one fit tells of its quantities, by name and β, and its text."""
    reader = _Reader()
    reader.feed(page)
    told: Told = defaultdict(set)
    for title, tables in reader.sections.items():
        for table in tables:
            for row in _rows(table):
                label = next(iter(row.values()))
                if title == "Training and held-out data" and label != "training":
                    continue
                if title == "Beside the exact optimum" and label != "fitted":
                    continue
                for name, text in row.items():
                    quantity = _OTHER_WORDS.get(name, name.removesuffix(", nats"))
                    if quantity in QUANTITIES:
                        told[quantity, row.get("β", "")].add(text)
    betas = {beta for _, beta in told if beta}
    for term, text in reader.definitions:
        name, _, beta = term.partition(", at β = ")
        quantity = _OTHER_WORDS.get(name.removeprefix("widest "))
        if quantity is not None and (beta or len(betas) == 1):
            told[quantity, beta or next(iter(betas))].add(re.sub(r" (reward units|nats)$", "", text))
    if len(betas) == 1:  # what tells no β is of the one there is
        for quantity, beta in [where for where in told if not where[1]]:
            told[quantity, next(iter(betas))] |= told.pop((quantity, beta))
    return dict(told), html.unescape(reader.text)


def read_pairs(page: str) -> dict[str, set[str]]:
    """Give what a page tells beside names, in definitions and in tables of two columns."""
    reader = _Reader()
    reader.feed(page)
    told: dict[str, set[str]] = defaultdict(set)
    tables = [table for section in reader.sections.values() for table in section]
    rows = [tuple(row) for table in tables for row in table if len(row) == 2]
    for name, value in [*reader.definitions, *rows]:
        told[name].add(value)
    return dict(told)


def several(told: Told) -> dict[tuple[str, str], set[str]]:
    """Give the quantities that are told in more ways than one."""
    return {where: texts for where, texts in told.items() if len(texts) != 1}


def _rows(table: list[list[str]]) -> list[dict[str, str]]:
    """Give rows by heading; a table whose first heading is β and whose first column are names is turned around."""
    if not table:
        return []
    head, *rows = table
    if head and head[0] == "β" and rows and rows[0][0] in QUANTITIES:
        return [{"β": beta, **{row[0]: row[column] for row in rows}} for column, beta in enumerate(head[1:], start=1)]
    return [dict(zip(head, row, strict=False)) for row in rows]


def read_table(printed: str, label: str) -> Told:
    """Give what the tables of a command tell in the rows that begin with a label, by quantity and β."""
    told: Told = defaultdict(set)
    heading: list[tuple[str, int]] = []
    for line in printed.splitlines():
        if re.match(r"\s+β\s+\S", line):
            heading = [(found[0], found.end()) for found in re.finditer(r"\S+(?: \S+)*", line)]
        elif heading and line.startswith(label):
            start, cells = len(label), []
            for _, end in heading:  # columns are flush right
                cells.append(line[start:end].strip())
                start = end
            for (name, _), cell in zip(heading[1:], cells[1:], strict=True):
                if name in QUANTITIES:
                    told[name, cells[0]].add(cell)
        elif not line.strip():
            heading = []
    return dict(told)


_NUMBER = r"-?[\d,]*\.?\d+(?:e[+-]\d+)?"


def numbers_of(text: str) -> list[tuple[float, float]]:
    """Give the numbers in a text, each with half a unit of its last digit; those in percent as parts of 1."""
    found = []
    for match in re.finditer(rf"({_NUMBER})(%?)", text):
        mantissa, _, power = match[1].replace(",", "").partition("e")
        decimals = len(mantissa.partition(".")[2])
        unit = 10.0 ** (int(power or 0) - decimals) * (0.01 if match[2] else 1.0)
        found.append((float(match[1].replace(",", "")) * (0.01 if match[2] else 1.0), unit / 2))
    return found


def adds_up(told: Told, beta: str) -> bool:
    """Whether J + gap = J*, to the digits that are told; bounds stand for what they bound."""
    texts = {name: next(iter(told[name, beta])) for name in ("J", "gap", "J*")}
    if "—" in (texts["gap"], texts["J*"]):
        return texts["gap"] == texts["J*"] == "—"
    assert texts["gap"][:1] == texts["J*"][:1] or not {"≤", "≥"} & {texts["gap"][:1], texts["J*"][:1]}
    if texts["gap"].startswith("<"):
        texts["gap"] = f"0 {texts['gap']}"
    (j, error), (gap, other), (optimum, last) = (numbers_of(texts[name])[0] for name in ("J", "gap", "J*"))
    return abs(j + gap - optimum) <= error + other + last + 1e-6 * abs(optimum)
