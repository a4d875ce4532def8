"""The density of the target p* of a policy that draws a single number."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import logsumexp

from bayesrl.core.density import log_density
from bayesrl.exact.regularizers import find_multiplier, make_regularizer
from bayesrl.posterior.posterior import Posterior

_GRID = 400


def target_density(
    posterior: Posterior, site: str, prior: np.ndarray, fitted: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Integrate p* on a grid if the site is the program's only draw and a single number; draws are [draws, 1, 1]."""
    programs = posterior.programs
    if programs is None or prior.shape[1:] != (1, 1) or posterior.draws[site].ndim != 2:
        return None
    if programs.structure.names("action", "environment") != (site,):
        return None
    both = np.concatenate([prior.ravel(), fitted.ravel()])
    grid = np.linspace(both.min(), both.max(), _GRID)
    policy, args = programs.policy, programs.args
    beta = None if posterior.beta is None else float(posterior.beta)

    def score(value: Array) -> tuple[Array, Array, Array]:
        found = log_density(policy, {site: value}, *args, beta=beta)
        return found.log_target.sum(), found.log_prior.sum(), found.total_reward.sum()

    log_target, log_prior, reward = (np.asarray(x, float) for x in jax.vmap(score)(jnp.asarray(grid, jnp.float32)))
    density = np.exp(log_target - log_target.max())
    f = make_regularizer(posterior.settings.get("regularizer", "kl"), posterior.settings.get("alpha"))
    if f is not None and beta is not None:
        reference = np.exp(log_prior - logsumexp(log_prior))
        root = find_multiplier(reward[:, None], beta, reference[:, None], f, posterior.settings["regularizer"])
        density = reference * f.ratio(f.origin - (reward - root) / beta)
    return grid, density / np.trapezoid(density, grid)
