"""Figures of a fit: how it trained, and how the fitted policy compares with the prior and the target.

Figures are made without pyplot, so they need no display and leave no global state.
"""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesrl.arguments import FiniteNumbersOrNone, Location, checked
from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.diagnostics.diagnosed_fit import full_data_fit
from bayesrl.errors import PolicyError
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.files.regular_files import file_name, write_file
from bayesrl.posterior.from_params import with_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.site_panels import (
    PANEL_SIZE,
    SiteComparison,
    beta_colours,
    beta_label,
    compare_site,
    escape_mathtext,
    is_text,
    legend_above,
    map_height,
    panel,
    shown_sites,
    site_panels,
    style_axes,
)
from bayesrl.statistics.regularizer_names import regularizer_of, regularizer_symbol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_BETAS = 3
MAX_LEGEND_BETAS = 6

HISTORY = {
    "objective": ("J", "J should rise and level off"),
    "reward": ("E[R]  (reward units)", "E[R] is what the policy earns"),
    "kl": ("KL to prior  (nats)", "KL is the price: how far it left the prior"),
}
"""Curves of the history, with their labels and what a good one looks like."""

DIVERGENCE = "metrics/divergence"
"""The curve of the divergence that takes the place of KL."""


@checked(PolicyError)
def training_figure(posterior: Posterior, optimum: FiniteNumbersOrNone = None) -> "Figure":
    """Draw J, E[R] and KL along the training steps, a line per β and restart.

    Args:
        posterior: fitted or loaded.
        optimum: J* of each β, reward units, drawn as dashed lines; None if unknown.

    Raises:
        PolicyError: the posterior has no history.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.report import training_figure
        >>> def coin():
        ...     bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(0.5)))
        >>> posterior = bayesrl.fit(jax.random.key(0), coin, beta=1.0, num_steps=10, progress=False)
        >>> len(training_figure(posterior).axes)  # J, E[R], KL
        3
    """
    from matplotlib.figure import Figure

    curves = curve_names(posterior)
    figure = Figure(figsize=(11 if len(curves) < 4 else 14, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(curves)), curves, strict=True):
        _draw_history(axes, posterior, name, optimum)
        if len(betas_of(posterior)) > MAX_LEGEND_BETAS:
            if name == "kl":
                _beta_colorbar(figure, axes, betas_of(posterior))
        elif name == "objective":
            axes.legend(frameon=False, fontsize=9, loc="lower right")
    restarts = f"; {posterior.num_restarts} restarts, one line each" if posterior.num_restarts > 1 else ""
    goal = " and meet the dashed optimum J*" if optimum is not None else ""
    figure.suptitle(f"Training: the curves should become flat{goal}{restarts}", fontsize=11)
    return figure


@checked(PolicyError)
def history_figure(posterior: Posterior, name: str, optimum: FiniteNumbersOrNone = None) -> "Figure":
    """Draw one curve of `training_figure`: `objective` (with the optimum), `reward`, `kl`, or `DIVERGENCE`.

    Raises:
        PolicyError: the posterior has no history.
    """
    if name not in curve_names(posterior):
        raise PolicyError(f"name must be {' or '.join(map(repr, curve_names(posterior)))}, got {name!r}")
    figure, axes = panel()
    _draw_history(axes, posterior, name, optimum if name == "objective" else None)
    axes.set_title("")
    if len(betas_of(posterior)) > MAX_LEGEND_BETAS:
        _beta_colorbar(figure, axes, betas_of(posterior))
    else:
        legend_above(figure)
    return figure


@checked(PolicyError)
def policy_figure(posterior: Posterior, target: WeightedDraws | None = None, site: str | None = None) -> "Figure":
    """Draw what the fitted policy does at a site, beside the prior and the target p*.

    Finite supports become bars, reals histograms, sequences heat maps (finite) or bands (reals). If there are
    contexts, values are averaged over them, and a second row shows the distribution, over contexts, of the
    probability that a policy puts on the target's best action. Of several β the figure shows the coldest, the
    middle and the warmest, each with its best restart.

    Args:
        posterior: fitted; one loaded without its policy shows its saved draws.
        target: p* at the same β, for instance from `enumerate_posterior`.
        site: name of a site; by default the first action.

    Raises:
        PolicyError: the posterior has no draws of the site.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.report import policy_figure
        >>> def coin():
        ...     bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(0.5)))
        >>> posterior = bayesrl.fit(jax.random.key(0), coin, beta=1.0, num_steps=10, progress=False)
        >>> figure = policy_figure(posterior, bayesrl.enumerate_posterior(coin, beta=1.0))
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['prior π₀', 'fitted q', 'target p*']
    """
    from matplotlib.figure import Figure

    compared = _compare_betas(posterior, target, site)
    first, panels = compared[0], [site_panels(own) for own in compared]
    # Maps of one β stand side by side, and other panels of one β below each other.
    rows = panels if first.is_map else list(zip(*panels, strict=True))
    height = map_height(first) if first.is_map else 3.9
    figure = Figure(figsize=(max(5.2 * len(rows[0]), 7), height * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharey="none" if first.support == "reals" else "row")
    for (row, column), axes in np.ndenumerate(grid):
        rows[row][column](axes, legend=column == 0)
    known = first.target is not None or first.density is not None
    goal = (
        "a good fit (q) matches the target (p*)"
        if known
        else "what the fit changed; the prior (π₀) is where it started"
    )
    along = f" along its {first.steps}s" if first.is_map else ""
    figure.suptitle(escape_mathtext(f"Site “{first.site}”{along}: {goal}"), fontsize=11)
    return figure


def site_figures(posterior: Posterior, target: WeightedDraws | None = None, site: str | None = None) -> list["Figure"]:
    """Draw the panels of `policy_figure` as small figures that a page can arrange.

    Raises:
        PolicyError: the posterior has no draws of the site.
    """
    figures = []
    for own in _compare_betas(posterior, target, site):
        for draw in site_panels(own):
            figure, axes = panel()
            if own.is_map:
                figure.set_size_inches(PANEL_SIZE[0], map_height(own))
            draw(axes, legend=True)
            figures.append(figure)
    return figures


@checked(PolicyError)
def save_figures(
    directory: Location,
    posterior: Posterior,
    target: WeightedDraws | None = None,
    optimum: FiniteNumbersOrNone = None,
    *,
    best: Posterior | None = None,
) -> list[Path]:
    """Write the figures of a posterior as PNG and SVG.

    Args:
        directory: an existing folder.
        posterior: fitted or loaded.
        target: p* at the same β, or None.
        optimum: J* of each β, reward units; by default that of the target.
        best: an existing posterior of its best restarts on all data, with draws; by default it is made here.

    Returns:
        The paths of the files: `training`, and `policy` or, with several action sites, `policy_SITE`.

    Raises:
        RunFolderError: the folder cannot be written.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, bayesrl, tempfile
        >>> from bayesrl.report import save_figures
        >>> def coin():
        ...     bayesrl.reward("heads", 1.0 * numpyro.sample("side", dist.Bernoulli(0.5)))
        >>> posterior = bayesrl.fit(jax.random.key(0), coin, beta=1.0, num_steps=10, progress=False)
        >>> [path.name for path in save_figures(tempfile.mkdtemp(), posterior)]
        ['training.png', 'training.svg', 'policy.png', 'policy.svg']
    """
    if optimum is None and target is not None and target.optimum is not None:
        lead = 0 if target.beta is None else target.beta.ndim
        optimum = target.optimum.mean(tuple(range(lead, target.optimum.ndim))).reshape(-1)
    figures = {}
    if len(posterior.history.get("step", ())):
        figures["training"] = training_figure(posterior, optimum)
    names = list(shown_sites(posterior))
    best = best if best is not None else best_over_all_data(posterior)
    for name in names:
        if not is_text(best, name):
            figures["policy" if len(names) == 1 else f"policy_{name}"] = policy_figure(best, target, name)
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            path = Path(directory) / f"{file_name(name)}.{suffix}"
            content = BytesIO()
            # Without a date the same fit gives the same bytes.
            figure.savefig(content, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            write_file(path, content.getvalue())
            written.append(path)
    return written


# ---- what to show ----------------------------------------------------------------------------


def betas_of(posterior: Posterior) -> list[float | None]:
    """Return the temperatures as a list; one None without rewards."""
    return [None] if posterior.beta is None else [float(b) for b in np.atleast_1d(posterior.beta)]


def shown_betas(betas: list[float | None]) -> list[int]:
    """Choose the coldest, the middle and the warmest of many temperatures; return their indices."""
    order = np.argsort([1.0 if beta is None else beta for beta in betas])
    return [int(order[i]) for i in np.unique(np.linspace(0, len(order) - 1, SHOWN_BETAS).round().astype(int))]


def best_over_all_data(posterior: Posterior) -> Posterior:
    """Return the best restarts, on all data if the fit saw mini-batches: figures compare contexts."""
    best = posterior.select(restart="best") if posterior.mixture is None else posterior
    if best.programs is None or not best.programs.structure.subsampled:
        return best
    return with_draws(key_from_seed(0), full_data_fit(best))


def optima_of(posterior: Posterior, optimum: Any) -> np.ndarray | None:
    """Return J* of each β, [betas], or None if unknown.

    Raises:
        PolicyError: the number of values differs from that of β.
    """
    count, given = len(betas_of(posterior)), np.asarray(optimum, float)
    if optimum is None:
        return None
    if given.size != count:
        raise PolicyError(f"optimum has shape {given.shape}, and the posterior {count} β; pass a number for each β")
    return given.reshape(-1)


def objective_label(beta: object) -> str:
    """Label J with its unit: without rewards it is the ELBO."""
    return "J  (reward units)" if beta is not None else "J, the ELBO  (nats)"


def _compare_betas(posterior: Posterior, target: WeightedDraws | None, site: str | None) -> list[SiteComparison]:
    site = next(iter(shown_sites(posterior)), "") if site is None else site
    best, betas = best_over_all_data(posterior), betas_of(posterior)
    if posterior.beta is None or np.ndim(posterior.beta) == 0:
        return [compare_site(best, target, site)]
    return [compare_site(best.select(beta=betas[i]), target, site) for i in shown_betas(betas)]


# ---- training -----------------------------------------------------------------------------------


def curve_names(posterior: Posterior) -> list[str]:
    """Name the curves of a history; without rewards E[R] is always 0 and is left out."""
    if regularizer_of(posterior.settings)[0] != "kl" and DIVERGENCE in posterior.history:
        return ["objective", "reward", DIVERGENCE, "kl"]
    return [name for name in HISTORY if posterior.beta is not None or name != "reward"]


def _described(posterior: Posterior, name: str) -> tuple[str, str]:
    """Return the label of a curve, and what a good one looks like."""
    regularizer = regularizer_of(posterior.settings)
    if name == DIVERGENCE:
        symbol = regularizer_symbol(*regularizer)
        return f"{symbol} to prior", f"{symbol}, in the place of KL, is the price"
    if name == "kl" and regularizer[0] != "kl":
        return HISTORY[name][0], "KL, in no J: how far it left the prior"
    return HISTORY[name]


def _draw_history(axes: "Axes", posterior: Posterior, name: str, optimum: Any) -> None:
    if not len(posterior.history.get("step", ())):
        raise PolicyError("the posterior has no history yet, so there is no training to draw; fit it for some steps")
    steps, betas = posterior.history["step"], betas_of(posterior)
    optimum = optima_of(posterior, optimum)
    label, title = _described(posterior, name)
    label = objective_label(posterior.beta) if name == "objective" else label
    colours = beta_colours(len(betas))
    lines = np.asarray(posterior.history[name]).reshape(len(steps), len(betas), -1)
    for i, beta in enumerate(betas):
        for restart in range(lines.shape[2]):
            legend = beta_label(beta) if restart == 0 else None
            axes.plot(steps, lines[:, i, restart], color=colours[i], lw=1.3, alpha=0.9, label=legend)
        if name == "objective" and optimum is not None and np.isfinite(optimum[i]):
            axes.axhline(optimum[i], color=colours[i], ls="--", lw=1)
    style_axes(axes, "step", label, title)
    if name == "objective" and optimum is not None:
        # An empty line puts the optimum into the legend once, not once per β.
        axes.plot([], [], color=colours[0] if len(betas) == 1 else "black", ls="--", lw=1, label="optimum J*")


def _beta_colorbar(figure: "Figure", axes: "Axes", betas: list[float | None]) -> None:
    """Label the lines of many β with a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(betas)
    mappable = ScalarMappable(BoundaryNorm(np.arange(count + 1), count), ListedColormap(beta_colours(count)))
    bar = figure.colorbar(mappable, ax=axes, label="β")
    ticks = np.unique(np.linspace(0, count - 1, 6).round().astype(int))
    bar.set_ticks([t + 0.5 for t in ticks], labels=[f"{betas[t]:.3g}" for t in ticks])
