"""Figures of how far a fit is from its optimum: frontier, over-optimisation, restarts, weights, held-out data."""

from typing import TYPE_CHECKING, Any

import numpy as np

from bayesrl.arguments import FiniteNumbersOrNone, checked
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.reward_kl_frontier import Frontier
from bayesrl.errors import PolicyError
from bayesrl.exact.weighted_draws import WeightedDraws
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

type Means = Estimate | Interval


@checked(PolicyError)
def frontier_figure(evidence: Evidence, target: WeightedDraws | None = None) -> "Figure":
    """Draw E[R] against KL(q‖π₀), with a point and two standard errors for each β.

    Args:
        evidence: evidence about a fit at several β.
        target: p* at the same β, whose curve no policy can pass; None if unknown.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.report import frontier_figure
        >>> def coin():
        ...     bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(0.5)))
        >>> sweep = bayesrl.fit(jax.random.key(0), coin, beta=jnp.array([0.5, 1.0]), num_steps=10, progress=False)
        >>> frontier_figure(bayesrl.evidence(jax.random.key(1), sweep)).axes[0].get_xlabel()
        'KL to prior  (nats)'
    """
    figure, axes = panel()
    kl, reward = evidence.kl, evidence.reward
    if target is not None and target.beta is not None:
        best_kl, best = np.asarray(target.estimates.kl.mean), np.asarray(target.estimates.reward.mean)
        order = np.argsort(best_kl)
        axes.plot(best_kl[order], best[order], color=TARGET, lw=1.5, ls="--", label="target p*")
    order = np.argsort(kl.mean)
    axes.plot(kl.mean[order], reward.mean[order], color=FITTED, lw=0.8, alpha=0.6)
    _points(axes, kl, reward, FITTED, "fitted q")
    for i in {int(order[0]), int(order[-1])}:
        axes.annotate(
            beta_label(evidence.betas[i]),
            (kl.mean[i], reward.mean[i]),
            (4, -11),
            textcoords="offset points",
            fontsize=8,
        )
    style_axes(axes, "KL to prior  (nats)", "E[R]  (reward units)")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def objective_figure(evidence: Evidence) -> "Figure":
    """Draw J and the bracket of J* against β.

    Args:
        evidence: evidence about a fit at several β.
    """
    figure, axes = panel()
    beta = np.asarray(evidence.beta)
    order = np.argsort(beta)
    optimum = evidence.optimum
    low = np.where(np.isnan(optimum.lower), optimum.conservative_lower, optimum.lower)[order]
    high = np.where(np.isnan(optimum.upper), optimum.conservative_upper, optimum.upper)[order]
    known = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(beta[order], low, high, where=known, color=TARGET, alpha=0.25, lw=0, label="J*, 95%")
    axes.plot(beta[order], optimum.mean[order], color=TARGET, lw=1.3, ls="--", label="J*")
    axes.errorbar(
        beta[order], evidence.objective.mean[order], 2 * evidence.objective.se[order], fmt="o", ms=4, color=FITTED,
        label="J of the fit",
    )  # fmt: skip
    axes.set_xscale("log")
    style_axes(axes, "β  (reward units per nat)", "J  (reward units)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def over_optimisation_figure(
    kl: Means, proxy: Means, gold: Means, name: str, turning_point: float | None = None
) -> "Figure":
    """Draw the optimised reward and the gold metric against √KL (Gao et al. 2023).

    Args:
        kl: KL(q‖π₀), nats, with `mean` and `se`, [*beta].
        proxy: E[R], reward units, in the same form.
        gold: the gold metric, in its own units and the same form.
        name: name of the gold metric.
        turning_point: √KL at which gold is greatest, drawn as a line; None if gold does not turn down.
    """
    figure, axes = panel()
    mean = np.sqrt(np.maximum(np.asarray(kl.mean), 0.0))
    # The delta method gives se(√KL) = se/(2·√KL), which diverges at KL = 0; cap it at the value itself.
    se: Any = np.minimum(np.asarray(kl.se) / (2 * np.maximum(mean, 1e-6)), mean)
    root = Estimate(mean, se)
    order = np.argsort(mean)
    spans = [np.ptp(part.mean) + np.abs(part.mean).max() for part in (proxy, gold)]
    # Gold has its own units: if the scales differ much, one axis would flatten one of the curves.
    apart = max(spans) > _FAR_APART * max(min(spans), 1e-300)
    other = axes.twinx() if apart else axes
    for own, part, colour, label in (
        (axes, proxy, FITTED, "proxy: E[R]"),
        (other, gold, GOLD, escape_mathtext(f"gold: {name}")),
    ):
        own.plot(mean[order], np.asarray(part.mean)[order], color=colour, lw=0.8, alpha=0.6)
        _points(own, root, part, colour, label)
    style_axes(axes, "√KL to prior  (√nats)", "E[R]  (reward units)" if apart else "reward, gold")
    if apart:
        style_axes(other, "", f"gold: {name}")
        other.grid(visible=False)
        other.spines["right"].set_visible(True)
    if turning_point is not None:
        axes.axvline(turning_point, color=GOLD, ls=":", lw=1.3)
    legend_above(figure)
    return figure


def restarts_figure(posterior: Posterior, optimum: FiniteNumbersOrNone = None) -> "Figure":
    """Draw J of each restart with two standard errors, at up to three β.

    Args:
        posterior: posterior with its draws.
        optimum: J* of each β, reward units; None if unknown.

    Raises:
        PolicyError: the posterior has no draws.
    """
    if not posterior.statistics:
        raise PolicyError("the posterior has no draws, so its restarts cannot be compared; load it with its policy")
    figure, axes = panel()
    betas = betas_of(posterior)
    objective = posterior.estimates.objective
    mean, se = (np.reshape(part, (len(betas), -1)) for part in objective)
    shown, optima = shown_betas(betas), optima_of(posterior, optimum)
    colours = beta_colours(len(shown))
    for k, i in enumerate(shown):
        at = np.arange(mean.shape[1]) + (k - (len(shown) - 1) / 2) * 0.12
        axes.errorbar(at, mean[i], 2 * se[i], fmt="o", ms=4, color=colours[k], label=beta_label(betas[i]))
        if optima is not None and np.isfinite(optima[i]):
            axes.axhline(float(optima[i]), color=colours[k], ls="--", lw=1)
    axes.set_xticks(np.arange(mean.shape[1]))
    style_axes(axes, "restart", objective_label(posterior.beta))
    legend_above(figure)
    return figure


@checked(PolicyError)
def weights_figure(posterior: Posterior, evidence: Evidence | None = None) -> "Figure":
    """Draw the log weights w = R/β + log π₀ − log q of the draws, minus log Z of their contexts if it is known.

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
    weights = np.asarray(best.statistics["log_weight"], float)
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
    style_axes(axes, f"w − {'log Z' if known else 'its mean'}  (nats)", "share of draws")
    legend_above(figure)
    return figure


def held_out_figure(
    beta: list[float | None], training: Estimates | Evidence, held_out: Estimates | Evidence
) -> "Figure":
    """Draw E[R] on training and held-out data with two standard errors, by β; J without rewards.

    Args:
        beta: temperatures; one None without rewards.
        training: estimates on the data of the fit, [*beta].
        held_out: estimates on other data, [*beta].
    """
    figure, axes = panel()
    at, rewarded = np.arange(len(beta)), all(one is not None for one in beta)
    for offset, estimates, colour, label in (
        (-0.08, training, FITTED, "training"),
        (0.08, held_out, TARGET, "held out"),
    ):
        shown = estimates.reward if rewarded else estimates.objective
        mean, se = np.reshape(shown.mean, -1), np.reshape(shown.se, -1)
        axes.errorbar(at + offset, mean, 2 * se, fmt="o", ms=5, color=colour, label=label)
    axes.set_xticks(at, [beta_label(b) for b in beta], rotation=45 if len(beta) > SHOWN_BETAS else 0)
    axes.set_xlim(-0.6, len(beta) - 0.4)
    style_axes(axes, "", "E[R]  (reward units)" if rewarded else objective_label(None))
    axes.legend(frameon=False, fontsize=9)
    return figure


def turning_kl(frontier: Frontier) -> float | None:
    """Return √KL at the β where gold turns down, or None if it does not."""
    if frontier.turning_point is None:
        return None
    index = int(np.argmin(np.abs(frontier.beta - frontier.turning_point)))
    return float(np.sqrt(max(float(frontier.evidence.kl.mean[index]), 0.0)))


def _points(axes: "Axes", x: Any, y: Any, colour: str, label: str) -> None:
    axes.errorbar(
        np.asarray(x.mean), np.asarray(y.mean), 2 * np.asarray(y.se), 2 * np.asarray(x.se), fmt="o", ms=4, lw=1,
        color=colour, label=label,
    )  # fmt: skip
