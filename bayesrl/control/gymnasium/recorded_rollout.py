"""Rollouts in environments that are not programs: their sites hold recorded values."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

from bayesrl.control.environments.base import Environment, Transition
from bayesrl.control.gymnasium.spaces import NEVER, Observations
from bayesrl.control.rollout import EpisodeProgram, PolicyFn, emit_critic_sites
from bayesrl.core.primitives import environment, reward
from bayesrl.errors import ControlError


class RecordedValue(dist.Distribution):
    """A placeholder for the values of an environment outside the program: their density is unknown, and cancels.

    It draws zeros, so that programs can be traced; only recorded values have a meaning.
    """

    recorded = True
    pytree_aux_fields = ("dtype", "num_values")

    def __init__(self, shape: tuple[int, ...] = (), dtype: Any = float, num_values: int | None = None) -> None:
        self.dtype = jnp.zeros((), dtype).dtype
        self.num_values = num_values
        super().__init__((), shape)

    @property
    def support(self) -> Any:
        """Integers from 0 on, booleans, or real numbers."""
        if self.num_values is not None:
            return constraints.integer_interval(0, self.num_values - 1)
        return constraints.boolean if self.dtype == bool else constraints.independent(constraints.real, self.event_dim)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Return zeros."""
        return jnp.zeros((*sample_shape, *self.event_shape), self.dtype)

    def log_prob(self, value: Any) -> Array:
        """Return zero."""
        shape = jnp.shape(value)
        return jnp.zeros(shape[: len(shape) - len(self.event_shape)])


def mask_actions(actions: dist.Distribution, allowed: Array) -> dist.Distribution:
    """Restrict a Categorical to the allowed actions, [..., actions]; if none is allowed, keep all."""
    logits = jnp.asarray(actions.logits)
    return dist.Categorical(logits=jnp.where(allowed | ~allowed.any(-1, keepdims=True), logits, NEVER))


@dataclass(frozen=True)
class ExternalEnvironment(Environment):
    """An environment that is not a program: the observations that policies see, and the prior of their actions."""

    observations: Observations
    actions: dist.Distribution
    num_observations: int | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_observations", self.observations.num)

    def reset(self) -> Array:
        """Return zeros in place of the first observation."""
        return jnp.zeros(self.observations.shape, self.observations.dtype)

    def step(self, state: Any, action: Any) -> Transition:
        """Refuse: the program does not know the next state."""
        raise ControlError(
            "this environment is not a program, so it cannot be stepped in one; use bayesrl.fit(..., source=source)"
        )

    def prior(self, observation: Any) -> dist.Distribution:
        """Return the distribution of actions from which policies start, restricted to allowed actions."""
        masked = self.observations.masked
        return mask_actions(self.actions, observation[-masked:] > 0) if masked else self.actions

    def label(self, observation: Any) -> Any:
        """Drop the mask; see `Environment.label`."""
        return observation[0] if self.observations.masked and self.num_observations is not None else observation

    def features(self, observation: Any) -> Array:
        """Scale vectors, and one-hot encode each of several integers; see `Environment.features`."""
        seen = self.observations
        if seen.num is None:
            return super().features(observation / seen.scale)
        label = self.label(observation)
        features = [super().features(label)]
        if len(seen.digits) > 1:
            digits = jnp.unravel_index(label, seen.digits)
            features = [jax.nn.one_hot(digit, size) for digit, size in zip(digits, seen.digits, strict=True)]
        if seen.masked:
            features.append(observation[-seen.masked :].astype(float))
        return jnp.concatenate(features)


@dataclass(frozen=True, eq=False)
class RecordedRollout(EpisodeProgram):
    """Steps of a policy in an environment outside the program, starting anywhere in an episode.

    `source` fills the sites `observation`, `counts` (False at resets of an environment, and in the last step, which
    only values what follows), `terminated` and `earned`, and supplies the density from which each action was drawn.

    Attributes:
        return_scale: size of returns to come, reward units; a critic's outputs are multiples of it.
    """

    environment: ExternalEnvironment
    return_scale: float = 1.0

    def play(self, choose: PolicyFn) -> Any:
        """Score the recorded steps; see `EpisodeProgram.run`."""
        seen = self.environment.observations
        # With a mask appended, an observation is no longer one integer.
        placeholder = RecordedValue(seen.shape, seen.dtype, None if seen.masked else seen.num)

        def step(carry: None, time: Array) -> tuple[None, None]:
            observation = environment("observation", placeholder, observable=True)
            counts = environment("counts", RecordedValue(dtype=bool), observable=True)
            choice = choose(observation, time)
            with handlers.mask(mask=counts):
                numpyro.sample("action", choice.action)
            terminated = environment("terminated", RecordedValue(dtype=bool), observable=True)
            earned = environment("earned", RecordedValue(), observable=True)
            reward("reward", jnp.where(counts, earned, 0.0))
            emit_critic_sites(choice, counts.astype(float), self.discount * (1.0 - terminated))
            return None, None

        scan(step, None, jnp.arange(self.horizon))
