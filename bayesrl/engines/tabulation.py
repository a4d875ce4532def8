"""Getting a finite program ready: frozen, checked, and tabulated whole or state by state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from bayesrl.core.handlers import check_beta
from bayesrl.core.host import host_errors
from bayesrl.core.keys import from_seed
from bayesrl.core.pairing import freeze
from bayesrl.core.structure import Structure, as_arrays, check_policy, inspect
from bayesrl.engines.grid import Axis, Scores, Table, axes_of, count, decode, run, scores_of, width_of
from bayesrl.engines.induction import Stage, make_stage
from bayesrl.engines.reachability import Scan, TooManyStatesError, reach, reads_outputs, take_apart
from bayesrl.errors import EngineError
from bayesrl.typing import Beta, Program

SMALL = 4096
"""Programs with a scan and at most this many paths are enumerated path by path, so that `sites` is filled."""

_CELLS_PER_ASSIGNMENT = 64


class Prepared(NamedTuple):
    """A policy with frozen parameters, and its arguments."""

    policy: Program
    args: tuple[Any, ...]
    structure: Structure


def prepare(policy: Program, args: tuple[Any, ...], beta: Beta | None) -> Prepared:
    """Freeze a policy and refuse what has no evidence: beta that does not fit, and subsampled plates."""
    if beta is not None:
        check_beta(beta)
    args = as_arrays(args)
    key = from_seed(0)  # nothing random is used: every latent site will be held
    frozen, _ = freeze(key, policy, *args)
    with host_errors():
        structure = inspect(key, frozen, *args)
    check_policy(structure, has_beta=beta is not None)
    structure.check_complete("nothing but draws can be known of it", EngineError)
    structure.check_whole_density()
    if structure.subsampled:
        raise EngineError(
            f"plate {structure.subsampled[0]!r} is subsampled, and log Z of a subsample is that of another problem; "
            "use bayesrl.whole(policy), or subsample_size=None"
        )
    return Prepared(frozen, args, structure)


def make_stages(program: Prepared, max_count: int) -> tuple[list[Stage], Scan | None]:
    """Tabulate a program as stages, path by path where that is cheap or the only way."""
    structure = program.structure
    nature, observed = structure.named("environment"), structure.named("observed")
    if nature and observed:
        raise EngineError(
            f"the policy has environment site {nature[0]!r} and observed site {observed[0]!r}; the optimum of control "
            "given data is not defined here: put what the data say into the prior, or make nature an ordinary site"
        )
    scan = take_apart(program.policy, structure, program.args)
    axes = path_axes(structure)
    reason = _needs_paths(structure, scan, axes)
    if scan is None or reason is not None or count(axes) <= min(SMALL, max_count):
        check_count(axes, structure, max_count, reason)
        return [enumerate_paths(program, axes)], None
    try:
        return reach(scan, max_count), scan
    except TooManyStatesError:
        if count(axes) > max_count:
            raise
        return [enumerate_paths(program, axes)], None


def path_axes(structure: Structure) -> tuple[Axis, ...]:
    """Lay all latent sites of a program out as axes, the steps of its scans one after another.

    Raises:
        EngineError: a site has no finite support.
    """
    return axes_of(structure, structure.sites, lambda site: range(site.length if site.scan is not None else 1))


def _needs_paths(structure: Structure, scan: Scan | None, axes: Sequence[Axis]) -> str | None:
    """Say why a program with a scan cannot be solved state by state, or None."""
    if scan is None:
        return "it has several scans" if any(site.scan is not None for site in structure.sites) else None
    unseen = [axis.site for axis in axes if axis.hidden and axis.site not in scan.after]
    if unseen:
        return f"nature's draw {unseen[0]!r} is hidden, so what the agent knows is its whole history"
    if reads_outputs(scan):
        return "what comes behind the scan reads its stacked outputs"
    return None


def check_count(axes: Sequence[Axis], structure: Structure, max_count: int, reason: str | None = None) -> None:
    """Refuse a grid that is too large."""
    number, contexts = count(axes), math.prod(structure.context_shape)
    why = f" ({reason}, so every path counts)" if reason else ""
    if number > max_count:
        largest = max(axes, key=lambda axis: axis.size)
        raise EngineError(
            f"the program has {number:,} assignments, more than max_count={max_count:,}{why}; site "
            f"{largest.site!r} alone has {largest.size:,}. Raise max_count, make interacting elements separate "
            "problems, or use bayesrl.importance(...) or bayesrl.fit(...)"
        )
    if number * contexts > _CELLS_PER_ASSIGNMENT * max_count:
        raise EngineError(
            f"the program has {number:,} assignments in each of {contexts:,} contexts, more than "
            f"{_CELLS_PER_ASSIGNMENT} × max_count={max_count:,} numbers; raise max_count, or pass fewer contexts"
        )


def enumerate_paths(program: Prepared, axes: tuple[Axis, ...]) -> Stage:
    """Tabulate a whole program as one stage, every assignment of `axes` a row."""
    score = _PathScores(program.policy, program.structure, axes)
    scores = Table(score, program.args, width_of(program.structure))(np.arange(count(axes)))
    reached = np.ones((1, math.prod(program.structure.context_shape)), bool)
    return make_stage(axes, scores, reached, program.structure)


@dataclass(frozen=True)
class _PathScores:
    """Scores of the numbered assignment of a program."""

    policy: Program
    structure: Structure
    axes: tuple[Axis, ...]

    def __call__(self, args: tuple[Any, ...], index: Array) -> Scores:
        names = [site.name for site in self.structure.sites]
        return scores_of(run(self.policy, decode(self.axes, index), args), self.structure, names)


@dataclass(frozen=True)
class _DrawScores:
    """Scores of given values of all latent sites of a program."""

    policy: Program
    structure: Structure

    def __call__(self, args: tuple[Any, ...], values: dict[str, Array]) -> Scores:
        names = [site.name for site in self.structure.sites]
        return scores_of(run(self.policy, values, args), self.structure, names)


def score_draws(program: Prepared, sites: dict[str, Any]) -> Scores:
    """Score given draws of all latent sites, [draws, ...], per context."""
    score = _DrawScores(program.policy, program.structure)
    result: Scores = Table(score, program.args, width_of(program.structure))(sites)
    return result
