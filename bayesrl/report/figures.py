"""Figures of a fit: how it trained, and what the fitted policy does beside the prior and the target.

Figures are made without pyplot, so that they need no display and leave no global state.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from bayesrl.certainty.scoreboard import over_all_data
from bayesrl.engines.fitting import with_draws
from bayesrl.engines.weighted import WeightedDraws
from bayesrl.errors import PolicyError, RunFolderError
from bayesrl.posterior import Posterior
from bayesrl.report.laid_out import Laid, frequencies, lay_out, quantiles, sites_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette, told apart by the colour-blind and in grey.
PRIOR, FITTED, TARGET = "#9a9a9a", "#0072B2", "#D55E00"
SHOWN_BETAS = 3
SHOWN_BARS = 30
BINS = 40

_HISTORY = (
    ("objective", "J  (reward units)", "J should rise and level off"),
    ("reward", "E[R]  (reward units)", "E[R] is what the policy earns"),
    ("kl", "KL to prior  (nats)", "KL is the price: how far it left the prior"),
)


def training_figure(posterior: Posterior, optimum: Sequence[float] | np.ndarray | None = None) -> "Figure":
    """Draw J, E[R] and KL along the training steps, a line per β and restart.

    Args:
        posterior: fitted or loaded.
        optimum: J* of each β, reward units, drawn as dashed lines; None where it is not known.

    Raises:
        PolicyError: the posterior has no history.
    """
    from matplotlib.figure import Figure

    steps = posterior.history.get("step", np.zeros(0))
    if not len(steps):
        raise PolicyError("the posterior has no history yet, so there is no training to draw; fit it for some steps")
    betas = _betas(posterior)
    colours = _beta_colours(len(betas))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (name, label, title) in zip(figure.subplots(1, 3), _HISTORY, strict=True):
        lines = np.asarray(posterior.history[name]).reshape(len(steps), len(betas), -1)
        for i, beta in enumerate(betas):
            for restart in range(lines.shape[2]):
                legend = _beta_label(beta) if restart == 0 else None
                axes.plot(steps, lines[:, i, restart], color=colours[i], lw=1.3, alpha=0.9, label=legend)
            if name == "objective" and optimum is not None and np.isfinite(optimum[i]):
                axes.axhline(optimum[i], color=colours[i], ls="--", lw=1)
        _axes(axes, "step", label, title)
        if name == "objective" and optimum is not None:
            axes.plot([], [], color="black", ls="--", lw=1, label="optimum J*")
        _legend_of_betas(figure, axes, betas, name)
    restarts = f"; {posterior.num_restarts} restarts, one line each" if posterior.num_restarts > 1 else ""
    goal = " and meet the dashed optimum J*" if optimum is not None else ""
    figure.suptitle(f"Training: the curves should become flat{goal}{restarts}", fontsize=11)
    return figure


def policy_figure(posterior: Posterior, target: WeightedDraws | None = None, site: str | None = None) -> "Figure":
    """Draw what the fitted policy does at a site, beside the prior and the target p*.

    Finite supports are bars, reals histograms, sequences heat maps (finite) or bands (reals). Where
    there are contexts, values are averaged over them, and a second row shows, over contexts, the
    probability put on the action that the target likes best. Of several β the coldest, the middle
    and the warmest are shown, each with its best restart.

    Args:
        posterior: fitted; a loaded one without its policy shows its saved draws.
        target: p* at the same β, such as `enumerate_posterior` gives.
        site: by default the first action.

    Raises:
        PolicyError: the posterior has no draws of the site.
    """
    from matplotlib.figure import Figure

    name = next(iter(sites_of(posterior)), "") if site is None else site
    panels = _panels(posterior, target, name)
    first = panels[0]
    if first.steps and first.support != "reals":
        return _sequence_figure(panels)
    by_context = _compares_contexts(first)
    rows = 2 if by_context else 1
    figure = Figure(figsize=(max(5.2 * len(panels), 7), 3.9 * rows), layout="constrained")
    grid = figure.subplots(rows, len(panels), squeeze=False, sharey="none" if first.support == "reals" else "row")
    for column, laid in enumerate(panels):
        _marginal(grid[0, column], laid, legend=column == 0)
        if by_context:
            _best_action(grid[1, column], laid, legend=column == 0)
    figure.suptitle(_headline(first, f"Site “{name}”"), fontsize=11)
    return figure


def save_figures(
    directory: str | Path,
    posterior: Posterior,
    target: WeightedDraws | None = None,
    optimum: Sequence[float] | np.ndarray | None = None,
) -> list[Path]:
    """Write the figures of a posterior as PNG and SVG.

    Args:
        directory: an existing folder.
        posterior: fitted or loaded.
        target: p* at the same β, or None.
        optimum: J* of each β, reward units; by default that of the target.

    Returns:
        The files written: `training`, and `policy` or, with several action sites, `policy_SITE`.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    if optimum is None and target is not None and target.optimum is not None:
        lead = 0 if target.beta is None else target.beta.ndim
        optimum = target.optimum.mean(tuple(range(lead, target.optimum.ndim))).reshape(-1)
    figures = {}
    if len(posterior.history.get("step", ())):
        figures["training"] = training_figure(posterior, optimum)
    names = list(sites_of(posterior))
    whole = _whole(posterior)
    for name in names:
        figures["policy" if len(names) == 1 else f"policy_{name}"] = policy_figure(whole, target, name)
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            path = Path(directory) / f"{name.replace('/', '_')}.{suffix}"
            try:
                figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            except OSError as error:
                raise RunFolderError(f"cannot write {path}: {error.strerror}; choose another directory") from error
            written.append(path)
    return written


# ---- what to show ----------------------------------------------------------------------------


def _whole(posterior: Posterior) -> Posterior:
    """Best restarts, over all data where the fit saw mini-batches: pictures compare contexts."""
    best = posterior.select(restart="best") if posterior.mixture is None else posterior
    if best.programs is None or not best.programs.structure.subsampled:
        return best
    return with_draws(jax.random.key(0), over_all_data(best))


def _panels(posterior: Posterior, target: WeightedDraws | None, site: str) -> list[Laid]:
    whole = _whole(posterior)
    if posterior.beta is None or np.ndim(posterior.beta) == 0:
        return [lay_out(whole, target, site)]
    betas = np.asarray(posterior.beta)
    order = np.argsort(betas)
    shown = order[np.unique(np.linspace(0, len(order) - 1, SHOWN_BETAS).round().astype(int))]
    return [lay_out(whole.select(beta=float(betas[i])), _target_of(target, float(betas[i])), site) for i in shown]


def _target_of(target: WeightedDraws | None, beta: float) -> WeightedDraws | None:
    """Choose one temperature of a target."""
    if target is None or target.beta is None or np.ndim(target.beta) == 0:
        return target
    found = np.flatnonzero(np.isclose(target.beta, beta, rtol=1e-4))
    if not found.size:
        return None
    index, draw = int(found[0]), target.sampler

    def sampler(rng: np.random.Generator, _: int, num_draws: int) -> dict[str, Array]:
        assert draw is not None
        return draw(rng, index, num_draws)

    chosen = np.asarray(target.beta[index])
    log_weights = target.log_weights[index]
    return replace(target, beta=chosen, log_weights=log_weights, sampler=None if draw is None else sampler)


def _compares_contexts(laid: Laid) -> bool:
    return laid.support == "finite" and laid.target is not None and laid.fitted.values.shape[1] > 1 and not laid.steps


def _betas(posterior: Posterior) -> list[float | None]:
    return [None] if posterior.beta is None else [float(b) for b in np.atleast_1d(posterior.beta)]


# ---- panels ----------------------------------------------------------------------------------


def _sources(laid: Laid) -> list[tuple[str, str, Any]]:
    sources = [("prior π₀", PRIOR, laid.prior), ("fitted q", FITTED, laid.fitted)]
    return sources + ([("target p*", TARGET, laid.target)] if laid.target is not None else [])


def _marginal(axes: "Axes", laid: Laid, *, legend: bool) -> None:
    contexts = laid.fitted.values.shape[1]
    mean = f", mean over {contexts:,} contexts" if contexts > 1 else ""
    if laid.steps:
        _bands(axes, laid)
        _axes(axes, laid.steps, laid.site, f"{_beta_label(laid.beta)}: median and middle 90%{mean}")
    elif laid.support == "reals":
        _histograms(axes, laid)
        _axes(axes, laid.site, "probability density", f"{_beta_label(laid.beta)}{mean}")
    else:
        shown = _bars(axes, laid)
        some = f", the {shown} likeliest of {len(laid.categories)}" if shown < len(laid.categories) else ""
        _axes(axes, laid.site, "probability", f"{_beta_label(laid.beta)}{mean}{some}")
    if legend:
        if laid.support != "reals":
            axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend above the bars
            axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
        else:
            axes.legend(frameon=False, fontsize=9)


def _bars(axes: "Axes", laid: Laid) -> int:
    """Draw grouped bars, only the likeliest values where there are many; give how many are shown."""
    sources = _sources(laid)
    heights = np.stack([frequencies(values, laid.categories).mean((0, 1)) for _, _, values in sources])
    keep = np.arange(len(laid.categories))
    if laid.support == "finite" and len(keep) > SHOWN_BARS:
        keep = np.sort(np.argsort(-heights[1:].max(0), kind="stable")[:SHOWN_BARS])
    width = 0.84 / len(sources)
    for k, (label, colour, _) in enumerate(sources):
        offset = (k - (len(sources) - 1) / 2) * width
        axes.bar(np.arange(len(keep)) + offset, heights[k][keep], width, color=colour, label=label)
    ticks = np.arange(0, len(keep), max(1, -(-len(keep) // 15)))
    axes.set_xticks(ticks, [f"{laid.categories[keep[t]]:g}" for t in ticks])
    return len(keep)


def _histograms(axes: "Axes", laid: Laid) -> None:
    sources = _sources(laid)
    low = min(quantiles(values, (0.001,)).min() for _, _, values in sources)
    high = max(quantiles(values, (0.999,)).max() for _, _, values in sources)
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    for label, colour, values in sources:
        weights = np.broadcast_to(values.weights[..., None], values.values.shape).ravel()
        density, _ = np.histogram(values.values.ravel().astype(float), edges, weights=weights, density=True)
        _stairs(axes, density, edges, colour, label)
    if laid.density is not None:
        grid, density = laid.density
        axes.plot(grid, density, color=TARGET, lw=1.8, label="target p*")
        axes.set_xlim(edges[0], edges[-1])


def _bands(axes: "Axes", laid: Laid) -> None:
    at = np.arange(1, laid.fitted.values.shape[2] + 1)
    for label, colour, values in _sources(laid):
        low, middle, high = quantiles(values, (0.05, 0.5, 0.95))
        axes.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(at, middle, color=colour, lw=1.6, label=label)


def _best_action(axes: "Axes", laid: Laid, *, legend: bool) -> None:
    """Draw, over contexts, the probability put on the value that the target likes best there."""
    assert laid.target is not None
    best = frequencies(laid.target, laid.categories)[:, 0].argmax(-1)
    edges = np.linspace(0, 1, 21)
    for label, colour, values in _sources(laid):
        on_best = np.take_along_axis(frequencies(values, laid.categories)[:, 0], best[:, None], 1)[:, 0]
        counts, _ = np.histogram(np.clip(on_best, 0, 1), edges)
        _stairs(axes, counts, edges, colour, f"{label} (mean {on_best.mean():.2f})")
    title = f"{_beta_label(laid.beta)}: how firmly each context's best action is chosen"
    _axes(axes, "probability of the target's best action", "contexts", title)
    axes.legend(frameon=False, fontsize=9, loc="upper left" if legend else "best")


def _stairs(axes: "Axes", heights: np.ndarray, edges: np.ndarray, colour: str, label: str) -> None:
    """Draw a histogram: prior and fit filled, the target as an outline over both."""
    if colour == TARGET:
        axes.stairs(heights, edges, color=colour, lw=1.8, label=label)
    else:
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.5, label=label)


def _sequence_figure(panels: list[Laid]) -> "Figure":
    """Draw position × value as heat maps: prior, fitted and target side by side, a row per β."""
    from matplotlib.figure import Figure

    columns = len(_sources(panels[0]))
    count = min(len(panels[0].categories), 40)
    figure = Figure(figsize=(3.9 * columns + 0.8, (1.6 + max(1.8, 0.11 * count)) * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False, sharex=True, sharey=True)
    for row, laid in enumerate(panels):
        maps = [frequencies(values, laid.categories).mean(0).T for _, _, values in _sources(laid)]
        top = max(image.max() for image in maps)
        extent = (0.5, maps[0].shape[1] + 0.5, laid.categories[-1] + 0.5, laid.categories[0] - 0.5)
        for column, (label, _, _) in enumerate(_sources(laid)):
            axes = grid[row, column]
            image = axes.imshow(
                maps[column], aspect="auto", cmap="cividis", vmin=0, vmax=top, extent=extent, interpolation="nearest"
            )
            xlabel = laid.steps if row == len(panels) - 1 else ""
            _axes(axes, xlabel, laid.site if column == 0 else "", f"{label},  {_beta_label(laid.beta)}")
            axes.grid(visible=False)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=list(grid[row]), label="probability")
    figure.suptitle(_headline(panels[0], f"Site “{panels[0].site}” along its {panels[0].steps}s"), fontsize=11)
    return figure


# ---- words and colours -----------------------------------------------------------------------


def _headline(laid: Laid, subject: str) -> str:
    if laid.target is not None or laid.density is not None:
        return f"{subject}: a good fit (q) matches the target (p*)"
    return f"{subject}: what the fit changed; the prior (π₀) is where it started"


def _axes(axes: "Axes", xlabel: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _beta_label(beta: float | None) -> str:
    return "without rewards" if beta is None else f"β = {beta:.3g}"


def _beta_colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [FITTED] if count == 1 else list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def _legend_of_betas(figure: "Figure", axes: "Axes", betas: list[float | None], name: str) -> None:
    """Name the lines: a legend for few β, a colour bar for many, and J* in the first panel."""
    if len(betas) <= 6:
        if name == "objective":
            axes.legend(frameon=False, fontsize=9, loc="lower right")
        return
    if name == "kl":
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import BoundaryNorm, ListedColormap

        count = len(betas)
        colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, count)))
        bar = figure.colorbar(ScalarMappable(BoundaryNorm(np.arange(count + 1), count), colours), ax=axes, label="β")
        ticks = np.unique(np.linspace(0, count - 1, 6).round().astype(int))
        bar.set_ticks([t + 0.5 for t in ticks], labels=[f"{betas[t]:.3g}" for t in ticks])
