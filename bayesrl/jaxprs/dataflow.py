"""Which inputs reach an output through a jump, where a pathwise gradient would be silently wrong."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Jaxpr, Literal

# A comparison of floats jumps; equality does so on a null set only, and the others cut on purpose.
_JUMPS = frozenset({"lt", "le", "gt", "ge", "floor", "ceil", "round", "sign", "argmax", "argmin", "rem"})
_CUTS = frozenset({"eq", "ne", "is_finite", "stop_gradient"})
_LOOPS = frozenset({"scan", "while", "cond"})
_OWN_DERIVATIVE = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})

type _Marks = tuple[frozenset[int], frozenset[int]]
_NONE: _Marks = (frozenset(), frozenset())


def discontinuous_inputs(
    function: Callable[[dict[str, Array]], Any], values: dict[str, Array]
) -> tuple[set[str], set[str]]:
    """Follow named float inputs through a function.

    Args:
        function: of a dictionary of arrays.
        values: where to trace it; only shapes and dtypes matter.

    Returns:
        Names of the inputs that reach an output at all, and of those that reach one through a jump
        (a float comparison, rounding, an arg-max, a cast to integers).
    """
    names = sorted(values)
    closed = jax.make_jaxpr(lambda *arrays: function(dict(zip(names, arrays, strict=True))))(
        *(values[n] for n in names)
    )
    starts = [(frozenset({i}), frozenset[int]()) for i in range(len(names))]
    outputs = _follow(closed.jaxpr, starts)
    smooth = {names[i] for marks in outputs for i in marks[0]}
    rough = {names[i] for marks in outputs for i in marks[1]}
    return smooth, rough


def count_dependent_numbers(function: Callable[[dict[str, Array]], Any], values: dict[str, Array]) -> int | None:
    """Count the numbers that a function computes anew for other values, about; None where it calls Python.

    Args:
        function: of a dictionary of arrays.
        values: where to trace it; only shapes and dtypes matter.
    """
    names = sorted(values)
    closed = jax.make_jaxpr(lambda *arrays: function(dict(zip(names, arrays, strict=True))))(
        *(values[n] for n in names)
    )
    return _numbers(closed.jaxpr, [True] * len(names))[0]


def _numbers(jaxpr: Jaxpr, inputs: list[bool]) -> tuple[int | None, list[bool]]:
    """Count what depends on marked inputs, and mark the outputs."""
    marks: dict[Any, bool] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> bool:
        return not isinstance(atom, Literal) and marks.get(atom, False)

    total = 0
    for eqn in jaxpr.eqns:
        incoming = [read(atom) for atom in eqn.invars]
        outgoing = [any(incoming)] * len(eqn.outvars)
        count: int | None = sum(_size(var) for var in eqn.outvars) if any(incoming) else 0
        inner = inner_jaxpr(eqn) if any(incoming) else None
        name = eqn.primitive.name
        if "callback" in name:
            return None, []
        if inner is not None and (name in _LOOPS or len(inner.invars) != len(eqn.invars)):
            each, _ = _numbers(inner, [True] * len(inner.invars))
            count = None if each is None else each * int(eqn.params.get("length", 1))
        elif inner is not None:
            count, outgoing = _numbers(inner, incoming)
        elif name in ("dot_general", "conv_general_dilated") and any(incoming):
            count = _size(eqn.outvars[0]) * max(_last(var) for var in eqn.invars)
        if count is None:
            return None, []
        total += count
        marks |= dict(zip(eqn.outvars, outgoing, strict=True))
    return total, [read(atom) for atom in jaxpr.outvars]


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)


def _last(var: Any) -> int:
    return math.prod(var.aval.shape[-1:])


def _follow(jaxpr: Jaxpr, inputs: list[_Marks]) -> list[_Marks]:
    marks: dict[Any, _Marks] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Marks:
        return _NONE if isinstance(atom, Literal) else marks.get(atom, _NONE)

    for eqn in jaxpr.eqns:
        incoming = [read(atom) for atom in eqn.invars]
        for var, out in zip(eqn.outvars, _through(eqn, incoming), strict=True):
            marks[var] = out
    return [read(atom) for atom in jaxpr.outvars]


def _through(eqn: Any, incoming: list[_Marks]) -> list[_Marks]:
    name = eqn.primitive.name
    merged = _merge(incoming)
    inner = inner_jaxpr(eqn)
    if name in _CUTS or not (merged[0] or merged[1]):
        out = _NONE
    elif name in _OWN_DERIVATIVE:
        out = merged
    elif name == "scan":
        return _through_scan(eqn, incoming)
    elif name == "cond":
        return _through_cond(eqn, incoming)
    elif inner is not None and len(inner.invars) == len(eqn.invars):
        return _follow(inner, incoming)
    elif name in _JUMPS or name == "while" or _casts_to_integer(eqn):
        out = (merged[0], merged[0] | merged[1])
    else:
        out = merged
    return [out] * len(eqn.outvars)


def _through_scan(eqn: Any, incoming: list[_Marks]) -> list[_Marks]:
    body = inner_jaxpr(eqn)
    if body is None:
        return [_merge(incoming)] * len(eqn.outvars)
    consts, carries = scan_layout(eqn, body)
    state = list(incoming)
    while True:
        outputs = _follow(body, state)
        new = list(state)
        for i in range(carries):
            new[consts + i] = _merge([state[consts + i], outputs[i]])
        if new == state:
            return outputs
        state = new


def _through_cond(eqn: Any, incoming: list[_Marks]) -> list[_Marks]:
    chooser, *operands = incoming
    chosen = (chooser[0], chooser[0] | chooser[1])
    branches = [_follow(branch.jaxpr, operands) for branch in eqn.params["branches"]]
    return [_merge([chosen, *outputs]) for outputs in zip(*branches, strict=True)]


def scan_layout(eqn: Any, body: Jaxpr) -> tuple[int, int]:
    """Count the constants and the carries of a scan: inputs and outputs per step have one axis more outside."""

    def per_step(outside: Any, inside: Any) -> bool:
        return bool(len(outside.aval.shape) > len(inside.aval.shape))

    carries = sum(not per_step(*pair) for pair in zip(eqn.outvars, body.outvars, strict=True))
    steps = sum(per_step(*pair) for pair in zip(eqn.invars, body.invars, strict=True))
    return len(eqn.invars) - carries - steps, carries


def inner_jaxpr(eqn: Any) -> Jaxpr | None:
    """Give the first program inside an operation, or None."""
    for value in eqn.params.values():
        open_jaxpr = getattr(value, "jaxpr", value)  # closed jaxprs hold an open one
        if isinstance(open_jaxpr, Jaxpr):
            return open_jaxpr
    return None


def _casts_to_integer(eqn: Any) -> bool:
    if eqn.primitive.name != "convert_element_type":
        return False
    (source,) = eqn.invars
    return jnp.issubdtype(source.aval.dtype, jnp.floating) and not jnp.issubdtype(
        eqn.outvars[0].aval.dtype, jnp.floating
    )


def _merge(marks: list[_Marks]) -> _Marks:
    reach: frozenset[int] = frozenset().union(*(m[0] for m in marks)) if marks else frozenset()
    rough: frozenset[int] = frozenset().union(*(m[1] for m in marks)) if marks else frozenset()
    return reach, rough
