"""Spaces of Gymnasium: which are supported, and what policies make of them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bayesrl.arguments import Positive, checked
from bayesrl.core.keys import key_of_nothing
from bayesrl.errors import ControlError

SUPPORTED = "Discrete and Box spaces of numbers for observations, Discrete and Box spaces of floats for actions"
_LARGEST = 1e6
"""Bounds beyond this are none: float32's greatest number is a common way to say "unbounded"."""


@dataclass(frozen=True)
class Observations:
    """Observations of an environment, as policies see them: float32 arrays, or integers from 0 on.

    Attributes:
        shape: of one observation.
        dtype: of one observation.
        num: how many there are, or None where they are arrays.
        scale: of about which size the numbers are, [*shape].
        first: the least of finitely many observations.
    """

    shape: tuple[int, ...]
    dtype: Any
    num: int | None = None
    scale: Any = 1.0
    first: int = 0

    def from_environment(self, seen: Any) -> np.ndarray:
        """Give what policies see of a batch, [num, *shape], as an array of its own."""
        return np.array(seen - self.first if self.first else seen, self.dtype)


@dataclass(frozen=True)
class Actions:
    """Actions of an environment.

    Attributes:
        num: their number, or None where they are vectors.
        first: the least of finitely many actions.
        low: lower bounds of vectors, [*shape], infinite where there are none.
        high: upper bounds.
    """

    num: int | None
    first: int = 0
    low: Any = None
    high: Any = None

    def prior(self) -> dist.Distribution:
        """Give the default prior: uniform, or Normal around the middle with half the range as its scale."""
        if self.num is not None:
            return dist.Categorical(logits=jax.device_put(np.zeros(self.num, np.float32)), validate_args=False)
        with np.errstate(over="ignore", invalid="ignore"):  # where there are no bounds
            low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
            bounded = (np.abs(low) < _LARGEST) & (np.abs(high) < _LARGEST)
            middle = jax.device_put(np.where(bounded, (low + high) / 2, 0.0).astype(np.float32))
            scale = jax.device_put(np.where(bounded, (high - low) / 2, 1.0).astype(np.float32))
        prior = dist.Normal(middle, scale, validate_args=False)
        return prior.to_event(self.low.ndim) if self.low.ndim else prior

    def to_environment(self, action: Any) -> Any:
        """Give what the environment takes: bounded actions are cut at their bounds."""
        if self.num is not None:
            return action + self.first
        return np.clip(action, self.low, self.high).astype(self.low.dtype)

    def check_prior(self, prior: dist.Distribution) -> None:
        """Refuse a prior whose draws are no actions of the environment.

        Raises:
            ControlError: it draws integers for vectors or the other way round, of another shape, or too many.
        """
        shape = () if self.num is not None else self.low.shape
        drawn = jax.eval_shape(lambda: prior.sample(key_of_nothing()))
        if prior.is_discrete != (self.num is not None) or drawn.shape != shape:
            kind = "integers" if self.num is not None else "floats"
            remedy = f"Categorical over {self.num} actions" if self.num is not None else "Normal(...).to_event()"
            raise ControlError(
                f"the prior {type(prior).__name__} draws {drawn.dtype}{list(drawn.shape)}, and actions of the "
                f"environment are {kind} of shape {list(shape)}; use a distribution such as {remedy}"
            )
        number = jax.eval_shape(prior.enumerate_support).shape[0] if prior.has_enumerate_support else self.num
        if number is not None and self.num is not None and number > self.num:
            raise ControlError(
                f"the prior {type(prior).__name__} draws from {number} actions, and the environment has {self.num}; "
                "give it as many probabilities as there are actions"
            )


@checked(ControlError)
def squashed_normal(low: Any, high: Any, *, scale: Positive = 1.0) -> dist.Distribution:
    """Give a prior on bounded actions: a Normal of this scale, squashed to [low, high] by a logistic function.

    Args:
        low: lower bounds, [*shape].
        high: upper bounds, [*shape].
        scale: of the Normal before it is squashed; about 1.7 is nearest to uniform.

    Raises:
        ControlError: a bound is infinite, or they are the wrong way round.
    """
    lower, upper = jnp.asarray(low, float), jnp.asarray(high, float)
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer):
        told = np.asarray(low, float), np.asarray(high, float)
        if not (np.isfinite(told).all() and (told[0] < told[1]).all()):
            raise ControlError(f"squashed_normal got low={low!r}, high={high!r}; use finite bounds with low < high")
    transforms = [
        dist.transforms.SigmoidTransform(),
        dist.transforms.AffineTransform(lower, upper - lower, domain=dist.constraints.unit_interval),
    ]
    base = dist.Normal(jnp.zeros(lower.shape), scale)
    squashed = dist.TransformedDistribution(base, transforms)
    return squashed.to_event(lower.ndim) if lower.ndim else squashed


def describe_observations(space: Any) -> Observations:
    """Describe a space of observations.

    Raises:
        ControlError: the space is not supported.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return Observations((), np.int32, int(space.n), 1.0, int(space.start))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.number):
        size = np.maximum(np.abs(space.low.astype(float)), np.abs(space.high.astype(float)))
        scale = np.where((size > 0) & (size < _LARGEST), size, 1.0).astype(np.float32)
        # One number where one will do: as many as a picture has would be built into every program.
        same = scale.size > 0 and bool((scale == scale.flat[0]).all())
        return Observations(space.shape, np.float32, None, float(scale.flat[0]) if same else scale)
    raise ControlError(
        f"observation space {space} is not supported; {SUPPORTED} are; use a wrapper such as "
        "gymnasium.wrappers.FlattenObservation"
    )


def describe_actions(space: Any) -> Actions:
    """Describe a space of actions.

    Raises:
        ControlError: the space is not supported.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return Actions(int(space.n), int(space.start))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return Actions(None, 0, space.low, space.high)
    raise ControlError(
        f"action space {space} is not supported; {SUPPORTED} are; use a wrapper such as "
        "gymnasium.wrappers.TransformAction"
    )
