"""Degrees of a program's densities and rewards as polynomials of its draws.

If everything that a normal draw enters is at most quadratic, the tilted posterior is normal too, and a normal guide
suffices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from bayesrl.jaxprs.interpreter import Interpreter

NOT_POLYNOMIAL = 3
"""Stands for every degree above 2, and for functions that are not polynomials."""

type _Degrees = tuple[int, ...]
"""Degrees of a number in each input, and in all inputs together."""

_LINEAR = frozenset({
    "add", "sub", "neg", "reduce_sum", "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "concatenate",
    "convert_element_type", "copy", "copy_p", "expand_dims", "rev", "pad", "add_any", "cumsum", "select_n", "gather",
    "dynamic_slice", "split",
})  # fmt: skip
_SELECTORS = {"select_n": slice(1), "gather": slice(1, None), "dynamic_slice": slice(1, None)}
"""The inputs of linear operations that select parts of the others."""

_EQUALITIES = frozenset({"eq", "ne", "is_finite"})
"""Constant on all draws but a null set."""

_BILINEAR = frozenset({"mul", "dot_general"})


class _DegreesOf(Interpreter[_Degrees]):
    """Propagates degrees; they only grow, up to `NOT_POLYNOMIAL`."""

    def __init__(self, num_inputs: int) -> None:
        self.zero = (0,) * (num_inputs + 1)

    def constant(self, value: Any, aval: Any) -> _Degrees:
        return self.zero

    def join(self, facts: list[_Degrees]) -> _Degrees:
        return tuple(map(max, zip(self.zero, *facts, strict=True)))

    def cond(self, eqn: Any, inputs: list[_Degrees]) -> list[_Degrees]:
        return self.operation(eqn, inputs)

    def operation(self, eqn: Any, inputs: list[_Degrees]) -> list[_Degrees]:
        name = eqn.primitive.name
        if name in _EQUALITIES:
            out = self.zero
        # `slice(0)` is empty: operations without selectors are linear in all of their inputs.
        elif name in _LINEAR and not any(degrees[-1] for degrees in inputs[_SELECTORS.get(name, slice(0))]):
            out = self.join(inputs)
        elif name in _BILINEAR:
            out = tuple(map(sum, zip(*inputs, strict=True)))
        elif name == "div" and not inputs[1][-1]:
            out = inputs[0]
        elif name == "triangular_solve" and not inputs[0][-1]:
            out = inputs[1]
        elif name in ("integer_pow", "square") and (power := int(eqn.params.get("y", 2))) >= 0:
            out = tuple(degree * power for degree in inputs[0])
        else:
            out = tuple(NOT_POLYNOMIAL * (degree > 0) for degree in self.join(inputs))
        return [tuple(min(degree, NOT_POLYNOMIAL) for degree in out)] * len(eqn.outvars)


def input_degrees(
    function: Callable[[dict[str, Array]], list[Any]],
    values: dict[str, Array],
    counts_as: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return, for each input, the highest degree of the outputs that it enters; `NOT_POLYNOMIAL` if above 2.

    Args:
        function: function of a dictionary of arrays, each of which is a variable.
        values: point at which to trace it; only shapes and dtypes matter.
        counts_as: degrees of the inputs themselves; 1 by default.
    """
    # The order in which JAX flattens a dictionary.
    names = sorted(values)
    own = [(counts_as or {}).get(name, 1) for name in names]
    inputs = [tuple(own[j] * (i in (j, len(names))) for i in range(len(names) + 1)) for j in range(len(names))]
    outputs = _DegreesOf(len(names)).run(jax.make_jaxpr(function)(values), inputs)
    return {name: max((out[-1] for out in outputs if out[i]), default=0) for i, name in enumerate(names)}
