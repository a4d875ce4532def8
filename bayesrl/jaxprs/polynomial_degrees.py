"""Of what degree a program's densities and rewards are, as polynomials of its draws.

Where all that a normal draw enters is at most quadratic, the tilted posterior is normal too: nothing richer is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.extend.core import Jaxpr, Literal

from bayesrl.jaxprs.dataflow import inner_jaxpr, scan_layout

NOT_POLYNOMIAL = 3
"""Stands for every degree above 2, and for what is no polynomial."""

type _Degrees = tuple[int, ...]
"""Of a number in each input, and in all of them together."""

_LINEAR = frozenset({
    "add", "sub", "neg", "reduce_sum", "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "concatenate",
    "convert_element_type", "copy", "copy_p", "expand_dims", "rev", "pad", "add_any", "cumsum", "select_n", "gather",
    "dynamic_slice", "split",
})  # fmt: skip
_EQUALITIES = frozenset({"eq", "ne", "is_finite"})
"""They hold or fail on all draws but a null set."""

_BILINEAR = frozenset({"mul", "dot_general"})


def input_degrees(
    function: Callable[[dict[str, Array]], list[Any]],
    values: dict[str, Array],
    counts_as: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Tell the highest degree of the outputs that each input enters, `NOT_POLYNOMIAL` where it is above 2.

    Args:
        function: of a dictionary of arrays, each of which is a variable.
        values: where to trace it; only shapes and dtypes matter.
        counts_as: degrees that inputs have themselves; 1 where none is given.
    """
    names = sorted(values)
    closed = jax.make_jaxpr(lambda *arrays: function(dict(zip(names, arrays, strict=True))))(
        *(values[n] for n in names)
    )
    own = [(counts_as or {}).get(name, 1) for name in names]
    starts = [tuple(own[j] * (i in (j, len(names))) for i in range(len(names) + 1)) for j in range(len(names))]
    outputs = _follow(closed.jaxpr, starts, (0,) * (len(names) + 1))
    return {name: max((out[-1] for out in outputs if out[i]), default=0) for i, name in enumerate(names)}


def _follow(jaxpr: Jaxpr, inputs: list[_Degrees], none: _Degrees) -> list[_Degrees]:
    degrees: dict[Any, _Degrees] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Degrees:
        return none if isinstance(atom, Literal) else degrees.get(atom, none)

    for eqn in jaxpr.eqns:
        incoming = [read(atom) for atom in eqn.invars]
        for var, out in zip(eqn.outvars, _through(eqn, incoming, none), strict=True):
            degrees[var] = out
    return [read(atom) for atom in jaxpr.outvars]


def _through(eqn: Any, incoming: list[_Degrees], none: _Degrees) -> list[_Degrees]:
    name = eqn.primitive.name
    inner = inner_jaxpr(eqn)
    if name in _EQUALITIES or not any(degrees[-1] for degrees in incoming):
        out = none
    elif name == "scan":
        return _through_scan(eqn, incoming, none)
    elif inner is not None and len(inner.invars) == len(eqn.invars) and name not in ("while", "cond"):
        return _follow(inner, incoming, none)
    elif name in _LINEAR and not any(incoming[i][-1] for i in _chosen_by(name, len(incoming))):
        out = _each(max, incoming)
    elif name in _BILINEAR:
        out = _each(sum, incoming)
    elif name == "div" and not incoming[1][-1]:
        out = incoming[0]
    elif name == "triangular_solve" and not incoming[0][-1]:
        out = incoming[1]
    elif name in ("integer_pow", "square"):
        power = int(eqn.params.get("y", 2))
        out = _each(lambda parts: parts[0] * power if power >= 0 else NOT_POLYNOMIAL * (parts[0] > 0), incoming)
    else:
        out = _each(lambda parts: NOT_POLYNOMIAL * any(parts), incoming)
    return [tuple(min(degree, NOT_POLYNOMIAL) for degree in out)] * len(eqn.outvars)


def _chosen_by(name: str, count: int) -> range:
    """Tell which inputs of a linear operation say what of the others is taken."""
    if name == "select_n":
        return range(1)
    return range(1, count) if name in ("gather", "dynamic_slice") else range(0)


def _through_scan(eqn: Any, incoming: list[_Degrees], none: _Degrees) -> list[_Degrees]:
    """Follow the carries until they stay what they are; degrees only grow, and not above `NOT_POLYNOMIAL`."""
    body = inner_jaxpr(eqn)
    if body is None:
        return [_each(lambda parts: NOT_POLYNOMIAL * any(parts), incoming)] * len(eqn.outvars)
    consts, carries = scan_layout(eqn, body)
    state = list(incoming)
    while True:
        outputs = _follow(body, state, none)
        new = list(state)
        for i in range(carries):
            new[consts + i] = _each(max, [state[consts + i], outputs[i]])
        if new == state:
            return outputs
        state = new


def _each(combine: Callable[[list[int]], int], incoming: list[_Degrees]) -> _Degrees:
    return tuple(combine(list(parts)) for parts in zip(*incoming, strict=True))
