"""The parts of the report, from the verdict down to how a fit was made."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bayesrl.diagnostics.results import Diagnosis, Section
from bayesrl.display.formatting import UNKNOWN, estimate_at, format_beta, format_estimate, format_number
from bayesrl.display.tables import MARKS, Markup, Table, estimates_table, tag
from bayesrl.report.contents import ReportContents
from bayesrl.report.figure_sections import checks_table, figure_parts
from bayesrl.report.fit_figures import betas_of
from bayesrl.report.page import CaptionedFigure, Cell, Content, Part

type ContentsFn = Callable[[ReportContents], Sequence[Content]]

_VERDICTS = {"pass": "Passed", "fail": "Failed", "unknown": "Unknown"}
_COMPARED = ("J", "E[R]", "KL", "gap", "share")
NO_DIAGNOSIS = "Whether this fit can be trusted was not found out."


def report_parts(fits: Sequence[ReportContents], sections: Sequence[Section]) -> list[Part]:
    """Give the parts of the report.

    Args:
        fits: one or several, shown side by side.
        sections: further ones, which domains add.
    """
    parts = [part("Verdict", "", fits, _verdict), *_checks(fits)]
    if len(fits) > 1:
        parts.append(_side_by_side(fits))
    parts.append(part("Numbers", _numbers_caption(fits), fits, _numbers))
    parts += figure_parts(fits)
    parts += [Part(s.title, s.caption, [Cell("", [_body(s.body)])]) for s in sections]
    parts.append(part("How it was made", "The same command with the same versions gives the same fit.", fits, _made))
    return parts


def part(title: str, caption: str, fits: Sequence[ReportContents], teller: ContentsFn) -> Part:
    """Let each fit tell its share of a part."""
    return Part(title, caption, [Cell(fit.name if len(fits) > 1 else "", teller(fit)) for fit in fits])


# ---- verdict ---------------------------------------------------------------------------------


def _verdict(fit: ReportContents) -> list[Content]:
    blocks: list[Content] = []
    if fit.about:
        blocks.append(tag("p", fit.about))
    if fit.diagnosis is None:
        blocks.append(_card("unknown", "No verdict", NO_DIAGNOSIS))
    else:
        blocks.append(
            _card(fit.diagnosis.verdict, _VERDICTS[fit.diagnosis.verdict], fit.diagnosis.explanation, _big(fit))
        )
    blocks += [tag("p", sentence, class_="missing") for sentence in fit.missing]
    return blocks


def _card(outcome: str, headline: str, sentence: str, *more: Markup) -> Markup:
    head = tag("p", f"{MARKS[outcome]} {headline}", class_=f"headline {outcome}")
    return tag("div", head, tag("p", sentence[:1].upper() + sentence[1:]), *more, class_=f"card {outcome}")


def _big(fit: ReportContents) -> Markup:
    """The few numbers that matter most: of a fit at several β, where the share of the gap is worst."""
    evidence = fit.evidence
    assert evidence is not None
    share, rows = evidence.relative_gap, len(evidence.betas)
    worst = 0
    if rows > 1 and share is not None and not np.isnan(share.mean).all():
        worst = int(np.nanargmax(np.reshape(share.mean, -1)))
    listing = evidence.table()
    told = dict(zip(listing.headings, listing.rows[worst], strict=True))
    unit = "reward units" if evidence.beta is not None else "nats"
    name = "gap J* − J" if rows == 1 else f"widest gap J* − J, at β = {told['β']}"
    pairs = [(name, f"{told['gap']} {unit}" if told["gap"] != UNKNOWN else UNKNOWN)]
    pairs.append(("of what there was to gain", told["share"]))
    pairs += [("J of the fit", told["J"]), ("optimum J*", told["J*"])]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="big")


def _checks(fits: Sequence[ReportContents]) -> list[Part]:
    if all(fit.diagnosis is None for fit in fits):
        return []
    caption = "What was asked of the fit. Good: all pass; a warning says what to look at, a failure what to do."
    return [part("Checks", caption, fits, lambda fit: [_checks_table(fit.diagnosis)])]


def _checks_table(diagnosis: Diagnosis | None) -> Markup:
    if diagnosis is None:
        return tag("p", NO_DIAGNOSIS)
    return checks_table(diagnosis.checks)


# ---- numbers ---------------------------------------------------------------------------------


def _numbers_caption(fits: Sequence[ReportContents]) -> str:
    structures = [fit.posterior.programs.structure for fit in fits if fit.posterior.programs is not None]
    contexts = {structure.num_contexts for structure in structures}
    each = f" Means over {contexts.pop():,} contexts." if len(contexts) == 1 and contexts != {1} else ""
    rewarded = [fit.posterior.beta is not None for fit in fits]
    told = []
    if any(rewarded):
        told.append(
            "J = E[R] − β·KL is what was maximised, J* the best that any policy can reach. J, J*, gap and E[R] are in "
            "reward units, KL and log Z in nats"
        )
    if not all(rewarded):
        told.append("Without rewards J is the ELBO and J* = log Z, the log-likelihood of the data: all are in nats")
    return (
        f"{'. '.join(told)}; ± is one standard error, [ ] a 95% interval, from below and above are 97.5% limits; "
        f"share = gap / (J* − J(π₀)).{each} Good: a gap that is small beside what there was to gain."
    )


def _numbers(fit: ReportContents) -> list[Content]:
    blocks: list[Content] = []
    evidence = fit.evidence
    if evidence is not None:
        blocks += [
            _tall(evidence.table()),
            _tall(evidence.weight_table()),
            f"{evidence.explanation} {evidence.weighed}",
        ]
    elif fit.training is not None:
        blocks += [_tall(fit.training.table()), fit.training.explanation]
    elif fit.posterior.statistics:
        blocks.append(_tall(estimates_table(fit.posterior.beta, fit.posterior.estimates)))
        blocks.append("Of the draws that were kept when the fit ended.")
    else:
        blocks.append("There are no draws yet to take numbers from.")
    if fit.training is not None and fit.training.metrics:
        blocks += [_metrics(fit), "Metrics of the program, which the fit does not maximise, on the data of the fit."]
    return blocks


def _tall(listing: Table) -> Table:
    """Turn a listing of a single row around, so that it fits a telephone."""
    return listing.transpose() if len(listing.rows) == 1 else listing


def _metrics(fit: ReportContents) -> Table:
    assert fit.training is not None
    metrics = fit.training.metrics
    rows = [
        (format_beta(beta), *(format_estimate(estimate_at(metric, i)) for metric in metrics.values()))
        for i, beta in enumerate(betas_of(fit.posterior))
    ]
    return _tall(Table(("β", *metrics), rows))


def _side_by_side(fits: Sequence[ReportContents]) -> Part:
    """A row for each fit and β."""
    rows = []
    for fit in fits:
        for i, beta in enumerate(betas_of(fit.posterior)):
            rows.append((fit.name, *_row(fit, i, beta)))
    listing = Table(("fit", "verdict", "β", *_COMPARED), rows, "llrrrrrr")
    caption = (
        "Fits of one problem can be compared: good is a high J, whose errors do not overlap the others'. "
        "J of different rewards or different β cannot."
    )
    return Part("Side by side", caption, [Cell("", [listing])])


def _row(fit: ReportContents, i: int, beta: float | None) -> Iterator[str]:
    verdict = "unknown" if fit.diagnosis is None else fit.diagnosis.verdict
    yield f"{MARKS[verdict]} {verdict}"
    yield format_beta(beta)
    if (evidence := fit.evidence or fit.training) is not None:
        listing = evidence.table()
        told = dict(zip(listing.headings, listing.rows[i], strict=True))
        yield from (told[name] for name in _COMPARED)
        return
    cells: Sequence[str] = [UNKNOWN] * 3
    if fit.posterior.statistics:
        cells = estimates_table(fit.posterior.beta, fit.posterior.estimates).rows[i][1:4]
    yield from (*cells, UNKNOWN, UNKNOWN)


# ---- the rest --------------------------------------------------------------------------------


def _made(fit: ReportContents) -> list[Content]:
    command = [tag("pre", fit.command)] if fit.command else []
    return [Table(("setting", "value"), fit.settings, "ll"), *command]


def _body(body: Any) -> Content:
    """Take what a domain brings: a figure, a table with its headings first, or text."""
    from matplotlib.figure import Figure

    if isinstance(body, Figure):
        return CaptionedFigure(body, "")
    if isinstance(body, str):
        return str(body)
    rows = [tuple(cell if isinstance(cell, str) else _spell(cell) for cell in row) for row in body]
    if not rows:
        return "There is nothing to show."
    width = max(len(row) for row in rows)
    full = [(*row, *[""] * (width - len(row))) for row in rows]
    numeric = [all(_is_number(row[i]) for row in body[1:] if i < len(row)) for i in range(width)]
    return Table(full[0], full[1:], "".join("r" if yes and len(rows) > 1 else "l" for yes in numeric))


def _is_number(cell: Any) -> bool:
    return np.ndim(cell) == 0 and np.asarray(cell).dtype.kind in "iuf"


def _spell(cell: Any) -> str:
    if not _is_number(cell):
        return str(cell)
    return f"{int(cell):,}" if np.asarray(cell).dtype.kind in "iu" else format_number(float(cell))
