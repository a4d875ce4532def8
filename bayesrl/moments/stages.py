"""Moments of programs with a `scan` that is too long for whole paths: solved state by state."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import ProgramStage, expectation, marginals, solve
from bayesrl.exact.enumeration import exact_metrics
from bayesrl.exact.tabulation import tabulate_stages
from bayesrl.moments.convex_dual import TiltedTable, averaged

_STEP = 1e-4
"""Step of central differences in λ·(range of f), whose error in the curvature only slows Newton's method."""
_COLD = 1e-9


class StagedTable(NamedTuple):
    """Values of the features stage by stage: what a `MomentTable` is to whole assignments.

    Attributes:
        stages: the prior.
        features: what each stage adds to each feature, [features][stages], each [states, assignments, contexts].
        targets: what E_q[f] is to be, [features, groups].
        labels: names of the features.
        shared: whether all contexts are one group.
    """

    stages: Sequence[ProgramStage]
    features: Sequence[Sequence[np.ndarray]]
    targets: np.ndarray
    labels: tuple[str, ...]
    shared: bool

    @property
    def dependent(self) -> float:
        """An eigenvalue of the correlations of the features that is 0 but for the error of differences."""
        return 1e-6

    @property
    def num_contexts(self) -> int:
        """Number of contexts."""
        return int(self.stages[0].reward.shape[-1])

    def grouped(self, values: np.ndarray) -> np.ndarray:
        """Average over the contexts of each group, [..., contexts] to [..., groups]."""
        return averaged(values, shared=self.shared)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Repeat values of groups for their contexts, [features, contexts]."""
        return np.broadcast_to(values, (len(self.labels), self.num_contexts))

    def tilt(self, multipliers: np.ndarray) -> TiltedTable:
        """Weight the paths by exp(λ·f), with λ [features, groups]."""
        log_z, means = self._moments(multipliers)
        low, high = self.limits()
        size = _STEP / np.where(high > low, high - low, 1.0)
        columns = []
        for k in range(len(self.labels)):
            step = np.zeros_like(multipliers)
            step[k] = size[k]
            (_, above), (_, below) = self._moments(multipliers + step), self._moments(multipliers - step)
            columns.append(self.grouped(above - below) / (2 * size[k]))
        curvature = np.stack(columns, -1).swapaxes(0, 1)
        # Differences leave the matrix a little askew, and what uses it takes it for symmetric.
        curvature = (curvature + curvature.swapaxes(1, 2)) / 2
        return TiltedTable(log_z, self.grouped(means), means, curvature)

    def _moments(self, multipliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        each = self.spread(multipliers)
        rewards = [sum(m * f for m, f in zip(each, parts, strict=True)) for parts in zip(*self.features, strict=True)]
        tilted = [replace(stage, reward=np.asarray(r)) for stage, r in zip(self.stages, rewards, strict=True)]
        solution = solve(tilted, 1.0)
        weights = marginals(tilted, solution)
        means = np.stack([expectation(weights, values) for values in self.features])
        # Relative to p(y), as log Z of a table of assignments is.
        return solution.value - solve(self.stages, 1.0, rewarded=False).value, means

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest moment that any policy has, each [features, groups]."""
        ends = []
        for sign in (-1.0, 1.0):
            rows = []
            for values in self.features:
                # Scaled to 1, so that _COLD is cold for a feature of any size.
                size = max(float(np.abs(value).max()) for value in values) or 1.0
                tilted = [replace(s, reward=sign * v / size) for s, v in zip(self.stages, values, strict=True)]
                # The value of a policy this cold has its entropy too: read the mean that the policy reaches.
                rows.append(expectation(marginals(tilted, solve(tilted, _COLD)), values))
            ends.append(self.grouped(np.stack(rows)))
        return ends[0], ends[1]

    def with_targets(self, targets: np.ndarray) -> "StagedTable":
        """Return the same table with other targets, [features, groups]."""
        return self._replace(targets=targets)

    def dispersion(self) -> np.ndarray:
        """Return the covariance of the features under the prior, [groups, features, features]."""
        return self.tilt(np.zeros_like(self.targets)).covariance


def staged_table(
    program: Programs, labels: tuple[str, ...], rewards: set[str], targets: np.ndarray, max_count: int, *, shared: bool
) -> StagedTable | None:
    """Tabulate the features of a program that collects them step by step; None if it cannot be solved so.

    Args:
        program: the policy with its features as deterministic sites.
        labels: names of the features.
        rewards: those that are summed, not averaged, over time.
        targets: what their means are to be, [features, groups].
        max_count: largest number of reachable states × assignments.
        shared: whether all contexts are one group.
    """
    if any(site.latent and site.support is None for site in program.structure.sites):
        return None
    try:
        stages, scan = tabulate_stages(program, {}, max_count)
    except EngineError:
        return None
    known = exact_metrics(program, {}, stages)
    if scan is None or not set(labels) <= known:
        return None
    contexts = math.prod(program.structure.context_shape)
    features = []
    for label in labels:
        # Deterministic sites are averaged over time and other axes, and rewards are sums.
        factor = math.prod(program.structure[label].shape) / contexts if label in rewards else 1.0
        features.append([factor * s.metrics.get(label, np.zeros_like(s.reward)) for s in stages])
    prior = [replace(stage, reward=np.zeros_like(stage.reward)) for stage in stages]
    return StagedTable(prior, features, targets, labels, shared)
