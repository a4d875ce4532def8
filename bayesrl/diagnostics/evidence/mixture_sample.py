"""Draws of m = (q + π₀)/2, half of the fit and half of the prior: every number of a fit is estimated from them."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from bayesrl.compilation.random_keys import split_keys
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.exact.weighted_draws import context_axes
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import draw_fit, draw_prior, score_draws
from bayesrl.typing import Params, PRNGKey


class MixtureSample(NamedTuple):
    """Scores of draws, [draws, contexts], contexts flat, in double precision; the fit's draws come first.

    Attributes:
        log_prior: log π₀ of the action sites, nats.
        log_q: log q of the action sites, nats.
        log_likelihood: log p of the observed sites, nats.
        reward: reward units.
        ratio: log π₀ − log q, nats.
        doubt: possible error of `ratio` in single precision, beyond that of its value's last place, nats.
        code: a fingerprint of the draw; empty if some site is continuous.
        num_fit: number of draws of the fit.
    """

    log_prior: np.ndarray
    log_q: np.ndarray
    log_likelihood: np.ndarray
    reward: np.ndarray
    ratio: np.ndarray
    doubt: np.ndarray
    code: np.ndarray
    num_fit: int

    @property
    def ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """q/m and π₀/m."""
        # Computed from the log-ratio, so that a density of 0 gives a ratio of 0, not nan.
        return 2 * np.exp(-np.logaddexp(0, self.ratio)), 2 * np.exp(-np.logaddexp(-self.ratio, 0))

    def unseen_prior(self) -> np.ndarray:
        """Return the prior's mass in what was not drawn, [contexts]; 1 if some site is continuous."""
        contexts = self.log_prior.shape[1]
        if self.code.shape[1] == 0:
            return np.ones(contexts)
        left = np.empty(contexts)
        for c in range(contexts):
            key = self.code[:, c, 0].astype(np.uint64) << np.uint64(32) | self.code[:, c, 1].astype(np.uint64)
            _, first = np.unique(key, return_index=True)
            left[c] = max(1.0 - float(np.exp(self.log_prior[first, c]).sum()), 0.0)
        return left


def draw_mixture_sample(key: PRNGKey, programs: Programs, params: Params, num_samples: int) -> MixtureSample:
    """Draw from the fit and from the prior, and score every draw under both."""
    half = num_samples // 2
    fit_key, prior_key = split_keys(key)
    fit = draw_fit(fit_key, programs, params, half)
    return _score_both(programs, fit, draw_prior(prior_key, programs, params, half), half)


def _score_both(programs: Programs, fit: tuple[Draws, Totals], prior: tuple[Draws, Totals], half: int) -> MixtureSample:
    structure, axes = programs.structure, _axes(programs)
    both = [
        totals._replace(
            log_ratio=totals.ratio, doubt=np.zeros_like(totals.reward) if totals.doubt is None else totals.doubt
        )
        for totals in (fit[1], prior[1])
    ]
    scores = {
        name: np.concatenate([np.asarray(part).reshape(half, -1) for part in parts]).astype(float)
        for name, *parts in zip(Totals._fields, *both, strict=True)
    }
    scores["ratio"] = scores.pop("log_ratio")
    codes = [_codes(drawn[0].sites, axes, structure, half) for drawn in (fit, prior)]
    return MixtureSample(**scores, code=np.concatenate(codes), num_fit=half)


def draw_restart_mixture_sample(key: PRNGKey, posterior: Posterior, num_samples: int) -> MixtureSample:
    """Draw from a mixture of restarts and from the prior, and score every draw under both."""
    programs, half = posterior._programs_for(), num_samples // 2
    fit_key, prior_key = split_keys(key)
    drawn, totals = jax.tree.map(lambda x: x[0], posterior._draw(fit_key, half, ()))
    first = posterior._lanes()[0]
    prior, prior_totals = draw_prior(prior_key, programs, first, half)
    scored = jax.tree.map(lambda x: x[0].reshape(prior_totals.log_q.shape), posterior.scores(prior.sites))
    return _score_both(programs, (drawn, totals), (prior, prior_totals.under(scored.log_q, scored.log_ratio)), half)


def target_log_weights(programs: Programs, params: Params, sites: dict[str, Any], beta: float | None) -> np.ndarray:
    """Return w = log π₀ + log p(y|x) + R/β − log q of given draws, [draws, contexts], nats."""
    w = np.asarray(score_draws(programs, params, sites).log_weight(1.0 if beta is None else beta), float)
    return w.reshape(len(w), -1)


def _axes(programs: Programs) -> tuple[tuple[str, tuple[int | None, ...]], ...] | None:
    """Find the context axes in the values of each site; None if some site is continuous."""
    structure = programs.structure
    latent = structure.names("action", "environment")
    if not all(structure[name].discrete for name in latent):
        return None
    return tuple(context_axes(structure).items())


def _codes(sites: dict[str, Any], axes: Any, structure: Structure, num: int) -> np.ndarray:
    """Fingerprint what each context drew, [draws, contexts, 2]; equal fingerprints mean equal draws."""
    contexts = structure.context_shape
    if axes is None:
        return np.zeros((num, 0, 2), np.uint32)
    # Two sums of 32 bits: with one, about two pairs of 2¹⁷ different draws would look equal by chance.
    total = np.zeros((num, *contexts, 2), np.uint32)
    for index, (name, own) in enumerate(axes):
        values = np.asarray(sites[name]).astype(np.int32).astype(np.uint32)
        kept = [1 + axis for axis in own if axis is not None]
        moved = np.moveaxis(values, kept, range(1, 1 + len(kept)))
        sizes = iter(moved.shape[1 : 1 + len(kept)])
        rest = moved.shape[1 + len(kept) :]
        aligned = moved.reshape(num, *(1 if axis is None else next(sizes) for axis in own), math.prod(rest))
        rng = np.random.default_rng(index)
        # Odd factors are invertible modulo 2³², so no single value collides with another.
        factors = rng.integers(2**32, size=(math.prod(rest), 2), dtype=np.uint32) | np.uint32(1)
        total = total + np.matmul(aligned + np.uint32(1), factors)
    return total.reshape(num, -1, 2)
