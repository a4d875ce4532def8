"""Panels of figures: one pair of axes each, and the words and colours that all of them share."""

from typing import TYPE_CHECKING, Any

import numpy as np

from bayesrl.display.formatting import sanitize
from bayesrl.report.site_values import SiteComparison, frequencies, quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette, told apart by the colour-blind and in grey.
PRIOR, FITTED, TARGET = "#9a9a9a", "#0072B2", "#D55E00"
SHOWN_BARS = 30
BINS = 40


def labelled_values(laid: SiteComparison) -> list[tuple[str, str, Any]]:
    """Give label, colour and values of prior, fit and, where it is known, target."""
    sources = [("prior π₀", PRIOR, laid.prior), ("fitted q", FITTED, laid.fitted)]
    return sources + ([("target p*", TARGET, laid.target)] if laid.target is not None else [])


def draw_marginal(axes: "Axes", laid: SiteComparison, *, legend: bool) -> None:
    """Draw one site: bars, histograms or bands of prior, fit and target."""
    contexts = laid.fitted.values.shape[1]
    mean = f", mean over {contexts:,} contexts" if contexts > 1 else ""
    if laid.steps:
        _bands(axes, laid)
        style_axes(axes, laid.steps, laid.site, f"{beta_label(laid.beta)}: median and middle 90%{mean}")
    elif laid.support == "reals":
        _histograms(axes, laid)
        style_axes(axes, laid.site, "probability density", f"{beta_label(laid.beta)}{mean}")
    else:
        shown = _bars(axes, laid)
        some = f", the {shown} likeliest of {len(laid.categories)}" if shown < len(laid.categories) else ""
        style_axes(axes, laid.site, "probability", f"{beta_label(laid.beta)}{mean}{some}")
    if legend:
        if laid.support != "reals":
            top = axes.get_ylim()[1]
            axes.set_ylim(0, 1.2 * top)  # room for the legend above the bars
            if not laid.steps:
                axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= min(1.2 * top, 1.0)])
            axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
        else:
            axes.legend(frameon=False, fontsize=9)


def _bars(axes: "Axes", laid: SiteComparison) -> int:
    """Draw grouped bars, only the likeliest values where there are many; give how many are shown."""
    sources = labelled_values(laid)
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


def _histograms(axes: "Axes", laid: SiteComparison) -> None:
    sources = labelled_values(laid)
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


def _bands(axes: "Axes", laid: SiteComparison) -> None:
    at = np.arange(1, laid.fitted.values.shape[2] + 1)
    for label, colour, values in labelled_values(laid):
        low, middle, high = quantiles(values, (0.05, 0.5, 0.95))
        axes.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(at, middle, color=colour, lw=1.6, label=label)


def draw_best_action(axes: "Axes", laid: SiteComparison, *, legend: bool) -> None:
    """Draw, over contexts, the probability put on the value that the target likes best there."""
    assert laid.target is not None
    best = frequencies(laid.target, laid.categories)[:, 0].argmax(-1)
    edges = np.linspace(0, 1, 21)
    for label, colour, values in labelled_values(laid):
        on_best = np.take_along_axis(frequencies(values, laid.categories)[:, 0], best[:, None], 1)[:, 0]
        counts, _ = np.histogram(np.clip(on_best, 0, 1), edges)
        _stairs(axes, counts, edges, colour, f"{label} (mean {on_best.mean():.2f})")
    title = f"{beta_label(laid.beta)}: how firmly each context's best action is chosen"
    style_axes(axes, "probability of the target's best action", "contexts", title)
    axes.legend(frameon=False, fontsize=9, loc="upper left" if legend else "best")


def _stairs(axes: "Axes", heights: np.ndarray, edges: np.ndarray, colour: str, label: str) -> None:
    """Draw a histogram: prior and fit filled, the target as an outline over both."""
    if colour == TARGET:
        axes.stairs(heights, edges, color=colour, lw=1.8, label=label)
    else:
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.5, label=label)


def style_axes(axes: "Axes", xlabel: str, ylabel: str, title: str = "") -> None:
    """Label a pair of axes, and give it the house's look."""
    axes.set_xlabel(escape_mathtext(xlabel))
    axes.set_ylabel(escape_mathtext(ylabel))
    axes.set_title(escape_mathtext(title), fontsize=10)
    axes.grid(visible=True, alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def beta_label(beta: float | None) -> str:
    """Write a temperature with its letter."""
    return "without rewards" if beta is None else f"β = {beta:.3g}"


def objective_label(beta: object) -> str:
    """Write J with its unit: without rewards it is the ELBO."""
    return "J  (reward units)" if beta is not None else "J, the ELBO  (nats)"


def beta_colours(count: int) -> list[Any]:
    """Give a colour to each temperature, from cold to warm."""
    from matplotlib import colormaps

    return [FITTED] if count == 1 else list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def legend_above(figure: "Figure", columns: int = 4) -> None:
    """Put a legend above the axes, where it hides nothing."""
    figure.legend(
        frameon=False, fontsize=8, ncols=columns, loc="outside upper left", columnspacing=1.2, handlelength=1.6
    )


def escape_mathtext(text: str) -> str:
    """Keep Matplotlib from reading mathematics into a text, whose dollars may be anybody's."""
    return sanitize(text).replace("$", r"\$")
