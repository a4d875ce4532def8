"""log π₀(x) − log q(x) of two distributions of one family, without the huge terms that cancel.

The log-density of a large count is a difference of terms of millions of nats. In single precision each is off by
tenths, always to the same side, and so is their difference. The terms that the two distributions do not share are
small, so we compute those directly: x·log(λ₀/λ) − (λ₀ − λ) for Poisson, the tilt and its log-normaliser.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jax.scipy.special import gammaln

from bayesrl.core.primitives import unwrapped
from bayesrl.core.trace import Frame, TraceSite, per_context, raw_log_prob, scale_log_prob

type Terms = tuple[Array, Array]
"""The two terms of a log-ratio."""


class Ratio(NamedTuple):
    """A log-ratio of two densities, and the summed size of its terms, nats, with the shape of log-probabilities."""

    value: Array
    size: Array


def log_ratio(prior: Any, guide: Any, value: Any) -> Ratio | None:
    """Return log π₀(x) − log q(x) of one site, or None if no direct form is known.

    Args:
        prior: the site's distribution under the policy.
        guide: the site's distribution under the guide.
        value: of the site.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from bayesrl.core.log_ratios import log_ratio
        >>> x = jnp.array(200_000)  # 200.1 − 200.0 nats, from densities of 2,400,000 nats
        >>> round(float(log_ratio(dist.Poisson(2e5), dist.Poisson(2e5 * jnp.exp(1e-3)), x).value), 2)
        0.1
    """
    own: Callable[[Any, Any], Ratio | None] | None = getattr(guide, "log_ratio_to", None)
    if own is not None:
        return own(prior, value)
    if isinstance(prior, dist.Independent) and isinstance(guide, dist.Independent):
        count = prior.reinterpreted_batch_ndims
        inner = log_ratio(prior.base_dist, guide.base_dist, value)
        if inner is None or count != guide.reinterpreted_batch_ndims:
            return None
        return Ratio(*(part.sum(tuple(range(-count, 0))) for part in inner))
    core_prior, core_guide = _unexpanded(prior), _unexpanded(guide)
    for family, form in _FORMS:
        if isinstance(core_prior, family) and isinstance(core_guide, family):
            terms = form(core_prior, core_guide, jnp.asarray(value, jnp.result_type(float)))
            if terms is None:
                return None
            shape = lax.broadcast_shapes(tuple(prior.batch_shape), tuple(guide.batch_shape), jnp.shape(value))
            total, size = terms[0] + terms[1], jnp.abs(terms[0]) + jnp.abs(terms[1])
            return Ratio(jnp.broadcast_to(total, shape), jnp.broadcast_to(size, shape))
    return None


def largest_term(fn: Any, value: Any) -> Array | None:
    """Return the size of the greatest term in a log-density, nats, with the shape of the value.

    Only counts and gamma functions make large terms; without either, the result is None.

    Args:
        fn: a distribution.
        value: of the site.
    """
    while hasattr(fn := unwrapped(fn), "stands_for"):
        fn = fn.stands_for
    told = [getattr(fn, name, None) for name in ("total_count", "concentration", "concentration0", "concentration1")]
    sizes = [jnp.abs(jnp.asarray(x, jnp.result_type(float))).max() for x in told if x is not None]
    counts = fn.support.is_discrete and not fn.has_enumerate_support
    if not sizes and not counts:
        return None
    if counts:
        sizes.append(jnp.abs(jnp.asarray(value, jnp.result_type(float))))
    # gammaln grows only from 1.46 on, so start at 2: then the greatest number has the greatest term.
    return jnp.abs(gammaln(reduce(jnp.maximum, sizes) + 2.0))


def doubt_of(prior: Any, guide: Any, value: Any) -> Array | None:
    """Bound the single-precision error of a difference of two log-densities, nats; None where it is negligible.

    The bound has the shape of the value: one unit in the last place of the greatest term.
    """
    terms = [term for fn in (prior, guide) if (term := largest_term(fn, value)) is not None]
    return doubt_in(reduce(jnp.maximum, terms)) if terms else None


def doubt_in(size: Array) -> Array:
    """Bound the single-precision error of a sum of terms of this size, nats."""
    return float(jnp.finfo(jnp.result_type(float)).eps) * size


def _unexpanded(fn: Any) -> Any:
    while isinstance(fn, dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _same(one: Any, other: Any) -> bool:
    """Whether two parameters are known to be equal."""
    if one is other:
        return True
    if isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return False
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def _log_quotient(one: Any, other: Any) -> Array:
    """log(a/b), accurate where a is near b, because a − b is then exact."""
    quotient = (one - other) / other
    near = jnp.abs(quotient) < 0.5
    # The inner `where` keeps log1p in its domain where its branch is discarded, or the gradient would be nan.
    return jnp.where(near, jnp.log1p(jnp.where(near, quotient, 0.0)), jnp.log(one) - jnp.log(other))


def _times(count: Array, factor: Array) -> Array:
    """x·f, but 0 where x is 0, even for an infinite f."""
    return jnp.where(count == 0, 0.0, count * jnp.where(count == 0, 0.0, factor))


def _poisson(prior: Any, guide: Any, x: Array) -> Terms:
    before, after = (jnp.asarray(fn.rate, x.dtype) for fn in (prior, guide))
    return _times(x, _log_quotient(before, after)), after - before


def _softplus_difference(before: Array, after: Array) -> Array:
    """log(1 + e^a) − log(1 + e^b), accurate where a is near b."""
    apart = before - after
    near = jnp.abs(apart) < 0.5
    # (1 + eᵃ) / (1 + eᵇ) = 1 + (eᵃ⁻ᵇ − 1)·σ(b)
    small = jnp.log1p(jnp.expm1(jnp.where(near, apart, 0.0)) * jax.nn.sigmoid(after))
    return jnp.where(near, small, jax.nn.softplus(before) - jax.nn.softplus(after))


def _binomial(prior: Any, guide: Any, x: Array) -> Terms | None:
    if not _same(prior.total_count, guide.total_count):
        return None
    count = jnp.asarray(prior.total_count, x.dtype)
    before, after = jnp.asarray(prior.logits), jnp.asarray(guide.logits)
    return x * (before - after), -count * _softplus_difference(before, after)


def _geometric(prior: Any, guide: Any, x: Array) -> Terms:
    before, after = jnp.asarray(prior.logits), jnp.asarray(guide.logits)
    return before - after, -(x + 1) * _softplus_difference(before, after)


def _gamma_poisson(prior: Any, guide: Any, x: Array) -> Terms | None:
    if not _same(prior.concentration, guide.concentration):
        return None
    size = jnp.asarray(prior.concentration, x.dtype)
    before, after = (jnp.asarray(fn.rate, x.dtype) for fn in (prior, guide))
    quotient = (before - after) / (1 + after)  # log1p of this, since 1 + before and 1 + after are rounded
    near = jnp.abs(quotient) < 0.5
    apart = jnp.where(near, jnp.log1p(jnp.where(near, quotient, 0.0)), jnp.log1p(before) - jnp.log1p(after))
    return size * _log_quotient(before, after), -(size + x) * apart


_FORMS: tuple[tuple[Any, Callable[[Any, Any, Array], Terms | None]], ...] = (
    (dist.Poisson, _poisson),
    ((dist.BinomialProbs, dist.BinomialLogits), _binomial),
    ((dist.GeometricProbs, dist.GeometricLogits), _geometric),
    (dist.GammaPoisson, _gamma_poisson),
)


def log_prior_ratio(
    prior: TraceSite, guide: TraceSite, contexts: tuple[Frame, ...]
) -> tuple[Array | None, Array | None]:
    """Return log π₀ − log q of an action site where it can be had more accurately than by subtracting two totals.

    This covers families with a direct form, and sites with many elements, where two large sums lose
    digits that a sum of differences keeps.

    Returns:
        The ratio, or None if the difference is as good; and a bound on the single-precision error of the ratio or
        of the difference, or None if it is negligible. Both are reduced as `per_context` does, nats.
    """
    if _time_of_its_own(prior) or _time_of_its_own(guide) or prior.scan != guide.scan or prior.frames != guide.frames:
        return None, None
    plain = prior.scale is None and guide.scale is None
    # Only a factor that both share can be taken out of the difference; traced ones cannot be compared.
    if not (plain or _are_one(prior.scale, guide.scale)):
        return None, None
    found = log_ratio(prior.fn, guide.fn, guide.value)
    if found is not None:
        doubt: Array | None = doubt_in(found.size)
    elif (doubt := doubt_of(prior.fn, guide.fn, guide.value)) is not None:
        doubt = _as_batch(doubt, guide)
    doubt = None if doubt is None else per_context(scale_log_prob(doubt, guide), guide, contexts)
    if found is not None:
        return per_context(scale_log_prob(found.value, guide), guide, contexts), doubt
    if _elements_per_context(guide, contexts) < MANY_ELEMENTS:
        return None, doubt
    apart = raw_log_prob(prior) - raw_log_prob(guide)
    return per_context(scale_log_prob(apart, guide), guide, contexts), doubt


MANY_ELEMENTS = 256
"""From this many elements per context on, log-densities are subtracted before they are summed."""


def _time_of_its_own(site: TraceSite) -> bool:
    return hasattr(site.fn, "log_prob_by_step")


def _are_one(one: Any, other: Any) -> bool:
    return isinstance(one, int | float) and isinstance(other, int | float) and one == other


def _elements_per_context(site: TraceSite, contexts: tuple[Frame, ...]) -> int:
    size = math.prod(jnp.shape(site.value))
    held = math.prod(frame.size for frame in contexts if frame in site.frames)
    return size // max(held * (site.length if site.scan is not None else 1), 1)


def _as_batch(values: Array, site: TraceSite) -> Array:
    """Sum per-number values over the event axes, and give them the shape of the site's log-density."""
    event = int(site.fn.event_dim)
    shape = jnp.shape(site.value)
    by_event = jnp.broadcast_to(values, shape) if event else values
    summed = by_event.sum(tuple(range(-event, 0))) if event else by_event
    return jnp.broadcast_to(summed, shape[: len(shape) - event])
