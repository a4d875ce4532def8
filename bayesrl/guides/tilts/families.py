"""Tilt each kind of distribution: how many numbers a tilt has, and what it does with them."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints

from bayesrl.core.censoring import Censored, censored
from bayesrl.core.structure import FiniteSupport, elementwise_support, finite_support, is_discrete
from bayesrl.core.support_edges import Edge, EdgeInterval, PriorSpread
from bayesrl.errors import GuideError
from bayesrl.guides.tilts.compounds import is_compound, num_compound, tilted_parts
from bayesrl.guides.tilts.corner_mixtures import num_corner_parameters, split_at_corners
from bayesrl.guides.tilts.distributions import Affine, Finite, coordinate_shape
from bayesrl.guides.tilts.reweighted_counts import ReweightedCounts, num_knots
from bayesrl.guides.tilts.sinh_arcsinh import NUM_NUMBERS

_LOWEST_LOGIT = -1e30
"""Replaces a prior log-probability of −inf, which NumPyro refuses as a logit."""

MAX_TRIANGULAR = 32
"""Largest event, in unconstrained coordinates, that gets a full triangular map."""

MAX_BENT = 64
"""Largest event, in unconstrained coordinates, whose coordinates a tilt bends."""

MAX_WINDOW, MAX_COUNT = 512, 4096
"""The most counts to reweight, and the largest: single precision resolves the density of larger ones poorly."""

_LEAST_BEYOND = 8.0
_PILING = (dist.Gamma, dist.Beta, dist.Dirichlet)
_CENSORED = (dist.LeftCensoredDistribution, dist.RightCensoredDistribution, dist.IntervalCensoredDistribution)
_NEVER = (dist.ImproperUniform, dist.Unit, dist.Delta, dist.VonMises, *_CENSORED)

_BERNOULLI = (dist.BernoulliProbs, dist.BernoulliLogits)
_CATEGORICAL = (dist.CategoricalProbs, dist.CategoricalLogits)
_BINOMIAL = (dist.BinomialProbs, dist.BinomialLogits)
_GEOMETRIC = (dist.GeometricProbs, dist.GeometricLogits)
_NATURAL = (*_BERNOULLI, *_BINOMIAL, *_GEOMETRIC, dist.Poisson, dist.GammaPoisson)


class PriorRange(NamedTuple):
    """Where the prior's draws of a site lie; a rich tilt needs this.

    Attributes:
        ends: coordinates beyond which draws stay where they are, or None; see `Affine`.
        centre: of the coordinates, [N] or a number.
        width: of the coordinates, [N] or a number.
        window: the first and the number of the consecutive counts that a tilt reweights freely, or None.
        rich: whether the tilt is rich: it bends draws, or reweights counts one by one.
    """

    ends: EdgeInterval | None = None
    centre: Any = 0.0
    width: Any = 1.0
    window: tuple[int, int] | None = None
    rich: bool = True


def prior_range(edge: Edge | None, lie: PriorSpread | None, *, discrete: bool) -> PriorRange:
    """Return the range of a site from the draws of its prior."""
    if lie is None:
        return PriorRange(edge and edge.ends)
    if not discrete:
        return PriorRange(edge and edge.ends, lie.centre, lie.width)
    # Tilted draws go farther than the prior's, so the window is wider; beyond it, the natural tilt still applies.
    most = max(2 * float(lie.high[0]) - float(lie.low[0]), float(lie.high[0]) + _LEAST_BEYOND)
    least = max(2 * float(lie.low[0]) - float(lie.high[0]), 0.0)
    size = int(most - least) + 1
    return PriorRange(window=(int(least), size) if size <= MAX_WINDOW and most <= MAX_COUNT else None)


def needs_prior_range(fn: Any) -> bool:
    """Whether a rich tilt of a distribution needs the range of its draws."""
    if is_discrete(fn):
        return not fn.event_shape and _is_unbounded(fn)
    core, _ = _elementwise(fn)
    if is_compound(core) or isinstance(core, _NEVER) or _tells_location(_peeled(fn)):
        return False
    try:
        return math.prod(coordinate_shape(_peeled(fn))) <= MAX_BENT
    except (NotImplementedError, AssertionError):
        return False


def tilt_shape(name: str, fn: Any, support: FiniteSupport | None, reach: PriorRange | None = None) -> tuple[int, ...]:
    """Return the shape of one element's tilt: the axes after the batch axes of a site; `reach` is for a rich tilt.

    Raises:
        GuideError: no tilt is known for the distribution.
    """
    core, reinterpreted = _elementwise(fn)
    if is_discrete(fn):
        size = num_compound(name, core, tilt_shape) if is_compound(core) else _num_discrete(name, core, support)
        window = _window(fn, support, reach)
        return (*reinterpreted, size + (0 if window is None else num_knots(window[1])))
    if is_compound(core):
        return (*reinterpreted, num_compound(name, core, tilt_shape))
    if isinstance(core, dist.VonMises):
        # Two numbers of the natural tilt; a rich one adds shift, scale and bend.
        return (*reinterpreted, 4 + NUM_NUMBERS if _is_rich(reach) else 2)
    if _is_piled(core, reach):
        return (*reinterpreted, num_corner_parameters(core))
    core = _peeled(fn)
    bent = NUM_NUMBERS if _is_rich(reach) else 0
    if isinstance(core, dist.Normal):
        return (2 + bent,)
    if _masks(core):
        raise GuideError(f"site {name!r} is masked inside .to_event(); call .mask(...) last")
    size = _num_coordinates(name, core)
    triangular = size * (size - 1) // 2 if size <= MAX_TRIANGULAR else 0
    return ((2 + (bent if size <= MAX_BENT else 0)) * size + triangular,)


def _is_piled(core: Any, reach: PriorRange | None) -> bool:
    """Whether draws often lie at the edge of single precision, in a family that can be tilted there."""
    return reach is not None and reach.ends is not None and isinstance(core, _PILING)


def _is_rich(reach: PriorRange | None) -> bool:
    return reach is not None and reach.rich


def _window(fn: Any, support: FiniteSupport | None, reach: PriorRange | None) -> tuple[int, int] | None:
    core, _ = _elementwise(fn)
    if reach is None or not reach.rich or core.event_shape:
        return None
    if isinstance(core, _BINOMIAL) and support is not None:
        return (int(support[0]), len(support)) if len(support) <= MAX_WINDOW else None
    return reach.window if _is_unbounded(fn) else None


def _is_unbounded(fn: Any) -> bool:
    """Whether a distribution over counts has no finite support that is known beforehand."""
    core, _ = _elementwise(fn)
    return not isinstance(core, (*_BERNOULLI, *_CATEGORICAL)) and finite_support(fn) is None


def _num_discrete(name: str, core: Any, support: FiniteSupport | None) -> int:
    if isinstance(core, _CATEGORICAL):
        return int(jnp.shape(core.logits)[-1])
    if isinstance(core, _NATURAL):
        return 2 if isinstance(core, dist.GammaPoisson) else 1
    if support is not None and not core.event_shape:
        return len(support)
    raise GuideError(
        f"the automatic guide cannot tilt site {name!r}: {type(core).__name__} has neither a natural parameter that "
        f"it knows nor a finite univariate support known beforehand; {_remedy(name, core)}"
    )


def _remedy(name: str, core: Any) -> str:
    """Say what to do instead: the distribution's own suggestion, or a hand-written guide."""
    by_hand = f"write a guide for it by hand, def guide(*args): numpyro.sample({name!r}, ...)"
    return str(getattr(core, "guide_remedy", by_hand))


def _num_coordinates(name: str, core: Any) -> int:
    refusal = GuideError(
        f"the automatic guide cannot tilt site {name!r}: {type(core).__name__} cannot be drawn and mapped to "
        f"unconstrained space; {_remedy(name, core)}"
    )
    inner, _ = _elementwise(core)
    if isinstance(inner, _CENSORED):
        raise GuideError(
            f"site {name!r} is drawn from {type(inner).__name__}, whose density is of observations and not of its "
            "draws; draw from the distribution inside of it, and keep this one for sites with obs="
        )
    if isinstance(inner, dist.TransformedDistribution) and not _has_density(inner):
        raise GuideError(
            f"the automatic guide cannot tilt site {name!r}: the absolute value in its {type(inner).__name__} leaves "
            "it without a density; write numpyro.distributions.FoldedDistribution(base)"
        )
    if isinstance(core, _NEVER):
        raise refusal
    try:
        return math.prod(coordinate_shape(core))
    except (NotImplementedError, AssertionError) as error:
        raise refusal from error


def _has_density(fn: Any) -> bool:
    own = type(fn).log_prob is not dist.TransformedDistribution.log_prob
    return own or not any(isinstance(part, dist.transforms.AbsTransform) for part in fn.transforms)


def tilt_distribution(fn: Any, theta: Array, support: FiniteSupport | None, reach: PriorRange | None = None) -> Any:
    """Tilt a prior by `theta`, [*batch, *tilt_shape], whose zero leaves it as it is; shape and support stay."""
    inner, _ = _elementwise(fn)
    if is_compound(inner) or isinstance(inner, dist.VonMises) or is_discrete(fn):
        return _tilted_elements(fn, theta, support, _window(fn, support, reach))
    if _is_piled(inner, reach):
        return _tilted_elements(censored(fn), theta, support)
    core = _peeled(fn)
    ends = None if reach is None else reach.ends
    if isinstance(core, dist.Normal) and theta.shape[-1] == 2:
        # An affine map of a normal draw is normal, so it needs no `Affine`.
        moved: Any = dist.Normal(core.loc + core.scale * theta[..., 0], core.scale * jnp.exp(theta[..., 1]))
    else:
        size = math.prod(coordinate_shape(core))
        base = core if core.batch_shape == fn.batch_shape else core.expand(fn.batch_shape)
        moved = _affine(base, theta, size, reach, ends)
    for mask in _masks(fn):
        moved = moved.mask(mask)
    return moved


def _affine(base: Any, theta: Array, size: int, reach: PriorRange | None, ends: EdgeInterval | None = None) -> Affine:
    """Move a distribution of `size` coordinates by θ: shift, log-scale, bend, and entries below the diagonal."""
    shift, log_scale, rest = theta[..., :size], theta[..., size : 2 * size], theta[..., 2 * size :]
    triangular = size * (size - 1) // 2 if size <= MAX_TRIANGULAR else 0
    bend, lower = jnp.split(rest, [rest.shape[-1] - triangular], -1)
    location = None if reach is None else _location(base)
    centre, width = (0.0, 1.0) if reach is None else location or (reach.centre, reach.width)
    return Affine(base, shift, log_scale, lower, ends=ends, bend=bend, centre=centre, width=width)


def _tells_location(fn: Any) -> bool:
    inner, _ = _elementwise(fn)
    real = not inner.event_shape and inner.support is constraints.real
    return real and {"loc", "scale"} <= set(inner.arg_constraints)


def _location(fn: Any) -> tuple[Array, Array] | None:
    """Return location and scale of a distribution over the line or over vectors, [*batch, N], or None."""
    if not _tells_location(fn):
        return None
    inner, _ = _elementwise(fn)
    shape = (*fn.batch_shape, math.prod(fn.event_shape))
    whole = tuple(fn.shape())
    loc, scale = (jnp.broadcast_to(part, whole) for part in (inner.loc, inner.scale))
    return loc.reshape(shape), scale.reshape(shape)


def _tilted_elements(
    fn: Any, theta: Array, support: FiniteSupport | None, window: tuple[int, int] | None = None
) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _tilted_elements(fn.base_dist, theta, support, window).mask(fn._mask)
    if isinstance(fn, dist.Independent):
        return _tilted_elements(fn.base_dist, theta, support, window).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        return _tilted_elements(fn.base_dist, theta, support, window)
    if window is not None:
        rest, knots = jnp.split(theta, [theta.shape[-1] - num_knots(window[1])], -1)
        return ReweightedCounts(_tilted_core(fn, rest, support), knots, *window)
    return _tilted_core(fn, theta, support)


def _tilted_core(fn: Any, theta: Array, support: FiniteSupport | None) -> Any:
    """Tilt a distribution without wrappers by its natural parameters, or part by part."""
    if is_compound(fn):
        return tilted_parts(fn, theta, tilt_distribution, "", tilt_shape)
    if isinstance(fn, dist.VonMises):
        natural, rest = theta[..., :2], theta[..., 2:]
        moved = _tilted_circle(fn, natural)
        return _affine(moved, rest, 1, None) if rest.shape[-1] else moved
    if isinstance(fn, Censored):
        return split_at_corners(fn, theta)
    if isinstance(fn, _CATEGORICAL):
        return dist.CategoricalLogits(jnp.maximum(fn.logits, _LOWEST_LOGIT) + theta)
    one = theta[..., 0]
    if isinstance(fn, _BERNOULLI):
        return dist.BernoulliLogits(fn.logits + one)
    if isinstance(fn, _BINOMIAL):
        return dist.BinomialLogits(fn.logits + one, total_count=fn.total_count)
    if isinstance(fn, _GEOMETRIC):
        return dist.GeometricLogits(fn.logits + one)
    if isinstance(fn, dist.Poisson):
        return dist.Poisson(fn.rate * jnp.exp(one), is_sparse=fn.is_sparse)
    if isinstance(fn, dist.GammaPoisson):
        # Both numbers of a negative binomial are free: the odds of the decay, and the number of failures.
        # The mean is concentration over rate, hence the minus.
        return dist.GammaPoisson(fn.concentration * jnp.exp(theta[..., 1]), fn.rate * jnp.exp(-one))
    return Finite(_log_probs(fn, support or ()) + theta, tuple(support or ()))


def _tilted_circle(fn: Any, theta: Array) -> Any:
    """Tilt a von Mises distribution by exp(θ₀·cos x + θ₁·sin x), which gives another von Mises distribution."""
    along = fn.concentration * jnp.cos(fn.loc) + theta[..., 0]
    across = fn.concentration * jnp.sin(fn.loc) + theta[..., 1]
    # 1e-12 keeps the gradient of the square root finite at 0.
    return dist.VonMises(jnp.arctan2(across, along), jnp.sqrt(along**2 + across**2 + 1e-12))


def _log_probs(fn: Any, support: FiniteSupport) -> Array:
    """Return the log-probabilities of all values of a finite support, [*batch, K]."""
    values = jnp.asarray(support, jnp.int32).reshape((-1,) + (1,) * len(fn.batch_shape))
    values = jnp.broadcast_to(values, (len(support), *fn.batch_shape))
    return jnp.moveaxis(fn.log_prob(values), 0, -1)


def describe_prior(fn: Any, support: FiniteSupport | None) -> Array | None:
    """Describe a prior by numbers of moderate size, [*batch, *elements, k], or None.

    Discrete sites have log-odds or log-probabilities; continuous ones have a location and a log-scale.
    """
    core, reinterpreted = _elementwise(fn)
    value: Array | None = None
    if isinstance(core, _CATEGORICAL):
        logits = jnp.asarray(core.logits)
        # Values rarer than e⁻²⁰ are alike to a network, and −inf must not reach it.
        value = jnp.maximum(logits - logits.max(-1, keepdims=True), -20.0)
    elif isinstance(core, (*_BERNOULLI, *_BINOMIAL, *_GEOMETRIC)):
        value = jnp.asarray(core.logits)[..., None]
    elif isinstance(core, dist.Poisson):
        value = jnp.log(core.rate)[..., None]
    elif isinstance(core, dist.GammaPoisson):
        value = jnp.stack([jnp.log(core.concentration), jnp.log(core.rate)], -1)
    elif support is not None and not core.event_shape:
        value = jnp.maximum(_log_probs(core, support), -20.0)
    elif not bool(core.support.is_discrete) and not core.event_shape and {"loc", "scale"} <= set(core.arg_constraints):
        value = jnp.stack(jnp.broadcast_arrays(core.loc, jnp.log(core.scale)), -1)
    if value is None:
        return None
    shape = jnp.broadcast_shapes((*fn.batch_shape, *reinterpreted), value.shape[:-1])
    return jnp.broadcast_to(value, (*shape, value.shape[-1]))


def to_unconstrained(fn: Any, value: Array) -> Array:
    """Map values of a continuous site to unconstrained space, if that keeps one coordinate per number."""
    support = elementwise_support(fn.support)
    fixed = (constraints.positive, constraints.nonnegative, constraints.unit_interval)
    if support in fixed:
        return jnp.clip(biject_to(support).inv(value), -87.0, 88.0)
    return value


def _layers(fn: Any) -> Iterator[Any]:
    """Yield a distribution, then the distribution inside each of its wrappers."""
    yield fn
    while isinstance(fn, (dist.MaskedDistribution, dist.Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
        yield fn


def _elementwise(fn: Any) -> tuple[Any, tuple[int, ...]]:
    """Strip all wrappers of a distribution, and return also the event axes that were batch axes inside."""
    reinterpreted: tuple[int, ...] = ()
    core = fn
    for core in _layers(fn):
        if isinstance(core, dist.Independent):
            own = core.reinterpreted_batch_ndims
            if len(core.event_shape) - own == len(core.base_dist.event_shape):
                reinterpreted = (*reinterpreted, *core.event_shape[:own])
    return core, reinterpreted


def _peeled(fn: Any) -> Any:
    """Strip masks and expansions, but keep `to_event`."""
    return next(
        core for core in _layers(fn) if not isinstance(core, (dist.MaskedDistribution, dist.ExpandedDistribution))
    )


def _masks(fn: Any) -> list[Any]:
    """Return the masks of a distribution, including those inside `to_event`."""
    return [core._mask for core in _layers(fn) if isinstance(core, dist.MaskedDistribution)]
