"""Check that a program is the same at each reading: a program that draws its own numbers on the host is not.

JAX runs a program's Python code to learn what it computes, and the library does so again for each question. If the
Python code draws numbers (`numpy.random`, `random`, the clock, a counter), these differ each time, and an optimum, a
fit and its evidence would belong to three different programs. So two readings are compared, number by number.
"""

from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from bayesrl.compilation.canonical_form import DIFFERENTIATION_ONLY
from bayesrl.errors import PolicyError

COMPARED_FIELDS = ("fn", "scale", "value")
"""The parts of a record to compare."""


class Reading(NamedTuple):
    """One reading of a program: its records by site, its trace, and the site and part behind each output."""

    sites: dict[str, Any]
    trace: Any
    outputs: list[tuple[str, str]]


def check_deterministic(first: Reading, second: Reading) -> None:
    """Refuse a program whose two readings differ.

    Raises:
        PolicyError: the readings differ; the message names the first site that reads other numbers.
    """
    name = _first_known(first, second) or _first_traced(first, second)
    if name is not None:
        raise PolicyError(
            f"site {name!r} is computed from other numbers each time the program is read (random numbers of NumPy or "
            "Python, the clock, a counter), so that no two answers would be of one program; draw such numbers before "
            "and pass them as arguments, or draw them inside by numpyro.sample or bayesrl.environment, and a "
            "mini-batch by numpyro.plate(..., subsample_size=...)"
        )


def _first_known(first: Reading, second: Reading) -> str | None:
    """Name the first site that differs in its name or in what is known without running the program."""
    for name, other in zip_longest(first.sites, second.sites):
        if name != other:
            return str(name or other)
        for part in COMPARED_FIELDS:
            ours, theirs = (jax.tree.leaves(getattr(reading.sites[name], part)) for reading in (first, second))
            if len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
                return str(name)
    return None


def _first_traced(first: Reading, second: Reading) -> str | None:
    """Name the first site whose value depends on a place where the two traces differ."""
    ours, theirs = first.trace, second.trace
    consts = zip_longest(ours.constvars, ours.consts, theirs.consts)
    other = {var for var, one, two in consts if not _same(one, two)}
    apart = len(ours.eqns) != len(theirs.eqns) or first.outputs != second.outputs
    for eqn, its in zip(ours.eqns, theirs.eqns, strict=False):
        read = {atom for atom in eqn.invars if not isinstance(atom, Literal)}
        # Whatever reads a differing value differs too.
        if read & other or not _same_operation(eqn, its):
            other |= set(eqn.outvars)
    touched = [
        name
        for (name, _), var, its in zip(first.outputs, ours.outvars, theirs.outvars, strict=False)
        if not _same_input(var, its) or (not isinstance(var, Literal) and var in other)
    ]
    return touched[0] if touched else (first.outputs[-1][0] if apart and first.outputs else None)


def _same_operation(eqn: Any, other: Any) -> bool:
    return (
        eqn.primitive is other.primitive
        and len(eqn.invars) == len(other.invars)
        and all(map(_same_input, eqn.invars, other.invars))
        and all(
            _same_part(value, other.params.get(key))
            for key, value in eqn.params.items()
            if key not in DIFFERENTIATION_ONLY
        )
    )


def _same_input(one: Any, other: Any) -> bool:
    if isinstance(one, Literal) and isinstance(other, Literal):
        return _same(one.val, other.val)
    return isinstance(one, Literal) == isinstance(other, Literal)


def _same_part(one: Any, other: Any) -> bool:
    """Compare parts of operations; functions and the like may be created anew at each reading."""
    if one is other:
        return True
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and len(one) == len(other) and all(map(_same_part, one, other))
    if not isinstance(one, Jaxpr):
        return _same(one, other)
    return (
        isinstance(other, Jaxpr)
        and (len(one.eqns), len(one.consts)) == (len(other.eqns), len(other.consts))
        and all(map(_same, one.consts, other.consts))
        and all(map(_same_operation, one.eqns, other.eqns))
        and all(map(_same_input, one.outvars, other.outvars))
    )


def _same(one: Any, other: Any) -> bool:
    """Compare two numbers or arrays bit by bit; tracers and other objects count as equal."""
    if one is other or not (_is_known(one) and _is_known(other)):
        return True
    # Bit by bit, so that nan equals nan.
    ours, theirs = (_bits(value) for value in (one, other))
    return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and ours.tobytes() == theirs.tobytes()


def _is_known(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | np.ndarray | np.generic | jax.Array) and not isinstance(
        value, jax.core.Tracer
    )


def _bits(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)
