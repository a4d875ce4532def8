"""Draws of the fit and of the prior, pooled: one sample from which every number of a fit is estimated.

Draws come from the mixture m = α·q + (1 − α)·π₀ in fixed shares. Ratios to m are bounded by 1/α and
1/(1 − α), so that no average over q or π₀ rests on a few heavy draws, and q/m, whose mean is known to be
1, is a control variate (Owen & Zhou 2000, "Safe and effective importance sampling", section 4): where w
is constant over q, its average has no noise at all.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from bayesrl.core.draws import Draws
from bayesrl.core.pairing import Pair
from bayesrl.core.recording import record
from bayesrl.core.structure import Structure
from bayesrl.engines.weighted import context_axes
from bayesrl.programs import Programs
from bayesrl.typing import Params, PRNGKey

FROM_FIT = 0.5
_ELEMENTS = 2**22
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


class Pool(NamedTuple):
    """Scores of pooled draws, [draws, contexts], contexts flat, in double precision; those of the fit come first.

    Attributes:
        log_prior: log π₀ of the action sites, nats.
        log_q: log q of the action sites, nats.
        log_likelihood: log p of the observed sites, nats.
        reward: reward units.
        code: a fingerprint of what was drawn; empty where some site is continuous.
        num_fit: number of draws of the fit.
    """

    log_prior: np.ndarray
    log_q: np.ndarray
    log_likelihood: np.ndarray
    reward: np.ndarray
    code: np.ndarray
    num_fit: int

    @property
    def ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """q/m and π₀/m."""
        share = self.num_fit / len(self.log_q)
        log_m = np.logaddexp(math.log(share) + self.log_q, math.log1p(-share) + self.log_prior)
        return np.exp(self.log_q - log_m), np.exp(self.log_prior - log_m)


def draw_pool(key: PRNGKey, programs: Programs, params: Params, num_draws: int) -> Pool:
    """Draw from the fit and from the prior, and score every draw under both.

    Args:
        key: consumed whole.
        programs: over all data; see `over_all_data`.
        params: unconstrained parameters of the guide, of one fit.
        num_draws: in all.
    """
    structure = programs.structure
    axes = _axes(programs)
    size = sum(math.prod(site.shape) for site in structure.sites if site.latent) + 4 * structure.num_contexts
    half = num_draws // 2
    batch = max(1, min(half, _ELEMENTS // max(size, 1)))
    static = (programs.policy, programs.guide, structure, programs.learned, axes)
    keys = jax.random.split(key, math.ceil(half / batch))
    parts = [
        jax.tree.map(np.asarray, _both(static, dict(programs.transforms), programs.args, k, params, batch)) for k in keys
    ]
    fit, prior = (jax.tree.map(lambda *xs: np.concatenate(xs)[:half], *(p[i] for p in parts)) for i in (0, 1))
    columns = {name: np.concatenate([fit[name], prior[name]]) for name in fit}
    scores = {n: columns[n].astype(float) for n in ("log_prior", "log_q", "log_likelihood", "reward")}
    return Pool(**scores, code=columns["code"], num_fit=half)


def _axes(programs: Programs) -> tuple[tuple[str, tuple[int | None, ...]], ...] | None:
    """Where the contexts lie in the values of each site; None where some site is continuous."""
    structure = programs.structure
    latent = structure.named("action", "environment")
    if not all(structure[name].discrete for name in latent):
        return None
    recording = record(handlers.seed(programs.policy, rng_seed=jax.random.key(0)), *programs.args)
    return tuple(context_axes(recording, structure).items())


@eqx.filter_jit
def _both(
    static: Any, transforms: Any, args: Any, key: PRNGKey, params: Params, num: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    policy, guide, structure, learned, axes = static
    pair = Pair(policy, guide, structure, args, transforms, learned)
    fit_key, prior_key = jax.random.split(key)
    ours = pair.draw(fit_key, params, num, share=False)
    prior = Pair(policy, None, structure, args, {}).draw(prior_key, {}, num, share=False)
    prior = prior._replace(log_q=pair.log_q(params, prior))
    return _columns(ours, structure, axes, num), _columns(prior, structure, axes, num)


def _columns(draws: Draws, structure: Structure, axes: Any, num: int) -> dict[str, Array]:
    totals = draws.totals((num, *structure.context_shape))
    flat = {name: value.reshape(num, -1) for name, value in totals._asdict().items()}
    return {**flat, "code": _codes(draws.sites, axes, structure, num)}


def _codes(sites: dict[str, Array], axes: Any, structure: Structure, num: int) -> Array:
    """Fingerprint what each context drew, [draws, contexts, 2]; two draws of one fingerprint are the same."""
    if axes is None:
        return jnp.zeros((num, 0, 2), jnp.uint32)
    contexts = structure.context_shape
    total = jnp.zeros((num, *contexts, 2), jnp.uint32)
    for index, (name, own) in enumerate(axes):
        values = sites[name].astype(jnp.int32).astype(jnp.uint32)
        held = [1 + axis for axis in own if axis is not None]
        moved = jnp.moveaxis(values, held, range(1, 1 + len(held)))
        sizes = iter(moved.shape[1 : 1 + len(held)])
        rest = moved.shape[1 + len(held) :]
        aligned = moved.reshape(num, *(1 if axis is None else next(sizes) for axis in own), math.prod(rest))
        factors = jax.random.bits(jax.random.fold_in(jax.random.key(0), index), (math.prod(rest), 2)) | 1
        total = total + jnp.einsum("...e,ek->...k", aligned + jnp.uint32(1), factors)
    return total.reshape(num, -1, 2)


class Estimator:
    """Averages over the pool with their waves: how much each draw moves an estimate, [draws].

    The standard error of an estimate is that of a stratified mean of its wave: fit and prior have
    fixed shares.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.of_q, self.of_prior = pool.ratios

    def mean(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average over q, [contexts], with the wave, [draws, contexts]: E_q[f] = E_m[(q/m)·f], less a multiple of q/m − 1."""
        kept = np.where(self.of_q > 0, values, 0.0)
        return self.controlled(self.of_q * kept)

    def controlled(self, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average over m with the control variate q/m − 1, regressed within the two shares."""
        control = self.of_q - 1
        inner = self._centred(control)
        slope = (inner * self._centred(terms)).sum(0) / np.maximum((inner**2).sum(0), 1e-300)
        steady = terms - slope * control
        mean = steady.mean(0)
        return mean, steady - mean

    def se(self, wave: np.ndarray) -> np.ndarray:
        """Standard error of the mean of a wave [draws, ...]."""
        n = len(wave)
        parts = (wave[: self.pool.num_fit], wave[self.pool.num_fit :])
        return np.sqrt(sum(len(part) * part.var(0, ddof=1) for part in parts)) / n

    def _centred(self, values: np.ndarray) -> np.ndarray:
        k = self.pool.num_fit
        return np.concatenate([values[:k] - values[:k].mean(0), values[k:] - values[k:].mean(0)])
