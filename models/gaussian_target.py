"""A Normal prior and a quadratic reward: the posterior is Normal, in closed form."""

import math

import numpyro
import numpyro.distributions as dist

import bayesrl


def problem(
    *, prior_mean: float = 0.0, prior_scale: float = 1.0, target: float = 2.0, sharpness: float = 1.0
) -> bayesrl.Problem:
    """Make the problem: action ~ Normal(prior), reward −sharpness/2 · (action − target)²."""

    def gaussian_target() -> None:
        action = numpyro.sample("action", dist.Normal(prior_mean, prior_scale))
        bayesrl.reward("closeness", -0.5 * sharpness * (action - target) ** 2)

    def optimum(beta: float) -> float:
        # Up to a constant, exp(R/β) is a Normal density of the action with variance β/sharpness.
        spread = beta / sharpness
        both = spread + prior_scale**2
        log_evidence = 0.5 * math.log(spread / both) - (target - prior_mean) ** 2 / (2 * both)
        return beta * log_evidence

    return bayesrl.Problem(gaussian_target, beta=0.5, fit_options={"num_steps": 1000}, optimum=optimum)
