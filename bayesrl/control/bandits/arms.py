"""Bandits as models of the unknown: a prior over instances, and conjugate or Laplace posteriors of their values."""

import abc
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from bayesrl.arguments import Count, CountAboveOne, Positive, checked, real_range
from bayesrl.control.exploration.beliefs import (
    Belief,
    BetaBelief,
    LinearBelief,
    LogisticBelief,
    NormalBelief,
    sample_by_precision,
)
from bayesrl.errors import ControlError
from bayesrl.typing import Numbers, PRNGKey

_NEWTON_STEPS = 8


@checked(ControlError)
@dataclass(frozen=True)
class Bandit(abc.ABC):
    """A bandit with a prior over its instances; many independent runs are played side by side, [runs, ...].

    The state, a pytree of arrays, sums up the rewards so far: `init` makes the state of the prior, `update` the next.
    By default, the state is itself a `Belief`.

    Args:
        num_arms: number of actions.

    Raises:
        ControlError: num_arms is below 2; another number is out of range.
    """

    num_arms: CountAboveOne

    @abc.abstractmethod
    def instance_prior(self) -> dist.Distribution:
        """Return the prior of the instance of one run, as NumPyro programs draw it."""

    @abc.abstractmethod
    def reward_distribution(self, values: Numbers) -> dist.Distribution:
        """Return the distribution of rewards of actions with these expected rewards."""

    @abc.abstractmethod
    def init(self, num_runs: Count) -> Any:
        """Make the state of the prior, [runs, ...]."""

    @abc.abstractmethod
    def update(self, state: Any, context: Array, arm: Array, reward: Array) -> Any:
        """Condition each run on one reward."""

    def posterior(self, state: Any, context: Array) -> Belief:
        """Return the posterior of the values of all arms, [runs, arms]."""
        return state

    def sample_posterior(self, key: PRNGKey, state: Any) -> Array:
        """Draw instances from the posterior, [runs, ...]."""
        return state.sample(key)

    def sample_instances(self, key: PRNGKey, num_runs: Count) -> Array:
        """Draw instances from the prior, [runs, ...]."""
        return self.sample_posterior(key, self.init(num_runs))

    def sample_context(self, key: PRNGKey, num_runs: Count) -> Array:
        """Draw the context that a rule sees before it chooses, [runs, ...]; empty by default."""
        return jnp.zeros((num_runs, 0))

    def expected_rewards(self, instances: Array, context: Array) -> Array:
        """Return the expected rewards, [runs, arms]; by default, the instances themselves."""
        return instances

    def sample_reward(self, key: PRNGKey, values: Array) -> Array:
        """Draw the rewards of actions with these expected rewards, [runs]."""
        # Bernoulli draws integers, and a scan wants rewards of one type.
        return jnp.asarray(self.reward_distribution(values).sample(key), float)


@checked(ControlError)
@dataclass(frozen=True)
class BernoulliArms(Bandit):
    """Rewards 0 and 1 with unknown probabilities, a priori Beta(prior_a, prior_b).

    Args:
        num_arms: number of actions.
        prior_a: parameter a of the Beta, at least 1.
        prior_b: parameter b of the Beta, at least 1.

    Example:
        >>> from bayesrl.control.bandits import BernoulliArms
        >>> BernoulliArms(2).init(1).mean.tolist()
        [[0.5, 0.5]]
    """

    prior_a: Annotated[float, real_range(1)] = 1.0
    prior_b: Annotated[float, real_range(1)] = 1.0

    def instance_prior(self) -> dist.Distribution:
        """Return Beta(prior_a, prior_b) for each arm."""
        return dist.Beta(self.prior_a, self.prior_b).expand([self.num_arms]).to_event(1)

    def reward_distribution(self, values: Numbers) -> dist.Distribution:
        """Return Bernoulli(value)."""
        return dist.Bernoulli(probs=values)

    def init(self, num_runs: Count) -> BetaBelief:
        """Return the prior."""
        shape = (num_runs, self.num_arms)
        # Floats, even if the prior is given as integers: sums with rewards would change the type inside a scan.
        return BetaBelief(jnp.full(shape, float(self.prior_a)), jnp.full(shape, float(self.prior_b)))

    def update(self, state: BetaBelief, context: Array, arm: Array, reward: Array) -> BetaBelief:
        """Count successes and failures."""
        pulled = jax.nn.one_hot(arm, self.num_arms)
        return BetaBelief(state.a + pulled * reward[:, None], state.b + pulled * (1 - reward[:, None]))


@checked(ControlError)
@dataclass(frozen=True)
class GaussianArms(Bandit):
    """Rewards Normal(value, noise) with unknown values, a priori Normal(prior_mean, prior_scale).

    Args:
        num_arms: number of actions.
        prior_mean: mean of the prior, reward units.
        prior_scale: standard deviation of the prior, reward units.
        noise: standard deviation of a reward, reward units.

    Example:
        >>> from bayesrl.control.bandits import GaussianArms
        >>> GaussianArms(2, prior_mean=1.5).init(1).mean.tolist()
        [[1.5, 1.5]]
    """

    prior_mean: float = 0.0
    prior_scale: Positive = 1.0
    noise: Positive = 1.0

    def instance_prior(self) -> dist.Distribution:
        """Return Normal(prior_mean, prior_scale) for each arm."""
        return dist.Normal(self.prior_mean, self.prior_scale).expand([self.num_arms]).to_event(1)

    def reward_distribution(self, values: Numbers) -> dist.Distribution:
        """Return Normal(value, noise)."""
        return dist.Normal(values, self.noise)

    def init(self, num_runs: Count) -> NormalBelief:
        """Return the prior."""
        shape = (num_runs, self.num_arms)
        return NormalBelief(jnp.full(shape, float(self.prior_mean)), jnp.full(shape, float(self.prior_scale) ** 2))

    def update(self, state: NormalBelief, context: Array, arm: Array, reward: Array) -> NormalBelief:
        """Add precisions."""
        pulled = jax.nn.one_hot(arm, self.num_arms)
        # Arms that were not pulled have gain 0, and keep their numbers to the last bit.
        gain = pulled * state.variance / (state.variance + self.noise**2)
        return NormalBelief(state.mean + gain * (reward[:, None] - state.mean), state.variance * (1 - gain))


@checked(ControlError)
@dataclass(frozen=True)
class LinearArms(Bandit):
    """Contextual arms: each shows features x ~ Normal(0, 1/features), and pays Normal(x·θ, noise).

    The arms share θ, a priori Normal(0, prior_scale). The state is (E[θ], precision of θ).

    Args:
        num_arms: number of actions.
        num_features: number of features of each arm.
        prior_scale: standard deviation of θ, a priori.
        noise: standard deviation of a reward, reward units.

    Example:
        >>> from bayesrl.control.bandits import LinearArms
        >>> LinearArms(3, num_features=2).init(1)[1].tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]

    References:
        Agrawal & Goyal (2013), "Thompson sampling for contextual bandits with linear payoffs".
    """

    num_features: Count = 4
    prior_scale: Positive = 1.0
    noise: Positive = 1.0

    def instance_prior(self) -> dist.Distribution:
        """Return Normal(0, prior_scale) for each feature."""
        return dist.Normal(0.0, self.prior_scale).expand([self.num_features]).to_event(1)

    def reward_distribution(self, values: Numbers) -> dist.Distribution:
        """Return Normal(value, noise)."""
        return dist.Normal(values, self.noise)

    def init(self, num_runs: Count) -> tuple[Array, Array]:
        """Return the prior."""
        precision = jnp.eye(self.num_features) / self.prior_scale**2
        return jnp.zeros((num_runs, self.num_features)), jnp.tile(precision, (num_runs, 1, 1))

    def update(self, state: tuple[Array, Array], context: Array, arm: Array, reward: Array) -> tuple[Array, Array]:
        """Move the mode of θ along Λ⁻¹·x, where Λ is the precision and x the arm's features, and add curvature·x·xᵀ."""
        mean, precision = state
        x = jnp.take_along_axis(context, arm[:, None, None], 1)[:, 0]
        direction = jnp.linalg.solve(precision, x[..., None])[..., 0]
        moved, curvature = self._condition((x * mean).sum(-1), (x * direction).sum(-1), reward)
        added = curvature[:, None, None] * x[:, :, None] * x[:, None, :]
        return mean + moved[:, None] * direction, precision + added

    def _condition(self, value: Array, variance: Array, reward: Array) -> tuple[Array, Array]:
        """Return the step of the mode along Λ⁻¹·x, and the curvature there, from the posterior of x·θ and a reward."""
        # Sherman–Morrison: the new mode needs no solve with the new precision.
        return (reward - value) / (self.noise**2 + variance), jnp.full_like(value, self.noise**-2)

    def posterior(self, state: tuple[Array, Array], context: Array) -> LinearBelief:
        """Return the posterior of x·θ."""
        return LinearBelief(context, state[0], jnp.linalg.cholesky(state[1]))

    def sample_posterior(self, key: PRNGKey, state: tuple[Array, Array]) -> Array:
        """Draw θ."""
        return sample_by_precision(key, state[0], jnp.linalg.cholesky(state[1]))

    def sample_instances(self, key: PRNGKey, num_runs: Count) -> Array:
        """Draw θ, [runs, features]."""
        return jnp.asarray(self.instance_prior().sample(key, (num_runs,)))

    def sample_context(self, key: PRNGKey, num_runs: Count) -> Array:
        """Draw the features of all arms, [runs, arms, features]."""
        return jax.random.normal(key, (num_runs, self.num_arms, self.num_features)) / self.num_features**0.5

    def expected_rewards(self, instances: Array, context: Array) -> Array:
        """Compute x·θ."""
        return jnp.einsum("rad,rd->ra", context, instances)


@checked(ControlError)
@dataclass(frozen=True)
class LogisticArms(LinearArms):
    """Contextual arms that pay 1 with probability σ(x·θ), else 0; a running Laplace approximation learns θ.

    Each observation moves the mode by Newton's method and adds its curvature there, so no observation is needed
    again; `noise` has no meaning here.

    Example:
        >>> import jax
        >>> from bayesrl.control.bandits import LogisticArms
        >>> LogisticArms(3, num_features=2).sample_instances(jax.random.key(0), 5).shape
        (5, 2)

    References:
        Chapelle & Li (2011), "An empirical evaluation of Thompson sampling", algorithm 3; here with the
        full precision matrix.
    """

    def expected_rewards(self, instances: Array, context: Array) -> Array:
        """Compute σ(x·θ)."""
        return jax.nn.sigmoid(super().expected_rewards(instances, context))

    def reward_distribution(self, values: Numbers) -> dist.Distribution:
        """Return Bernoulli(value)."""
        return dist.Bernoulli(probs=values)

    def _condition(self, value: Array, variance: Array, reward: Array) -> tuple[Array, Array]:
        def newton(_: Any, moved: Array) -> Array:
            # The mode is mean + moved·Λ⁻¹·x with moved = reward − σ(value + variance·moved): one unknown.
            p = jax.nn.sigmoid(value + variance * moved)
            return moved - (moved - (reward - p)) / (1 + variance * p * (1 - p))

        moved = jax.lax.fori_loop(0, _NEWTON_STEPS, newton, jnp.zeros_like(value))
        p = jax.nn.sigmoid(value + variance * moved)
        return moved, p * (1 - p)

    def posterior(self, state: tuple[Array, Array], context: Array) -> LogisticBelief:
        """Return the posterior of σ(x·θ)."""
        return LogisticBelief(context, state[0], jnp.linalg.cholesky(state[1]))
