"""A full-rank normal guide, site by site: each site given the ones before is normal around a linear map of them."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bayesrl.preferences.engines.laplace_approximation import Gaussian
from bayesrl.preferences.preference_program import PreferenceModel


def gaussian_guide(model: PreferenceModel) -> Callable[[], None]:
    """Write the guide of a model; it starts at the prior, and every site has a density of its own."""

    def guide() -> None:
        before: list[Array] = []
        for name, (scale, shape) in model.priors.items():
            size = math.prod(shape)
            # In units of the prior, so that one learning rate suits all.
            mean = scale * numpyro.param(f"{name}.mean", jnp.zeros(size))
            if before:
                earlier = jnp.concatenate(before)
                mean = mean + scale * numpyro.param(f"{name}.slope", jnp.zeros((size, len(earlier)))) @ earlier
            if shape:
                root = numpyro.param(f"{name}.root", jnp.eye(size), constraint=constraints.lower_cholesky)
                value = numpyro.sample(name, dist.MultivariateNormal(mean, scale_tril=scale * root))
            else:
                spread = numpyro.param(f"{name}.root", jnp.ones(()), constraint=constraints.positive)
                value = numpyro.sample(name, dist.Normal(mean[0], scale * spread))
            before.append(jnp.reshape(value, (size,)))

    return guide


def gaussian_of(model: PreferenceModel, params: dict[str, Any]) -> Gaussian:
    """Return mean and covariance of a guide with these parameters, all sites in one vector."""
    mean, root = np.zeros(0), np.zeros((0, 0))
    for name, (scale, _) in model.priors.items():
        own_mean = scale * np.atleast_1d(np.asarray(params[f"{name}.mean"], float))
        own_root = scale * np.atleast_2d(np.asarray(params[f"{name}.root"], float))
        slope = scale * np.asarray(params.get(f"{name}.slope", np.zeros((len(own_mean), len(mean)))), float)
        mean = np.concatenate([mean, own_mean + slope @ mean])
        above = np.hstack([root, np.zeros((len(root), len(own_root)))])
        root = np.vstack([above, np.hstack([slope @ root, own_root])])
    return Gaussian(mean, root @ root.T)
