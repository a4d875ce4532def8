"""How each kind of distribution is tilted: how many numbers a tilt takes, and what it does with them."""

import math
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints

from bayesrl.core.edges import Ends
from bayesrl.core.structure import Support, is_discrete
from bayesrl.errors import GuideError
from bayesrl.guides.compounds import is_compound, num_compound, tilted_parts
from bayesrl.guides.distributions import Affine, Finite, coordinate_shape

_LOWEST_LOGIT = -1e30
"""Stands for a prior log-probability of −inf, which NumPyro refuses as a logit."""

MAX_TRIANGULAR = 32
"""Largest event, in unconstrained coordinates, that gets a full triangular map."""

_BERNOULLI = (dist.BernoulliProbs, dist.BernoulliLogits)
_CATEGORICAL = (dist.CategoricalProbs, dist.CategoricalLogits)
_BINOMIAL = (dist.BinomialProbs, dist.BinomialLogits)
_GEOMETRIC = (dist.GeometricProbs, dist.GeometricLogits)
_NATURAL = (*_BERNOULLI, *_BINOMIAL, *_GEOMETRIC, dist.Poisson, dist.GammaPoisson)


def tilt_shape(name: str, fn: Any, support: Support | None) -> tuple[int, ...]:
    """Tell the shape of one element's tilt: the axes beyond the batch axes of a site.

    Args:
        name: of the site, for errors.
        fn: its distribution.
        support: values of its finite support, or None.

    Raises:
        GuideError: no tilt is known for the distribution.
    """
    core, reinterpreted = _elementwise(fn)
    if is_compound(core):
        return (*reinterpreted, num_compound(name, core, tilt_shape))
    if isinstance(core, dist.VonMises):
        return (*reinterpreted, 2)
    if is_discrete(fn):
        return (*reinterpreted, _num_discrete(name, core, support))
    core = _peeled(fn)
    if isinstance(core, dist.Normal):
        return (2,)
    if _holds_mask(core):
        raise GuideError(f"site {name!r} is masked inside .to_event(); call .mask(...) last")
    size = _num_coordinates(name, core)
    triangular = size * (size - 1) // 2 if size <= MAX_TRIANGULAR else 0
    return (2 * size + triangular,)


def _num_discrete(name: str, core: Any, support: Support | None) -> int:
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
    """Tell what to do in the place of tilting: what a distribution says of itself, or a guide written by hand."""
    by_hand = f"write a guide for it by hand, def guide(*args): numpyro.sample({name!r}, ...)"
    return str(getattr(core, "guide_remedy", by_hand))


def _num_coordinates(name: str, core: Any) -> int:
    refusal = GuideError(
        f"the automatic guide cannot tilt site {name!r}: {type(core).__name__} cannot be drawn and mapped to "
        f"unconstrained space; {_remedy(name, core)}"
    )
    if isinstance(core, (dist.ImproperUniform, dist.Unit, dist.Delta)):
        raise refusal
    try:
        return math.prod(coordinate_shape(core))
    except (NotImplementedError, AssertionError) as error:
        raise refusal from error


def tilted(fn: Any, theta: Array, support: Support | None, ends: Ends | None = None) -> Any:
    """Tilt a distribution.

    Args:
        fn: the prior of a site.
        theta: [*batch, *tilt_shape]; zero leaves the prior as it is.
        support: values of its finite support, or None.
        ends: coordinates beyond which draws stay where they are; see `Affine`.

    Returns:
        A distribution of the same shape and support.
    """
    inner, _ = _elementwise(fn)
    if is_compound(inner) or isinstance(inner, dist.VonMises) or is_discrete(fn):
        return _tilted_elements(fn, theta, support)
    core = _peeled(fn)
    if isinstance(core, dist.Normal):
        moved: Any = dist.Normal(core.loc + core.scale * theta[..., 0], core.scale * jnp.exp(theta[..., 1]))
    else:
        size = math.prod(coordinate_shape(core))
        base = core if core.batch_shape == fn.batch_shape else core.expand(fn.batch_shape)
        moved = Affine(base, theta[..., :size], theta[..., size : 2 * size], theta[..., 2 * size :], ends=ends)
    for mask in _masks(fn):
        moved = moved.mask(mask)
    return moved


def _tilted_elements(fn: Any, theta: Array, support: Support | None) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _tilted_elements(fn.base_dist, theta, support).mask(fn._mask)
    if isinstance(fn, dist.Independent):
        return _tilted_elements(fn.base_dist, theta, support).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        return _tilted_elements(fn.base_dist, theta, support)
    if is_compound(fn):
        return tilted_parts(fn, theta, tilted, "", tilt_shape)
    if isinstance(fn, dist.VonMises):
        return _tilted_circle(fn, theta)
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
        # Odds of the geometric decay are free, and so is the number of failures.
        return dist.GammaPoisson(fn.concentration * jnp.exp(theta[..., 1]), fn.rate * jnp.exp(-one))
    return Finite(_log_probs(fn, support or ()) + theta, tuple(support or ()))


def _tilted_circle(fn: Any, theta: Array) -> Any:
    """Tilt a von Mises distribution by exp(θ₀·cos x + θ₁·sin x), which makes another one."""
    along = fn.concentration * jnp.cos(fn.loc) + theta[..., 0]
    across = fn.concentration * jnp.sin(fn.loc) + theta[..., 1]
    return dist.VonMises(jnp.arctan2(across, along), jnp.sqrt(along**2 + across**2 + 1e-12))


def _log_probs(fn: Any, support: Support) -> Array:
    """Log-probabilities of all values of a finite support, [*batch, K]."""
    values = jnp.asarray(support, jnp.int32).reshape((-1,) + (1,) * len(fn.batch_shape))
    values = jnp.broadcast_to(values, (len(support), *fn.batch_shape))
    return jnp.moveaxis(fn.log_prob(values), 0, -1)


def describe(fn: Any, support: Support | None) -> Array | None:
    """Describe a prior by numbers of moderate size, [*batch, *elements, k], or None.

    Discrete sites give log-odds or log-probabilities; continuous ones a location and a log-scale.
    """
    core, reinterpreted = _elementwise(fn)
    value: Array | None = None
    if isinstance(core, _CATEGORICAL):
        logits = jnp.asarray(core.logits)
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


def unconstrained(fn: Any, value: Array) -> Array:
    """Map values of a continuous site to unconstrained space, where that keeps one coordinate per number."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    fixed = (constraints.positive, constraints.nonnegative, constraints.unit_interval)
    if support in fixed:
        return jnp.clip(biject_to(support).inv(value), -87.0, 88.0)
    return value


def _elementwise(fn: Any) -> tuple[Any, tuple[int, ...]]:
    """Strip all wrappers of a distribution, and give the event axes that were batch axes."""
    reinterpreted: tuple[int, ...] = ()
    core = fn
    while isinstance(core, (dist.MaskedDistribution, dist.Independent, dist.ExpandedDistribution)):
        if isinstance(core, dist.Independent):
            kept = len(core.event_shape) - core.reinterpreted_batch_ndims
            if kept == len(core.base_dist.event_shape):
                reinterpreted = (*reinterpreted, *core.event_shape[: core.reinterpreted_batch_ndims])
        core = core.base_dist
    return core, reinterpreted


def _peeled(fn: Any) -> Any:
    """Strip masks and expansions, but keep `to_event`."""
    core = fn
    while isinstance(core, (dist.MaskedDistribution, dist.ExpandedDistribution)):
        core = core.base_dist
    return core


def _masks(fn: Any) -> list[Any]:
    masks, core = [], fn
    while isinstance(core, (dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(core, dist.MaskedDistribution):
            masks.append(core._mask)
        core = core.base_dist
    return masks


def _holds_mask(core: Any) -> bool:
    while isinstance(core, (dist.MaskedDistribution, dist.Independent, dist.ExpandedDistribution)):
        if isinstance(core, dist.MaskedDistribution):
            return True
        core = core.base_dist
    return False
