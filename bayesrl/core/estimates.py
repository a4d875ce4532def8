"""Numbers with their error bars: the one type in which engines and fits report expectations."""

from typing import NamedTuple

from jax import Array


class Estimate(NamedTuple):
    """A mean and its standard error, both [*beta, ...]; the error is 0 where the mean is exact."""

    mean: Array
    se: Array


class Estimates(NamedTuple):
    """Expectations under one distribution over actions, averaged over contexts, [*beta, ...].

    Attributes:
        objective: J = E[R] − β·KL, reward units (the ELBO, nats, without rewards).
        reward: E[R], reward units.
        kl: KL to the prior policy, nats.
        metrics: means of the deterministic sites, by name, in the units of each.
    """

    objective: Estimate
    reward: Estimate
    kl: Estimate
    metrics: dict[str, Estimate]
