"""The scores of a fit, and how a run folder keeps them: read and shown without JAX."""

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayesrl.diagnostics.fit_quantities import Measured, plain
from bayesrl.statistics.estimates import Estimate, Estimates, Interval

if TYPE_CHECKING:
    from bayesrl.exact.weighted_draws import WeightedDraws


class Score(NamedTuple):
    """What a fit achieves at one β, per context; the best restart where there are several.

    Attributes:
        beta: temperature, reward units per nat; None without rewards.
        restart: the one that was scored.
        estimates: J and E[R] (reward units), KL (nats) and metrics of the fit, scalars; errors are 0
            where they are exact.
        start: J(π₀) of the policy before the fit, reward units; None where its parameters were trained.
        optimum: J*, reward units; None where it is not known.
        log_evidence: log Z, nats; None where it is not known or not the optimum's.
    """

    beta: float | None
    restart: int
    estimates: Estimates
    start: Estimate | None
    optimum: float | None
    log_evidence: float | None

    @property
    def gap(self) -> Estimate | None:
        """J* − J, reward units, with the standard error of J."""
        if self.optimum is None:
            return None
        return Estimate(self.optimum - self.estimates.objective.mean, self.estimates.objective.se)

    @property
    def share(self) -> float | None:
        """The gap as a share of J* − J(π₀), which is what there was to gain."""
        if self.gap is None or self.start is None or self.optimum is None:
            return None
        gain = self.optimum - float(self.start.mean)
        return float(self.gap.mean) / gain if gain > 0 else None

    @property
    def measured(self) -> Measured:
        """The same as what is known of a fit, with intervals of two standard errors."""
        told = self.estimates
        gap, share = plain(self.gap), self.share
        gain = (
            math.nan if share is None or self.start is None or self.optimum is None else self.optimum - self.start.mean
        )
        parts = {name: plain(getattr(told, name)) for name in ("objective", "reward", "kl", "log_marginal")}
        known: dict[str, Any] = {
            "optimum": None if self.optimum is None else Interval.exact(self.optimum),
            "log_evidence": None if self.log_evidence is None else Interval.exact(self.log_evidence),
            "relative_gap": None if gap is None or math.isnan(gain) else gap * (1 / float(gain)),
        }
        return Measured(beta=self.beta, gap=gap, prior_objective=plain(self.start), **parts, **known)  # type: ignore[arg-type]


class Scoreboard(NamedTuple):
    """The scores of a fit.

    Attributes:
        rows: by β.
        contexts: number of separate problems that each number is a mean over.
        target: p* where it could be enumerated.
        note: why J* is not known; empty where it is.
    """

    rows: tuple[Score, ...]
    contexts: int
    target: "WeightedDraws | None"
    note: str

    @property
    def estimates(self) -> Estimates:
        """J, E[R], KL and metrics of the fit, [*beta] flat."""
        import jax

        return jax.tree.map(lambda *parts: np.asarray(parts, float), *(row.estimates for row in self.rows))


def to_json(board: Scoreboard) -> dict[str, Any]:
    """Describe a scoreboard, less its target, by what JSON can hold."""
    rows = []
    for row in board.rows:
        fields: dict[str, Any] = row._asdict()
        fields["estimates"] = {**row.estimates._asdict(), "metrics": dict(row.estimates.metrics)}
        rows.append(fields)
    result: dict[str, Any] = json.loads(json.dumps({"rows": rows, "contexts": board.contexts, "note": board.note}))
    return result


def from_json(told: dict[str, Any]) -> Scoreboard:
    """Make the scoreboard that `to_json` described.

    Raises:
        KeyError, TypeError: it is not such a description.
    """
    rows = []
    for fields in told["rows"]:
        own = dict(fields)
        numbers = dict(own.pop("estimates"))
        metrics = {name: Estimate(*pair) for name, pair in numbers.pop("metrics").items()}
        known = {name: Estimate(*pair) for name, pair in numbers.items() if pair is not None}
        estimates = Estimates(**known, metrics=metrics)
        start = own.pop("start")
        rows.append(Score(**own, estimates=estimates, start=None if start is None else Estimate(*start)))
    return Scoreboard(tuple(rows), told["contexts"], None, told["note"])
