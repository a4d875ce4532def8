"""Gibbs sampling where the posterior is conjugate given auxiliary draws: one for each judgement."""

import math

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri_exp

from bayesrl.errors import PreferenceError
from bayesrl.preferences.engines.laplace_approximation import FlatDensity
from bayesrl.preferences.preference_program import PreferenceModel
from bayesrl.preferences.score_models import FreeScores, LinearScores

_CUT = 0.64
"""Where the two series of the Pólya–Gamma density meet."""
_MAX_TERMS = 200


def gibbs_chains(
    density: FlatDensity, rng: np.random.Generator, num_chains: int, num_warmup: int, num_samples: int
) -> np.ndarray:
    """Draw from the posterior of a model that is linear inside its link, [chain, draw, size].

    Given Pólya–Gamma variables, Bradley and Terry's likelihood is normal in the scores; given the noise of impressions,
    Thurstone's is. The prior is normal, so that each update is an exact draw.

    Raises:
        PreferenceError: the model has ties, annotators or rankings, whose likelihood is not linear inside its link.

    References:
        Polson, Scott & Windle (2013), "Bayesian inference for logistic models using Pólya–Gamma latent variables";
        Albert & Chib (1993), "Bayesian analysis of binary and polychotomous response data".
    """
    model = density.model
    if model.name not in ("bradley_terry", "thurstone"):
        remedy = "method='conjugate'" if model.name == "gaussian_ratings" else "method='nuts'"
        raise PreferenceError(f"method='gibbs' takes Bradley–Terry or Thurstone, and got {model!r}; use {remedy}")
    design = design_matrix(model, "gibbs")
    won = np.asarray(model.observed == (1 if model.data.kind == "labels" else 0))
    scales = [np.full(math.prod(shape), scale) for scale, shape in model.priors.values()]
    precision = np.diag(np.concatenate(scales) ** -2.0)
    probit = model.name == "thurstone"
    if probit:
        design = design / math.sqrt(2)
        fixed = np.linalg.cholesky(precision + design.T @ design)
    theta = rng.standard_normal((num_chains, density.size)) / np.sqrt(np.diag(precision))
    kept = np.empty((num_chains, num_samples, density.size))
    for step in range(-num_warmup, num_samples):
        linear = theta @ design.T
        if probit:
            root, target = np.broadcast_to(fixed, (num_chains, *fixed.shape)), _impressions(rng, linear, won) @ design
        else:
            omega = polya_gamma(rng, linear)
            root = np.linalg.cholesky(precision + np.einsum("ri,cr,rj->cij", design, omega, design, optimize=True))
            target = np.broadcast_to((won - 0.5) @ design, theta.shape)
        # θ = P⁻¹ target + P^(−1/2) ε, with P = root · rootᵀ.
        half = np.linalg.solve(root, target[..., None]) + rng.standard_normal((*theta.shape, 1))
        theta = np.linalg.solve(root.swapaxes(-1, -2), half)[..., 0]
        if step >= 0:
            kept[:, step] = theta
    return kept


def design_matrix(model: PreferenceModel, method: str) -> np.ndarray:
    """Return the matrix that maps all latent numbers to what is inside the link, [rows, size].

    Raises:
        PreferenceError: the model is not linear inside its link.
    """
    scores = model.score_model
    linear = isinstance(scores, FreeScores | LinearScores)
    if model.name == "plackett_luce" or model.ties is not None or model.annotators or not linear:
        raise PreferenceError(
            f"method={method!r} needs pairs, labels or ratings, without ties, annotators and train=, and got "
            f"{model!r}; use method='nuts'"
        )
    features = scores.features if isinstance(scores, LinearScores) else np.eye(model.data.num_items)
    members, kind = model.data.members, model.data.kind
    single = kind != "pairs"
    inside = features[members[:, 0]] - (0 if single else features[members[:, 1]])
    ones = np.ones((len(members), 1))
    sides = {"labels": [-ones], "ratings": [ones]}
    columns = [inside, *sides.get(kind, []), *([ones] if model.position else [])]
    if model.lengths is not None:
        columns.append((model.lengths[members[:, 0]] - (0 if single else model.lengths[members[:, 1]]))[:, None])
    return np.concatenate(columns, -1)


def _impressions(rng: np.random.Generator, mean: np.ndarray, won: np.ndarray) -> np.ndarray:
    """Draw N(mean, 1) above 0 where the first won, and below 0 where it lost."""
    sign = np.where(won, 1.0, -1.0)
    # Of the mirrored draw, by the logarithm of its tail, which does not vanish far out.
    tail = log_ndtr(sign * mean) + np.log(rng.random(mean.shape))
    return mean - sign * ndtri_exp(tail)


def polya_gamma(rng: np.random.Generator, tilt: np.ndarray) -> np.ndarray:
    """Draw Pólya–Gamma variables PG(1, tilt), exactly, by Devroye's method of alternating series."""
    z = np.abs(np.asarray(tilt, float)).reshape(-1) / 2
    result = np.empty_like(z)
    waiting = np.arange(len(z))
    while len(waiting):
        own = z[waiting]
        proposed = _proposal(rng, own)
        accepted = _accepts(rng, proposed)
        result[waiting[accepted]] = proposed[accepted] / 4
        waiting = waiting[~accepted]
    return result.reshape(np.shape(tilt))


def _proposal(rng: np.random.Generator, z: np.ndarray) -> np.ndarray:
    rate = np.pi**2 / 8 + z**2 / 2
    right = np.pi / (2 * rate) * np.exp(-rate * _CUT)
    at = 1 / math.sqrt(_CUT)
    left = 2 * (np.exp(-z) * ndtr(at * (_CUT * z - 1)) + np.exp(z + log_ndtr(-at * (_CUT * z + 1))))
    draws = _CUT + rng.exponential(size=z.shape) / rate
    inner = np.flatnonzero(rng.random(z.shape) >= right / (right + left))
    draws[inner] = _cut_inverse_gaussian(rng, z[inner])
    return draws


def _cut_inverse_gaussian(rng: np.random.Generator, z: np.ndarray) -> np.ndarray:
    """Draw from the inverse Gaussian of mean 1/z and shape 1, below the cut."""
    result = np.empty_like(z)
    waiting = np.arange(len(z))
    while len(waiting):
        own = z[waiting]
        flat = own * _CUT < 1  # its mean lies above the cut
        draws = np.empty_like(own)
        accepted = np.empty(len(own), bool)
        first, second = rng.exponential(size=(2, int(flat.sum())))
        draws[flat] = _CUT / (1 + _CUT * first) ** 2
        kept = (first**2 <= 2 * second / _CUT) & (rng.random(first.shape) < np.exp(-(own[flat] ** 2) * draws[flat] / 2))
        accepted[flat] = kept
        mean = 1 / own[~flat]
        squared = rng.standard_normal(mean.shape) ** 2
        root = mean + 0.5 * mean**2 * squared - 0.5 * mean * np.sqrt(4 * mean * squared + (mean * squared) ** 2)
        draws[~flat] = np.where(rng.random(mean.shape) <= mean / (mean + root), root, mean**2 / root)
        accepted[~flat] = draws[~flat] < _CUT
        result[waiting[accepted]] = draws[accepted]
        waiting = waiting[~accepted]
    return result


def _accepts(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Compare a uniform number with the partial sums of the alternating series until they decide."""
    total = _term(0, x)
    level = rng.random(x.shape) * total
    decided, accepted = np.zeros(x.shape, bool), np.zeros(x.shape, bool)
    for n in range(1, _MAX_TERMS):
        odd = n % 2 == 1
        total = total - _term(n, x) if odd else total + _term(n, x)
        now = ~decided & ((level <= total) if odd else (level > total))
        accepted |= now & odd
        decided |= now
        if decided.all():
            break
    return accepted


def _term(n: int, x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        near = np.pi * (n + 0.5) * (2 / (np.pi * x)) ** 1.5 * np.exp(-2 * (n + 0.5) ** 2 / x)
    far = np.pi * (n + 0.5) * np.exp(-((n + 0.5) ** 2) * np.pi**2 * x / 2)
    return np.where(x <= _CUT, near, far)
