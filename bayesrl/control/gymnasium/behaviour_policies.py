"""Behaviour policies: the guide itself, or another policy, with importance weights to correct its draws."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from bayesrl.arguments import UnitInterval, checked
from bayesrl.compilation.random_keys import split, split_keys
from bayesrl.control.policies import action_distribution
from bayesrl.core.programs import Programs
from bayesrl.errors import ControlError
from bayesrl.typing import Params, PRNGKey

type Behaviour = Callable[[PRNGKey, dist.Distribution, dist.Distribution], tuple[Array, Array]]
"""A function from a key, the guide's and the prior's action distribution to an action and its log-probability."""


class ScoredActions(NamedTuple):
    """One action for each observation, with its log-probabilities in nats."""

    action: Array
    log_behaviour: Array
    log_q: Array
    log_prior: Array


def play_guide(key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
    """Play the guide itself."""
    action = fitted.sample(key)
    return action, fitted.log_prob(action)


@checked(ControlError)
def prior_mixture(share: UnitInterval) -> Behaviour:
    """Play the prior in a share of the steps, and the guide in the others.

    Args:
        share: probability of playing the prior, in [0, 1]; 1 plays the prior alone.

    Raises:
        ControlError: the share is not in [0, 1].

    Example:
        >>> from bayesrl import control
        >>> source = control.GymnasiumSource("CartPole-v1", num_envs=1, behaviour=control.prior_mixture(0.1))
    """

    def behave(key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
        which, own, other = split_keys(key, 3)
        explore = jax.random.bernoulli(which, share)
        action = jnp.where(explore, prior.sample(own), fitted.sample(other))
        # The density of the mixture, not of the branch taken: importance weights then stay bounded.
        by_guide, by_prior = fitted.log_prob(action), prior.log_prob(action)
        # At a share of 0 or 1, one of the logarithms is −inf, which logaddexp takes.
        return action, jnp.logaddexp(by_guide + jnp.log1p(-jnp.asarray(share)), by_prior + jnp.log(jnp.asarray(share)))

    return behave


def choose_actions(
    programs: Programs, params: Params, key: PRNGKey, seen: Array, behaviour: Behaviour
) -> ScoredActions:
    """Choose an action for each observation [num, ...] by the behaviour policy, and score it; the key is consumed."""

    def one(key: PRNGKey, observation: Array) -> ScoredActions:
        prior = fitted = action_distribution(programs.policy, observation)
        if programs.guide is not None:
            fitted = action_distribution(
                handlers.substitute(programs.guide, data=programs.constrain(params)), observation
            )
        action, log_prob = behaviour(key, fitted, prior)
        return ScoredActions(action, log_prob, fitted.log_prob(action), prior.log_prob(action))

    return jax.vmap(one)(split(key, seen.shape[0]), seen)
