"""Twists: values of what is still to come, by which a particle filter looks ahead."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.random_keys import dummy_key
from bayesrl.core.programs import Programs
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure
from bayesrl.core.trace import trace_abstractly, trace_program
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import solve
from bayesrl.exact.grid import assignments
from bayesrl.exact.scan_states import PartialScan, reads_outputs, split_scan, tabulate_states
from bayesrl.exact.weighted_draws import context_axes
from bayesrl.guides.policy_analysis import analyze_policy
from bayesrl.jaxprs.dataflow import input_dependencies
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import Params

type Axes = tuple[int | None, ...]
"""Where each context plate lies in an array; None for a plate that the array is outside of."""

type Twist = Callable[[Array, Any, Mapping[str, Array]], Array]
"""From the step just taken (−1 before the first), the carry after it and the latent sites before the scan to the value
of what is still to come, reward units, [*contexts]."""


def learned_twist(posterior: Posterior) -> tuple[Any, Params, float]:
    """Return the guide that holds a learned twist, its parameters and its temperature.

    Raises:
        EngineError: the guide of the posterior has no value of what is to come.
    """
    one = posterior if posterior.num_restarts == 1 else posterior.select(restart="best")
    programs, params = one.unbatched()
    if not hasattr(programs.guide, "twist_values"):
        raise EngineError(
            f"twist= is a posterior whose guide, a {type(programs.guide).__name__}, values no states; pass what "
            "bayesrl.fit_twist returned, or a fit of a rollout by bayesrl.control.ActorCritic, and a posterior to draw "
            "from as proposal="
        )
    return programs.guide, programs.constrain(params), 1.0 if one.beta is None else float(one.beta)


def refuse_peeking(programs: Programs, function: Callable[..., Any]) -> None:
    """Refuse a function of (step, carry) that looks at what the agent does not see.

    Raises:
        EngineError: naming the site.
    """
    structure = programs.structure
    if not any(site.hidden for site in structure.sites) or {site.scan for site in structure.sites} - {None} != {0}:
        return
    # Any key serves, because nothing is computed.
    key = dummy_key()
    window = PartialScan(programs.policy, "watch")
    trace_abstractly(lambda: trace_program(FoldedKeys(window, key), *programs.args))
    leaves, form = jax.tree.flatten(window.carry)
    like = {str(i): jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for i, x in enumerate(leaves)}
    facts = analyze_policy(key, programs.policy, structure, programs.args, {}).carries[0]

    def value(held: dict[str, Array]) -> Any:
        return function(jnp.asarray(0), jax.tree.unflatten(form, [held[str(i)] for i in range(len(leaves))]))

    read = frozenset[str]().union(*input_dependencies(value, like))
    seen = sorted(name for i in read for name in facts[int(i)].reached if structure[name].hidden)
    if seen:
        raise EngineError(
            f"the twist looks at {seen[0]!r} in the carry, an environment site that the agent does not see "
            "(observable=False); read only what the agent sees"
        )


def size_of_twist(twisted: Array) -> Array:
    """Return the mean |twist| of particles [particles, ...], 0 for −inf; nan or inf if one is."""
    # A mean, because XLA's greatest value of numbers and nan need not be nan.
    return jnp.where(twisted == -jnp.inf, 0.0, jnp.abs(twisted)).mean(0)


def finite_twist(twist: Array) -> Array:
    """Put 0 for −inf, before a twist is taken back: it has left no weight, and −inf − −inf would be nan."""
    return jnp.where(twist == -jnp.inf, 0.0, twist)


class UserTwist:
    """A function of (step, carry) as a twist, checked for the shape of its values.

    After the last step of a program that ends there, nothing is to come, whatever the function says.
    """

    def __init__(self, function: Callable[..., Any], structure: Structure) -> None:
        self.function, self.shape = function, structure.context_shape
        last = [site for site in structure.sites if site.kind != "metric"][-1]
        self.length = last.length if last.scan is not None else None

    def __call__(self, step: Array, carry: Any, before: Mapping[str, Array]) -> Array:
        """Return the value, [*contexts]."""
        value = self._read(step, carry)
        if value.shape != self.shape:
            raise EngineError(
                f"the twist returned shape {value.shape}; return one value for each context, of shape {self.shape}"
            )
        if self.length is None:
            return value
        return jnp.where(step == self.length - 1, 0.0, value)

    def _read(self, step: Array, carry: Any) -> Array:
        try:
            value = jnp.asarray(self.function(step, carry))
        except Exception as error:
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise EngineError(
                f"the twist could not be run: {told}; it gets (step, carry), the number of the step just taken and the "
                "carry of the scan after it, and returns one number for each context"
            ) from error
        return value


class ExactTwist:
    """The soft value of every state that a finite program with a scan can reach: V = β·log E[exp(what is to come/β)].

    Under it all particles have the same weight, Z.
    """

    def __init__(self, program: Programs, beta: float | None, carry_axes: tuple[Axes, ...], max_count: int) -> None:
        structure = program.structure
        scan = split_scan(program)
        assert scan is not None
        if reads_outputs(scan):
            raise EngineError(
                "what comes behind the scan reads its stacked outputs, so no value of the carry tells what is to come; "
                "carry what it reads through the scan, or pass a twist that you know"
            )
        stages, states = tabulate_states(scan, max_count)
        self.evaluations = Evaluations.of_both(sum(math.prod(stage.reward.shape[:2]) for stage in stages))
        self.shape = structure.context_shape
        axes = context_axes(structure)
        self.before = {name: axes[name] for name in scan.before if structure[name].latent}
        self.carry_axes = carry_axes
        # The first value is that of the whole program, before anything is drawn.
        values = solve(stages, 1.0 if beta is None else beta, rewarded=beta is not None).by_state[1:]
        widest = max(len(v) for v in values)
        # The last stage may lie behind the scan; without one nothing comes after the last step.
        blank = [np.zeros((1, values[0].shape[-1]))] if len(values) == scan.length else []
        self.values = np.stack([_padded(v, widest, np.nan) for v in [*values, *blank]])
        grid = scan.axes(scan.before)
        tables = [self._columns(assignments(grid, s["prefix"]), s["carry"]) for s in states]
        tables += [tables[-1]] * len(blank)
        self.table = [np.stack([_padded(x, widest, 0) for x in leaf]) for leaf in zip(*tables, strict=True)]
        if blank:
            self.values[-1] = 0.0

    def _columns(self, before: Mapping[str, Any], carry: Any) -> list[Any]:
        """Lay out everything that tells states apart as [states, contexts, numbers]."""
        leaves = [(before[name], axes) for name, axes in sorted(self.before.items())]
        leaves += list(zip(jax.tree.leaves(carry), self.carry_axes, strict=True))
        return [by_context(x, axes, self.shape) for x, axes in leaves]

    def __call__(self, step: Array, carry: Any, before: Mapping[str, Array]) -> Array:
        """Look a state up; nan for one that the table does not have."""
        one = jax.tree.map(lambda x: x[None], (dict(before), carry))
        columns = [x[0] for x in self._columns(*one)]
        found = jnp.ones(self.values.shape[1:], bool)
        for table, own in zip(self.table, columns, strict=True):
            found &= (jnp.asarray(table)[step + 1] == own).all(-1)
        values = jnp.asarray(self.values, jnp.result_type(float))[step + 1]
        # Rows that only pad the table hold zeros, as a real state may; their value is nan.
        found &= ~jnp.isnan(values)
        at = jnp.argmax(found, 0)[None]
        value = jnp.where(found.any(0), jnp.take_along_axis(values, at, 0)[0], jnp.nan)
        # After the last step nothing is to come, whatever state it left.
        last = (step + 2 == len(self.values)) & (self.values[-1] == 0).all()
        return jnp.where(last, 0.0, value).reshape(self.shape)


def _padded(rows: Any, number: int, value: float) -> np.ndarray:
    return np.pad(np.asarray(rows), [(0, number - len(rows)), *((0, 0),) * (rows.ndim - 1)], constant_values=value)


def by_context(value: Any, axes: Axes, shape: tuple[int, ...]) -> Array:
    """Lay out [rows, ...] as [rows, contexts, numbers], contexts flat."""
    own = [1 + axis for axis in axes if axis is not None]
    moved = jnp.moveaxis(value, own, range(1, 1 + len(own)))
    sizes = [n if axis is not None else 1 for n, axis in zip(shape, axes, strict=True)]
    moved = moved.reshape(len(value), *sizes, -1)
    full = jnp.broadcast_to(moved, (len(value), *shape, moved.shape[-1]))
    return full.reshape(len(value), -1, moved.shape[-1])
