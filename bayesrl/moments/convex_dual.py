"""The dual of moment constraints: Newton's method on log Z(λ) − λ·target, and what keeps it from having a minimum."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from scipy.optimize import linprog
from scipy.special import logsumexp

from bayesrl.errors import EngineError

_MOST_STEPS = 200
_SOLVED = 1e-11
_LONGEST_STEP = 50.0
_STEEP = 15.0
_ROUNDING = 1e-6


class TiltedTable(NamedTuple):
    """Moments under the exponential tilt by given multipliers.

    Attributes:
        log_z: log E_π₀[exp(λ·f)], [contexts], nats; relative to Σ base for weighted rows.
        means: E_q[f], [features, groups].
        each: the same in each context, [features, contexts].
        covariance: Cov_q[f], [groups, features, features].
        weights: q of each row, [rows, contexts], normalised over rows; empty where rows are not held.
    """

    log_z: np.ndarray
    means: np.ndarray
    each: np.ndarray
    covariance: np.ndarray
    weights: np.ndarray = np.zeros((0, 0))


@runtime_checkable
class FeatureTable(Protocol):
    """Features of a prior: what the dual needs to know of them; see `MomentTable`."""

    @property
    def targets(self) -> np.ndarray:
        """What E_q[f] is to be, [features, groups]."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the features."""

    @property
    def dependent(self) -> float:
        """An eigenvalue of the correlations of the features that is 0 but for rounding."""

    def grouped(self, values: np.ndarray) -> np.ndarray:
        """Average over the contexts of each group, [..., contexts] to [..., groups]."""

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Repeat values of groups for their contexts, [features, contexts]."""

    def tilt(self, multipliers: np.ndarray) -> TiltedTable:
        """Weight by exp(λ·f), with λ [features, groups]."""

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest moment that can be, each [features, groups]."""

    def dispersion(self) -> np.ndarray:
        """Return a covariance of the features that is singular where they are dependent."""


def averaged(values: np.ndarray, *, shared: bool) -> np.ndarray:
    """Average over the contexts of each group, [..., contexts] to [..., groups]."""
    return values.mean(-1, keepdims=True) if shared else values


class MomentTable(NamedTuple):
    """Values of the features with the weights of the prior, in double precision.

    Contexts of a group share their multipliers and average their moments: each context is a group, or all are one.

    Attributes:
        log_base: log weight of each row before the tilt, [rows, contexts], nats; −inf excludes a row.
        features: f, [features, rows, contexts].
        targets: what E_q[f] is to be, [features, groups].
        labels: names of the features.
        shared: whether all contexts are one group.
    """

    log_base: np.ndarray
    features: np.ndarray
    targets: np.ndarray
    labels: tuple[str, ...]
    shared: bool

    @property
    def dependent(self) -> float:
        """An eigenvalue of the correlations of the features that is 0 but for rounding."""
        return 1e-10

    def grouped(self, values: np.ndarray) -> np.ndarray:
        """Average over the contexts of each group, [..., contexts] to [..., groups]."""
        return averaged(values, shared=self.shared)

    def tilt(self, multipliers: np.ndarray) -> TiltedTable:
        """Weight the rows by exp(λ·f), with λ [features, groups]."""
        offset = logsumexp(self.log_base, axis=0)
        logits = self.log_base - offset + np.einsum("knc,kc->nc", self.features, self.spread(multipliers))
        log_z = logsumexp(logits, axis=0)
        weights = np.exp(logits - log_z)
        means = np.einsum("nc,knc->kc", weights, self.features)
        apart = self.features - means[:, None]
        covariance = np.einsum("nc,knc,lnc->klc", weights, apart, apart)
        return TiltedTable(log_z, self.grouped(means), means, np.moveaxis(self.grouped(covariance), -1, 0), weights)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Repeat values of groups for their contexts, [features, contexts]."""
        return np.broadcast_to(values, (len(self.features), self.log_base.shape[1]))

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest moment that any weighting of the rows has, each [features, groups]."""
        held = self.log_base > -np.inf
        low = np.where(held, self.features, np.inf).min(1)
        high = np.where(held, self.features, -np.inf).max(1)
        return self.grouped(low), self.grouped(high)

    def dispersion(self) -> np.ndarray:
        """Return the covariance of the features over the rows, each once, [groups, features, features]."""
        held = self.log_base > -np.inf
        count = held.sum(0)
        means = np.where(held, self.features, 0.0).sum(1) / count
        apart = np.where(held, self.features - means[:, None], 0.0)
        return np.moveaxis(self.grouped(np.einsum("knc,lnc->klc", apart, apart) / count), -1, 0)

    def with_targets(self, targets: np.ndarray) -> "MomentTable":
        """Return the same table with other targets, [features, groups]."""
        return self._replace(targets=targets)


def solve_dual(table: FeatureTable) -> tuple[np.ndarray, np.ndarray]:
    """Minimise log Z(λ) − λ·target, which is convex, by damped Newton steps.

    Returns:
        λ, [features, groups], and whether each group converged, [groups].
    """
    low, high = table.limits()
    # Features are measured by their range, so that one tolerance suits all.
    scale = np.where(high > low, high - low, 1.0)
    # A ridge far below the curvature of any solvable problem keeps a flat direction from stopping the others.
    ridge = 1e-14 * np.eye(len(scale))

    def at(scaled: np.ndarray) -> tuple[TiltedTable, np.ndarray, np.ndarray]:
        tilted = table.tilt(scaled / scale)
        return tilted, table.grouped(tilted.log_z), (tilted.means - table.targets) / scale

    found = np.zeros_like(table.targets)
    now, value, slope = at(found)
    for _ in range(_MOST_STEPS):
        if np.abs(slope).max() < _SOLVED:
            break
        curvature = now.covariance / scale.T[:, :, None] / scale.T[:, None, :]
        step = -np.linalg.solve(curvature + ridge, slope.T[..., None])[..., 0].T
        step = step * np.minimum(1.0, _LONGEST_STEP / np.maximum(np.abs(step).max(0), 1e-300))
        gain, size = -(slope * step).sum(0), np.ones(step.shape[1])
        for _ in range(60):
            now, after, slope = at(found + size * step)
            change = after - value - size * (step * table.targets / scale).sum(0)
            # Near the minimum the gain drowns in rounding, and the full step is right.
            # With ~, a change that is nan counts as poor.
            poor = ~(change <= -1e-4 * size * gain) & (gain > 1e-12 * (1 + np.abs(value)))
            if not poor.any():
                break
            size = np.where(poor, size / 2, size)
        found, value = found + size * step, after
    # Rounding may stop the slope short of _SOLVED; this is near enough.
    return found / scale, np.abs(slope).max(0) < 1e-8


def refuse_dependent(table: FeatureTable, where: str) -> None:
    """Refuse features that are constant, or linear in one another.

    Args:
        table: the table.
        where: over what, as in "in every assignment".

    Raises:
        EngineError: naming the features.
    """
    low, high = table.limits()
    size = np.maximum(np.abs(low), np.abs(high))
    flat = high - low <= _ROUNDING * size
    if flat.any():
        index, group = (int(i[0]) for i in np.nonzero(flat))
        raise EngineError(
            f"feature {table.labels[index]!r} is {low[index, group]:.6g} {where}{_at(table, group)}, so no tilt moves "
            "its mean; leave it out, or choose a feature that varies"
        )
    covariance = table.dispersion()
    spread = np.sqrt(np.einsum("gkk->gk", covariance))
    values, vectors = np.linalg.eigh(covariance / spread[:, :, None] / spread[:, None, :])
    if (values[:, 0] < table.dependent).any():
        group = int(values[:, 0].argmin())
        factors = vectors[group, :, 0] / spread[group]
        part = np.abs(vectors[group, :, 0]) > 1e-3
        factors = factors / factors[part][0]
        named = [repr(label) for label, used in zip(table.labels, part, strict=True) if used]
        text = " ".join(f"{f:+.4g}·{n}" for f, n in zip(factors[part], named, strict=True)).removeprefix("+")
        raise EngineError(
            f"features {', '.join(named)} are linearly dependent: {text} is constant {where}{_at(table, group)}, "
            "so one target follows from the others or contradicts them; leave one of them out"
        )


def _at(table: FeatureTable, group: int) -> str:
    return f" of context {group}" if table.targets.shape[1] > 1 else ""


def refuse_outside(table: FeatureTable, low: np.ndarray, high: np.ndarray, given: str = "") -> None:
    """Refuse targets outside of a range of moments, or on its edge.

    Args:
        table: the table.
        low: least moments, [features, groups]; −inf if unknown.
        high: largest moments.
        given: under what condition, as in ", given the target of 'a',".

    Raises:
        EngineError: naming the feature, its target and the range.
    """
    # Ends are known in single precision only; without a finite range the sizes of the ends set the scale.
    with np.errstate(invalid="ignore"):
        width = np.where(np.isfinite(high - low), high - low, np.maximum(np.abs(low), np.abs(high)))
    slack = _ROUNDING * np.where(np.isfinite(width), width, 0.0)
    inside = (table.targets > low + slack) & (table.targets < high - slack)
    if inside.all():
        return
    index, group = (int(i[0]) for i in np.nonzero(~inside))
    target, ends = table.targets[index, group], (low[index, group], high[index, group])
    label, here = table.labels[index], _at(table, group)
    if ends[0] - slack[index, group] <= target <= ends[1] + slack[index, group]:
        raise EngineError(
            f"the target {target:.6g} of feature {label!r}{here} is on the edge of its range{given} "
            f"[{ends[0]:.6g}, {ends[1]:.6g}], which only an infinite multiplier would reach; choose a target inside, "
            "or write a program that excludes the rest"
        )
    raise EngineError(
        f"the target {target:.6g} of feature {label!r}{here} is out of reach: its mean{given} is between "
        f"{ends[0]:.6g} and {ends[1]:.6g} whatever the policy does; choose a target inside"
    )


def refuse_contradictions(table: MomentTable, multipliers: np.ndarray, solved: np.ndarray) -> None:
    """Refuse targets that each can be met and all together cannot, or only on the edge of what is possible.

    The range of each moment given the targets before it is a linear program over the weights of the rows. It is solved
    only where Newton's method failed or the multipliers are so large that the solution may lie on an edge.

    Raises:
        EngineError: naming the first feature whose target contradicts those before it.
    """
    low, high = table.limits()
    steep = (np.abs(multipliers) * (high - low)).max(0) > _STEEP
    for group in np.flatnonzero(~solved | steep):
        own = table if table.shared else _only(table, int(group))
        for index in range(1, len(table.labels)):
            ends = _range_given(own, index)
            least, most = (np.full_like(table.targets, end) for end in (-np.inf, np.inf))
            least[index, group], most[index, group] = ends
            before = ", ".join(repr(label) for label in table.labels[:index])
            refuse_outside(table, least, most, f", given the target{'s' if index > 1 else ''} of {before},")


def refuse_unsolved(table: FeatureTable, solved: np.ndarray) -> None:
    """Refuse targets for which Newton's method did not converge.

    Raises:
        EngineError: naming the features.
    """
    if not solved.all():
        where = _at(table, int(np.flatnonzero(~solved)[0]))
        raise EngineError(
            f"the multipliers of {list(table.labels)}{where} did not converge, so the targets lie very near the edge "
            "of what is possible together; choose targets farther inside"
        )


def _only(table: MomentTable, group: int) -> MomentTable:
    one = slice(group, group + 1)
    return table._replace(
        log_base=table.log_base[:, one], features=table.features[..., one], targets=table.targets[:, one]
    )


def _range_given(table: MomentTable, index: int) -> tuple[float, float]:
    """Return the least and largest moment of one feature when those before it have their targets."""
    columns: list[np.ndarray] = []
    context: list[int] = []
    for c in range(table.log_base.shape[1]):
        held = table.features[: index + 1, table.log_base[:, c] > -np.inf, c]
        # Rows with the same features are one unknown of the linear program, which keeps it small.
        distinct = np.unique(held, axis=1)
        columns.append(distinct)
        context += [c] * distinct.shape[1]
    values = np.concatenate(columns, 1)
    one_hot = (np.arange(table.log_base.shape[1])[:, None] == np.asarray(context)).astype(float)
    contexts = len(one_hot)
    equal = np.concatenate([one_hot, values[:index] / contexts])
    right = np.concatenate([np.ones(contexts), table.targets[:index, 0]])
    ends: Sequence[float] = []
    for sign in (1.0, -1.0):
        # If the solver fails nothing is known, and infinite ends refuse nothing.
        found = linprog(sign * values[index] / contexts, A_eq=equal, b_eq=right, bounds=(0, None), method="highs")
        ends = [*ends, sign * float(found.fun) if found.success else sign * -np.inf]
    return ends[0], ends[1]
