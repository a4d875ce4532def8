"""Take a `scan` apart: the states that a program can reach at each step, and the effect of each step on them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.interpreters import partial_eval
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger, apply_stack

from bayesrl.core.handlers import scan_length
from bayesrl.core.programs import Programs
from bayesrl.core.trace import Trace
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import ProgramStage, build_stage
from bayesrl.exact.grid import (
    Axis,
    BatchEvaluator,
    decode_assignment,
    enumeration_axes,
    first_assignment,
    num_assignments,
    path_axes,
    run_with_sites,
    score_trace,
)
from bayesrl.typing import Program


class TooManyStatesError(EngineError):
    """More states and assignments can be reached than the bound allows."""


class _Leave(Exception):  # noqa: N818  (not an error: it ends a run early)
    """Ends a run of the program early, when the rest of it is not needed."""


class PartialScan(Messenger):
    """Runs only a part of a program with one scan.

    Modes: `watch` records the scan's inputs and results; `enter` stops before it; `step` runs one
    step from a given carry, then stops; `finish` skips it and supplies a final carry and outputs.
    """

    def __init__(
        self, fn: Program, mode: Literal["watch", "enter", "step", "finish"], given: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(fn)
        self.mode, self.given = mode, given
        self.length, self.count = 1, 0
        self.carry: Any = None
        self.outputs: Any = None

    def process_message(self, msg: dict[str, Any]) -> None:
        """Change the scan's inputs, or replace the scan by given results."""
        if msg["type"] != "control_flow":
            return
        self.count += 1
        body, init, xs, *_ = msg["args"]
        self.length = scan_length(msg)
        if self.mode == "enter":
            self.carry = init
            raise _Leave
        if self.mode == "step":
            t, carry = self.given
            now = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(jnp.asarray(x), t, 1), xs)
            # NumPyro's order: body, carry, inputs, length, reverse.
            msg["args"] = (body, carry, now, 1, False)
        if self.mode == "finish":
            carry, outputs = self.given
            # NumPyro does not run what has a value; its scans return ((length, key, carry), (sites, outputs)).
            msg["value"] = ((self.length, None, carry), (PytreeTrace({}), outputs))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Record the scan's results; after one step, pass its sites to the other handlers and stop."""
        if msg["type"] != "control_flow":
            return
        (_, _, self.carry), (trace, self.outputs) = msg["value"]
        if self.mode == "step":
            for site in trace.trace.values():
                if site["type"] != "plate":
                    apply_stack(site)
            raise _Leave


def run_until_left(window: PartialScan) -> Program:
    """Return the program that ends where its window leaves it."""

    def program(*args: Any) -> None:
        try:
            window(*args)
        except _Leave:
            return

    return program


def _run_window(window: PartialScan, values: dict[str, Array], args: tuple[Any, ...]) -> Trace:
    return run_with_sites(run_until_left(window), values, args)


@dataclass(frozen=True)
class ScanProgram:
    """A program of flat sites, one scan, and flat sites.

    Attributes:
        programs: the policy, without a guide.
        length: number of time steps.
        carry: shapes and dtypes of the carry.
        outputs: shapes and dtypes of the stacked outputs.
        before: names of all sites before the scan.
        inside: names of all sites inside it.
        after: names of all sites after it.
    """

    programs: Programs
    length: int
    carry: Any
    outputs: Any
    before: tuple[str, ...]
    inside: tuple[str, ...]
    after: tuple[str, ...]

    def axes(self, names: Sequence[str]) -> tuple[Axis, ...]:
        """Arrange the latent sites among `names` as axes of one step."""
        structure = self.programs.structure
        return enumeration_axes(structure, [site for site in structure.sites if site.name in names], lambda _: (0,))


def split_scan(programs: Programs) -> ScanProgram | None:
    """Find the program's scan; None if there is none, or more than one."""
    structure = programs.structure
    if all(site.scan is None for site in structure.sites):
        return None
    window = PartialScan(programs.policy, "watch")
    axes = path_axes(structure)

    def watch() -> tuple[Any, Any]:
        _run_window(window, first_assignment(axes), programs.args)
        return window.carry, window.outputs

    carry, outputs = jax.eval_shape(watch)
    if window.count != 1:
        return None
    names = [site.name for site in structure.sites]
    inside = [i for i, site in enumerate(structure.sites) if site.scan is not None]
    first, last = inside[0], inside[-1] + 1
    return ScanProgram(
        programs,
        window.length,
        carry,
        outputs,
        tuple(names[:first]),
        tuple(names[first:last]),
        tuple(names[last:]),
    )


def reads_outputs(scan: ScanProgram) -> bool:
    """Whether a scored site after the scan reads its stacked outputs, not just the final carry."""
    if not scan.after or not jax.tree.leaves(scan.outputs):
        return False
    axes = (*scan.axes(scan.before), *scan.axes(scan.after))
    scored = [name for name in scan.after if scan.programs.structure[name].kind != "metric"]
    return _depends(scan, axes, scored)


def unknown_metrics(scan: ScanProgram) -> set[str]:
    """Return the names of metrics after the scan that read its stacked outputs."""
    if not jax.tree.leaves(scan.outputs):
        return set()
    axes = (*scan.axes(scan.before), *scan.axes(scan.after))
    metrics = [name for name in scan.after if scan.programs.structure[name].kind == "metric"]
    return {name for name in metrics if _depends(scan, axes, [name])}


def _depends(scan: ScanProgram, axes: tuple[Axis, ...], names: Sequence[str]) -> bool:
    leaves, tree = jax.tree.flatten(scan.outputs)

    def scores(*outputs: Any) -> Any:
        carry = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), scan.carry)
        window = PartialScan(scan.programs.policy, "finish", (carry, jax.tree.unflatten(tree, outputs)))
        trace = _run_window(window, first_assignment(axes), scan.programs.args)
        values = [trace.sites[n].value for n in names if scan.programs.structure[n].kind == "metric"]
        return score_trace(trace, scan.programs.structure, names), values

    jaxpr = jax.make_jaxpr(scores)(*leaves)
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    # Dead-code elimination tells which outputs matter: those that no kept operation reads are unused.
    return any(used)


def tabulate_states(scan: ScanProgram, max_count: int) -> tuple[list[ProgramStage], list[Any]]:
    """Tabulate the program as stages: before the scan, each of its steps, after it.

    Returns:
        The stages, and the states that each but the first starts from: the number of the assignment before the scan
        and the carry, [states, ...].

    Raises:
        TooManyStatesError: there are more than `max_count` states × assignments.
    """
    spent = 0

    def spend(num: int, where: str) -> None:
        nonlocal spent
        spent += num
        if spent > max_count:
            raise TooManyStatesError(
                f"the program has at least {spent:,} reachable states × assignments ({where}), more than "
                f"max_count={max_count:,}; raise max_count, shorten the horizon, carry less through the scan, "
                "or use bayesrl.importance(...) or bayesrl.fit(...)"
            )

    enter, step, finish = _parts(scan)
    before, inside, after = scan.axes(scan.before), scan.axes(scan.inside), scan.axes(scan.after)
    spend(num_assignments(before), "before the scan")
    prefix = np.arange(num_assignments(before))
    scores, carry = BatchEvaluator(enter, scan.programs.args, scan.programs.structure)({"prefix": prefix})
    stage = build_stage(
        before, scores, np.ones((1, math.prod(scan.programs.structure.context_shape)), bool), scan.programs.structure
    )
    stage, states, reached = _follow(stage, {"prefix": prefix}, carry)
    stages, starts = [stage], [states]
    table = BatchEvaluator(step, scan.programs.args, scan.programs.structure)
    for t in range(scan.length):
        rows = _rows(states, num_assignments(inside))
        spend(len(rows["prefix"]), f"by step {t + 1} of {scan.length}")
        # The step is an array in the row, so it is traced, and one program serves all steps.
        scores, carry = table({**rows, "t": np.full(len(rows["prefix"]), t)})
        stage = build_stage(inside, scores, reached, scan.programs.structure)
        stage, states, reached = _follow(stage, rows, carry)
        # Metrics are means over time, so each step contributes its share.
        own = {name: value / scan.length for name, value in stage.metrics.items()}
        stages.append(replace(stage, axes=tuple(replace(axis, step=t) for axis in stage.axes), metrics=own))
        starts.append(states)
    if not scan.after:
        stages[-1] = replace(stages[-1], following=None)
        return stages, starts[:-1]
    rows = _rows(states, num_assignments(after))
    spend(len(rows["prefix"]), "behind the scan")
    scores = BatchEvaluator(finish, scan.programs.args, scan.programs.structure)(rows)
    return [*stages, build_stage(after, scores, reached, scan.programs.structure)], starts


def _parts(scan: ScanProgram) -> tuple[Callable[..., Any], ...]:
    """Return the functions of (args, row) that run each part of the program."""
    before, inside, after = scan.axes(scan.before), scan.axes(scan.inside), scan.axes(scan.after)

    def enter(args: tuple[Any, ...], row: Any) -> Any:
        window = PartialScan(scan.programs.policy, "enter")
        trace = _run_window(window, decode_assignment(before, row["prefix"]), args)
        # The first carry may hold Python numbers; states have the dtypes of the last one.
        carry = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), window.carry, scan.carry)
        return score_trace(trace, scan.programs.structure, scan.before), carry

    def step(args: tuple[Any, ...], row: Any) -> Any:
        window = PartialScan(scan.programs.policy, "step", (row["t"], row["carry"]))
        values = decode_assignment(before, row["prefix"]) | decode_assignment(inside, row["assignment"])
        trace = _run_window(window, values, args)
        carry = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), window.carry, scan.carry)
        return score_trace(trace, scan.programs.structure, scan.inside), carry

    def finish(args: tuple[Any, ...], row: Any) -> Any:
        outputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), scan.outputs)
        window = PartialScan(scan.programs.policy, "finish", (row["carry"], outputs))
        values = decode_assignment(before, row["prefix"]) | decode_assignment(after, row["assignment"])
        return score_trace(_run_window(window, values, args), scan.programs.structure, scan.after)

    return enter, step, finish


def _rows(states: Any, num: int) -> Any:
    """Pair every state with every assignment; assignments run fastest."""
    rows = jax.tree.map(lambda x: np.repeat(x, num, 0), states)
    return {**rows, "assignment": np.tile(np.arange(num), len(states["prefix"]))}


def _follow(stage: ProgramStage, rows: Any, carry: Any) -> tuple[ProgramStage, Any, np.ndarray]:
    """Find the distinct states after a stage, and which assignment leads to which."""
    live = stage.reached[:, None] & (stage.log_prob("action") + stage.log_prob("environment") > -np.inf)
    states, assignments, contexts = live.shape
    flat = live.reshape(-1, contexts)
    kept = np.flatnonzero(flat.any(-1))
    columns = [np.ascontiguousarray(x[kept]).reshape(len(kept), -1) for x in (rows["prefix"], *jax.tree.leaves(carry))]
    # States are compared byte by byte; adding 0 makes −0 and 0 one state.
    signature = np.concatenate([(x + np.zeros((), x.dtype)).view(np.uint8) for x in columns], 1)
    _, first, inverse = np.unique(signature, axis=0, return_index=True, return_inverse=True)
    # NumPy 2.0 gives the inverse one more axis here than other versions do.
    inverse = inverse.reshape(-1)
    following = np.full(len(flat), -1)
    following[kept] = inverse
    reached = np.zeros((len(first), contexts), bool)
    np.logical_or.at(reached, inverse, flat[kept])
    at = kept[first]
    new = {"prefix": rows["prefix"][at], "carry": jax.tree.map(lambda x: x[at], carry)}
    return replace(stage, following=following.reshape(states, assignments)), new, reached
