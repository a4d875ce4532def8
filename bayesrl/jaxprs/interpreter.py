"""Abstract interpretation of jaxprs: propagate facts about a program's inputs to its outputs."""

import abc
import itertools
from typing import Any

from jax.extend.core import Jaxpr, Literal, jaxprs_in_params


class Interpreter[T](abc.ABC):
    """Runs a jaxpr on facts of type `T` instead of arrays.

    A subclass defines the facts about constants, and how an operation maps facts about inputs to facts about outputs.
    This class follows calls, `scan` and `cond`; it iterates a `scan` until the facts about its carry no longer change.
    A `while` is one operation.
    """

    @abc.abstractmethod
    def constant(self, value: Any, aval: Any) -> T:
        """Return the fact about a constant."""

    @abc.abstractmethod
    def operation(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Return facts about the outputs of an operation that is not looked into."""

    @abc.abstractmethod
    def join(self, facts: list[T]) -> T:
        """Return a fact that holds if any of the given facts does."""

    def widen(self, old: T, new: T, attempt: int) -> T:
        """Join a carry's fact with that after one more step; if facts may grow for ever, a subclass must jump ahead."""
        return self.join([old, new])

    def equal(self, one: T, other: T) -> bool:
        """Whether two facts are equal."""
        return bool(one == other)

    def run(self, jaxpr: Jaxpr, inputs: list[T]) -> list[T]:
        """Propagate facts through a jaxpr."""
        known: dict[Any, T] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, jaxpr.consts, strict=True):
            known[var] = self.constant(value, var.aval)

        def read(atom: Any) -> T:
            return self.constant(atom.val, atom.aval) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self.equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Propagate facts through one equation."""
        if eqn.primitive.name == "scan":
            return self.scan(eqn, inputs)
        if eqn.primitive.name == "cond":
            return self.cond(eqn, inputs)
        program = called_program(eqn)
        return self.operation(eqn, inputs) if program is None else self.run(program, inputs)

    def scan(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Iterate the carry of a scan until its facts no longer change."""
        (program,) = jaxprs_in_params(eqn.params)
        first, num = scan_layout(eqn, program)
        state, carry = list(inputs), slice(first, first + num)
        for attempt in itertools.count():
            outputs = self.run(program, state)
            wider = [self.widen(*pair, attempt) for pair in zip(state[carry], outputs[:num], strict=True)]
            if all(map(self.equal, wider, state[carry])):
                break
            state[carry] = wider
        return outputs

    def cond(self, eqn: Any, inputs: list[T]) -> list[T]:
        """Join the facts from all branches."""
        branches = [self.run(branch, inputs[1:]) for branch in eqn.params["branches"]]
        return [self.join(list(outputs)) for outputs in zip(*branches, strict=True)]


def called_program(eqn: Any) -> Jaxpr | None:
    """Return the jaxpr that an operation runs once on its own inputs, as `jit` does; None if it has none."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    shapes = [atom.aval.shape for atom in eqn.invars]
    # Reductions hold jaxprs too, but of single elements; their shapes tell them apart.
    return next((p for p in jaxprs_in_params(eqn.params) if _shapes_of(p) == shapes), None)


def _shapes_of(program: Any) -> list[tuple[int, ...]]:
    return [var.aval.shape for var in program.invars]


def scan_layout(eqn: Any, body: Jaxpr) -> tuple[int, int]:
    """Count the constants and the carries of a scan; per-step inputs and outputs have one more axis outside."""

    def per_step(outside: Any, inside: Any) -> bool:
        return bool(len(outside.aval.shape) > len(inside.aval.shape))

    carries = sum(not per_step(*pair) for pair in zip(eqn.outvars, body.outvars, strict=True))
    steps = sum(per_step(*pair) for pair in zip(eqn.invars, body.invars, strict=True))
    return len(eqn.invars) - carries - steps, carries
