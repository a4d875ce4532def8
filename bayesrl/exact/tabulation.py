"""Prepare a finite program: freeze it, check it, and tabulate it as a whole or state by state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.arguments import check_memory
from bayesrl.compilation.callbacks import host_errors
from bayesrl.compilation.random_keys import key_from_seed
from bayesrl.core.handlers import check_beta
from bayesrl.core.programs import Programs, freeze
from bayesrl.core.structure import Structure, as_arrays, check_policy, inspect
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.backward_induction import ProgramStage, build_stage
from bayesrl.exact.grid import (
    Axis,
    BatchEvaluator,
    SiteScores,
    assignments,
    num_assignments,
    path_axes,
    run_with_sites,
    score_trace,
)
from bayesrl.exact.scan_states import ScanProgram, TooManyStatesError, reads_outputs, split_scan, tabulate_states
from bayesrl.typing import Beta, Params, Program

MAX_EXPLICIT_PATHS = 4096
"""Programs with a scan and at most this many paths are enumerated path by path, which fills `sites`."""

_CELLS_PER_ASSIGNMENT = 64


def freeze_program(
    policy: Program, args: tuple[Any, ...], beta: Beta | None, *, ranks_by_reward: bool = False
) -> Programs:
    """Freeze a policy; refuse beta that does not fit, and subsampled plates, which have no log Z.

    What only ranks draws by reward needs rewards and no temperature.
    """
    if beta is not None:
        check_beta(beta)
    args = as_arrays(args)
    key = key_from_seed(0)  # the randomness is never used: every latent site will get a value
    frozen, _ = freeze(key, policy, *args)
    with host_errors():
        structure = inspect(key, frozen, *args)
    if ranks_by_reward and not structure.names("reward"):
        raise PolicyError("the policy has no reward site to rank its draws by; add bayesrl.reward(name, value)")
    check_policy(structure, has_beta=beta is not None or ranks_by_reward)
    structure.check_complete("nothing but draws can be known of it", EngineError)
    structure.check_drawn()
    structure.check_whole_density()
    if structure.subsampled:
        raise EngineError(
            f"plate {structure.subsampled[0]!r} is subsampled, and log Z of a subsample is that of another problem; "
            "use bayesrl.full_data(policy), or subsample_size=None"
        )
    return Programs(frozen, None, structure, args)


def tabulate_stages(program: Programs, params: Params, max_count: int) -> tuple[list[ProgramStage], ScanProgram | None]:
    """Tabulate a program as stages, path by path if that is cheap or the only way."""
    structure = program.structure
    nature, observed = structure.names("environment"), structure.names("observed")
    if nature and observed:
        raise EngineError(
            f"the policy has environment site {nature[0]!r} and observed site {observed[0]!r}; the optimum of control "
            "given data is not defined here: put what the data say into the prior, or make nature an ordinary site"
        )
    scan = split_scan(program)
    axes = path_axes(structure)
    reason = _needs_paths(structure, scan, axes)
    if scan is None or reason is not None or num_assignments(axes) <= min(MAX_EXPLICIT_PATHS, max_count):
        check_grid_size(axes, structure, max_count, reason)
        return [enumerate_paths(program, params, axes).stage], None
    try:
        return tabulate_states(scan, max_count)[0], scan
    except TooManyStatesError:
        # Paths can be fewer than states × assignments: then enumerate them after all.
        if num_assignments(axes) > max_count:
            raise
        return [enumerate_paths(program, params, axes).stage], None


def _needs_paths(structure: Structure, scan: ScanProgram | None, axes: Sequence[Axis]) -> str | None:
    """Say why a program with a scan cannot be solved state by state, or return None."""
    if scan is None:
        return "it has several scans" if any(site.scan is not None for site in structure.sites) else None
    unseen = [axis.site for axis in axes if axis.hidden and axis.site not in scan.after]
    if unseen:
        return f"nature's draw {unseen[0]!r} is hidden, so what the agent knows is its whole history"
    if reads_outputs(scan):
        return "what comes behind the scan reads its stacked outputs"
    return None


def check_grid_size(axes: Sequence[Axis], structure: Structure, max_count: int, reason: str | None = None) -> None:
    """Refuse grids that are too large."""
    number, contexts = num_assignments(axes), math.prod(structure.context_shape)
    why = f" ({reason}, so every path counts)" if reason else ""
    if number > max_count:
        largest = max(axes, key=lambda axis: axis.size)
        raise EngineError(
            f"the program has {number:,} assignments, more than max_count={max_count:,}{why}; site "
            f"{largest.site!r} alone has {largest.size:,}. Raise max_count, make interacting elements separate "
            "problems, or use bayesrl.importance(...) or bayesrl.fit(...)"
        )
    what = f"a table of {number:,} assignments"
    check_memory(
        4.0 * number * (contexts + len(axes)), what, "use bayesrl.importance(...) or bayesrl.fit(...)", EngineError
    )
    if number * contexts > _CELLS_PER_ASSIGNMENT * max_count:
        raise EngineError(
            f"the program has {number:,} assignments in each of {contexts:,} contexts, more than "
            f"{_CELLS_PER_ASSIGNMENT} × max_count={max_count:,} numbers; raise max_count, or pass fewer contexts"
        )


def name_context(structure: Structure, index: int) -> str:
    """Say " of context 'plate'[i]", for the flat index of a context; nothing if there is only one."""
    where = np.unravel_index(index, structure.context_shape)
    plates = [frame.name for frame in sorted(structure.contexts, key=lambda frame: frame.dim)]
    named = ", ".join(f"{plate!r}[{int(i)}]" for plate, i in zip(plates, where, strict=True))
    return f" of context {named}" if named else ""


class ProgramPaths(NamedTuple):
    """A whole program as one stage with one row per assignment.

    Attributes:
        stage: stage of the policy.
        raw_prior: log π₀ of the actions as handlers leave it, [assignments, contexts], nats.
        raw_q: the same for the guide, or for the policy if there is no guide.
    """

    stage: ProgramStage
    raw_prior: np.ndarray
    raw_q: np.ndarray


def enumerate_paths(program: Programs, params: Params, axes: tuple[Axis, ...]) -> ProgramPaths:
    """Tabulate a whole program, one row per assignment of `axes`."""
    found = _evaluator(program, params).of(num_assignments(axes), lambda index: assignments(axes, index))
    reached = np.ones((1, math.prod(program.structure.context_shape)), bool)
    return ProgramPaths(build_stage(axes, found.policy, reached, program.structure), found.raw_prior, found.raw_q)


def score_by_context(program: Programs, params: Params, sites: dict[str, Any]) -> SiteScores:
    """Score given draws of all latent sites, [draws, ...], per context."""
    found: _Both = _evaluator(program, params)(sites)
    return found.policy


def _evaluator(program: Programs, params: Params) -> BatchEvaluator:
    """Score values of all latent sites under policy and guide; paths and draws share one compilation."""
    both = _BothScores(program.policy, program.guide, program.structure, program.learned)
    return BatchEvaluator(both, (program.args, params, dict(program.transforms)), program.structure)


class _Both(NamedTuple):
    """Scores of one assignment under the policy, and log-probabilities of its actions under both, [contexts]."""

    policy: SiteScores
    raw_prior: Any
    raw_q: Any


@dataclass(frozen=True)
class _BothScores:
    """Scores given values of all latent sites under a policy and its guide."""

    policy: Program
    guide: Program | None
    structure: Structure
    learned: bool

    def __call__(self, given: tuple[Any, ...], values: dict[str, Array]) -> _Both:
        args, params, transforms = given
        structure = self.structure
        policy = score_trace(run_with_sites(self.policy, values, args), structure, [s.name for s in structure.sites])
        guide = policy
        if self.guide is not None or self.learned:
            programs = Programs(self.policy, self.guide, structure, args, transforms, self.learned)
            guide = score_trace(programs.run_guide(None, None, params, values, ()), structure, structure.actions)
        zero = jnp.zeros(math.prod(structure.context_shape))
        raw = (sum((s.latent[name].sum(-1) for name in structure.actions), start=zero) for s in (policy, guide))
        return _Both(policy, *raw)
