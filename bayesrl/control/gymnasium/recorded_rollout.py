"""Rollouts in environments that are no program: their sites hold what was recorded."""

from dataclasses import dataclass
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
from bayesrl.control.gymnasium.spaces import NEVER
from bayesrl.control.rollout import EpisodeProgram, PolicyFn, emit_critic_sites
from bayesrl.core.primitives import environment, reward
from bayesrl.errors import ControlError


class RecordedValue(dist.Distribution):
    """Stands for what an environment outside of the program gives: its density is not known, and cancels.

    It draws zeros, so that programs can be looked at; only recorded values mean anything.
    """

    recorded = True

    def __init__(self, shape: tuple[int, ...] = (), dtype: Any = float, num_values: int | None = None) -> None:
        self.dtype = jnp.zeros((), dtype).dtype
        self.num_values = num_values
        super().__init__((), shape)

    @property
    def support(self) -> Any:
        """Integers from 0 on, truth values, or real numbers."""
        if self.num_values is not None:
            return constraints.integer_interval(0, self.num_values - 1)
        return (
            constraints.boolean
            if self.dtype == bool
            else constraints.independent(constraints.real, len(self.event_shape))
        )

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Give zeros."""
        return jnp.zeros((*sample_shape, *self.event_shape), self.dtype)

    def log_prob(self, value: Any) -> Array:
        """Give zero."""
        shape = jnp.shape(value)
        return jnp.zeros(shape[: len(shape) - len(self.event_shape)])

    def tree_flatten(self) -> Any:
        """Hold no arrays."""
        return (), (self.event_shape, self.dtype, self.num_values)

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> "RecordedValue":
        """Make it again."""
        return cls(*aux_data)


def mask_actions(actions: dist.Distribution, allowed: Array) -> dist.Distribution:
    """Give a Categorical among the actions that are allowed, [..., actions]; among all where none is."""
    logits = jnp.asarray(actions.logits)
    return dist.Categorical(logits=jnp.where(allowed | ~allowed.any(-1, keepdims=True), logits, NEVER))


@dataclass(frozen=True)
class ExternalEnvironment(Environment):
    """An environment that is no program, known by its observations and its prior policy alone.

    Args:
        shape: of one observation.
        dtype: of one observation.
        actions: the distribution of actions that policies start from.
        num_observations: their number where they are the integers from 0 on, else None.
        scale: of about which size the numbers in an observation are, [*shape].
        digits: how many values each of several integers takes that are counted together.
        masked: how many numbers at the end of an observation tell which actions are allowed.
    """

    shape: tuple[int, ...]
    dtype: Any
    actions: dist.Distribution
    num_observations: int | None = None
    scale: Any = 1.0
    digits: tuple[int, ...] = ()
    masked: int = 0

    def reset(self) -> Array:
        """Stand for the first observation."""
        return jnp.zeros(self.shape, self.dtype)

    def step(self, state: Any, action: Any) -> Transition:
        """Refuse: nobody knows what follows.

        Raises:
            ControlError: always.
        """
        raise ControlError("this environment is no program, so it cannot be stepped in one; fit with source=...")

    def prior(self, observation: Any) -> dist.Distribution:
        """Give the distribution of actions that policies start from; those that are not allowed have no share in it."""
        if not self.masked:
            return self.actions
        return mask_actions(self.actions, observation[-self.masked :] > 0)

    def label(self, observation: Any) -> Any:
        """Leave the mask away; see `Environment.label`."""
        return observation[0] if self.masked and self.num_observations is not None else observation

    def features(self, observation: Any) -> Array:
        """Scale vectors, and indicate each of several integers; see `Environment.features`."""
        if self.num_observations is None:
            return super().features(observation / self.scale)
        label = self.label(observation)
        told = [super().features(label)]
        if len(self.digits) > 1:
            digits = jnp.unravel_index(label, self.digits)
            told = [jax.nn.one_hot(digit, size) for digit, size in zip(digits, self.digits, strict=True)]
        if self.masked:
            told.append(observation[-self.masked :].astype(float))
        return jnp.concatenate(told)


@dataclass(frozen=True, eq=False)
class RecordedRollout(EpisodeProgram):
    """Steps of a policy in an environment outside of the program, from anywhere in an episode on.

    `source` fills the sites `observation`, `counts` (False where an environment was reset, and in the last step,
    which only values what follows), `terminated` and `earned`; of the actions it is known who drew them.

    Attributes:
        return_scale: of about which size returns to come are, reward units; a critic's numbers are multiples of it.
    """

    environment: ExternalEnvironment
    return_scale: float = 1.0

    def play(self, choose: PolicyFn) -> Any:
        """Score what was recorded; see `EpisodeProgram.run`."""
        world = self.environment

        def step(carry: None, time: Array) -> tuple[None, None]:
            seen = environment(
                "observation",
                RecordedValue(world.shape, world.dtype, None if world.masked else world.num_observations),
                observable=True,
            )
            counts = environment("counts", RecordedValue(dtype=bool), observable=True)
            choice = choose(seen, time)
            with handlers.mask(mask=counts):
                numpyro.sample("action", choice.action)
            terminated = environment("terminated", RecordedValue(dtype=bool), observable=True)
            earned = environment("earned", RecordedValue(), observable=True)
            reward("reward", jnp.where(counts, earned, 0.0))
            emit_critic_sites(choice, counts.astype(float), self.discount * (1.0 - terminated))
            return None, None

        scan(step, None, jnp.arange(self.horizon))
