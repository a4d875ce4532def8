"""The density of given sites under a policy and under its tilt, per context and per step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers

from bayesrl.arguments import checked
from bayesrl.compilation.random_keys import dummy_key, key_from_seed
from bayesrl.core.draws import total
from bayesrl.core.programs import Programs
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import check_policy, structure_of
from bayesrl.core.trace import trace_program
from bayesrl.errors import PolicyError
from bayesrl.typing import Beta, Program, SiteArrays


class Density(NamedTuple):
    """Scores of given sites, of shape [*contexts] or per step [*contexts, T].

    Attributes:
        log_prior: log π₀ of the action sites, which the KL compares with log q, nats.
        log_nature: log p of the environment sites, nats.
        log_likelihood: log p of the observed sites, nats.
        total_reward: sum of the reward sites, reward units.
        log_target: log π₀ + log p(nature) + log p(y|x) + R/β, unnormalised, nats.
        steps: the same scores per site, [*contexts, T] with T = 1 outside scans, under the keys
            `log_prior`, `log_nature`, `log_likelihood` and `rewards`.
    """

    log_prior: Array
    log_nature: Array
    log_likelihood: Array
    total_reward: Array
    log_target: Array
    steps: dict[str, dict[str, Array]]


@checked(PolicyError)
def log_density(policy: Program, sites: SiteArrays, *args: Any, beta: Beta | None = None) -> Density:
    """Score given values of all latent sites under a policy and its tilt.

    log_target(x) = log π₀(x) + log p(y|x) + R(x)/β, unnormalised, per independent plate element.

    Args:
        policy: the program.
        sites: the value of every action and environment site. You may also pass the indices of a
            subsampled plate, under its name.
        *args: arguments of the program.
        beta: temperature, reward units per nat; required if the program has rewards, refused otherwise.

    Returns:
        `Density`, with one entry per context; with a mini-batch, one per element of the batch.

    Raises:
        PolicyError: a latent site is missing from `sites`, or beta does not fit the program.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2)))
        ...     bayesrl.reward("payoff", 3.0 * arm)
        >>> density = bayesrl.log_density(bandit, {"arm": jnp.array(1)}, beta=3.0)
        >>> round(float(density.log_target), 4)  # log(1/2) + 1
        0.3069
    """
    program = FoldedKeys(handlers.substitute(policy, data=dict(sites)), dummy_key())
    structure = structure_of(trace_program(program, *args))
    check_policy(structure, has_beta=beta is not None)
    missing = [name for name in structure.names("action", "environment") if name not in sites]
    if missing:
        raise PolicyError(f"no value was given for site {missing[0]!r}; pass one for each of {list(structure.actions)}")
    programs = Programs(policy, None, structure, args, {})
    # All sites have values; the key is only for mini-batches whose indices were not given.
    draws = jax.tree.map(lambda x: x[0], programs.draw(key_from_seed(0), {}, 1, values=sites))
    shape = structure.context_shape
    parts = {name: getattr(draws, name) for name in ("log_prior", "log_nature", "log_likelihood", "rewards")}
    log_prior, log_nature, log_likelihood, reward = (total(part, shape) for part in parts.values())
    tempered = reward / jnp.asarray(beta) if beta is not None else jnp.zeros(shape)
    log_target = log_prior + log_nature + log_likelihood + tempered
    return Density(log_prior, log_nature, log_likelihood, reward, log_target, parts)
