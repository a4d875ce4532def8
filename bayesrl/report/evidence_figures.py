"""Figures of how far a fit is from its optimum: frontier, over-optimisation, restarts, weights, held-out data."""

from typing import TYPE_CHECKING, Any

import numpy as np

from bayesrl.arguments import FiniteNumbersOrNone, checked
from bayesrl.diagnostics.engines.engine_table import EngineComparison, ends_of, label_of
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.proxy_gains import Overoptimisation
from bayesrl.diagnostics.reward_kl_frontier import Frontier
from bayesrl.errors import PolicyError
from bayesrl.exact.regularizers import make_regularizer
from bayesrl.exact.weighted_draws import WeightedDraws, refuse_other_regularizer
from bayesrl.monte_carlo.best_of_draws import BestOfDraws
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.fit_figures import SHOWN_BETAS, betas_of, objective_label, optima_of, shown_betas
from bayesrl.report.site_panels import (
    BINS,
    FITTED,
    PRIOR,
    TARGET,
    beta_colours,
    beta_label,
    escape_mathtext,
    legend_above,
    panel,
    style_axes,
)
from bayesrl.statistics.estimates import Estimate, Estimates, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOLD = "#E69F00"
_FAR_APART = 5
_CROWDED = 0.12
"""Labels closer than this share of the axes would lie on each other."""

type Means = Estimate | Interval


@checked(PolicyError)
def frontier_figure(
    evidence: Evidence, target: WeightedDraws | None = None, best_of: BestOfDraws | None = None
) -> "Figure":
    """Draw E[R] against KL(q‖π₀), or what takes its place in J, with a point and two standard errors for each β.

    Args:
        evidence: evidence about a fit at several β.
        target: p* at the same β, whose curve no policy can pass; None if unknown.
        best_of: the best of n draws of the same policy, at several n, on the same axes; None for none.

    Raises:
        EngineError: the target has another regulariser than the fit.
        PolicyError: `best_of` is given, whose law is known by its KL, and the fit has another regulariser.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.report import frontier_figure
        >>> def coin():
        ...     bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(0.5)))
        >>> sweep = bayesrl.fit(jax.random.key(0), coin, beta=jnp.array([0.5, 1.0]), num_steps=10, progress=False)
        >>> frontier_figure(bayesrl.evidence(jax.random.key(1), sweep)).axes[0].get_xlabel()
        'KL to prior  (nats)'
    """
    refuse_other_regularizer(target, "the fit has", evidence.regularizer, evidence.alpha)
    if best_of is not None and evidence.regularizer != "kl":
        raise PolicyError(
            f"best_of is drawn by its KL, and the fit has regularizer={evidence.regularizer!r}; leave best_of= out"
        )
    figure, axes = panel()
    kl, reward = evidence.kl if evidence.divergence is None else evidence.divergence, evidence.reward
    curve = []
    if target is not None and target.beta is not None:
        price = target.estimates.kl if target.estimates.divergence is None else target.estimates.divergence
        curve.append((np.ravel(price.mean), np.ravel(target.estimates.reward.mean)))
    if best_of is not None:  # it knows the curve of p* too
        curve.append((np.ravel(best_of.kl.mean), np.ravel(best_of.best_reward.mean)))
    if curve:
        best_kl, best = (np.concatenate(parts) for parts in zip(*curve, strict=True))
        along = np.argsort(best_kl)
        axes.plot(best_kl[along], best[along], color=TARGET, lw=1.5, ls="--", label="target p*")
    if best_of is not None:
        _best_of_n(axes, best_of)
    order = np.argsort(kl.mean)
    axes.plot(kl.mean[order], reward.mean[order], color=FITTED, lw=0.8, alpha=0.6)
    _points(axes, kl.mean, reward, FITTED, "fitted q", 2 * kl.se)
    for i in {int(order[0]), int(order[-1])}:
        at = (kl.mean[i], reward.mean[i])
        axes.annotate(beta_label(evidence.betas[i]), at, (4, -11), textcoords="offset points", fontsize=8)
    unit = "  (nats)" if evidence.regularizer == "kl" else ""
    style_axes(axes, f"{evidence.symbol} to prior{unit}", "E[R]  (reward units)")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _best_of_n(axes: "Axes", found: BestOfDraws) -> None:
    """Draw the best of n draws, one point per n."""
    number = found.n.reshape(-1)
    kl, reward = (Estimate(*(np.reshape(part, -1) for part in each)) for each in (found.kl, found.reward))
    order = np.argsort(number)
    axes.plot(kl.mean[order], reward.mean[order], color=GOLD, lw=0.8, alpha=0.6)
    _points(axes, np.asarray(kl.mean), reward, GOLD, "best of n", 2 * np.asarray(kl.se))
    places = np.stack([kl.mean, reward.mean], 1)
    size = np.maximum(np.ptp(places, axis=0), 1e-12)
    told = list[np.ndarray]()
    for i in order[::-1]:
        at = (float(kl.mean[i]), float(reward.mean[i]))
        if any(np.abs((places[i] - other) / size).max() < _CROWDED for other in told):
            continue
        told.append(places[i])
        axes.annotate(f"n = {number[i]}", at, (-3, 4), textcoords="offset points", fontsize=8, ha="right")


def objective_figure(evidence: Evidence) -> "Figure":
    """Draw J and the bracket of J* against β, of a fit at several."""
    figure, axes = panel()
    evidence = evidence[np.argsort(np.asarray(evidence.beta))]
    beta, optimum = np.asarray(evidence.beta), evidence.optimum
    low = np.where(np.isnan(optimum.lower), optimum.conservative_lower, optimum.lower)
    high = np.where(np.isnan(optimum.upper), optimum.conservative_upper, optimum.upper)
    known = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(beta, low, high, where=known, color=TARGET, alpha=0.25, lw=0, label="J*, 95%")
    axes.plot(beta, optimum.mean, color=TARGET, lw=1.3, ls="--", label="J*")
    _points(axes, beta, evidence.objective, FITTED, "J of the fit")
    axes.set_xscale("log")
    style_axes(axes, "β  (reward units per nat)", "J  (reward units)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def over_optimisation_figure(
    kl: Means, proxy: Means, gold: Means, name: str, turning_point: float | None = None
) -> "Figure":
    """Draw E[R] and a gold metric in its own units against √KL (Gao et al. 2023), all [*beta].

    A line marks `turning_point`, the √KL at which gold is greatest; it is None if gold does not turn down.
    """
    figure, axes = panel()
    root = np.sqrt(np.maximum(np.asarray(kl.mean), 0.0))
    # The delta method gives se(√KL) = se/(2·√KL), which diverges at KL = 0; cap it at the value itself.
    error = np.minimum(np.asarray(kl.se) / (2 * np.maximum(root, 1e-6)), root)
    order = np.argsort(root)
    spans = [np.ptp(part.mean) + np.abs(part.mean).max() for part in (proxy, gold)]
    # Gold has its own units: if the scales differ much, one axis would flatten one of the curves.
    apart = max(spans) > _FAR_APART * max(min(spans), 1e-300)
    other = axes.twinx() if apart else axes
    for own, part, colour, label in (
        (axes, proxy, FITTED, "proxy: E[R]"),
        (other, gold, GOLD, escape_mathtext(f"gold: {name}")),
    ):
        own.plot(root[order], np.asarray(part.mean)[order], color=colour, lw=0.8, alpha=0.6)
        _points(own, root, part, colour, label, 2 * error)
    style_axes(axes, "√KL to prior  (√nats)", "E[R]  (reward units)" if apart else "reward, gold")
    if apart:
        style_axes(other, "", f"gold: {name}")
        other.grid(visible=False)
        other.spines["right"].set_visible(True)
    if turning_point is not None:
        axes.axvline(turning_point, color=GOLD, ls=":", lw=1.3)
    legend_above(figure)
    return figure


@checked(PolicyError)
def trust_figure(found: Overoptimisation) -> "Figure":
    """Draw gains over the prior policy against KL: the proxy, the true reward as predicted with its interval, and gold.

    A line marks where the lower end turns down.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl import rewards
        >>> from bayesrl.report import trust_figure
        >>> reward = rewards.uncertain((np.array([0.0, 0.5, 0.6]), np.diag([0.01, 0.01, 1.0])))
        >>> def bandit():
        ...     bayesrl.reward("score", reward(numpyro.sample("item", dist.Categorical(logits=jnp.zeros(3)))))
        >>> found = bayesrl.overoptimisation(jax.random.key(0), bandit, beta=jnp.array([0.3, 1.0]))
        >>> trust_figure(found).axes[0].get_ylabel()
        'gain over the prior policy'
    """
    figure, axes = panel()
    kl = np.asarray(found.kl.mean)
    axes.axhline(0.0, color="#888888", lw=0.8)
    axes.fill_between(kl, found.lower, found.upper, color=TARGET, alpha=0.2, lw=0, label=f"true, {found.level:.0%}")
    for part, colour, label in (
        (found.predicted, TARGET, "true, predicted"),
        (found.proxy, FITTED, "proxy"),
        *([(found.gold, GOLD, "gold")] if found.gold is not None else []),
    ):
        axes.plot(kl, part.mean, color=colour, lw=0.8, alpha=0.6)
        _points(axes, kl, part, colour, label)
    if found.turning_point is not None:
        axes.axvline(kl[int(found.lower.argmax())], color=TARGET, ls=":", lw=1.3)
    for i in {0, len(kl) - 1}:
        at = (float(kl[i]), float(found.lower[i]))
        label = f"{found.symbol} = {found.strength[i]:.3g}"
        axes.annotate(label, at, (3, -10), textcoords="offset points", fontsize=8, ha="left" if i == 0 else "right")
    style_axes(axes, "KL to prior  (nats)", "gain over the prior policy")
    legend_above(figure)
    return figure


def restarts_figure(posterior: Posterior, optimum: FiniteNumbersOrNone = None) -> "Figure":
    """Draw J of each restart with two standard errors, at up to three β, and J* of each β where it is known.

    Raises:
        PolicyError: the posterior has no draws.
    """
    if not posterior.statistics:
        raise PolicyError("the posterior has no draws, so its restarts cannot be compared; load it with its policy")
    figure, axes = panel()
    betas = betas_of(posterior)
    objective = Estimate(*(np.reshape(part, (len(betas), -1)) for part in posterior.estimates.objective))
    restarts = np.arange(objective.mean.shape[1])
    shown, optima = shown_betas(betas), optima_of(posterior, optimum)
    colours = beta_colours(len(shown))
    for k, i in enumerate(shown):
        own = Estimate(objective.mean[i], objective.se[i])
        _points(axes, restarts + (k - (len(shown) - 1) / 2) * 0.12, own, colours[k], beta_label(betas[i]))
        if optima is not None and np.isfinite(optima[i]):
            axes.axhline(float(optima[i]), color=colours[k], ls="--", lw=1)
    axes.set_xticks(restarts)
    style_axes(axes, "restart", objective_label(posterior.beta))
    legend_above(figure)
    return figure


@checked(PolicyError)
def weights_figure(posterior: Posterior, evidence: Evidence | None = None) -> "Figure":
    """Draw the log weights w = R/β + log π₀ − log q of the draws, minus log Z of their contexts if it is known.

    With another regulariser, draw R/β − f′(q/π₀), which is the same for all draws of its optimum.

    Args:
        posterior: posterior with its draws; of several β at most three are drawn, each at its best restart.
        evidence: evidence about the same fit.

    Raises:
        PolicyError: the posterior has no draws.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.report import weights_figure
        >>> def coin():
        ...     bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(0.5)))
        >>> posterior = bayesrl.fit(jax.random.key(0), coin, beta=1.0, num_steps=10, progress=False)
        >>> weights_figure(posterior).axes[0].get_ylabel()
        'share of draws'
    """
    if not posterior.statistics:
        raise PolicyError("the posterior has no draws, so there are no weights to show; load it with its policy")
    figure, axes = panel()
    betas, best = betas_of(posterior), posterior.select(restart="best")
    weights, name = _tempered_slack(best)
    weights = weights.reshape(len(betas), weights.shape[len(best.batch_shape)], -1)
    log_z = None if evidence is None or evidence.by_context is None else evidence.by_context.mean
    known = log_z is not None and log_z.size == len(betas) * weights.shape[2]
    centre = log_z.reshape(len(betas), 1, -1) if log_z is not None and known else weights.mean(1, keepdims=True)
    shown = shown_betas(betas)
    parts = [(weights - centre)[i].ravel() for i in shown]
    width = max(0.05, *(float(np.abs(np.quantile(p, (0.002, 0.998))).max()) for p in parts))
    edges = np.linspace(-1.05 * width, 1.05 * width, BINS + 2)  # an odd number of bins: 0 is inside one
    for part, colour, i in zip(parts, beta_colours(len(shown)), shown, strict=True):
        heights = np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] / part.size
        axes.stairs(heights, edges, color=colour, fill=len(shown) == 1, alpha=0.9, lw=1.5, label=beta_label(betas[i]))
    axes.axvline(0.0, color=TARGET if known else PRIOR, ls="--", lw=1.2, label="log Z" if known else "mean")
    style_axes(axes, f"{name} − {'log Z' if known else 'its mean'}  (nats)", "share of draws")
    legend_above(figure)
    return figure


def _tempered_slack(best: Posterior) -> tuple[np.ndarray, str]:
    """Return what is constant over draws of p*, [*beta, restart, draw, *contexts], nats, and its name."""
    regularizer, alpha = best.settings.get("regularizer", "kl"), best.settings.get("alpha")
    f, told = make_regularizer(regularizer, alpha), {k: np.asarray(v, float) for k, v in best.statistics.items()}
    if f is None:
        return told["log_weight"], "w"
    beta = np.asarray(best.beta, float)
    beta = beta.reshape(*beta.shape, *(1,) * (told["log_q"].ndim - beta.ndim))
    ratio = np.exp(np.minimum(told["log_q"] - told["log_prior"], 700.0))
    return told["total_reward"] / beta + f.descent(ratio), "R/β − f′(q/π₀)"


def held_out_figure(
    beta: list[float | None], training: Estimates | Evidence, held_out: Estimates | Evidence
) -> "Figure":
    """Draw E[R] on training and held-out data with two standard errors, by β; J without rewards, where β is None."""
    figure, axes = panel()
    at, rewarded = np.arange(len(beta)), all(one is not None for one in beta)
    for offset, estimates, colour, label in (
        (-0.08, training, FITTED, "training"),
        (0.08, held_out, TARGET, "held out"),
    ):
        _points(axes, at + offset, estimates.reward if rewarded else estimates.objective, colour, label)
    axes.set_xticks(at, [beta_label(b) for b in beta], rotation=45 if len(beta) > SHOWN_BETAS else 0)
    axes.set_xlim(-0.6, len(beta) - 0.4)
    style_axes(axes, "", "E[R]  (reward units)" if rewarded else objective_label(None))
    axes.legend(frameon=False, fontsize=9)
    return figure


def engines_figure(comparison: EngineComparison) -> "Figure":
    """Draw what each engine says of log Z: limits as thin lines, intervals as thick ones, exact values as diamonds.

    At several β, of which at most three are drawn, each is less what the tightest engine says.
    """
    figure, axes = panel()
    betas, rows = comparison.betas, comparison.rows
    shown = shown_betas(betas)
    best, colours = comparison[comparison.tightest], beta_colours(len(shown))
    spans = []
    for k, i in enumerate(shown):
        centre = 0.0 if len(shown) == 1 else float(np.mean(ends_of(best.bracket(i))))
        label = "" if len(shown) == 1 else beta_label(betas[i])
        for place, row in enumerate(rows):
            y = place + (k - (len(shown) - 1) / 2) * 0.22
            spans += _bracket(axes, row.bracket(i), centre, y, colours[k], "" if place else label)
        if best.width(i) == 0:
            axes.axvline(float(best.bracket(i).mean) - centre, color=TARGET, ls="--", lw=1)
    low, high = min(spans, default=0.0), max(spans, default=1.0)
    margin = 0.06 * (high - low) or 0.1
    axes.set_xlim(low - margin, high + margin)
    for line in axes.lines:
        # A side that nothing limits ends at the border.
        line.set_xdata(np.clip(np.asarray(line.get_xdata(), float), low - margin, high + margin))
    axes.set_yticks(range(len(rows)), [label_of(row.engine) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    what = comparison.quantity if len(shown) == 1 else f"{comparison.quantity}, less that of the tightest"
    style_axes(axes, f"{what}  ({'nats' if comparison.quantity == 'log Z' else 'reward units'})", "")
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    if len(shown) > 1:
        legend_above(figure)
    return figure


def _bracket(axes: "Axes", found: Interval, centre: float, y: float, colour: Any, label: str) -> list[float]:
    """Draw one row of `engines_figure`; return its ends that are finite."""
    mean, _, lower, upper, floor, ceiling = (float(part) - centre for part in found)
    if floor == ceiling:
        axes.plot([mean], [y], "D", ms=5, color=colour, label=label or None)
        return [mean]
    axes.plot([floor, ceiling], [y, y], lw=1, color=colour, alpha=0.6, label=label or None)
    for end, mark in ((floor, "|"), (ceiling, "|")):
        if np.isfinite(end):
            axes.plot([end], [y], mark, ms=6, color=colour)
    if np.isfinite(lower) and np.isfinite(upper):
        axes.plot([lower, upper], [y, y], lw=3.5, color=colour, solid_capstyle="butt")
    if np.isfinite(mean):
        trusted = np.isfinite(upper)
        axes.plot([mean], [y], "o", ms=4, color=colour, mfc=colour if trusted else "none")
    return [end for end in (floor, ceiling, mean) if np.isfinite(end)]


def turning_kl(frontier: Frontier) -> float | None:
    """Return √KL at the β where gold turns down, or None if it does not."""
    if frontier.turning_point is None:
        return None
    index = int(np.argmin(np.abs(frontier.beta - frontier.turning_point)))
    return float(np.sqrt(max(float(frontier.evidence.kl.mean[index]), 0.0)))


def _points(axes: "Axes", x: np.ndarray, y: Means, colour: Any, label: str, x_error: Any = None) -> None:
    """Draw means with bars of two standard errors."""
    mean, error = np.reshape(y.mean, -1), 2 * np.reshape(y.se, -1)
    axes.errorbar(x, mean, error, x_error, fmt="o", ms=4, lw=1, color=colour, label=label)
