"""The parts of the report that are mostly figures; each figure says what a good result looks like."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from bayesrl.diagnostics.checks import Check
from bayesrl.display.formatting import estimate_at, format_beta, format_estimate, format_number, pluralize, truncate
from bayesrl.display.tables import MARKS, Markup, Table, join_html, table_html, tag
from bayesrl.errors import BayesRLError
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.summary import num_draws
from bayesrl.report.evidence_figures import (
    engines_figure,
    frontier_figure,
    held_out_figure,
    objective_figure,
    over_optimisation_figure,
    restarts_figure,
    trust_figure,
    turning_kl,
    weights_figure,
)
from bayesrl.report.fit_figures import DIVERGENCE, betas_of, curve_names, history_figure, shown_betas, site_figures
from bayesrl.report.fit_results import FitResults
from bayesrl.report.html_page import CaptionedFigure, Cell, Content, Part
from bayesrl.report.site_panels import is_text, shown_sites, site_values, value_text
from bayesrl.statistics.regularizer_names import distils, regularizer_of, regularizer_symbol

EXTREMES = 3
"""How many of the best draws, and how many of the worst, to list."""

_EXAMINED = 500
_TOLD_N = 16


def figure_parts(fits: Sequence[FitResults]) -> Iterator[Part]:
    """Yield the parts with figures; skip those for which no fit has content."""
    for title, caption, contents_fn in (
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
        (
            "What each engine says of the same optimum",
            "Other ways to the same log Z, each with as many evaluations of the program. Good: all overlap, and the "
            "fit's own bound reaches them.",
            _engines,
        ),
        ("Restarts", "Fits from several starts. Good: they end at the same J.", _restarts),
        ("Frontier", _frontier_caption(fits), _frontier),
        ("Best of n", "What choosing the best of n draws of the prior earns, and what it costs in KL.", _best_of_n),
        ("Over-optimisation", "Whether more of the reward is still more of what it stands for.", _gold),
        (
            "How far to follow the reward",
            "The reward is not known: what the true one may be at each point, over the posterior. Gains are over the "
            "prior policy. Good: the whole interval is above 0, and its lower end still rises.",
            _trust,
        ),
        (
            "Training and held-out data",
            "What holds on data that was not trained on. Good: numbers near those of training.",
            _held_out,
        ),
    ):
        contents = [list(contents_fn(fit)) for fit in fits]
        if any(contents):
            nothing: list[Content] = ["Nothing to show for this fit."]
            cells = [Cell(fit.name, own or nothing) for fit, own in zip(fits, contents, strict=True)]
            yield Part(title, caption, cells)


def _training(fit: FitResults) -> Iterator[Content]:
    if not len(fit.posterior.history.get("step", ())):
        yield "No step was recorded, so there are no curves."
        return
    goal = ", levels off and meets the dashed optimum J*" if fit.optimum is not None else " and levels off"
    symbol = regularizer_symbol(*regularizer_of(fit.posterior.settings))
    captions = {
        "objective": f"What is maximised. Good: it rises{goal}.",
        "reward": f"What the policy earns. Good: flat at the end; it may fall where {symbol} was too dear.",
        "kl": "How far it left the prior. Good: flat at the end; still rising means that it needs more steps.",
    }
    if "best_of_n" in fit.posterior.settings:
        captions["objective"] = "E[R] − β·KL, which a fit to the best of n does not maximise. Good: flat at the end."
    if symbol != "KL":
        captions[DIVERGENCE] = f"{symbol} to the prior, which J counts in the place of KL. Good: flat at the end."
        captions["kl"] = "How far it left the prior in KL, which is in no J here. Good: flat at the end."
    history = fit.posterior.history
    if "direct" in fit.posterior.settings:
        captions["objective"] = (
            f"E[R] − β·{symbol}, which a fit to judgements does not maximise. Good: flat at the end."
        )
        loss, right = (np.ravel(np.mean(history[name][-1], -1)) for name in ("loss", "metrics/accuracy"))
        yield (
            f"At the end the loss of the judgements is {', '.join(f'{x:.3f}' for x in loss)}, and the implicit reward "
            f"prefers what was chosen in {', '.join(f'{x:.0%}' for x in right)} of them, by β in the order above."
        )
    for name in curve_names(fit.posterior):
        # A fit to texts that were judged draws none while it learns, and so knows no J.
        if np.isfinite(history[name]).any():
            yield CaptionedFigure(history_figure(fit.posterior, name, fit.optimum), captions[name])


def _policy(fit: FitResults) -> Iterator[Content]:
    if fit.best is None:
        return
    for site in shown_sites(fit.best):
        if is_text(fit.best, site):
            yield f"Site “{site}” is text: see the draws."
            continue
        try:
            figures = site_figures(fit.best, fit.target, site)
        except BayesRLError as error:
            yield f"Site “{site}” cannot be drawn: {error}."
            continue
        for figure in figures:
            labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
            # A figure may also show the target from a density that it integrated itself.
            known = fit.target is not None or any("target" in label for label in labels)
            goal = (
                "Good: the fit (q) lies on the target (p*)" if known else "What the fit (q) changed of the prior (π₀)"
            )
            if (n := fit.posterior.settings.get("best_of_n")) is not None:
                goal = goal.replace("the target (p*)", f"the law of the best of n = {n}")
            yield CaptionedFigure(figure, f"Site “{site}”. {goal}.")


def _frontier_caption(fits: Sequence[FitResults]) -> str:
    symbols = dict.fromkeys(regularizer_symbol(*regularizer_of(fit.posterior.settings)) for fit in fits)
    return f"What reward costs in {' or in '.join(symbols)}, over the temperatures."


def _draws(fit: FitResults) -> Iterator[Content]:
    if fit.best is None or not fit.best.draws:
        return
    betas = betas_of(fit.best)
    if fit.best.beta is None or len(fit.best.batch_shape) == 1:
        yield extreme_draws(fit.best, shown_sites(fit.best))
    else:
        rows: list[Sequence[str]] = []
        for beta in (betas[i] for i in shown_betas(betas)):
            one = fit.best.select(beta=beta)
            table = extreme_draws(one, shown_sites(one))
            rows += [(format_beta(beta), *row) for row in table.rows]
        yield Table(("β", *table.headings), rows, "l" + table.alignments)
    explained = "log p(y|x), in nats, is how well the draw explains the data"
    what = "Reward in reward units" if fit.posterior.beta is not None else explained
    likelier = "log q/π₀, in nats, is how much likelier the fit made the draw"
    yield f"{what}; {likelier}. Draws that read alike are listed once."


def _weights(fit: FitResults) -> Iterator[Content]:
    if not fit.posterior.statistics:
        return
    if (n := fit.posterior.settings.get("best_of_n")) is not None:
        yield f"{distils(n)} Weights towards p* would say nothing of it."
        return
    name = regularizer_symbol(*regularizer_of(fit.posterior.settings))
    caption = (
        f"w = {'R/β + log π₀' if fit.posterior.beta is not None else 'log p(x, y)'} − log q of the draws. "
        "Good: a narrow spike at 0; a long right tail is what the fit misses."
    )
    if name != "KL":
        caption = (
            f"R/β − f′(q/π₀) of the draws, with the f of {name}: at p*, the optimum with {name} in the place of KL, it "
            "is the same for all draws. Good: a narrow spike at 0; a long right tail is what the fit misses."
        )
    yield CaptionedFigure(weights_figure(fit.best or fit.posterior, fit.evidence), caption)
    evidence = fit.evidence
    if evidence is None:
        return
    if not evidence.num_weighed:
        yield evidence.weighed
        return
    cells = [row.cells() for row in evidence.rows]
    rows = [tuple(row[name] for name in ("β", "k̂", "ESS", "of")) for row in cells]
    yield Table(("β", "Pareto k̂", "effective draws (ESS)", "draws of the fit"), rows)
    absent = [f" At β = {row.cells()['β']} there is none: {row.no_khat}." for row in evidence.rows if row.no_khat]
    yield (
        "Good: k̂ below 0.7 and many effective draws, so that draws of the fit can be weighted into draws of p*. k̂ is "
        f"blind to modes that the fit dropped.{''.join(absent)}"
    )


def _engines(fit: FitResults) -> Iterator[Content]:
    found = fit.engines
    if found is None:
        return
    names = "J*" if found.quantity == "J*" else "log Z"
    yield CaptionedFigure(
        engines_figure(found),
        f"{names}: limits (thin), 95% intervals where they can be trusted (thick), exact values (diamonds). Good: the "
        "intervals overlap, and no limit excludes another.",
    )
    yield found.table()
    yield found.cost_table()
    yield f"{found.legend[:1].upper()}{found.legend[1:]}."
    yield Table(("engine", "note"), [(name, note) for name, note in found.notes], "ll") if found.notes else ""


def _restarts(fit: FitResults) -> Iterator[Content]:
    if not fit.posterior.statistics or fit.posterior.mixture is not None:
        return
    restarts = fit.posterior.num_restarts
    if fit.posterior.trained_elsewhere:
        yield "One set of parameters; another, trained from another start, would show whether the start matters."
        return
    if restarts == 1:
        yield "One restart, so nothing to compare it with; num_restarts=4 would show whether the start matters."
        return
    at_optimum = " and at J* (dashed)" if fit.optimum is not None else ""
    caption = (
        f"J of {restarts:,} restarts, each on the {pluralize(num_draws(fit.posterior), 'draw')} that it carries, bars "
        f"of two standard errors; J of the best, as given above, is of more draws. Good: all alike{at_optimum}."
    )
    yield CaptionedFigure(restarts_figure(fit.posterior, fit.optimum), caption)
    if fit.diagnosis is not None:
        for check in fit.diagnosis.checks:
            if check.name == "restarts" and check.outcome != "unknown":
                yield f"{check.value_text}, where {check.limit} is good: {check.explanation}"


def _frontier(fit: FitResults) -> Iterator[Content]:
    evidence = fit.frontier.evidence if fit.frontier is not None else fit.evidence
    if evidence is None or len(evidence.betas) < 2 or evidence.best_of is not None:
        return
    limit = (
        "no point can lie above the dashed curve of p*, and good ones lie on it"
        if fit.target is not None
        else ("points rise and bend to the right, never back")
    )
    yield CaptionedFigure(
        frontier_figure(evidence, fit.target), f"Reward against {evidence.symbol}, two standard errors. Good: {limit}."
    )
    yield CaptionedFigure(
        objective_figure(evidence),
        "J of the fit and the bracket of J*. Good: points on the line; J* falls as β grows, and bends upwards.",
    )
    yield fit.frontier.table() if fit.frontier is not None else evidence.table()
    if fit.frontier is not None:
        yield checks_table(fit.frontier.checks)


def _best_of_n(fit: FitResults) -> Iterator[Content]:
    found, evidence = fit.best_of, fit.evidence
    if found is None:
        return
    if evidence is not None and evidence.beta is not None and evidence.regularizer == "kl":
        shown = evidence if evidence.beta.ndim else evidence[np.arange(1)]
        target = fit.target if evidence.best_of is None else None
        caption = (
            "Reward against KL: the fit, the best of n, and the dashed curve of p*, which no policy can pass. "
            "Good: the fit lies on the dashed curve, left of the best of n that earns as much."
        )
        if evidence.best_of is not None:
            caption = f"Reward against KL. Good: the fit lies on the best of n = {evidence.best_of}, a little below p*."
        yield CaptionedFigure(frontier_figure(shown, target, found), caption)
    yield found.table()
    i = int(np.argmin(np.abs(found.n.reshape(-1) - fit.posterior.settings.get("best_of_n", _TOLD_N))))
    told = (found.kl, found.reward, found.best_reward, found.least_kl)
    parts = (*(estimate.mean for estimate in told), found.beta, found.reward_beta)
    kl, reward, best, least, at_kl, at_reward = (format_number(float(np.reshape(part, -1)[i])) for part in parts)
    yield (
        f"The best of {found.n.reshape(-1)[i]} draws of the prior earns E[R] = {reward} at a KL of {kl} nats. "
        f"At the same KL, p* is that of β = {at_kl} and earns {best}. "
        f"At the same E[R], p* is that of β = {at_reward} and needs a KL of {least} nats."
    )


def _gold(fit: FitResults) -> Iterator[Content]:
    if fit.gold is None:
        return
    caption = "Proxy and gold against √KL. Good: both rise together; where gold turns down, β is too low."
    frontier, training = fit.frontier, fit.training
    if frontier is not None and frontier.gold is not None:
        evidence, turn = frontier.evidence, frontier.turning_point
        figure = over_optimisation_figure(evidence.kl, evidence.reward, frontier.gold, fit.gold, turning_kl(frontier))
        yield CaptionedFigure(figure, caption)
        if turn is None:
            yield f"“{fit.gold}” does not turn down over these β."
        else:
            yield f"“{fit.gold}” is greatest at β = {turn:.3g}, while the reward still rises below it (dotted line)."
    elif training is None or fit.gold not in training.metrics:
        known = ", ".join(training.metrics) if training is not None else ""
        yield f"The program has no deterministic site “{fit.gold}”; it has {known or 'none'}."
    elif len(betas_of(fit.posterior)) == 1:
        yield f"One β shows one point of “{fit.gold}”; fit an array of β to see whether it turns down."
    else:
        figure = over_optimisation_figure(training.kl, training.reward, training.metrics[fit.gold], fit.gold)
        yield CaptionedFigure(figure, caption)


def _trust(fit: FitResults) -> Iterator[Content]:
    found = fit.trust
    if found is None:
        return
    yield CaptionedFigure(trust_figure(found), f"Proxy and true reward against KL, {found.level:.0%} of the posterior.")
    yield found.table()
    yield (
        f"{found.explanation} P(worse) is the probability that the prior policy is better, P(best) that the true "
        "reward is greatest there, and “bought” the share of what is not known of single draws that does not average "
        "out."
    )


def _held_out(fit: FitResults) -> Iterator[Content]:
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
            other = [] if told.divergence is None else [told.divergence]
            estimates = [told.objective, told.reward, *other, told.kl, *(told.metrics[name] for name in names)]
            rows.append((label, format_beta(beta), *(format_estimate(estimate_at(e, i)) for e in estimates)))
    symbol = [] if fit.training.divergence is None else [fit.training.symbol]
    yield Table(("data", "β", "J", "E[R]", *symbol, "KL", *names), rows)
    yield "± is one standard error over draws, the data being what they are; other data of the kind differ by more."


def extreme_draws(one: Posterior, sites: Iterable[str]) -> Table:
    """List the best, the median and the worst draws with their rewards and their distance from the prior.

    Without rewards the best draws are those that explain the data best. Draws that read alike are listed
    once. If there are contexts, a draw belongs to one context. The posterior has one β and restart.
    """
    total, weight, log_prior, log_q = (
        np.asarray(one.statistics[name], float) for name in ("total_reward", "log_weight", "log_prior", "log_q")
    )
    contexts = int(np.prod(total.shape[2:], dtype=int))
    rewarded = one.beta is not None
    # Without rewards a weight is log p(y|x) + log π₀ − log q.
    score = (total if rewarded else weight - log_prior + log_q).ravel()
    ratio = (log_q - log_prior).ravel()
    values = {name: site_values(one, name).values for name in sites}

    def cells_of(place: int) -> tuple[str, ...]:
        draw, context = divmod(place, contexts)
        where = [f"{context:,}"] if contexts > 1 else []
        read = [(own[draw, context], value_text(one, name, own[draw, context])) for name, own in values.items()]
        cells = [truncate(value if text is None else text) for value, text in read]
        return (format_number(float(score[place])), format_number(float(ratio[place]), 3), *where, *cells)

    order = np.argsort(-score, kind="stable")
    median = cells_of(int(order[len(order) // 2]))
    best = _distinct(order, cells_of, EXTREMES)
    worst = [cells for cells in _distinct(order[::-1], cells_of, EXTREMES) if cells not in best]
    ranked = [*(("best", *cells) for cells in best), ("median", *median), *(("worst", *cells) for cells in worst[::-1])]
    headings = ("", "reward" if rewarded else "log p(y|x)", "log q/π₀", *(["context"] if contexts > 1 else []), *values)
    return Table(headings, ranked, "lrr" + "r" * (contexts > 1) + "l" * len(values))


def _distinct(places: np.ndarray, cells_of: Callable[[int], tuple[str, ...]], most: int) -> list[tuple[str, ...]]:
    distinct: dict[tuple[str, ...], None] = {}
    for place in places[:_EXAMINED]:
        distinct.setdefault(cells_of(int(place)))
        if len(distinct) == most:
            break
    return list(distinct)


def checks_table(checks: Sequence[Check]) -> Markup:
    """Write checks as a table; a mark and a word tell the outcome, not only a colour."""
    rows = []
    for check in checks:
        mark = tag("span", f"{MARKS[check.outcome]} {check.outcome}", class_=f"mark {check.outcome}")
        reference = [tag("span", f" {check.reference}", class_="reference")] if check.reference else []
        rows.append((mark, check.name, check.value_text, check.limit, join_html(check.explanation, *reference)))
    return table_html(Table(("", "check", "value", "limit", "what it means"), rows, "llrrl"), "checks")
