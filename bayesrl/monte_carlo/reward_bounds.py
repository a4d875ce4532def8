"""How large the rewards of a program can be: proven bounds, not sampled ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters.partial_eval import dce_jaxpr
from numpyro.distributions import constraints

from bayesrl.compilation.random_keys import dummy_key
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure, as_arrays, elementwise_support
from bayesrl.core.trace import per_context, site_log_prob, trace_abstractly, trace_program
from bayesrl.exact.grid import run_with_sites
from bayesrl.jaxprs.interval_rules import Range, RangeEnd
from bayesrl.jaxprs.intervals import propagate_ranges
from bayesrl.typing import Program

_MOST_PASSES = 8


def reward_bounds(policy: Program, structure: Structure, args: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Bound the total reward of a program over everything that it can draw, per context.

    lower ≤ R(x) ≤ upper for every x in the support, by interval arithmetic over the program's own
    operations, rounding included. The bounds hold for every reward that is not nan; they need not be
    attained.

    Returns:
        Lower and upper bounds, each [*contexts], reward units; −inf and inf if none can be proven.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.monte_carlo.reward_bounds import reward_bounds
        >>> from bayesrl.core.structure import inspect
        >>> def target():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     bayesrl.reward("near", -0.5 * (x - 2.0) ** 2)
        >>> lower, upper = reward_bounds(target, inspect(jax.random.key(0), target), ())
        >>> float(lower), float(upper)
        (-inf, 0.0)

    References:
        Moore, Kearfott & Cloud (2009), "Introduction to Interval Analysis", chapters 2, 3 and 5.
    """
    bounds = site_reward_bounds(policy, structure, args)
    zero = np.zeros(structure.context_shape)
    lower = sum((b[0] for b in bounds.values()), start=zero)
    upper = sum((b[1] for b in bounds.values()), start=zero)
    return np.asarray(lower), np.asarray(upper)


def site_reward_bounds(
    policy: Program, structure: Structure, args: tuple[Any, ...]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bound each reward site, summed over time: {site: (lower, upper)}, each [*contexts]."""
    names = structure.names("reward")
    args = as_arrays(args)
    shapes, indices = _inputs(policy, structure, args)
    if not names:
        return {}

    def rewards(values: dict[str, Array]) -> list[Array]:
        sites = run_with_sites(policy, values, args).sites
        contexts = structure.contexts
        return [per_context(site_log_prob(sites[n]), sites[n], contexts).sum(-1) for n in names]

    latent = [site.name for site in structure.sites if site.latent]

    def supports(values: dict[str, Array]) -> list[list[Array]]:
        sites = run_with_sites(policy, values, args).sites
        return [_ends(sites[name].fn) for name in latent]

    held = {name: Range(np.full(s.shape, -np.inf), np.full(s.shape, np.inf)) for name, s in shapes.items()} | indices
    # The support of a site can depend on other draws: narrow until nothing changes. Every pass is sound.
    for _ in range(_MOST_PASSES):
        ends = iter(_bound(supports, shapes, held))
        narrower = held | {name: _between(next(ends), next(ends), shapes[name]) for name in latent}
        if all(np.array_equal(np.stack(held[n]), np.stack(narrower[n])) for n in held):
            break
        held = narrower
    found = _bound(rewards, shapes, held)
    return {name: (bound.lower, bound.upper) for name, bound in zip(names, found, strict=True)}


def _inputs(
    policy: Program, structure: Structure, args: tuple[Any, ...]
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Range]]:
    """Return shapes and types of what the program draws, and the ranges of the indices of its mini-batches."""
    recorded = trace_abstractly(lambda: trace_program(FoldedKeys(policy, dummy_key()), *args))
    shapes = {
        site.name: jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))
        for site in structure.sites
        if site.latent
        for value in [recorded.sites[site.name].value]
    }
    ranges = {}
    frames = {frame.name: frame for site in structure.sites for frame in site.frames}
    for name in structure.subsampled:
        shapes[name] = jax.ShapeDtypeStruct((frames[name].size,), jnp.result_type(recorded.plates[name]))
        last = float(frames[name].full_size - 1)
        ranges[name] = Range(np.zeros(frames[name].size), np.full(frames[name].size, last))
    return shapes, ranges


def _bound(function: Any, shapes: dict[str, jax.ShapeDtypeStruct], held: dict[str, Range]) -> list[Range]:
    """Bound the flat outputs of a function of named values."""
    jaxpr = jax.make_jaxpr(function)(shapes)
    # What no output reads needs no bound.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    # A dictionary flattens in the order of its sorted keys.
    return propagate_ranges(jaxpr, [held[name] for name in sorted(shapes)])


def _ends(fn: Any) -> list[Array]:
    """Return both ends of a distribution's support, which may depend on earlier draws."""
    support = elementwise_support(fn.support)
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if support is constraints.boolean or support is constraints.simplex:
        lower, upper = 0.0, 1.0
    elif isinstance(support, type(constraints.multinomial(1))):
        lower = 0
    return [jnp.asarray(-jnp.inf if lower is None else lower), jnp.asarray(jnp.inf if upper is None else upper)]


def _between(lower: Range, upper: Range, value: jax.ShapeDtypeStruct) -> Range:
    low, high = _laid(lower.lower, value.shape, np.min), _laid(upper.upper, value.shape, np.max)
    if jnp.issubdtype(value.dtype, jnp.floating):
        # Rounding can put a draw a little beyond the end of its support.
        low, high = (side + sign * 1e-6 * np.abs(side) for side, sign in ((low, -1), (high, 1)))
    return Range(low, high)


def _laid(side: RangeEnd, shape: tuple[int, ...], extreme: Any) -> np.ndarray:
    """Broadcast ends of a support along the value if their shapes agree; else use the outermost end everywhere."""
    if side.ndim == len(shape) and all(a in (1, b) for a, b in zip(side.shape, shape, strict=True)):
        return np.broadcast_to(side, shape)
    return np.full(shape, extreme(side) if math.prod(side.shape) else np.nan)
