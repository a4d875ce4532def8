"""The rules of interval arithmetic: how each JAX operation maps ranges."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from scipy.special import erf, expit

_MOST_POINTS = 4096
_MOST_PRODUCTS = 2**22


type RangeEnd = Any
"""One side of a range: an array, or the scalar that NumPy returns for an array without axes."""


class Range(NamedTuple):
    """Elementwise bounds of an array, in double precision; ±inf if unknown."""

    lower: np.ndarray
    upper: np.ndarray


type IntervalRule = Callable[[Any, list[Range]], Range | None]
"""(operation, ranges of its inputs) → range of its output before rounding, or None if unknown."""


def nan_to_unbounded(lower: Any, upper: Any) -> Range:
    """Replace nan, as from inf − inf, by an unbounded range."""
    low, high = np.asarray(lower, float), np.asarray(upper, float)
    unknown = np.isnan(low) | np.isnan(high)
    return Range(np.where(unknown, -np.inf, low), np.where(unknown, np.inf, high))


# ---- arithmetic ------------------------------------------------------------------------------


def _monotone(fn: Callable[..., Any]) -> IntervalRule:
    return lambda eqn, x: nan_to_unbounded(fn(x[0].lower), fn(x[0].upper))


def _product(x: Range, y: Range) -> Range:
    corners = [a * b for a in x for b in y]
    # An infinite end stands for arbitrarily large finite numbers, so zero times it is zero.
    corners = [np.where(np.isnan(c), 0.0, c) for c in corners]
    return Range(np.minimum.reduce(corners), np.maximum.reduce(corners))


def _mul(eqn: Any, x: list[Range]) -> Range:
    # x·x is not the product of two independent numbers: knowing that it is a square keeps it non-negative.
    return _power(x[0], 2) if _same(eqn) else _product(*x)


def _same(eqn: Any) -> bool:
    first, second = eqn.invars
    return first is second and not isinstance(first, Literal)


def _power(x: Range, exponent: int) -> Range:
    if exponent < 0:
        return _divide(Range(np.ones(()), np.ones(())), _power(x, -exponent))
    low, high = x.lower**exponent, x.upper**exponent
    if exponent % 2 == 1:
        return Range(low, high)
    across = (x.lower <= 0) & (x.upper >= 0)
    return Range(np.where(across, 0.0 if exponent else 1.0, np.minimum(low, high)), np.maximum(low, high))


def _divide(x: Range, y: Range) -> Range:
    across = (y.lower <= 0) & (y.upper >= 0)
    found = _product(x, Range(1 / np.where(across, 1.0, y.upper), 1 / np.where(across, 1.0, y.lower)))
    return Range(np.where(across, -np.inf, found.lower), np.where(across, np.inf, found.upper))


def _pow(eqn: Any, x: list[Range]) -> Range | None:
    base, exponent = x
    if (base.lower < 0).any():
        return None
    # With a base of at least 0, the power is monotone in each number, so the corners have its extremes.
    corners = [a**b for a in base for b in exponent]
    return nan_to_unbounded(np.minimum.reduce(corners), np.maximum.reduce(corners))


def _absolute(eqn: Any, x: list[Range]) -> Range:
    low, high = np.abs(x[0].lower), np.abs(x[0].upper)
    across = (x[0].lower <= 0) & (x[0].upper >= 0)
    return Range(np.where(across, 0.0, np.minimum(low, high)), np.maximum(low, high))


def _remainder(eqn: Any, x: list[Range]) -> Range:
    dividend, size = x[0], _absolute(eqn, x[1:])
    largest = size.upper
    if _integers(eqn):
        largest = np.where(size.lower > 0, size.upper - 1, np.inf)  # n % 0 is n
    # The remainder has the sign of the dividend, unlike Python's.
    low = np.where(dividend.lower < 0, np.maximum(dividend.lower, -largest), 0.0)
    high = np.where(dividend.upper > 0, np.minimum(dividend.upper, largest), 0.0)
    unchanged = np.maximum(np.abs(dividend.lower), np.abs(dividend.upper)) < size.lower
    return Range(np.where(unchanged, dividend.lower, low), np.where(unchanged, dividend.upper, high))


def _cast(eqn: Any, x: list[Range]) -> Range:
    lower, upper = x[0]
    new, old = eqn.outvars[0].aval.dtype, eqn.invars[0].aval.dtype
    if jnp.issubdtype(new, jnp.bool_):
        return _compared((lower > 0) | (upper < 0), (lower == 0) & (upper == 0))
    if jnp.issubdtype(new, jnp.integer) and jnp.issubdtype(old, jnp.floating):
        return Range(np.trunc(lower), np.trunc(upper))
    return Range(lower, upper)


def _compared(always: RangeEnd, never: RangeEnd) -> Range:
    # Truth is 1: a comparison that may go either way has the range from 0 to 1.
    return Range(always.astype(float), 1.0 - never)


def _equal(eqn: Any, x: list[Range]) -> Range:
    (a, b), (c, d) = x
    # Infinite ends stand for unknown numbers, which need not be equal.
    return _compared((a == b) & (c == d) & (a == c) & np.isfinite(a), (b < c) | (d < a))


def _less(x: Range, y: Range) -> Range:
    return _compared(x.upper < y.lower, x.lower >= y.upper)


def _not(found: Range) -> Range:
    return Range(1 - found.upper, 1 - found.lower)


def _logical(fn: Callable[..., Range]) -> IntervalRule:
    def rule(eqn: Any, x: list[Range]) -> Range | None:
        return fn(*x) if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.bool_) else None

    return rule


def _least(x: Range, y: Range) -> Range:
    return Range(np.minimum(x.lower, y.lower), np.minimum(x.upper, y.upper))


def _most(x: Range, y: Range) -> Range:
    return Range(np.maximum(x.lower, y.lower), np.maximum(x.upper, y.upper))


def _integers(eqn: Any) -> bool:
    return bool(jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer))


def _select(eqn: Any, x: list[Range]) -> Range:
    which, *cases = x
    lower, upper = np.full(eqn.outvars[0].aval.shape, np.inf), np.full(eqn.outvars[0].aval.shape, -np.inf)
    for i, case in enumerate(cases):
        possible = (which.lower <= i) & (which.upper >= i)
        lower = np.where(possible, np.minimum(lower, case.lower), lower)
        upper = np.where(possible, np.maximum(upper, case.upper), upper)
    none = lower > upper
    return Range(np.where(none, -np.inf, lower), np.where(none, np.inf, upper))


# ---- sums ------------------------------------------------------------------------------------


def _total(x: Range, axes: tuple[int, ...], aval: Any, *, exact_terms: bool) -> Range:
    """Sum ranges; move the ends outwards by the possible rounding of terms and partial sums."""
    result = [side.sum(axes) for side in x]
    if jnp.issubdtype(aval.dtype, jnp.integer):
        return Range(*result)
    roundings, eps = math.prod(x.lower.shape[a] for a in axes) - int(exact_terms), float(jnp.finfo(aval.dtype).eps)
    for i, sign in ((0, -1), (1, 1)):
        # Multiples of 1/256 with a small sum add up without any rounding.
        size = np.abs(x[i]).sum(axes)
        exact = (x[i] * 256 == np.round(x[i] * 256)).all(axes) & (size * 256 < 1 / eps)
        result[i] = np.where(exact | ~np.isfinite(result[i]), result[i], result[i] + sign * roundings * eps * size)
    return Range(*result)


def _dot(eqn: Any, x: list[Range]) -> Range | None:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    if eqn.params.get("preferred_element_type") not in (None, eqn.outvars[0].aval.dtype):
        return None
    shapes = [r.lower.shape for r in x]
    free = [
        [i for i in range(len(s)) if i not in (*c, *b)]
        for s, c, b in zip(shapes, (left, right), (left_batch, right_batch), strict=True)
    ]
    sizes = [[s[i] for i in f] for s, f in zip(shapes, free, strict=True)]
    batch, inner = [shapes[0][i] for i in left_batch], [shapes[0][i] for i in left]
    if math.prod((*batch, *sizes[0], *sizes[1], *inner)) > _MOST_PRODUCTS:
        return None
    ones = [[1] * len(f) for f in free]
    first = [side.transpose(*left_batch, *free[0], *left).reshape(*batch, *sizes[0], *ones[1], *inner) for side in x[0]]
    second = [
        side.transpose(*right_batch, *free[1], *right).reshape(*batch, *ones[0], *sizes[1], *inner) for side in x[1]
    ]
    squares = _same(eqn) and left == right and not free[0]
    products = _power(Range(*first), 2) if squares else _product(Range(*first), Range(*second))
    axes = tuple(range(products.lower.ndim - len(inner), products.lower.ndim))
    return _total(products, axes, eqn.outvars[0].aval, exact_terms=False)


def _cumulative(eqn: Any, x: list[Range]) -> Range:
    axis, aval = eqn.params["axis"], eqn.outvars[0].aval

    def along(side: RangeEnd) -> RangeEnd:
        return np.flip(np.cumsum(np.flip(side, axis), axis), axis) if eqn.params["reverse"] else np.cumsum(side, axis)

    sums, sizes = [along(side) for side in x[0]], [np.abs(side).sum(axis, keepdims=True) for side in x[0]]
    error = 0.0 if _integers(eqn) else x[0].lower.shape[axis] * float(jnp.finfo(aval.dtype).eps)
    return nan_to_unbounded(sums[0] - error * sizes[0], sums[1] + error * sizes[1])


# ---- shapes and look-ups ---------------------------------------------------------------------


def _shaped(fn: Callable[[Any, RangeEnd], Any]) -> IntervalRule:
    return lambda eqn, x: Range(*(np.asarray(fn(eqn, side)) for side in x[0]))


def _broadcast(eqn: Any, side: RangeEnd) -> RangeEnd:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    laid = [1] * len(shape)
    for source, target in enumerate(where):
        laid[target] = side.shape[source]
    return np.broadcast_to(side.reshape(laid), shape)


def _slice(eqn: Any, side: RangeEnd) -> RangeEnd:
    start, stop = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)
    return side[tuple(slice(*ends) for ends in zip(start, stop, strides, strict=True))]


def _look_up(eqn: Any, x: list[Range]) -> Range | None:
    """Read a table at every index that the ranges allow; if too many, return the hull of the table."""
    table, *columns = x
    aval = eqn.outvars[0].aval
    if eqn.primitive.name == "gather":
        columns = [Range(*sides) for sides in zip(*(np.moveaxis(side, -1, 0) for side in columns[0]), strict=True)]
    counts = [float((column.upper - column.lower).max(initial=0.0)) + 1 for column in columns]
    if not table.lower.size or not all(math.isfinite(n) for n in counts) or math.prod(counts) > _MOST_POINTS:
        return _whole(eqn, table, aval)
    offsets = np.array(list(product(*(range(int(n)) for n in counts)))).reshape(-1, len(columns))
    at = [np.minimum(c.lower + o.reshape(-1, *(1,) * c.lower.ndim), c.upper) for c, o in zip(columns, offsets.T)]  # noqa: B905
    # Look up places, not values: JAX itself then clamps or fills in as in the program.
    places = np.arange(table.lower.size, dtype=np.int32).reshape(table.lower.shape)
    found = np.asarray(_read(eqn, places, at)).reshape(len(offsets), *aval.shape)
    if (found < 0).any():  # an index outside the table, for which JAX fills in a value
        return None
    return Range(table.lower.reshape(-1)[found].min(0), table.upper.reshape(-1)[found].max(0))


def _read(eqn: Any, places: RangeEnd, at: list[RangeEnd]) -> Any:
    clipped = [jnp.asarray(np.clip(c, -(2**31), 2**31 - 1), jnp.int32) for c in at]
    if eqn.primitive.name == "dynamic_slice":
        sizes = eqn.params["slice_sizes"]
        return jax.vmap(lambda *starts: lax.dynamic_slice(places, starts, sizes))(*clipped)
    stacked = jnp.stack(clipped, -1) if clipped else jnp.zeros((1, *eqn.invars[1].aval.shape), jnp.int32)
    options = {k: eqn.params[k] for k in ("dimension_numbers", "slice_sizes", "mode")}
    return jax.vmap(lambda index: lax.gather(places, index, fill_value=-1, **options))(stacked)


def _whole(eqn: Any, table: Range, aval: Any) -> Range | None:
    """Return the hull of a table and of what JAX fills in for indices outside of it; None if that is unknown."""
    lower, upper = table.lower.min(initial=np.inf), table.upper.max(initial=-np.inf)
    if eqn.params.get("mode") == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params.get("fill_value")
        if fill is not None:
            lower, upper = min(lower, float(fill)), max(upper, float(fill))
        elif not jnp.issubdtype(
            aval.dtype, jnp.floating
        ):  # the least or greatest integer; a float is nan, which is refused
            return None
    return None if lower > upper else Range(np.full(aval.shape, lower), np.full(aval.shape, upper))


def _update(eqn: Any, x: list[Range]) -> Range:
    table, new = x[0], x[1] if eqn.primitive.name == "dynamic_update_slice" else x[2]
    lower, upper = new.lower.min(initial=np.inf), new.upper.max(initial=-np.inf)
    # Where it writes is not known, so any element may be the old or the new one.
    return Range(np.minimum(table.lower, lower), np.maximum(table.upper, upper))


def _iota(eqn: Any, x: list[Range]) -> Range:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    laid = np.arange(shape[axis], dtype=float).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return Range(np.broadcast_to(laid, shape), np.broadcast_to(laid, shape))


def _position(eqn: Any, x: list[Range]) -> Range:
    (axis,), shape = eqn.params["axes"], eqn.outvars[0].aval.shape
    return Range(np.zeros(shape), np.full(shape, float(x[0].lower.shape[axis] - 1)))


def _from(fn: Callable[..., Any], least: float) -> IntervalRule:
    def rule(eqn: Any, x: list[Range]) -> Range:
        found = nan_to_unbounded(fn(x[0].lower), fn(x[0].upper))
        outside = x[0].lower < least
        return Range(np.where(outside, -np.inf, found.lower), np.where(outside, np.inf, found.upper))

    return rule


def _bounded(lower: float, upper: float) -> IntervalRule:
    return lambda eqn, x: Range(np.full(x[0].lower.shape, lower), np.full(x[0].lower.shape, upper))


INTERVAL_RULES: dict[str, IntervalRule] = {
    # arithmetic
    "add": lambda eqn, x: nan_to_unbounded(x[0].lower + x[1].lower, x[0].upper + x[1].upper),
    "sub": lambda eqn, x: nan_to_unbounded(x[0].lower - x[1].upper, x[0].upper - x[1].lower),
    "mul": _mul,
    "div": lambda eqn, x: None if _integers(eqn) else _divide(*x),
    "rem": _remainder,
    "neg": lambda eqn, x: Range(-x[0].upper, -x[0].lower),
    "abs": _absolute,
    "max": lambda eqn, x: _most(*x),
    "min": lambda eqn, x: _least(*x),
    # Its inputs are least, x, greatest.
    "clamp": lambda eqn, x: Range(*(np.minimum(np.maximum(x[1][i], x[0][i]), x[2][i]) for i in (0, 1))),
    "square": lambda eqn, x: _power(x[0], 2),
    "integer_pow": lambda eqn, x: _power(x[0], eqn.params["y"]) if abs(eqn.params["y"]) <= 8 else None,
    "pow": _pow,
    # non-decreasing functions
    "exp": _monotone(np.exp),
    "expm1": _monotone(np.expm1),
    "tanh": _monotone(np.tanh),
    "logistic": _monotone(expit),
    "erf": _monotone(erf),
    # At a half it may round away from 0 or to the even number, so allow both.
    "round": lambda eqn, x: Range(np.ceil(x[0].lower - 0.5), np.floor(x[0].upper + 0.5)),
    "floor": _monotone(np.floor),
    "ceil": _monotone(np.ceil),
    "sign": _monotone(np.sign),
    "log": _from(np.log, 0.0),
    "log1p": _from(np.log1p, -1.0),
    "sqrt": _from(np.sqrt, 0.0),
    "sin": _bounded(-1.0, 1.0),
    "cos": _bounded(-1.0, 1.0),
    # comparisons and logic
    "eq": _equal,
    "ne": lambda eqn, x: _not(_equal(eqn, x)),
    "lt": lambda eqn, x: _less(*x),
    "le": lambda eqn, x: _not(_less(*x[::-1])),
    "gt": lambda eqn, x: _less(*x[::-1]),
    "ge": lambda eqn, x: _not(_less(*x)),
    "and": _logical(_least),
    "or": _logical(_most),
    "not": _logical(_not),
    "select_n": _select,
    "convert_element_type": _cast,
    # reductions
    # Axes may be NumPy's integers.
    "reduce_sum": lambda eqn, x: _total(
        x[0], tuple(map(int, eqn.params["axes"])), eqn.outvars[0].aval, exact_terms=True
    ),
    "reduce_max": _shaped(lambda eqn, side: side.max(eqn.params["axes"])),
    "reduce_min": _shaped(lambda eqn, side: side.min(eqn.params["axes"])),
    "reduce_and": _shaped(lambda eqn, side: side.min(eqn.params["axes"])),
    "reduce_or": _shaped(lambda eqn, side: side.max(eqn.params["axes"])),
    "argmax": _position,
    "argmin": _position,
    "dot_general": _dot,
    "cumsum": _cumulative,
    # shapes and look-ups
    "broadcast_in_dim": _shaped(_broadcast),
    "reshape": _shaped(lambda eqn, side: side.reshape(eqn.params["new_sizes"])),
    "squeeze": _shaped(lambda eqn, side: side.reshape(eqn.outvars[0].aval.shape)),
    "transpose": _shaped(lambda eqn, side: side.transpose(eqn.params["permutation"])),
    "rev": _shaped(lambda eqn, side: np.flip(side, eqn.params["dimensions"])),
    "slice": _shaped(_slice),
    "concatenate": lambda eqn, x: Range(*(np.concatenate(s, eqn.params["dimension"]) for s in zip(*x, strict=True))),
    "iota": _iota,
    "gather": _look_up,
    "dynamic_slice": _look_up,
    "scatter": _update,
    "dynamic_update_slice": _update,
    **dict.fromkeys(("stop_gradient", "copy", "copy_p"), lambda eqn, x: x[0]),
}

INEXACT = frozenset({"pow", "exp", "expm1", "tanh", "logistic", "erf", "log", "log1p", "sqrt", "sin", "cos"})
"""Functions that processors compute only to within a few units in the last place."""
