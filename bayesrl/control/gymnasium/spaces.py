"""Gymnasium spaces: which ones are supported, and how policies represent them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bayesrl.arguments import FiniteNumbers, Positive, checked
from bayesrl.compilation.random_keys import dummy_key
from bayesrl.control.gymnasium.nested_spaces import (
    LARGEST_BOUND,
    SpaceLeaf,
    add_batch_axis,
    assemble,
    flatten_space,
)
from bayesrl.errors import ControlError

SUPPORTED = (
    "Discrete and Box spaces, MultiDiscrete and MultiBinary, and Dict and Tuple spaces of these are, actions being "
    "either all integers within bounds or all floats"
)
MASK = "action_mask"
"""The key of the allowed actions, in an observation of several parts or in `info`."""

_MOST_COUNTED = 4096
"""Up to this number, observations of several integers are numbered, and tables can look them up."""

MOST_JOINT = 256
"""Up to this number, actions of several integers have a probability each; beyond it, each integer has its own."""

NEVER = -1e30
"""A log-probability in place of −inf, which NumPyro refuses as a logit."""


@dataclass(frozen=True)
class Observations:
    """The observations that policies see: float32 arrays, or integers from 0 on.

    A mask of allowed actions is appended to the observation.

    Attributes:
        shape: shape of one observation.
        dtype: type of one observation.
        num: number of observations, or None if they are arrays.
        scale: typical size of the numbers, [*shape].
        leaves: the parts of an observation, if it is not one array of numbers.
        digits: number of values of each integer, if one or several integers are numbered.
        masked: number of actions in the mask, 0 without one.
        mask: the part that holds the mask; None if the mask comes beside the observation.
    """

    shape: tuple[int, ...]
    dtype: Any
    num: int | None = None
    scale: Any = 1.0
    leaves: tuple[SpaceLeaf, ...] = ()
    digits: tuple[int, ...] = ()
    masked: int = 0
    mask: SpaceLeaf | None = None

    def from_environment(self, seen: Any, allowed: Any = None) -> np.ndarray:
        """Convert a batch, and the mask beside it (None allows all), to what policies see, a new [num, *shape]."""
        own = self._without_mask(seen)
        if not self.masked:
            return own
        if self.mask is not None:
            allowed = self.mask.extract(seen)
        elif allowed is None:
            allowed = np.ones((len(own), self.masked))
        return np.concatenate([own.reshape(len(own), -1), np.asarray(allowed) > 0], -1).astype(self.dtype)

    def one(self, seen: Any, allowed: Any = None) -> np.ndarray:
        """Convert one observation to what policies see, [*shape], without a batch."""
        batch = self.from_environment(add_batch_axis(seen), None if allowed is None else np.asarray(allowed)[None])
        return np.asarray(batch[0])

    def _without_mask(self, seen: Any) -> np.ndarray:
        if not self.leaves:
            return np.array(seen, self.dtype)
        parts = [leaf.extract(seen) for leaf in self.leaves]
        for i, leaf in enumerate(self.leaves):
            if leaf.sizes:
                _check_counted(parts[i], leaf.least, leaf.sizes)
                parts[i] = parts[i] - np.asarray(leaf.least)
        if self.num is not None:
            digits = np.concatenate(parts, -1).astype(int)
            return np.ravel_multi_index(tuple(digits.T), self.digits).astype(self.dtype)
        columns = [
            _one_hot(part, leaf.sizes) if leaf.sizes else part / leaf.scale()
            for part, leaf in zip(parts, self.leaves, strict=True)
        ]
        return np.concatenate(columns, -1).astype(self.dtype)


@dataclass(frozen=True)
class Actions:
    """Actions of an environment.

    Attributes:
        num: number of actions, or None if they are vectors.
        first: the least of finitely many actions.
        low: lower bounds of vectors, [*shape]; infinite without bounds.
        high: upper bounds.
        sizes: number of values of each of several integers.
        space: the Gymnasium space, if actions have several parts, `leaves`.
    """

    num: int | None
    first: int = 0
    low: Any = None
    high: Any = None
    sizes: tuple[int, ...] = ()
    space: Any = None
    leaves: tuple[SpaceLeaf, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an action that a policy draws."""
        return () if self.num is not None else (len(self.sizes),) if self.sizes else tuple(np.shape(self.low))

    def prior(self) -> dist.Distribution:
        """Return the default prior: uniform, or Normal around the middle with half the range as its scale."""
        if self.num is not None:
            return dist.Categorical(logits=jax.device_put(np.zeros(self.num, np.float32)), validate_args=False)
        if self.sizes:
            # Integers with fewer values than others are padded with values that are never drawn.
            known = np.arange(max(self.sizes)) < np.asarray(self.sizes)[:, None]
            logits = jax.device_put(np.where(known, 0.0, NEVER).astype(np.float32))
            return dist.Categorical(logits=logits, validate_args=False).to_event(1)
        middle, scale = jax.device_put(self._ranges())
        prior = dist.Normal(middle, scale, validate_args=False)
        return prior.to_event(middle.ndim) if middle.ndim else prior

    def sample_prior(self, rng: np.random.Generator, number: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """Draw from the default prior on the host, [number, *shape], over all or `allowed` actions, [number, num]."""
        if self.num is not None:
            known = np.ones((number, self.num), bool) if allowed is None else allowed
            # The argmax of uniform numbers is a uniform draw from the allowed actions.
            return np.argmax(np.where(known, rng.random(known.shape), -1.0), -1)
        if self.sizes:
            return rng.integers(self.sizes, size=(number, len(self.sizes)))
        middle, scale = self._ranges()
        drawn: np.ndarray = middle + scale * rng.standard_normal((number, *middle.shape), np.float32)
        return drawn

    def _ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the middle and half the range of vectors; 0 and 1 without bounds."""
        # The range of an unbounded space overflows here, and is replaced below.
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
            bounded = (np.abs(low) < LARGEST_BOUND) & (np.abs(high) < LARGEST_BOUND)
            middle = np.where(bounded, (low + high) / 2, 0.0).astype(np.float32)
            return middle, np.where(bounded, (high - low) / 2, 1.0).astype(np.float32)

    def to_environment(self, action: Any) -> Any:
        """Convert a batch, [num, ...], to the environment's form; bounded actions are clipped."""
        if self.leaves:
            drawn = np.asarray(action)
            joint = self.num is not None
            numbers = np.stack(np.unravel_index(drawn, self.sizes), -1) if joint else drawn.reshape(len(drawn), -1)
            return assemble(self.space, self.leaves, numbers)
        if self.num is not None:
            return action + self.first
        return np.clip(action, self.low, self.high).astype(self.low.dtype)

    def one(self, action: Any) -> Any:
        """Convert one action to the environment's form, without a batch."""
        given = self.to_environment(np.asarray(action)[None])
        if not self.leaves:
            return given[0].item() if self.num is not None else given[0]
        from gymnasium.vector.utils import batch_space, iterate

        return next(iter(iterate(batch_space(self.space, 1), given)))

    def check_prior(self, prior: dist.Distribution) -> None:
        """Refuse a prior whose draws are not actions of the environment, or are more of them than it has."""
        kind, remedy = "floats", "Normal(...).to_event()"
        if self.num is not None:
            kind, remedy = "integers", f"Categorical over {self.num} actions"
        elif self.sizes:
            kind, remedy = "integers", f"Categorical(logits of [{len(self.sizes)}, {max(self.sizes)}]).to_event(1)"
        drawn = jax.eval_shape(lambda: prior.sample(dummy_key()))
        if prior.is_discrete != (kind == "integers") or drawn.shape != self.shape:
            raise ControlError(
                f"the prior {type(prior).__name__} draws {drawn.dtype}{list(drawn.shape)}, and actions of the "
                f"environment are {kind} of shape {list(self.shape)}; use a distribution such as {remedy}"
            )
        if self.num is None or not prior.has_enumerate_support:
            return
        number = jax.eval_shape(prior.enumerate_support).shape[0]
        if number > self.num:
            raise ControlError(
                f"the prior {type(prior).__name__} draws from {number} actions, and the environment has {self.num}; "
                "give it as many probabilities as there are actions"
            )


@checked(ControlError)
def squashed_normal(low: FiniteNumbers, high: FiniteNumbers, *, scale: Positive = 1.0) -> dist.Distribution:
    """Make a prior on bounded actions: a Normal of this scale, squashed to [low, high] by a logistic function.

    Args:
        low: lower bounds, [*shape].
        high: upper bounds, [*shape].
        scale: scale of the Normal before squashing; about 1.7 is nearest to uniform.

    Raises:
        ControlError: a bound is infinite, or the bounds are the wrong way round.

    Example:
        >>> from bayesrl import control
        >>> control.squashed_normal(-2.0, 2.0, scale=1.7).event_shape
        ()
    """
    lower, upper = jnp.asarray(low, float), jnp.asarray(high, float)
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer):
        least, most = np.asarray(low, float), np.asarray(high, float)
        if least.shape != most.shape or not (least < most).all():
            raise ControlError(
                f"squashed_normal got low={low!r}, high={high!r}; use bounds of one shape with low < high"
            )
    transforms = [
        dist.transforms.SigmoidTransform(),
        dist.transforms.AffineTransform(lower, upper - lower, domain=dist.constraints.unit_interval),
    ]
    base = dist.Normal(jnp.zeros(lower.shape), scale)
    squashed = dist.TransformedDistribution(base, transforms)
    return squashed.to_event(lower.ndim) if lower.ndim else squashed


def describe_observations(space: Any, *, masked: int = 0, within: bool = True) -> Observations:
    """Describe a space of observations, or refuse it by name.

    A mask of `masked` actions is its part `action_mask` (`within`), or comes beside it.
    """
    from gymnasium import spaces

    leaves = flatten_space(space)
    mask = None
    if leaves is not None and masked and within:
        mask = next(leaf for leaf in leaves if leaf.path == (MASK,))
        leaves = [leaf for leaf in leaves if leaf is not mask]
    if not leaves:
        raise ControlError(
            f"observation space {space} is not supported; {SUPPORTED}; use a wrapper such as "
            "gymnasium.wrappers.FlattenObservation"
        )
    if isinstance(space, spaces.Box):
        scale = leaves[0].scale().reshape(space.shape)
        # If all scales are equal, keep one number: every program would embed an image's worth of constants.
        same = scale.size > 0 and bool((scale == scale.flat[0]).all())
        plain = Observations(space.shape, np.float32, None, float(scale.flat[0]) if same else scale)
    else:
        plain = _in_parts(leaves, numbered=isinstance(space, spaces.Discrete))
    if not masked:
        return plain
    width = math.prod(plain.shape) + masked
    scale = np.append(np.broadcast_to(plain.scale, plain.shape).ravel(), np.ones(masked, np.float32))
    return replace(plain, shape=(width,), masked=masked, mask=mask, scale=scale if plain.num is None else 1.0)


def _in_parts(leaves: list[SpaceLeaf], *, numbered: bool) -> Observations:
    digits = tuple(size for leaf in leaves for size in leaf.sizes)
    if all(leaf.sizes for leaf in leaves) and (numbered or math.prod(digits) <= _MOST_COUNTED):
        return Observations((), np.int32, math.prod(digits), leaves=tuple(leaves), digits=digits)
    width = sum(sum(1 if n == 2 else n for n in leaf.sizes) if leaf.sizes else leaf.width for leaf in leaves)
    return Observations((width,), np.float32, leaves=tuple(leaves))


def _check_counted(values: np.ndarray, least: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Refuse integers outside their space, [..., integers]: they would index the wrong row of a table."""
    first = np.asarray(least)
    odd = (values != np.floor(values)) | (values < first) | (values >= first + np.asarray(sizes))
    if odd.any():
        *_, place = np.argwhere(odd)[0]
        raise ControlError(
            f"an environment gave the observation {values[odd][0]!r}, and its space holds {least[place]} to "
            f"{least[place] + sizes[place] - 1} there; correct the environment, or its observation_space"
        )


def _one_hot(digits: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Encode each integer one-hot, or as itself if it has two values, [num, columns]."""
    columns = [
        digits[:, i, None] if size == 2 else digits[:, i, None] == np.arange(size) for i, size in enumerate(sizes)
    ]
    return np.concatenate(columns, -1)


def describe_actions(space: Any) -> Actions:
    """Describe a space of actions, or refuse it by name."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return Actions(int(space.n), int(space.start))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return Actions(None, 0, space.low, space.high)
    leaves = tuple(flatten_space(space, counted=True) or ())
    sizes = tuple(size for leaf in leaves for size in leaf.sizes)
    if leaves and all(leaf.sizes for leaf in leaves):
        joint = math.prod(sizes)
        return Actions(joint if joint <= MOST_JOINT else None, sizes=sizes, space=space, leaves=leaves)
    if leaves and not any(leaf.sizes for leaf in leaves):
        low, high = (
            np.concatenate([np.ravel(getattr(leaf.space, side)).astype(float) for leaf in leaves])
            for side in ("low", "high")
        )
        return Actions(None, 0, low, high, space=space, leaves=leaves)
    raise ControlError(
        f"action space {space} is not supported; {SUPPORTED}; use a wrapper such as gymnasium.wrappers.TransformAction"
    )


def drop_mask(space: Any) -> Any:
    """Remove the part `action_mask` from a Dict space."""
    from gymnasium import spaces

    return spaces.Dict({name: part for name, part in space.spaces.items() if name != MASK})


def has_mask(space: Any, actions: Actions) -> bool:
    """Check whether observations have a part `action_mask` of the right size."""
    from gymnasium import spaces

    part = space.spaces.get(MASK) if isinstance(space, spaces.Dict) else None
    return part is not None and actions.num is not None and math.prod(part.shape or ()) == actions.num
