"""What certainty says of a fit: brackets of the evidence, checks with a verdict, frontiers, comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from bayesrl.core.estimates import Interval

type Method = Literal["enumeration", "rejection", "importance", "nuts", "hindsight"]
type Outcome = Literal["pass", "warn", "fail", "unknown"]
type Verdict = Literal["pass", "fail", "unknown"]


class Side(NamedTuple):
    """One side of the bracket around log Z, nats, [*beta].

    Attributes:
        mean: the estimate, whose expectation lies on this side of log Z (ELBO, IWAE; EUBO).
        se: its standard error.
        limit: one-sided 97.5% limit that leans on no standard error.
    """

    mean: np.ndarray
    se: np.ndarray
    limit: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """How far a fit is from the optimum: log Z from both sides, and the gap, per context, [*beta].

    Without environment sites J* = β·log Z and gap = β·KL(q‖p*). With environment sites `optimum` is
    that of control, `log_evidence` and both KLs to p* are None.

    Attributes:
        beta: temperatures, [*beta], reward units per nat; None without rewards.
        method: how log Z, or the optimum of control, was reached.
        lower: log Z from below, nats; of J*/β with environment sites.
        upper: log Z from above; None where only a lower bound is honest.
        reason: why `upper` is None, or why no calibrated interval is given; empty otherwise.
        log_evidence: log Z averaged over contexts, nats; None with environment sites.
        by_context: log Z of each context, [*beta, *contexts]; None with environment sites.
        log_marginal: log p(y), nats; None without observed sites beside rewards. `log_evidence` is
            log Z − log p(y) there.
        optimum: J*, reward units (nats without rewards).
        start: J(π₀), reward units; None where the policy itself was trained.
        objective: J(q), reward units.
        reward: E_q[R], reward units.
        kl: KL(q‖π₀), nats.
        gap: J* − J(q), reward units; None where J* has no upper bound at all.
        kl_reverse: KL(q‖p*), nats; None with environment sites or without an upper bound.
        kl_forward: KL(p*‖q), nats; None likewise.
        ess: effective number of draws of the weights, least over contexts, [*beta]; inf where exact.
        khat: Pareto k̂ of the weights, greatest over contexts, [*beta]; nan where it is not defined.
        missed: mass of p* where q puts less than a tenth of it, [*beta]; nan where unknown.
        num_draws: draws used, 0 where everything is exact.
    """

    beta: np.ndarray | None
    method: Method
    lower: Side
    upper: Side | None
    reason: str
    log_evidence: Interval | None
    by_context: Interval | None
    log_marginal: Interval | None
    optimum: Interval
    start: Interval | None
    objective: Interval
    reward: Interval
    kl: Interval
    gap: Interval | None
    kl_reverse: Interval | None
    kl_forward: Interval | None
    ess: np.ndarray
    khat: np.ndarray
    missed: np.ndarray
    num_draws: int

    @property
    def share(self) -> Interval | None:
        """The gap as a share of J* − J(π₀), which is what there was to gain; None where that is not known."""
        if self.gap is None or self.start is None:
            return None
        gain = self.optimum.mean - self.start.mean
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.gap.times(np.where(gain > 0, 1 / gain, np.nan))


class Check(NamedTuple):
    """One question asked of a fit, and its answer.

    Attributes:
        name: what is asked, in two or three words.
        value: what was measured, the worst over β; nan where it could not be.
        threshold: where warning or failure begins.
        outcome: pass, warn, fail, or unknown where it could not be measured.
        advice: one sentence: what the value means, and what to do.
        reference: where the check comes from.
    """

    name: str
    value: float
    threshold: float
    outcome: Outcome
    advice: str
    reference: str


@dataclass(frozen=True)
class Diagnosis:
    """Whether a fit can be trusted.

    Attributes:
        verdict: pass, fail, or unknown where p* cannot be reached.
        sentence: why, and what would settle it.
        checks: every question that was asked.
        evidence: what the first of them rests on.
    """

    verdict: Verdict
    sentence: str
    checks: tuple[Check, ...]
    evidence: Evidence

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)


@dataclass(frozen=True)
class Frontier:
    """Reward against KL over an array of β, and whether it obeys what any optimum obeys.

    Attributes:
        beta: temperatures, ascending, reward units per nat, [beta].
        evidence: of the fit, at these β.
        checks: `dJ*/dβ = −KL`, `J* non-increasing`, `J* convex`, `E[R] non-increasing`,
            `KL non-increasing`, `E[R] concave in KL`; they pass within error.
        gold: the gold metric at each β, or None.
        turning_point: β at which gold is greatest while the proxy still rises; None where gold does not turn down.
    """

    beta: np.ndarray
    evidence: Evidence
    checks: tuple[Check, ...]
    gold: Interval | None
    turning_point: float | None


@dataclass(frozen=True)
class Comparison:
    """Fits of one problem side by side, on common draws.

    Attributes:
        names: of the fits; differences are to the first.
        objective: J of each, reward units, [fit].
        reward: E[R] of each.
        kl: KL(q‖π₀) of each, nats.
        delta_objective: J less that of the first, with paired standard error, [fit].
        delta_reward: likewise E[R].
        delta_kl: likewise KL.
    """

    names: Sequence[str]
    objective: Interval
    reward: Interval
    kl: Interval
    delta_objective: Interval
    delta_reward: Interval
    delta_kl: Interval


class Section(NamedTuple):
    """A part of the report that a domain adds.

    Attributes:
        title: its heading.
        caption: a sentence that says what good looks like.
        body: a Matplotlib figure, a table as rows of cells with the headings first, or plain text.
    """

    title: str
    caption: str
    body: Any
