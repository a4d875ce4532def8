"""A policy and its guide cut along the time of their scan, so that they can be run one step at a time."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.core.trace import Frame
from bayesrl.errors import EngineError
from bayesrl.exact.grid import Axis, enumeration_axes, num_assignments
from bayesrl.exact.scan_states import PartialScan, run_until_left
from bayesrl.exact.weighted_draws import context_axes
from bayesrl.monte_carlo.particles.twists import Axes
from bayesrl.posterior.sampling import draw_fit
from bayesrl.typing import Params, PRNGKey


class Carries(NamedTuple):
    """The carries of the policy's scan and of the guide's; the guide's is None if the policy itself draws."""

    policy: Any
    guide: Any


@dataclass(frozen=True)
class TimeSteps:
    """A program of flat sites, one scan, and flat sites, beside a guide of the same form."""

    programs: Programs
    length: int
    before: tuple[str, ...]
    inside: tuple[str, ...]
    after: tuple[str, ...]

    def enter(self, key: PRNGKey | None, params: Params, values: dict[str, Array]) -> tuple[Draws, Carries]:
        """Draw and score what stands before the scan, and return the carries it starts from; arguments as in `step`."""
        return self._part("enter", self.before, key, params, values, None)

    def step(
        self, key: PRNGKey | None, params: Params, t: Array, values: dict[str, Array], carries: Carries
    ) -> tuple[Draws, Carries]:
        """Draw and score one step of the scan.

        Args:
            key: for the draws; None if `values` holds them all.
            params: of the guide.
            t: which step, traced.
            values: sites before the scan and, where they are known, of this step, [1, ...].
            carries: at the start of the step.
        """
        return self._part("step", self.inside, key, params, values, (t, carries))

    def _part(
        self,
        mode: Literal["enter", "step"],
        names: tuple[str, ...],
        key: PRNGKey | None,
        params: Params,
        values: dict[str, Array],
        at: tuple[Array, Carries] | None,
    ) -> tuple[Draws, Carries]:
        given = [() if at is None else (at[0], carry) for carry in ((None, None) if at is None else at[1])]
        policy = PartialScan(self.programs.policy, mode, given[0])
        guide = None if self.programs.guide is None else PartialScan(self.programs.guide, mode, given[1])
        structure = self.programs.structure
        # A run scores what its structure names, so a part has a structure of its own.
        kept = Structure(tuple(site for site in structure.sites if site.name in names), structure.contexts)
        ends = None if guide is None else run_until_left(guide)
        part = replace(self.programs, policy=run_until_left(policy), guide=ends, structure=kept)
        draws = part.run_both(key, params, values)
        carries = Carries(policy.carry, None if guide is None else guide.carry)
        return draws, jax.tree.map(jnp.asarray, carries)

    @property
    def is_finite(self) -> bool:
        """Whether the values before the scan and of one step are few enough to try them all."""
        try:
            return all(num_assignments(self.axes(names)) <= _MOST_TRIED for names in (self.before, self.inside))
        except EngineError:
            return False

    def axes(self, names: tuple[str, ...]) -> tuple[Axis, ...]:
        """Arrange the latent sites among `names` as axes of one step."""
        structure = self.programs.structure
        return enumeration_axes(structure, [s for s in structure.sites if s.name in names], lambda _: (0,))


def cut_by_time(programs: Programs) -> TimeSteps | str:
    """Cut a program along the time of its scan, or say why that is impossible."""
    sites = programs.structure.sites
    scans = {site.scan for site in sites} - {None}
    if len(scans) != 1:
        return "it has several scans" if scans else "it has no scan"
    inside = [i for i, site in enumerate(sites) if site.scan is not None]
    first, last = inside[0], inside[-1] + 1
    names = [site.name for site in sites]
    return TimeSteps(programs, sites[first].length, tuple(names[:first]), tuple(names[first:last]), tuple(names[last:]))


_MOST_TRIED = 64
"""A step with more joint values than this is drawn from the prior, and its twist only weighs it."""

_PAIRS = 16
"""How many pairs of paths show where contexts lie in a carry."""


def context_axes_of_carries(steps: TimeSteps, params: Params) -> tuple[tuple[Axes, ...], tuple[Axes, ...]]:
    """Find where the context plates lie in the leaves of the policy's carry and of the guide's.

    Contexts do not read one another, so the draws of one context move only its own part of a carry. The program is run
    on pairs of paths, and on paths that take the first half of a plate from one of a pair and the rest from the other:
    what moves shows the axis.

    Raises:
        EngineError: a leaf depends on the draws in a plate and has no axis for the plate.
    """
    programs, structure = steps.programs, steps.programs.structure
    frames = sorted(structure.contexts, key=lambda frame: frame.dim)
    axes = context_axes(structure)
    # Any pairs of paths serve, so the key is fixed.
    drawn, _ = draw_fit(key_from_seed(0), replace(programs, guide=None), {}, 2 * _PAIRS)
    one, other = ({name: x[part] for name, x in drawn.sites.items()} for part in (slice(_PAIRS), slice(_PAIRS, None)))
    mixed = [one]
    for plate, frame in enumerate(frames):
        upper = np.arange(frame.size) >= frame.size // 2
        mixed.append({name: _mix(x, other[name], axes[name][plate], upper) for name, x in one.items()})
    rows = {name: np.concatenate([x[name] for x in mixed]) for name in one}
    carries = closure_jit(lambda params, rows: jax.vmap(lambda v: _last_carries(programs, params, v))(rows))(
        params, rows
    )

    def found(name: str, leaf: Array) -> Axes:
        base, *moved = np.asarray(leaf).reshape(len(mixed), _PAIRS, *leaf.shape[1:])
        return tuple(_axis_of(name, frame, base != values) for frame, values in zip(frames, moved, strict=True))

    policy, guide = (
        tuple(found(f"{side}{jax.tree_util.keystr(at)}", leaf) for at, leaf in jax.tree.leaves_with_path(carry))
        for side, carry in (("the policy's carry", carries.policy), ("the guide's carry", carries.guide))
    )
    return policy, guide


def _mix(one: np.ndarray, other: np.ndarray, axis: int | None, upper: np.ndarray) -> np.ndarray:
    if axis is None:
        return one
    return np.where(upper.reshape(-1, *(1,) * (one.ndim - axis - 2)), other, one)


def _axis_of(name: str, frame: Frame, moved: np.ndarray) -> int | None:
    """Return the axis of a leaf [pairs, ...] along which only the upper half of a plate has moved."""
    if not moved.any():
        return None
    # A plate of one element has an empty lower half, which stands still on any axis of size 1.
    half = frame.size // 2
    for axis in range(moved.ndim - 1):
        if moved.shape[1 + axis] == frame.size and not np.moveaxis(moved, 1 + axis, 0)[:half].any():
            return axis
    raise EngineError(
        f"{name} has shape {moved.shape[1:]} and depends on draws in plate {frame.name!r}, but has no axis of its "
        f"{frame.size} elements, so particles of different elements cannot be resampled apart; carry an array with one "
        "axis per plate through the scan"
    )


def _last_carries(programs: Programs, params: Params, values: dict[str, Array]) -> Carries:
    """Return the carries after the scan, given all latent sites."""
    policy = PartialScan(programs.policy, "watch")
    guide = None if programs.guide is None else PartialScan(programs.guide, "watch")
    replace(programs, policy=policy, guide=guide).run_both(None, params, values)
    return Carries(policy.carry, None if guide is None else guide.carry)
