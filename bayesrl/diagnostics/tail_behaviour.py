"""Two of ArviZ's diagnostics of draws, without ArviZ: its import takes longer than a verdict.

The tests compare both with ArviZ itself.
"""

import math

import numpy as np
from scipy.special import logsumexp, ndtri

_LEAST_TAIL = 5
_PRIOR_SCALE, _PRIOR_DRAWS, _PRIOR_SHAPE = 3.0, 10.0, 0.5
"""Weakly informative prior on k̂, which steadies it when there are few draws."""
_BLOM = 3 / 8


def pareto_shape(log_weights: np.ndarray) -> float:
    """Fit k̂, the shape of a generalised Pareto distribution, to the largest weights.

    Args:
        log_weights: [draws], nats.

    Returns:
        The shape; nan if the tail has fewer than 5 draws or is far from such a distribution, inf if none fits.

    Example:
        >>> import numpy as np
        >>> log_weights = np.random.default_rng(0).exponential(0.5, 4000)  # weights of a Pareto tail of shape 0.5
        >>> bool(0.3 < pareto_shape(log_weights) < 0.7)
        True

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling", section 2; Zhang & Stephens
        (2009), "A new and efficient estimation method for the generalized Pareto distribution".
    """
    ordered = np.sort(np.asarray(log_weights, float))
    count = len(ordered)
    # The lesser of S/5 and 3·√S, as Vehtari et al. choose the tail.
    size = int(3 * math.sqrt(count)) if count > 225 else count // 5
    if size < _LEAST_TAIL:
        return math.nan
    weights = np.exp(ordered - ordered[-1])
    excess = weights[-size:] - weights[-size - 1]
    quartile = excess[int(size / 4 + 0.5) - 1]
    if quartile <= excess[0]:
        return math.nan
    # Zhang & Stephens: average the scale over a grid, weighted by its profile likelihood.
    points = 30 + int(math.sqrt(size))
    scales = 1 - np.sqrt(points / (np.arange(1, points + 1) - 0.5))
    scales = scales / (_PRIOR_SCALE * quartile) + 1 / excess[-1]
    with np.errstate(all="ignore"):
        shapes = np.log1p(-scales[:, None] * excess).mean(1)
        profile = size * (np.log(-scales / shapes) - shapes - 1)
        share = np.exp(profile - logsumexp(profile))
        kept = share >= 10 * np.finfo(float).eps
        scale = float((scales[kept] * share[kept]).sum() / share[kept].sum())
        shape = float(np.log1p(-scale * excess).mean())
    shape = (size * shape + _PRIOR_DRAWS * _PRIOR_SHAPE) / (size + _PRIOR_DRAWS)
    return math.inf if math.isnan(shape) else shape


def rank_rhat(chains: np.ndarray) -> float:
    """Return the rank-normalised split R̂ of chains, the greater of bulk and tails.

    Args:
        chains: [chain, draw].

    Returns:
        R̂, near 1 if the chains agree; nan for one chain, fewer than 4 draws, or draws with nan.

    Example:
        >>> import numpy as np
        >>> chains = np.random.default_rng(0).normal(size=(4, 500))
        >>> bool(rank_rhat(chains) < 1.01 < rank_rhat(chains + np.arange(4)[:, None]))
        True

    References:
        Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), "Rank-normalization, folding, and localization".
    """
    values = np.asarray(chains, float)
    if values.shape[0] < 2 or values.shape[1] < 4 or np.isnan(values).any():
        return math.nan
    half = values.shape[1] // 2
    # The two halves of a chain that drifts disagree like two chains.
    split = np.vstack((values[:, :half], values[:, -half:]))
    # Folding around the median shows chains that agree in location but not in spread.
    return max(_rhat(_normal_scores(split)), _rhat(_normal_scores(np.abs(split - np.median(split)))))


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Replace each number by the normal quantile of its rank; ties share one."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    scores: np.ndarray = ndtri((ranks[place.reshape(-1)] - _BLOM) / (values.size - 2 * _BLOM + 1)).reshape(values.shape)
    return scores


def _rhat(chains: np.ndarray) -> float:
    count = chains.shape[1]
    between, within = count * np.var(chains.mean(1), ddof=1), np.var(chains, axis=1, ddof=1).mean()
    with np.errstate(all="ignore"):
        return float(np.sqrt((between / within + count - 1) / count))
