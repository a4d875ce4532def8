"""Resampling of weighted particles, each context on its own, and the paths that survive it."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bayesrl.typing import PRNGKey

type Scheme = Literal["systematic", "stratified", "multinomial"]
"""How resampling spreads its uniform numbers.

All are unbiased; systematic resampling usually adds the least noise.
"""


def effective_size(log_weights: Array) -> Array:
    """Return the effective number of particles (Σw)²/Σw² of log-weights [particles, contexts]; 0 if all are −inf."""
    weights = jnp.exp(log_weights - _finite(log_weights.max(0)))
    return weights.sum(0) ** 2 / jnp.maximum((weights**2).sum(0), jnp.finfo(weights.dtype).tiny)


def log_mean(log_weights: Array) -> Array:
    """Return log of the mean weight over particles, [contexts]; −inf if all weights are 0."""
    top = _finite(log_weights.max(0))
    return jnp.log(jnp.exp(log_weights - top).mean(0)) + top


def ancestors(key: PRNGKey, log_weights: Array, scheme: Scheme) -> Array:
    """Draw the parent of each particle with probability proportional to its weight, [particles, contexts]."""
    num, contexts = log_weights.shape
    if scheme == "multinomial":
        # Uniform order statistics come sorted, so that one pass through the cumulative weights finds all parents.
        gaps = jnp.cumsum(jax.random.exponential(key, (num + 1, contexts)), 0)
        places = gaps[:-1] / gaps[-1]
    else:
        shape = (1 if scheme == "systematic" else num, contexts)
        places = (jnp.arange(num)[:, None] + jax.random.uniform(key, shape)) / num
    weights = jnp.exp(log_weights - _finite(log_weights.max(0)))
    cumulative = jnp.cumsum(weights, 0)
    # The right side skips particles of weight 0, whose cumulative weight is that of the one before.
    found = jax.vmap(lambda c, u: jnp.searchsorted(c, u * c[-1], side="right"), 1, 1)(cumulative, places)
    # Rounding may put a place at the very end: the last particle with a weight takes it.
    last = num - 1 - jnp.argmax((weights > 0)[::-1], 0)
    return jnp.minimum(found, last).astype(jnp.int32)


class Moves(NamedTuple):
    """Resampling as few copies: survivors stay where they are, and only particles without offspring are overwritten.

    Attributes:
        parents: whose state each particle takes, [particles]; a survivor's own.
        source: particles to copy, [particles]; only the first `num_moved` are meant.
        target: where to.
        num_moved: how many particles are overwritten.
    """

    parents: Array
    source: Array
    target: Array
    num_moved: Array


def fewest_moves(parents: Array) -> Moves:
    """Rearrange the parents of all particles, [particles], so that each survivor is its own parent.

    No source is also a target, so the copies may be made one after another in place.
    """
    num = len(parents)
    everyone = jnp.arange(num, dtype=jnp.int32)
    offspring = jnp.zeros(num, jnp.int32).at[parents].add(1)
    dead = offspring == 0
    # There are as many dead as children beyond the first, so both lists are equally long. Both are in the order of
    # particles, so that where contexts lie behind one another no particle leaves its own.
    source = jnp.repeat(everyone, jnp.maximum(offspring - 1, 0), total_repeat_length=num)
    target = jnp.nonzero(dead, size=num, fill_value=0)[0].astype(jnp.int32)
    rank = jnp.maximum(jnp.cumsum(dead) - 1, 0)
    return Moves(jnp.where(dead, source[rank], everyone), source, target, dead.sum())


def _finite(top: Array) -> Array:
    return jnp.where(jnp.isfinite(top), top, 0.0)


def gather(value: Array, parents: Array, axes: tuple[int | None, ...], context_shape: tuple[int, ...]) -> Array:
    """Let each context of each particle take the value of its parent.

    Args:
        value: [particles, ...].
        parents: [particles, contexts], contexts flat.
        axes: the axis of `value[0]` along each context plate; None for a plate that the value is outside of.
        context_shape: sizes of the context plates.
    """
    at = parents.reshape(-1, *context_shape)
    at = at[(slice(None), *(0 if axis is None else slice(None) for axis in axes))]
    own = [axis for axis in axes if axis is not None]
    order = sorted(range(len(own)), key=lambda i: own[i])
    at = at.transpose(0, *(1 + i for i in order))
    sizes = [value.shape[1 + axis] if axis in own else 1 for axis in range(value.ndim - 1)]
    return jnp.take_along_axis(value, at.reshape(-1, *sizes), axis=0)


def lineages(parents: Array) -> tuple[Array, Array]:
    """Return whose value each final particle inherits at each step, [steps, particles, contexts], and at the start.

    Args:
        parents: of the particles of each step among those of the step before, [steps, particles, contexts].
    """
    num = parents.shape[1]
    last = jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32)[:, None], parents.shape[1:])

    def back(line: Array, parent: Array) -> tuple[Array, Array]:
        return jnp.take_along_axis(parent, line, 0), line

    # Backwards, because only the last step knows which lines survive.
    start, lines = lax.scan(back, last, parents, reverse=True)
    return lines, start
