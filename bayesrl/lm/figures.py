"""Pictures of what a language model writes: reward and KL by position, and length against reward."""

from typing import TYPE_CHECKING

import numpy as np

from bayesrl.lm.text_samples import ModelSamples, TextSamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FITTED, _PRIOR = "#0b62a8", "#8a8f98"
_MOST_POINTS = 400


def position_figure(samples: TextSamples, positions: np.ndarray, fitted: np.ndarray, prior: np.ndarray) -> "Figure":
    """Draw the reward of what is written so far, and KL of each next token, by position.

    Args:
        samples: of a fit and its reference.
        positions: at which the reward was taken, counted from 0.
        fitted: reward of what the fit wrote up to there, [positions, samples, prompts].
        prior: the same of the reference.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for values, colour, name in ((fitted, _FITTED, "fit"), (prior, _PRIOR, "reference")):
        _band(above, positions + 1, values.reshape(len(positions), -1), colour, name)
    above.set_ylabel("reward so far")
    above.legend(frameon=False)
    kl = samples.fitted.kl
    steps = np.arange(kl.shape[-1]) + 1
    _band(below, steps, kl.reshape(-1, kl.shape[-1]).T, _FITTED, "KL")
    going_on = samples.fitted.mask.mean((0, 1))
    if going_on.min() < 1:
        other = below.twinx()
        other.plot(steps, going_on, color=_PRIOR, linestyle=":", linewidth=1.4)
        other.set_ylim(0, 1.02)
        other.set_ylabel("share still writing (dotted)", color=_PRIOR)
    below.set_ylabel("KL of the next token, nats")
    below.set_ylim(bottom=0)
    below.set_xlabel("position")
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines["top"].set_visible(False)
    return figure


def _band(axes: "Axes", x: np.ndarray, values: np.ndarray, colour: str, name: str) -> None:
    """Draw a mean with two standard errors, from values [x, draws]."""
    mean, se = values.mean(-1), values.std(-1) / np.sqrt(values.shape[-1])
    axes.plot(x, mean, color=colour, label=name, marker="o" if len(x) < 12 else None, markersize=3)
    axes.fill_between(x, mean - 2 * se, mean + 2 * se, color=colour, alpha=0.2, linewidth=0)


def length_figure(samples: TextSamples) -> "Figure":
    """Draw the reward of completions against their length in tokens, of the fit and of its reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    for written, colour, name in ((samples.prior, _PRIOR, "reference"), (samples.fitted, _FITTED, "fit")):
        lengths, reward = _points(written)
        axes.scatter(lengths, reward, s=9, color=colour, alpha=0.45, linewidths=0, label=name)
    axes.set_xlabel("length, tokens (the end counts; points are spread a little)")
    axes.set_ylabel("reward")
    for handle in axes.legend(frameon=False, markerscale=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _points(written: ModelSamples) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths, reward = written.mask.sum(-1).ravel(), written.reward.ravel()
    chosen = rng.permutation(len(lengths))[:_MOST_POINTS]
    return lengths[chosen] + rng.uniform(-0.25, 0.25, len(chosen)), reward[chosen]
