"""The parts of the report, from the verdict down to how the fit was made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bayesrl.display.formatting import UNKNOWN, estimate_at, format_beta, format_estimate, format_number
from bayesrl.display.section import Section
from bayesrl.display.tables import MARKS, Markup, Table, estimates_table, tag
from bayesrl.report.figure_sections import checks_table, figure_parts
from bayesrl.report.fit_figures import betas_of
from bayesrl.report.fit_results import FitResults
from bayesrl.report.html_page import CaptionedFigure, Cell, Content, Part
from bayesrl.statistics.regularizer_names import (
    distils,
    learns_directly,
    regularizer_formula,
    regularizer_of,
    regularizer_symbol,
)

type ContentsFn = Callable[[FitResults], Sequence[Content]]

_VERDICTS = {"pass": "Passed", "fail": "Failed", "unknown": "Unknown"}
_COMPARED = ("J", "E[R]", "KL", "gap", "relative gap")
NO_DIAGNOSIS = "Whether this fit can be trusted was not found out."


def report_parts(fits: Sequence[FitResults], sections: Sequence[Section]) -> list[Part]:
    """Return the parts of the report of one fit, or of several side by side, with sections that domains add."""

    def part(title: str, caption: str, contents_fn: ContentsFn) -> Part:
        return Part(title, caption, [Cell(fit.name, contents_fn(fit)) for fit in fits])

    parts = [part("Verdict", "", _verdict)]
    if any(fit.diagnosis is not None for fit in fits):
        asked = "What was asked of the fit. Good: all pass; a warning says what to look at, a failure what to do."
        parts.append(part("Checks", asked, _checks))
    if len(fits) > 1:
        parts.append(_side_by_side(fits))
    parts.append(part("Numbers", _numbers_caption(fits), _numbers))
    parts += [*figure_parts(fits), *section_parts(sections)]
    parts.append(part("How it was made", "The same command with the same versions gives the same fit.", _settings))
    return parts


def section_parts(sections: Sequence[Section]) -> list[Part]:
    """Return the parts that domains add."""
    return [Part(section.title, section.caption, [Cell("", [_body(section.body)])]) for section in sections]


def verdict_card(outcome: str, headline: str, sentence: str, numbers: Iterable[tuple[str, str]] = ()) -> Markup:
    """Write a verdict with the few numbers that matter most, as pairs of name and value."""
    head = tag("p", f"{MARKS[outcome]} {headline}", class_=f"headline {outcome}")
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in numbers]
    big = [tag("dl", *pairs, class_="big")] if pairs else []
    return tag("div", head, tag("p", sentence[:1].upper() + sentence[1:]), *big, class_=f"card {outcome}")


# ---- verdict ---------------------------------------------------------------------------------


def _verdict(fit: FitResults) -> list[Content]:
    blocks: list[Content] = [tag("p", fit.about)] if fit.about else []
    if fit.diagnosis is None:
        blocks.append(verdict_card("unknown", "No verdict", NO_DIAGNOSIS))
    else:
        verdict = fit.diagnosis.verdict
        blocks.append(verdict_card(verdict, _VERDICTS[verdict], fit.diagnosis.explanation, _big(fit)))
    return [*blocks, *(tag("p", sentence, class_="missing") for sentence in fit.missing)]


def _big(fit: FitResults) -> Iterator[tuple[str, str]]:
    """The few numbers that matter most; for a fit at several β, where the share of the gap is worst."""
    evidence = fit.evidence
    assert evidence is not None
    share, several = evidence.relative_gap, len(evidence.betas) > 1
    worst = 0
    if several and share is not None and not np.isnan(share.mean).all():
        worst = int(np.nanargmax(np.reshape(share.mean, -1)))
    cells = evidence.rows[worst].cells()
    if evidence.best_of is not None:
        yield "KL(q‖pₙ) to the best of n", f"{cells['KL(q‖p*)']} nats"
        yield "of KL(pₙ‖π₀)", cells["relative gap"]
        yield "E[R] of the fit", cells["E[R]"]
        return
    unit = "reward units" if evidence.beta is not None else "nats"
    name = f"widest gap J* − J, at β = {cells['β']}" if several else "gap J* − J"
    yield name, f"{cells['gap']} {unit}" if cells["gap"] != UNKNOWN else UNKNOWN
    yield from (
        ("of what there was to gain", cells["relative gap"]),
        ("J of the fit", cells["J"]),
        ("optimum J*", cells["J*"]),
    )


def _checks(fit: FitResults) -> list[Content]:
    return [tag("p", NO_DIAGNOSIS) if fit.diagnosis is None else checks_table(fit.diagnosis.checks)]


# ---- numbers ---------------------------------------------------------------------------------


def _numbers_caption(fits: Sequence[FitResults]) -> str:
    structures = [fit.posterior.programs.structure for fit in fits if fit.posterior.programs is not None]
    contexts = {structure.num_contexts for structure in structures}
    each = f" Means over {contexts.pop():,} contexts." if len(contexts) == 1 and contexts != {1} else ""
    rewarded = [fit.posterior.beta is not None for fit in fits]
    units = []
    units += [
        distils(n) for n in dict.fromkeys(fit.posterior.settings.get("best_of_n") for fit in fits) if n is not None
    ]
    units += [
        learns_directly(what)
        for what in dict.fromkeys(fit.posterior.settings.get("direct") for fit in fits)
        if what is not None
    ]
    others = dict.fromkeys(regularizer_of(fit.posterior.settings) for fit in fits)
    direct = all("direct" in fit.posterior.settings for fit in fits)
    aim = "what the policy's reward gives" if direct else "what was maximised"
    distilled = all("best_of_n" in fit.posterior.settings for fit in fits)
    if distilled:
        units.append("β·KL(q‖pₙ) and E[R] are in reward units, KL in nats")
    elif any(rewarded) and ("kl", None) in others:
        units.append(
            f"J = E[R] − β·KL is {aim}, J* the best that any policy can reach. J, J*, gap and E[R] are in reward "
            "units, KL and log Z in nats"
        )
    for one in (one for one in others if one[0] != "kl"):
        symbol = regularizer_symbol(*one)
        units.append(
            f"J = E[R] − β·{symbol} is {aim}, with {symbol} in the place of KL, and J* the best that any "
            f"policy can reach, at p*; {regularizer_formula(*one)}. J, J*, gap and E[R] are in reward units; KL to the "
            "prior, in nats, is told beside them and is in no J"
        )
    if not all(rewarded):
        units.append("Without rewards J is the ELBO and J* = log Z, the log-likelihood of the data: all are in nats")
    share = "relative gap = " + ("KL(q‖pₙ) / KL(pₙ‖π₀)" if distilled else "gap / (J* − J(π₀))")
    return (
        f"{'. '.join(unit.rstrip('.') for unit in units)}; ± is one standard error, [ ] a 95% interval, from below and "
        f"above are 97.5% limits; {share}.{each} Good: a gap that is small beside what there was to gain."
    )


def _numbers(fit: FitResults) -> list[Content]:
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
        blocks.append(_tall(_kept(fit)))
        blocks.append("Of the draws that were kept when the fit ended.")
    else:
        blocks.append("There are no draws yet to take numbers from.")
    if fit.training is not None and fit.training.metrics:
        blocks += [_metrics(fit), "Metrics of the program, which the fit does not maximise, on the data of the fit."]
    return blocks


def _kept(fit: FitResults) -> Table:
    return estimates_table(fit.posterior.beta, fit.posterior.estimates, regularizer_of(fit.posterior.settings))


def _tall(table: Table) -> Table:
    """Transpose a table with a single row, so that it fits a telephone."""
    return table.transpose() if len(table.rows) == 1 else table


def _metrics(fit: FitResults) -> Table:
    assert fit.training is not None
    metrics = fit.training.metrics
    rows = [
        (format_beta(beta), *(format_estimate(estimate_at(metric, i)) for metric in metrics.values()))
        for i, beta in enumerate(betas_of(fit.posterior))
    ]
    return _tall(Table(("β", *metrics), rows))


def _side_by_side(fits: Sequence[FitResults]) -> Part:
    """One row per fit and β; with the regulariser if one is not KL."""
    rows, told = [], any(regularizer_of(fit.posterior.settings)[0] != "kl" for fit in fits)
    for fit in fits:
        verdict = "unknown" if fit.diagnosis is None else fit.diagnosis.verdict
        for i, beta in enumerate(betas_of(fit.posterior)):
            own = [regularizer_symbol(*regularizer_of(fit.posterior.settings))] if told else []
            rows.append((fit.name, f"{MARKS[verdict]} {verdict}", format_beta(beta), *own, *_compared(fit, i)))
    caption = (
        "Fits of one problem can be compared: good is a high J, whose errors do not overlap the others'. "
        "J of different rewards, different β or different regularisers cannot."
    )
    headings = ("fit", "verdict", "β", *(["regulariser"] if told else []), *_COMPARED)
    return Part("Side by side", caption, [Cell("", [Table(headings, rows, "ll" + "r" * (len(headings) - 2))])])


def _compared(fit: FitResults, i: int) -> Sequence[str]:
    if (evidence := fit.evidence or fit.training) is not None:
        cells = evidence.rows[i].cells()
        return [cells[name] for name in _COMPARED]
    if not fit.posterior.statistics:
        return [UNKNOWN] * 5
    kept = _kept(fit)
    row = dict(zip(kept.headings, kept.rows[i], strict=True))
    return [row["J"], row["E[R]"], row["KL"], UNKNOWN, UNKNOWN]


# ---- the rest --------------------------------------------------------------------------------


def _settings(fit: FitResults) -> list[Content]:
    command = [tag("pre", fit.command)] if fit.command else []
    return [Table(("setting", "value"), fit.settings, "ll"), *command]


def _body(body: Any) -> Content:
    """Convert a domain's body: a figure, a table with its headings first, or text."""
    from matplotlib.figure import Figure

    if isinstance(body, Figure):
        return CaptionedFigure(body, "")
    if isinstance(body, str):
        return str(body)
    rows = [tuple(cell if isinstance(cell, str) else _cell_text(cell) for cell in row) for row in body]
    if not rows:
        return "There is nothing to show."
    width = max(len(row) for row in rows)
    full = [(*row, *[""] * (width - len(row))) for row in rows]
    numeric = [all(_is_number(row[i]) for row in body[1:] if i < len(row)) for i in range(width)]
    return Table(full[0], full[1:], "".join("r" if yes and len(rows) > 1 else "l" for yes in numeric))


def _is_number(cell: Any) -> bool:
    return np.ndim(cell) == 0 and np.asarray(cell).dtype.kind in "iuf"


def _cell_text(cell: Any) -> str:
    if not _is_number(cell):
        return str(cell)
    return f"{int(cell):,}" if np.asarray(cell).dtype.kind in "iu" else format_number(float(cell))
