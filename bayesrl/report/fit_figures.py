"""Figures of a fit: how it trained, and what the fitted policy does beside the prior and the target.

Figures are made without pyplot, so that they need no display and leave no global state.
"""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesrl.arguments import FiniteNumbersOrNone, Location, checked
from bayesrl.compilation.keys import key_from_seed
from bayesrl.diagnostics.scoreboard import over_all_data
from bayesrl.errors import PolicyError
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.files.plain import file_name, write_file
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.axes import (
    beta_colours,
    beta_label,
    draw_best_action,
    draw_marginal,
    escape_mathtext,
    labelled_values,
    legend_above,
    objective_label,
    style_axes,
)
from bayesrl.report.site_values import SiteComparison, compare_site, frequencies, shown_sites, value_text
from bayesrl.svi.fitting import with_draws
from bayesrl.typing import Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_BETAS = 3
PANEL_SIZE = (4.6, 3.2)
"""Inches of a figure in the report: two stand side by side on a page, one fits a telephone."""

MAX_LEGEND_BETAS = 6

HISTORY = {
    "objective": ("J", "J should rise and level off"),
    "reward": ("E[R]  (reward units)", "E[R] is what the policy earns"),
    "kl": ("KL to prior  (nats)", "KL is the price: how far it left the prior"),
}
"""Curves of the history, with their labels and what is good about them."""


def curve_names(posterior: Posterior) -> list[str]:
    """Name the curves of a history; without rewards E[R] is 0 throughout, and is none."""
    return [name for name in HISTORY if posterior.beta is not None or name != "reward"]


@checked(PolicyError)
def training_figure(posterior: Posterior, optimum: FiniteNumbersOrNone = None) -> "Figure":
    """Draw J, E[R] and KL along the training steps, a line per β and restart.

    Args:
        posterior: fitted or loaded.
        optimum: J* of each β, reward units, drawn as dashed lines; None where it is not known.

    Raises:
        PolicyError: the posterior has no history.
    """
    from matplotlib.figure import Figure

    _check_history(posterior)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    curves = curve_names(posterior)
    for axes, name in zip(figure.subplots(1, len(curves)), curves, strict=True):
        _draw_history(axes, posterior, name, optimum)
        _legend_of_betas(figure, axes, betas_of(posterior), name)
    restarts = f"; {posterior.num_restarts} restarts, one line each" if posterior.num_restarts > 1 else ""
    goal = " and meet the dashed optimum J*" if optimum is not None else ""
    figure.suptitle(f"Training: the curves should become flat{goal}{restarts}", fontsize=11)
    return figure


@checked(PolicyError)
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

    name = next(iter(shown_sites(posterior)), "") if site is None else site
    panels = _panels(posterior, target, name)
    first = panels[0]
    if first.steps and first.support != "reals":
        return _sequence_figure(panels)
    by_context = _compares_contexts(first)
    rows = 2 if by_context else 1
    figure = Figure(figsize=(max(5.2 * len(panels), 7), 3.9 * rows), layout="constrained")
    grid = figure.subplots(rows, len(panels), squeeze=False, sharey="none" if first.support == "reals" else "row")
    for column, laid in enumerate(panels):
        draw_marginal(grid[0, column], laid, legend=column == 0)
        if by_context:
            draw_best_action(grid[1, column], laid, legend=column == 0)
    figure.suptitle(escape_mathtext(_headline(first, f"Site “{name}”")), fontsize=11)
    return figure


@checked(PolicyError)
def save_figures(
    directory: Location,
    posterior: Posterior,
    target: WeightedDraws | None = None,
    optimum: FiniteNumbersOrNone = None,
    *,
    whole: Posterior | None = None,
) -> list[Path]:
    """Write the figures of a posterior as PNG and SVG.

    Args:
        directory: an existing folder.
        posterior: fitted or loaded.
        target: p* at the same β, or None.
        optimum: J* of each β, reward units; by default that of the target.
        whole: its best restarts over all data, with draws, made before; by default it is made here.

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
    names = list(shown_sites(posterior))
    whole = whole if whole is not None else best_over_all_data(posterior)
    for name in names:
        if value_text(whole, name, np.asarray(whole.draws[name])[(0,) * (np.ndim(whole.draws[name]) - 1)]) is not None:
            continue  # a text is read, not drawn
        figures["policy" if len(names) == 1 else f"policy_{name}"] = policy_figure(whole, target, name)
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            path = Path(directory) / f"{file_name(name)}.{suffix}"
            drawn = BytesIO()
            figure.savefig(drawn, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            write_file(path, drawn.getvalue())
            written.append(path)
    return written


# ---- training -----------------------------------------------------------------------------------


def _check_history(posterior: Posterior) -> None:
    if not len(posterior.history.get("step", ())):
        raise PolicyError("the posterior has no history yet, so there is no training to draw; fit it for some steps")


def optima_of(posterior: Posterior, optimum: Any) -> np.ndarray | None:
    """Give J* of each β, [betas], or None where it is not known.

    Raises:
        PolicyError: there are more or fewer.
    """
    count, given = len(betas_of(posterior)), np.asarray(optimum, float)
    if optimum is None:
        return None
    if given.size != count:
        raise PolicyError(f"optimum has shape {given.shape}, and the posterior {count} β; pass a number for each β")
    return given.reshape(-1)


def _draw_history(axes: "Axes", posterior: Posterior, name: str, optimum: Any) -> None:
    steps, betas = posterior.history["step"], betas_of(posterior)
    optimum = optima_of(posterior, optimum)
    label, title = HISTORY[name]
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
        axes.plot([], [], color=colours[0] if len(betas) == 1 else "black", ls="--", lw=1, label="optimum J*")


# ---- what to show ----------------------------------------------------------------------------


def best_over_all_data(posterior: Posterior) -> Posterior:
    """Best restarts, over all data where the fit saw mini-batches: pictures compare contexts."""
    best = posterior.select(restart="best") if posterior.mixture is None else posterior
    if best.programs is None or not best.programs.structure.subsampled:
        return best
    return with_draws(key_from_seed(0), over_all_data(best))


def _panels(posterior: Posterior, target: WeightedDraws | None, site: str) -> list[SiteComparison]:
    whole = best_over_all_data(posterior)
    if posterior.beta is None or np.ndim(posterior.beta) == 0:
        return [compare_site(whole, target, site)]
    betas = np.asarray(posterior.beta)
    order = np.argsort(betas)
    shown = order[np.unique(np.linspace(0, len(order) - 1, SHOWN_BETAS).round().astype(int))]
    return [compare_site(whole.select(beta=float(betas[i])), _target_of(target, float(betas[i])), site) for i in shown]


def _target_of(target: WeightedDraws | None, beta: float) -> WeightedDraws | None:
    """Choose one temperature of a target."""
    if target is None or target.beta is None or np.ndim(target.beta) == 0:
        return target
    found = np.flatnonzero(np.isclose(target.beta, beta, rtol=1e-4))
    if not found.size:
        return None
    index, draw = int(found[0]), target.sampler

    def sampler(rng: np.random.Generator, _: int, num_draws: int) -> dict[str, Numbers]:
        assert draw is not None
        return draw(rng, index, num_draws)

    chosen = np.asarray(target.beta[index])
    log_weights = target.log_weights[index]
    return replace(target, beta=chosen, log_weights=log_weights, sampler=None if draw is None else sampler)


def _compares_contexts(laid: SiteComparison) -> bool:
    return laid.support == "finite" and laid.target is not None and laid.fitted.values.shape[1] > 1 and not laid.steps


def betas_of(posterior: Posterior) -> list[float | None]:
    """Give the temperatures as a list; one None without rewards."""
    return [None] if posterior.beta is None else [float(b) for b in np.atleast_1d(posterior.beta)]


@checked(PolicyError)
def history_figure(
    posterior: Posterior,
    name: str,
    optimum: FiniteNumbersOrNone = None,
) -> "Figure":
    """Draw one curve of the history along the training steps, a line per β and restart.

    Args:
        posterior: fitted or loaded.
        name: `objective`, `reward` or `kl`.
        optimum: J* of each β, reward units, drawn with the objective; None where it is not known.

    Raises:
        PolicyError: the posterior has no history.
    """
    from matplotlib.figure import Figure

    _check_history(posterior)
    if name not in curve_names(posterior):
        raise PolicyError(f"history_figure got name={name!r}; use {' or '.join(map(repr, curve_names(posterior)))}")
    figure = Figure(figsize=PANEL_SIZE, layout="constrained")
    axes = figure.subplots()
    _draw_history(axes, posterior, name, optimum if name == "objective" else None)
    axes.set_title("")
    if len(betas_of(posterior)) > MAX_LEGEND_BETAS:
        _legend_of_betas(figure, axes, betas_of(posterior), "kl")
    else:
        legend_above(figure)
    return figure


def site_figures(posterior: Posterior, target: WeightedDraws | None = None, site: str | None = None) -> list["Figure"]:
    """Draw what `policy_figure` draws as small figures, which a page can arrange.

    Args:
        posterior: as there.
        target: as there.
        site: as there.

    Raises:
        PolicyError: the posterior has no draws of the site.
    """
    from matplotlib.figure import Figure

    figures = []
    for laid in _panels(posterior, target, next(iter(shown_sites(posterior)), "") if site is None else site):
        if laid.steps and laid.support != "reals":
            figures += _map_figures(laid)
            continue
        figures.append(Figure(figsize=PANEL_SIZE, layout="constrained"))
        draw_marginal(figures[-1].subplots(), laid, legend=True)
        if _compares_contexts(laid):
            figures.append(Figure(figsize=PANEL_SIZE, layout="constrained"))
            draw_best_action(figures[-1].subplots(), laid, legend=True)
    return figures


# ---- composing --------------------------------------------------------------------------------


def _sequence_figure(panels: list[SiteComparison]) -> "Figure":
    """Draw position × value as heat maps: prior, fitted and target side by side, a row per β."""
    from matplotlib.figure import Figure

    columns = len(labelled_values(panels[0]))
    size = (3.9 * columns + 0.8, _map_height(panels[0]) * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False, sharex=True, sharey=True)
    for row, laid in enumerate(panels):
        image = _draw_maps(list(grid[row]), laid, xlabel=laid.steps if row == len(panels) - 1 else "")
        figure.colorbar(image, ax=list(grid[row]), label="probability")
    figure.suptitle(
        escape_mathtext(_headline(panels[0], f"Site “{panels[0].site}” along its {panels[0].steps}s")), fontsize=11
    )
    return figure


def _map_figures(laid: SiteComparison) -> list["Figure"]:
    """Draw the heat maps of prior, fit and target one by one, on one scale of colours."""
    from matplotlib.figure import Figure

    figures = [Figure(figsize=(PANEL_SIZE[0], _map_height(laid)), layout="constrained") for _ in labelled_values(laid)]
    axes = [figure.subplots() for figure in figures]
    _draw_maps(axes, laid, xlabel=laid.steps)
    for figure, own in zip(figures, axes, strict=True):
        own.set_ylabel(escape_mathtext(laid.site))
        figure.colorbar(own.get_images()[0], ax=own, label="probability")
    return figures


def _map_height(laid: SiteComparison) -> float:
    return 1.6 + max(1.8, 0.11 * min(len(laid.categories), 40))


def _draw_maps(row: list["Axes"], laid: SiteComparison, *, xlabel: str) -> Any:
    maps = [frequencies(values, laid.categories).mean(0).T for _, _, values in labelled_values(laid)]
    top = max(image.max() for image in maps)
    extent = (0.5, maps[0].shape[1] + 0.5, laid.categories[-1] + 0.5, laid.categories[0] - 0.5)
    image = None
    for column, (axes, (label, _, _)) in enumerate(zip(row, labelled_values(laid), strict=True)):
        image = axes.imshow(
            maps[column], aspect="auto", cmap="cividis", vmin=0, vmax=top, extent=extent, interpolation="nearest"
        )
        style_axes(axes, xlabel, laid.site if column == 0 else "", f"{label},  {beta_label(laid.beta)}")
        axes.grid(visible=False)
        axes.locator_params(integer=True)
    return image


def _headline(laid: SiteComparison, subject: str) -> str:
    if laid.target is not None or laid.density is not None:
        return f"{subject}: a good fit (q) matches the target (p*)"
    return f"{subject}: what the fit changed; the prior (π₀) is where it started"


def _legend_of_betas(figure: "Figure", axes: "Axes", betas: list[float | None], name: str) -> None:
    """Name the lines: a legend for few β, a colour bar for many, and J* in the first panel."""
    if len(betas) <= MAX_LEGEND_BETAS:
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
