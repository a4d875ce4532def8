"""The posterior of normal ratings, in closed form."""

import math

import numpy as np

from bayesrl.errors import PreferenceError
from bayesrl.preferences.engines.gibbs_sampling import design_matrix
from bayesrl.preferences.engines.laplace_approximation import FlatDensity, Gaussian


def normal_posterior(density: FlatDensity) -> tuple[Gaussian, float]:
    """Return p(θ | y) and log p(y), nats, of ratings that are linear in θ with normal noise.

    Raises:
        PreferenceError: the model is of other judgements, which have no conjugate prior.

    References:
        Bishop (2006), "Pattern recognition and machine learning", equations 3.49 to 3.51 and 3.86.
    """
    model = density.model
    if model.name != "gaussian_ratings":
        raise PreferenceError(
            f"method='conjugate' takes gaussian_ratings, and got {model!r}, whose likelihood has no conjugate prior; "
            "method='gibbs' is conjugate given one auxiliary draw for each judgement"
        )
    design, ratings = design_matrix(model, "conjugate"), np.asarray(model.observed, float)
    prior = np.concatenate([np.full(math.prod(shape), scale**-2.0) for scale, shape in model.priors.values()])
    precision = np.diag(prior) + design.T @ design / model.noise**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ design.T @ ratings / model.noise**2
    residual = ratings - design @ mean
    fit = (residual @ residual) / model.noise**2 + mean @ (prior * mean)
    log_det = np.linalg.slogdet(precision)[1] - np.log(prior).sum()
    constant = len(ratings) * math.log(2 * math.pi * model.noise**2)
    return Gaussian(mean, covariance), float(-0.5 * (constant + log_det + fit))
