"""Arms with known win rates: the smallest problem, whose optimum is a softmax."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesrl


def problem(*, arms: int = 5, best: float = 0.9, worst: float = 0.1) -> bayesrl.Problem:
    """Make the bandit: `arms` arms with win rates spread evenly from `worst` to `best`."""
    rates = jnp.asarray(np.linspace(worst, best, int(arms)))

    def bernoulli_bandit() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(len(rates))))
        bayesrl.reward("win_rate", rates[arm])

    return bayesrl.Problem(bernoulli_bandit, beta=0.1, fit_options={"num_steps": 1000})
