"""Draws at the edge of single precision, where many different numbers round to one.

A Beta(.1, .1) has a twelfth of its mass between 1 − 6e-6 and 1, where single precision has a hundred numbers, and most
of that mass is closer to 1 than any of them. Those draws round to 1, and no density says how likely they are: they are
atoms. To move an atom you would need the numbers behind it, which rounding lost. So a guide leaves these draws where
they are: prior and guide then draw them alike, and they cancel from every ratio.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints

from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import split
from bayesrl.core.primitives import unwrapped
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure, elementwise_support
from bayesrl.core.trace import abstract_trace, trace_program
from bayesrl.typing import PRNGKey, Program

type EdgeInterval = tuple[float, float]
"""Unconstrained coordinates between which single precision resolves a number to one part in a hundred."""

NUM_DRAWS = 1024
MOST_AT_EDGE = 2
"""A site with at most this many of its `NUM_DRAWS` prior draws at the edge counts as one without an edge."""

_MOST_NUMBERS = 4096
"""Larger sites are not measured: a thousand draws of them would fill memory."""

_LOWEST, _HIGHEST = -83.0, 86.0
"""Bounds of log x: a hundred times the least and a tenth of the greatest normal number."""
_UNITS = 100.0
_EPS = 2.0**-23


class Edge(NamedTuple):
    """The edge of a site whose draws often lie there: where it is, and how many of `NUM_DRAWS` draws are on it."""

    ends: EdgeInterval
    num: int


class PriorSpread(NamedTuple):
    """Where the prior's draws of a site lie, [N]: in unconstrained coordinates, or as values if it is discrete.

    Attributes:
        centre: the median.
        width: the standard deviation of the normal distribution with the same interquartile range.
        low: the least draw.
        high: the greatest draw.
    """

    centre: np.ndarray
    width: np.ndarray
    low: np.ndarray
    high: np.ndarray


def edge_interval(support: Any) -> EdgeInterval | None:
    """Return the edges of a support in unconstrained coordinates, or None if they are not known."""
    support = elementwise_support(support)
    if support in (constraints.positive, constraints.nonnegative):
        return _LOWEST, _HIGHEST
    near_one = -math.log(_UNITS * _EPS)
    if support in (constraints.unit_interval, constraints.open_interval(0.0, 1.0)):
        return _LOWEST, near_one
    if support is constraints.simplex:
        return _LOWEST, near_one - 2.0  # the bijection shifts the coordinates of an n-simplex by up to log n
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if lower is None or upper is None or support.is_discrete or isinstance(lower, jax.core.Tracer | jax.Array):
        return None
    if not (isinstance(lower, int | float) and isinstance(upper, int | float)):
        return None
    far = upper - lower
    # Numbers near an end lie eps·|end| apart. The logit of so small a share of the interval is nearly its log.
    low, high = (_UNITS * _EPS * abs(end) / far for end in (lower, upper))
    return (math.log(low) if low > 0 else _LOWEST), (-math.log(high) if high > 0 else -_LOWEST)


def at_edge(fn: Any, value: Any, ends: EdgeInterval) -> Array:
    """Whether each draw has a coordinate at the edge, booleans [*batch]."""
    event = int(fn.event_dim)
    coordinates = biject_to(fn.support).inv(jnp.asarray(value))
    # Negated, so that nan counts as outside too.
    outside = ~((coordinates > ends[0]) & (coordinates < ends[1]))
    lost: Array = outside.any(tuple(range(-event, 0))) if event else outside
    return lost


class EdgeMasked:
    """The prior of a site whose guide leaves draws at the edge alone: both score those draws 0.

    Args:
        fn: the prior.
        ends: where the edge is.
    """

    def __init__(self, fn: Any, ends: EdgeInterval) -> None:
        self.fn, self.ends = fn, ends
        self.stands_for = fn
        self.event_dim, self.batch_shape = fn.event_dim, fn.batch_shape

    def log_prob(self, value: Any) -> Array:
        """Log-density, nats; 0 at the edge, without gradient."""
        inner = self.fn
        while isinstance(inner, dist.MaskedDistribution):
            inner = inner.base_dist
        lost = at_edge(inner, value, self.ends)
        return jnp.where(lost, 0.0, self.fn.log_prob(safe(inner, value, lost)))


def safe(fn: Any, value: Any, lost: Array) -> Array:
    """Replace the draws at the edge by a number from the middle of the support.

    `jnp.where` differentiates both of its branches, so the branch it discards must have a finite gradient.
    """
    event = int(fn.event_dim)
    value = jnp.asarray(value)
    transform = biject_to(fn.support)
    middle = transform(jnp.zeros(transform.inverse_shape(value.shape)))
    return jnp.where(lost.reshape(lost.shape + (1,) * event), middle, value)


def edges_of(key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> dict[str, Edge]:
    """Find the action sites with many of the prior's draws at the edge."""
    return summarize_prior_draws(key, policy, structure, args, lambda *_: False)[0]


def summarize_prior_draws(
    key: PRNGKey,
    policy: Program,
    structure: Structure,
    args: tuple[Any, ...],
    measured: Callable[[str, Any], bool],
) -> tuple[dict[str, Edge], dict[str, PriorSpread]]:
    """Summarize where the prior's draws of the action sites lie, from `NUM_DRAWS` draws.

    Args:
        key: consumed whole.
        policy: the program.
        structure: of the policy.
        args: of the policy.
        measured: maps a site's name and distribution to whether to measure its spread.

    Returns:
        The sites with many draws at the edge, and the spread of the measured sites.
    """
    if not structure.actions:
        return {}, {}
    seen = abstract_trace(key, policy, args).trace.sites
    continuous = [
        name
        for name in structure.actions
        # A hurdle distribution's zeros are atoms too, but its density already accounts for them.
        if not structure[name].discrete and not isinstance(unwrapped(seen[name].fn), dist.HurdleProbs)
    ]
    ends = {name: own for name in continuous if (own := edge_interval(_peeled(seen[name].fn).support)) is not None}
    lying = [
        name
        for name in structure.actions
        if math.prod(structure[name].shape) <= _MOST_NUMBERS and measured(name, seen[name].fn)
    ]
    if not ends and not lying:
        return {}, {}

    def count(keys: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        def one(key: PRNGKey) -> tuple[dict[str, Array], dict[str, Array]]:
            sites = trace_program(FoldedKeys(policy, key), *args).sites
            shares = {
                name: at_edge(_peeled(sites[name].fn), sites[name].value, own).mean() for name, own in ends.items()
            }
            return shares, {name: _coordinates(sites[name].fn, sites[name].value) for name in lying}

        # In batches, because all draws of a large program at once might fill memory.
        shares, places = jax.lax.map(one, keys, batch_size=128)
        return {name: share.sum() for name, share in shares.items()}, {
            # Least, lower quartile, median, upper quartile and greatest of each column, [5, N].
            name: jnp.quantile(place.reshape((-1, place.shape[-1])), jnp.linspace(0.0, 1.0, 5), axis=0)
            for name, place in places.items()
        }

    counts, quantiles = closure_jit(count, name="edges")(split(key, NUM_DRAWS))
    # A draw counts by the share of its elements at the edge, so the sums are fractions.
    found = {name: int(np.ceil(float(counts[name]))) for name in ends}
    edges = {name: Edge(ends[name], count) for name, count in found.items() if count > MOST_AT_EDGE}
    return edges, {name: _lie(np.asarray(place, float)) for name, place in quantiles.items()}


def _coordinates(fn: Any, value: Any) -> Array:
    """Return the unconstrained coordinates of a continuous draw, or the counts of a discrete one, [..., N]."""
    fn = _peeled(fn)
    value = jnp.asarray(value)
    if fn.support.is_discrete:
        return value.astype(jnp.result_type(float)).reshape((-1, 1))
    transform = biject_to(fn.support)
    coordinates = transform.inv(value)
    event = transform.domain.event_dim
    return coordinates.reshape((-1, math.prod(coordinates.shape[coordinates.ndim - event :])))


def _lie(quantiles: np.ndarray) -> PriorSpread:
    low, lower, centre, upper, high = np.clip(np.nan_to_num(quantiles), -1e30, 1e30)
    width = (upper - lower) / 1.349  # of a normal distribution this is the standard deviation
    # A width within rounding of the centre says nothing; others divide by it, so take 1.
    return PriorSpread(centre, np.where(width > np.abs(centre) * _EPS + 1e-30, width, 1.0), low, high)


def _peeled(fn: Any) -> Any:
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn
