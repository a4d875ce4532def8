"""Exact posteriors of a few free scores by quadrature over the cones in which each item is the best."""

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from bayesrl.errors import PreferenceError
from bayesrl.preferences.engines.laplace_approximation import FlatDensity, Gaussian
from bayesrl.preferences.score_models import SCORE, FreeScores

_REACH = 9.0
"""How many standard deviations of Laplace's approximation the nodes cover on each side."""
_NODES = {1: 96, 2: 64, 3: 40, 4: 24}
"""Nodes along each axis, by the number of axes."""


@dataclass(frozen=True)
class ExactPosterior:
    """What quadrature gives, to about six digits.

    Attributes:
        log_evidence: log p(y), nats.
        mean: of all latent numbers, [size].
        covariance: [size, size].
        p_best: P(item has the greatest score), [items].
    """

    log_evidence: float
    mean: np.ndarray
    covariance: np.ndarray
    p_best: np.ndarray


def integrate(density: FlatDensity, gaussian: Gaussian) -> ExactPosterior:
    """Integrate the posterior of free scores.

    Space is cut into one cone for each item, in which it is the best: θ_b = t and θ_j = t − u_j with u_j ≥ 0. Inside a
    cone the density is smooth up to its edge, so that Gauss–Legendre rules converge fast; a grid across the edges would
    not.
    """
    where, _ = density.slices[SCORE]
    items = where.stop - where.start
    points, log_masses, cone = [], [], []
    for best in range(items):
        nodes, log_weights = _cone(gaussian, best, items)
        points.append(nodes)
        log_masses.append(density.many(nodes) + log_weights)
        cone.append(np.full(len(nodes), best))
    vectors, log_mass, best_of = np.concatenate(points), np.concatenate(log_masses), np.concatenate(cone)
    evidence = float(logsumexp(log_mass))
    share = np.exp(log_mass - evidence)
    mean = share @ vectors
    centred = vectors - mean
    covariance = (centred * share[:, None]).T @ centred
    return ExactPosterior(evidence, mean, covariance, np.bincount(best_of, share, minlength=items))


def check_axes(density: FlatDensity) -> None:
    """Refuse to integrate over too many numbers.

    Raises:
        PreferenceError: scores are not free, or there are more than four latent numbers.
    """
    if not isinstance(density.model.score_model, FreeScores) or density.size not in _NODES:
        raise PreferenceError(
            f"quadrature takes free scores and at most {max(_NODES)} latent numbers, and there are {density.size}; use "
            "method='laplace' or 'nuts'"
        )


def _cone(gaussian: Gaussian, best: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes, [n, size], and the logarithms of their weights in the cone of one item."""
    size = len(gaussian.mean)
    rule, rule_weights = np.polynomial.legendre.leggauss(_NODES[size])
    axes, weights = [], []
    for at in range(size):
        mean, spread = gaussian.mean[at], np.sqrt(gaussian.covariance[at, at])
        low, high = mean - _REACH * spread, mean + _REACH * spread
        if at < items and at != best:
            direction = np.zeros(size)
            direction[best], direction[at] = 1, -1
            mean, spread = direction @ gaussian.mean, np.sqrt(direction @ gaussian.covariance @ direction)
            # Where the item is far from the best, all that is left lies near the edge.
            low, high = 0.0, max(mean + _REACH * spread, 4 * spread)
        axes.append(low + (high - low) * (rule + 1) / 2)
        weights.append(np.log(rule_weights) + np.log((high - low) / 2))
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, size)
    log_weights = sum(np.meshgrid(*weights, indexing="ij"), start=np.zeros(())).reshape(-1)
    top = nodes[:, best].copy()
    for at in range(items):
        nodes[:, at] = top if at == best else top - nodes[:, at]
    return nodes, log_weights
