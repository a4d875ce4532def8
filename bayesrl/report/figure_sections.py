"""The parts of the report that are mostly pictures; each picture says what good looks like."""

from collections.abc import Iterator, Sequence

import numpy as np

from bayesrl.diagnostics.results import Check, Evidence
from bayesrl.display.formatting import estimate_at, format_beta, format_estimate, pluralize
from bayesrl.display.tables import MARKS, Markup, Table, join_html, tag
from bayesrl.errors import BayesRLError
from bayesrl.posterior.posterior import num_draws
from bayesrl.report.evidence_figures import (
    frontier_figure,
    held_out_figure,
    objective_figure,
    over_optimisation_figure,
    restarts_figure,
    shown_betas,
    turning_kl,
    weights_figure,
)
from bayesrl.report.extreme_draws import extreme_draws
from bayesrl.report.facts import ReportContents
from bayesrl.report.fit_figures import betas_of, curve_names, history_figure, site_figures
from bayesrl.report.page import CaptionedFigure, Cell, Content, Part
from bayesrl.report.site_values import shown_sites, value_text


def figure_parts(fits: Sequence[ReportContents]) -> Iterator[Part]:
    """Give the parts with pictures, those of which no fit has anything left out."""
    for title, caption, teller in (
        (
            "Training",
            "What is maximised, and what it is made of, along the steps. Good: every curve is flat at the end.",
            _training,
        ),
        ("Policy, prior and target", "What the policy does, beside where it started and where it should be.", _policy),
        (
            "Draws",
            "The best, median and worst of what the fit draws. Good: the best are what you meant to have.",
            _draws,
        ),
        ("Weights", "How evenly the fit covers p*. Good: every draw weighs the same.", _weights),
        ("Restarts", "Fits from several starts. Good: they end at the same J.", _restarts),
        ("Frontier", "What reward costs in KL, over the temperatures.", _frontier),
        ("Over-optimisation", "Whether more of the reward is still more of what it stands for.", _gold),
        (
            "Training and held-out data",
            "What holds on data that was not trained on. Good: numbers near those of training.",
            _held_out,
        ),
    ):
        told = [list(teller(fit)) for fit in fits]
        if any(told):
            nothing: Content = "Nothing to show for this fit."
            cells = [
                Cell(fit.name if len(fits) > 1 else "", contents or [nothing])
                for fit, contents in zip(fits, told, strict=True)
            ]
            yield Part(title, caption, cells)


def _training(fit: ReportContents) -> Iterator[Content]:
    if not len(fit.posterior.history.get("step", ())):
        yield "No step was recorded, so there are no curves."
        return
    goal = ", levels off and meets the dashed optimum J*" if fit.optimum is not None else " and levels off"
    captions = {
        "objective": f"What is maximised. Good: it rises{goal}.",
        "reward": "What the policy earns. Good: flat at the end; it may fall where KL was too dear.",
        "kl": "How far it left the prior. Good: flat at the end; still rising means that it needs more steps.",
    }
    for name in curve_names(fit.posterior):
        yield CaptionedFigure(history_figure(fit.posterior, name, fit.optimum), captions[name])


def _policy(fit: ReportContents) -> Iterator[Content]:
    if fit.whole is None:
        return
    for site, values in shown_sites(fit.whole).items():
        if value_text(fit.whole, site, np.asarray(values)[(0,) * (np.ndim(values) - 1)]) is not None:
            yield f"Site “{site}” is text: see the draws."
            continue
        try:
            figures = site_figures(fit.whole, fit.target, site)
        except BayesRLError as error:
            yield f"Site “{site}” cannot be drawn: {error}."
            continue
        for figure in figures:
            labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
            known = fit.target is not None or any("target" in label for label in labels)
            goal = (
                "Good: the fit (q) lies on the target (p*)" if known else "What the fit (q) changed of the prior (π₀)"
            )
            yield CaptionedFigure(figure, f"Site “{site}”. {goal}.")


def _draws(fit: ReportContents) -> Iterator[Content]:
    if fit.whole is None or not fit.whole.draws:
        return
    betas = betas_of(fit.whole)
    if fit.whole.beta is None or len(fit.whole.batch_shape) == 1:
        yield extreme_draws(fit.whole, list(shown_sites(fit.whole)))
    else:
        chosen = [fit.whole.select(beta=betas[i]) for i in shown_betas(betas)]
        listings = [extreme_draws(one, list(shown_sites(one))) for one in chosen]
        rows = [
            (format_beta(betas[i]), *row)
            for i, told in zip(shown_betas(betas), listings, strict=True)
            for row in told.rows
        ]
        yield Table(("β", *listings[0].headings), rows, "l" + listings[0].alignments)
    what = (
        "Reward in reward units;"
        if fit.posterior.beta is not None
        else "log p(y|x), in nats, is how well the draw explains the data;"
    )
    yield (
        f"{what} log q/π₀, in nats, is how much likelier the fit made the draw. Draws that read alike are listed once."
    )


def _weights(fit: ReportContents) -> Iterator[Content]:
    if not fit.posterior.statistics:
        return
    yield CaptionedFigure(
        weights_figure(fit.whole or fit.posterior, fit.evidence),
        f"w = {'R/β + log π₀' if fit.posterior.beta is not None else 'log p(x, y)'} − log q of the draws. "
        "Good: a narrow spike at 0; a long right tail is what the fit misses.",
    )
    evidence = fit.evidence
    if evidence is None:
        return
    if not evidence.num_weighed:
        yield evidence.weighed
        return
    rows = [(row.cells()["β"], *(row.weight_cells()[name] for name in ("k̂", "ESS", "of"))) for row in evidence.measured]
    yield Table(("β", "Pareto k̂", "effective draws (ESS)", "draws of the fit"), rows)
    yield (
        "Good: k̂ below 0.7 and many effective draws, so that draws of the fit can be weighted into draws of p*. k̂ is "
        f"blind to modes that the fit dropped.{''.join(f' {sentence}' for sentence in _no_khat(evidence))}"
    )


def _no_khat(evidence: Evidence) -> list[str]:
    """Say where k̂ is not told, and why."""
    return [f"At β = {row.cells()['β']} there is none: {row.no_khat}." for row in evidence.measured if row.no_khat]


def _restarts(fit: ReportContents) -> Iterator[Content]:
    if not fit.posterior.statistics or fit.posterior.mixture is not None:
        return
    restarts = fit.posterior.num_restarts
    if restarts == 1:
        yield "One restart, so nothing to compare it with; num_restarts=4 would show whether the start matters."
        return
    at_optimum = " and at J* (dashed)" if fit.optimum is not None else ""
    caption = (
        f"J of {pluralize(restarts, 'restart')}, each on the {num_draws(fit.posterior):,} draws that it carries, bars "
        f"of two standard errors; J of the best, as it is told above, is of more. Good: all alike{at_optimum}."
    )
    yield CaptionedFigure(restarts_figure(fit.posterior, fit.optimum), caption)
    if fit.diagnosis is not None:
        for check in fit.diagnosis.checks:
            if check.name == "restarts" and check.outcome != "unknown":
                yield f"{check.told}, where {check.limit} is good: {check.explanation}"


def _frontier(fit: ReportContents) -> Iterator[Content]:
    evidence = fit.frontier.evidence if fit.frontier is not None else fit.evidence
    if evidence is None or len(evidence.betas) < 2:
        return
    limit = (
        "no point can lie above the dashed curve of p*, and good ones lie on it"
        if fit.target is not None
        else ("points rise and bend to the right, never back")
    )
    yield CaptionedFigure(
        frontier_figure(evidence, fit.target), f"Reward against KL, two standard errors. Good: {limit}."
    )
    yield CaptionedFigure(
        objective_figure(evidence),
        "J of the fit and the bracket of J*. Good: points on the line; J* falls as β grows, and bends upwards.",
    )
    yield fit.frontier.table() if fit.frontier is not None else evidence.table()
    if fit.frontier is not None:
        yield checks_table(fit.frontier.checks)


def _gold(fit: ReportContents) -> Iterator[Content]:
    if fit.gold is None:
        return
    caption = "Proxy and gold against √KL. Good: both rise together; where gold turns down, β is too low."
    frontier = fit.frontier
    if frontier is not None and frontier.gold is not None:
        evidence = frontier.evidence
        figure = over_optimisation_figure(evidence.kl, evidence.reward, frontier.gold, fit.gold, turning_kl(frontier))
        yield CaptionedFigure(figure, caption)
        turn = frontier.turning_point
        if turn is None:
            yield f"“{fit.gold}” does not turn down over these β."
        else:
            yield f"“{fit.gold}” is greatest at β = {turn:.3g}, while the reward still rises below it (dotted line)."
    elif fit.training is not None and fit.gold in fit.training.metrics and len(betas_of(fit.posterior)) == 1:
        yield f"One β shows one point of “{fit.gold}”; fit an array of β to see whether it turns down."
    elif fit.training is not None and fit.gold in fit.training.metrics:
        told = fit.training
        yield CaptionedFigure(over_optimisation_figure(told.kl, told.reward, told.metrics[fit.gold], fit.gold), caption)
    else:
        known = ", ".join(fit.training.metrics) if fit.training is not None else ""
        yield f"The program has no deterministic site “{fit.gold}”; it has {known or 'none'}."


def _held_out(fit: ReportContents) -> Iterator[Content]:
    if fit.held_out is None or fit.training is None:
        return
    betas = betas_of(fit.posterior)
    yield CaptionedFigure(
        held_out_figure(betas, fit.training, fit.held_out),
        f"{'E[R]' if fit.posterior.beta is not None else 'J'}, bars of two standard errors. Good: close together; far "
        "below on what was held out means learning by heart.",
    )
    names = list(fit.training.metrics)
    rows = []
    for i, beta in enumerate(betas):
        for label, told in (("training", fit.training), ("held out", fit.held_out)):
            estimates = [told.objective, told.reward, told.kl, *(told.metrics[name] for name in names)]
            rows.append((label, format_beta(beta), *(format_estimate(estimate_at(e, i)) for e in estimates)))
    yield Table(("data", "β", "J", "E[R]", "KL", *names), rows)
    yield "± is one standard error over draws, the data being what they are; other data of the kind differ by more."


def checks_table(checks: Sequence[Check]) -> Markup:
    """Write checks as a table, outcomes told by mark and word as well as colour."""
    right = "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
    heads = [("", None), ("check", None), ("value", right), ("limit", right), ("what it means", None)]
    rows = []
    for check in checks:
        mark = tag("span", f"{MARKS[check.outcome]} {check.outcome}", class_=f"mark {check.outcome}")
        advice = join_html(
            check.explanation, *([tag("span", f" {check.reference}", class_="reference")] * bool(check.reference))
        )
        cells = (tag("td", mark), tag("td", check.name))
        numbers = (tag("td", text, style=right) for text in (check.told, check.limit))
        rows.append(tag("tr", *cells, *numbers, tag("td", advice, class_="advice")))
    head = tag("thead", tag("tr", *(tag("th", text, scope="col", style=style) for text, style in heads)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_="checks"), class_="wide all", tabindex="0")
