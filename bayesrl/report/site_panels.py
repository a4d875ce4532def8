"""One site of a program: its values under prior, fit and target in one form, and the axes that show them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.core.structure import Structure
from bayesrl.display.formatting import sanitize
from bayesrl.errors import PolicyError
from bayesrl.exact.weighted_draws import WeightedDraws, context_axes, refuse_other_regularizer
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.target_density import target_density
from bayesrl.statistics.regularizer_names import regularizer_of, regularizer_symbol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_FINITE = 200
"""Integers with at most this many distinct values are shown value by value."""

# From Okabe and Ito's palette, which colour-blind readers can tell apart, also in grey.
PRIOR, FITTED, TARGET = "#9a9a9a", "#0072B2", "#D55E00"
PANEL_SIZE = (4.6, 3.2)
"""Size of a figure in the report, inches: two fit side by side on a page, one fits a telephone."""
SHOWN_BARS = 30
BINS = 40

_TARGET_DRAWS = 1000

type SupportKind = Literal["finite", "integers", "reals"]


class SiteValues(NamedTuple):
    """Values of one site with weights.

    Attributes:
        values: [draws, contexts, positions]; positions are time steps, elements, or both.
        weights: [draws, contexts], adding up to 1 over draws.
    """

    values: Shaped[np.ndarray, "draws contexts positions"]
    weights: Float[np.ndarray, "draws contexts"]

    def frequencies(self, categories: np.ndarray) -> Float[np.ndarray, "contexts positions values"]:
        """Return the weighted frequency of each category, by context and position."""
        hits = self.values[..., None] == categories
        result: np.ndarray = np.einsum("dc,dcpk->cpk", self.weights, hits.astype(float))
        return result

    def quantiles(self, levels: tuple[float, ...]) -> Float[np.ndarray, "levels positions"]:
        """Return weighted quantiles at each position, with contexts pooled."""
        draws, contexts, positions = self.values.shape
        flat = self.values.reshape(draws * contexts, positions).astype(float)
        weights = np.broadcast_to(self.weights / contexts, (draws, contexts)).reshape(-1)
        result = np.empty((len(levels), positions))
        for position in range(positions):
            order = np.argsort(flat[:, position])
            reached = np.cumsum(weights[order])
            # The total need not be exactly 1 in floating point.
            index = np.searchsorted(reached, np.asarray(levels) * reached[-1])
            result[:, position] = flat[order, position][np.minimum(index, len(order) - 1)]
        return result


class SiteComparison(NamedTuple):
    """One site at one temperature: what the prior, the fit and the target do.

    Attributes:
        site: name of the site.
        beta: temperature, reward units per nat; None without rewards.
        support: finite, integers or reals.
        categories: values to show one by one; empty for reals.
        steps: what a position means: `time step`, `element`, or empty if there is only one.
        prior: draws of the policy before the fit.
        fitted: draws of the fit.
        target: the posterior p*, or None if unknown.
        density: points and density of p* on the real line, or None.
        goal: how the legend names p*.
    """

    site: str
    beta: float | None
    support: SupportKind
    categories: np.ndarray
    steps: str
    prior: SiteValues
    fitted: SiteValues
    target: SiteValues | None
    density: tuple[np.ndarray, np.ndarray] | None
    goal: str = "target p*"

    @property
    def sources(self) -> list[tuple[str, str, SiteValues]]:
        """Label, colour and values of prior, fit and, if known, target."""
        sources = [("prior π₀", PRIOR, self.prior), ("fitted q", FITTED, self.fitted)]
        return sources + ([(self.goal, TARGET, self.target)] if self.target is not None else [])

    @property
    def compares_contexts(self) -> bool:
        """Whether the target's best action can be compared across several contexts."""
        several = self.fitted.values.shape[1] > 1 and not self.steps
        return several and self.support == "finite" and self.target is not None

    @property
    def is_map(self) -> bool:
        """Whether the site is shown as maps of position × value."""
        return bool(self.steps) and self.support != "reals"


# ---- values ----------------------------------------------------------------------------------


def compare_site(posterior: Posterior, target: WeightedDraws | None, site: str) -> SiteComparison:
    """Compare one site of a posterior of one β and one restart with its prior and its target, or draws of p* at any β.

    Raises:
        PolicyError: there is no such site among the draws.
    """
    if site not in posterior.draws:
        raise PolicyError(f"there are no draws of site {site!r}; choose from {', '.join(posterior.draws) or 'none'}")
    regularizer = regularizer_of(posterior.settings)
    refuse_other_regularizer(target, "the fit has", *regularizer)
    structure = posterior.programs.structure if posterior.programs is not None else None
    beta = None if posterior.beta is None else float(posterior.beta)
    prior, fitted = _aligned(posterior, site, posterior.prior_draws[site]), site_values(posterior, site)
    at_beta = None if target is None else target.select(beta)
    known = None if at_beta is None else _target_values(posterior, at_beta, site)
    support, categories = _support(structure, site, [prior, fitted] + ([known] if known else []))
    density = target_density(posterior, site, prior.values, fitted.values) if support == "reals" else None
    steps = _positions(structure, site, fitted.values.shape[2])
    goal = "target p*" if regularizer[0] == "kl" else f"target p* ({regularizer_symbol(*regularizer)})"
    if (n := posterior.settings.get("best_of_n")) is not None:
        goal, density = f"target: best of {n}", None
    return SiteComparison(site, beta, support, categories, steps, prior, fitted, known, density, goal)


def value_text(posterior: Posterior, site: str, value: Any) -> str | None:
    """Return a site's value as text, if the program has a method `read(site, value)` that knows one."""
    program: Any = None if posterior.programs is None else posterior.programs.policy
    while program is not None and not hasattr(program, "read"):
        program = getattr(program, "fn", None)  # unwrap handlers
    return None if program is None else program.read(site, value)


def is_text(posterior: Posterior, site: str) -> bool:
    """Whether values of a site are shown as text, not drawn."""
    draws = np.asarray(posterior.draws[site])
    return value_text(posterior, site, draws[(0,) * (draws.ndim - 1)]) is not None


def site_values(posterior: Posterior, site: str) -> SiteValues:
    """Return the draws of one site of a posterior of one β and one restart."""
    return _aligned(posterior, site, posterior.draws[site][0])


def shown_sites(posterior: Posterior) -> Mapping[str, Any]:
    """Return the draws of the sites to show: actions, or all draws if the program is unknown."""
    if posterior.programs is None:
        return posterior.draws
    return {name: posterior.draws[name] for name in posterior.programs.structure.actions}


def _contexts(posterior: Posterior) -> tuple[int, ...]:
    shape: tuple[int, ...] = posterior.statistics["log_weight"].shape[2:]
    return shape


def _aligned(posterior: Posterior, site: str, drawn: Any) -> SiteValues:
    """Bring draws of a site, [draws, ...], into the form of `SiteValues`, with equal weights."""
    draws, contexts = np.asarray(drawn), _contexts(posterior)
    axes: tuple[int | None, ...]  # the context axes of a value; None for a plate that the site is outside of
    if posterior.programs is not None:
        axes = context_axes(posterior.programs.structure)[site]
    else:  # the shapes must do: the first axes that look like the contexts
        shape = draws.shape[1:]
        start = next((i for i in range(len(shape)) if shape[i : i + len(contexts)] == contexts), None)
        axes = tuple(None if start is None else start + i for i in range(len(contexts)))
    own = [1 + axis for axis in axes if axis is not None]
    moved = np.moveaxis(draws, own, range(1, 1 + len(own)))
    sizes = iter(moved.shape[1 : 1 + len(own)])
    leading = [1 if axis is None else next(sizes) for axis in axes]
    positions = int(np.prod(moved.shape[1 + len(own) :]))
    full = np.broadcast_to(moved.reshape(len(draws), *leading, positions), (len(draws), *contexts, positions))
    flat = full.reshape(len(draws), int(np.prod(contexts, dtype=int)), positions)
    return SiteValues(flat, np.full(flat.shape[:2], 1 / len(draws)))


def _target_values(posterior: Posterior, target: WeightedDraws, site: str) -> SiteValues | None:
    """Bring p* into the same form: its weighted assignments, or draws from it if it has none."""
    log_weights, contexts = np.asarray(target.log_weights), _contexts(posterior)
    if log_weights.shape[log_weights.ndim - len(contexts) :] != contexts:
        return None
    if site in target.sites and log_weights.ndim == 1 + len(contexts):
        values = _aligned(posterior, site, target.sites[site])
        return values._replace(weights=np.exp(log_weights).reshape(len(log_weights), -1))
    return _aligned(posterior, site, target.resample(key_from_seed(0), _TARGET_DRAWS)[site])


def _support(structure: Structure | None, site: str, sources: list[SiteValues]) -> tuple[SupportKind, np.ndarray]:
    declared = structure[site].support if structure is not None and not structure[site].event_dim else None
    if declared is not None and len(declared) <= MAX_FINITE:
        return "finite", np.asarray(declared)
    if not all(np.issubdtype(source.values.dtype, np.integer) or source.values.dtype == bool for source in sources):
        return "reals", np.zeros(0)
    seen = np.unique(np.concatenate([np.unique(source.values).astype(int) for source in sources]))
    # Quantiles, so that a few outliers do not stretch the axis.
    low = min(int(source.quantiles((0.001,)).min()) for source in sources)
    high = max(int(source.quantiles((0.999,)).max()) for source in sources)
    if len(seen) > MAX_FINITE and high - low >= MAX_FINITE:
        return "reals", np.zeros(0)
    return "integers", np.arange(low, high + 1)


def _positions(structure: Structure | None, site: str, count: int) -> str:
    if count == 1:
        return ""
    if structure is not None and structure[site].scan is None:
        return "time step" if structure[site].length == count else "element"
    return "time step and element" if structure is not None and structure[site].length < count else "time step"


# ---- axes ------------------------------------------------------------------------------------


def site_panels(site: SiteComparison) -> list[Callable[..., None]]:
    """Return the functions that draw a site: each takes axes, and whether they are the first in their row."""
    if not site.is_map:
        return [partial(draw, site) for draw in (_draw_marginal, _draw_best_action)[: 1 + site.compares_contexts]]
    maps = [values.frequencies(site.categories).mean(0).T for _, _, values in site.sources]
    top = max(image.max() for image in maps)
    return [
        partial(_draw_map, site, label, image, top) for (label, _, _), image in zip(site.sources, maps, strict=True)
    ]


def map_height(site: SiteComparison) -> float:
    """Height of a map in inches, enough for its values."""
    return 1.6 + max(1.8, 0.11 * min(len(site.categories), 40))


def _draw_map(site: SiteComparison, label: str, image: np.ndarray, top: float, axes: "Axes", *, legend: bool) -> None:
    """Draw the probability of each value at each position; `top` makes the colours of several maps the same."""
    extent = (0.5, image.shape[1] + 0.5, site.categories[-1] + 0.5, site.categories[0] - 0.5)
    drawn = axes.imshow(image, aspect="auto", cmap="cividis", vmin=0, vmax=top, extent=extent, interpolation="nearest")
    style_axes(axes, site.steps, site.site if legend else "", f"{label},  {beta_label(site.beta)}")
    axes.grid(visible=False)
    axes.locator_params(integer=True)
    axes.figure.colorbar(drawn, ax=axes, label="probability")


def _draw_marginal(site: SiteComparison, axes: "Axes", *, legend: bool) -> None:
    """Draw one site: bars, histograms or bands of prior, fit and target."""
    contexts = site.fitted.values.shape[1]
    mean = f", mean over {contexts:,} contexts" if contexts > 1 else ""
    if site.steps:
        _bands(axes, site)
        style_axes(axes, site.steps, site.site, f"{beta_label(site.beta)}: median and middle 90%{mean}")
    elif site.support == "reals":
        _histograms(axes, site)
        style_axes(axes, site.site, "probability density", f"{beta_label(site.beta)}{mean}")
    else:
        shown = _bars(axes, site)
        some = f", the {shown} likeliest of {len(site.categories)}" if shown < len(site.categories) else ""
        style_axes(axes, site.site, "probability", f"{beta_label(site.beta)}{mean}{some}")
    if legend and site.support == "reals":
        axes.legend(frameon=False, fontsize=9)
    elif legend:
        top = axes.get_ylim()[1]
        axes.set_ylim(0, 1.2 * top)  # room for the legend above the bars
        if not site.steps:
            axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= min(1.2 * top, 1.0)])
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")


def _bars(axes: "Axes", site: SiteComparison) -> int:
    """Draw grouped bars, only the likeliest values if there are many; return how many are shown."""
    heights = np.stack([values.frequencies(site.categories).mean((0, 1)) for _, _, values in site.sources])
    shown = np.arange(len(site.categories))
    if site.support == "finite" and len(shown) > SHOWN_BARS:
        shown = np.sort(np.argsort(-heights[1:].max(0), kind="stable")[:SHOWN_BARS])
    width = 0.84 / len(heights)
    for k, (label, colour, _) in enumerate(site.sources):
        offset = (k - (len(heights) - 1) / 2) * width
        axes.bar(np.arange(len(shown)) + offset, heights[k][shown], width, color=colour, label=label)
    ticks = np.arange(0, len(shown), max(1, -(-len(shown) // 15)))
    axes.set_xticks(ticks, [f"{site.categories[shown[t]]:g}" for t in ticks])
    return len(shown)


def _histograms(axes: "Axes", site: SiteComparison) -> None:
    low = min(values.quantiles((0.001,)).min() for _, _, values in site.sources)
    high = max(values.quantiles((0.999,)).max() for _, _, values in site.sources)
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    for label, colour, values in site.sources:
        weights = np.broadcast_to(values.weights[..., None], values.values.shape).ravel()
        density, _ = np.histogram(values.values.ravel().astype(float), edges, weights=weights, density=True)
        _stairs(axes, density, edges, colour, label)
    if site.density is not None:
        axes.plot(*site.density, color=TARGET, lw=1.8, label=site.goal)
        axes.set_xlim(edges[0], edges[-1])


def _bands(axes: "Axes", site: SiteComparison) -> None:
    at = np.arange(1, site.fitted.values.shape[2] + 1)
    for label, colour, values in site.sources:
        low, middle, high = values.quantiles((0.05, 0.5, 0.95))
        axes.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(at, middle, color=colour, lw=1.6, label=label)


def _draw_best_action(site: SiteComparison, axes: "Axes", *, legend: bool) -> None:
    """Draw the distribution, over contexts, of the probability of the value that the target likes best there."""
    assert site.target is not None
    best = site.target.frequencies(site.categories)[:, 0].argmax(-1)
    edges = np.linspace(0, 1, 21)
    for label, colour, values in site.sources:
        on_best = np.take_along_axis(values.frequencies(site.categories)[:, 0], best[:, None], 1)[:, 0]
        counts, _ = np.histogram(np.clip(on_best, 0, 1), edges)
        _stairs(axes, counts, edges, colour, f"{label} (mean {on_best.mean():.2f})")
    title = f"{beta_label(site.beta)}: how firmly each context's best action is chosen"
    style_axes(axes, "probability of the target's best action", "contexts", title)
    axes.legend(frameon=False, fontsize=9, loc="upper left" if legend else "best")


def _stairs(axes: "Axes", heights: np.ndarray, edges: np.ndarray, colour: str, label: str) -> None:
    """Draw a histogram: prior and fit filled, the target as an outline over both."""
    if colour == TARGET:
        axes.stairs(heights, edges, color=colour, lw=1.8, label=label)
    else:
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.5, label=label)


def style_axes(axes: "Axes", xlabel: str, ylabel: str, title: str = "") -> None:
    """Label the axes and style them."""
    axes.set_xlabel(escape_mathtext(xlabel))
    axes.set_ylabel(escape_mathtext(ylabel))
    axes.set_title(escape_mathtext(title), fontsize=10)
    axes.grid(visible=True, alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def beta_label(beta: float | None) -> str:
    """Write a temperature as β = value."""
    return "without rewards" if beta is None else f"β = {beta:.3g}"


def beta_colours(count: int) -> list[Any]:
    """Return a colour for each temperature, from cold to warm."""
    from matplotlib import colormaps

    return [FITTED] if count == 1 else list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def panel() -> "tuple[Figure, Axes]":
    """Start a small figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_SIZE, layout="constrained")
    return figure, figure.subplots()


def legend_above(figure: "Figure") -> None:
    """Put a legend above the axes, where it hides nothing."""
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper left", columnspacing=1.2, handlelength=1.6)


def escape_mathtext(text: str) -> str:
    """Keep Matplotlib from reading a text as mathematics: it may contain any dollar signs."""
    return sanitize(text).replace("$", r"\$")
