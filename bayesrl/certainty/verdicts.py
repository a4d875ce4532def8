"""What certainty says of a fit: brackets of the evidence, checks with a verdict, frontiers, comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from bayesrl.arguments import checked
from bayesrl.core.estimates import Interval
from bayesrl.core.showing import MARKS, Block, Line, Listing, Shown
from bayesrl.core.wording import UNKNOWN, at, beta_text, number, percent, with_ends, with_error
from bayesrl.errors import EngineError

type Method = Literal["enumeration", "rejection", "importance", "nuts", "hindsight", "known", "draws"]
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


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Evidence(Shown):
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

    @property
    def betas(self) -> list[float | None]:
        """Temperatures as a list; one None without rewards."""
        return [None] if self.beta is None else [float(b) for b in np.atleast_1d(self.beta)]

    @property
    def how(self) -> str:
        """How the optimum was reached, in a sentence."""
        words = {
            "enumeration": "by enumeration",
            "rejection": "by rejection, whose draws are of p* itself",
            "importance": "by weighting draws",
            "nuts": "by weighting draws, checked by a Markov chain (NUTS)",
            "hindsight": "by hindsight: an upper bound with nature's draws fixed",
            "known": "by what is known of the problem",
            "draws": "by nothing",
        }
        if self.method == "draws":
            return f"The optimum is not known: {self.reason.rstrip('.')}. J is the mean of {self.num_draws:,} draws."
        drawn = f"; J of the fit was estimated from {self.num_draws:,} draws" if self.num_draws else ", exactly"
        if self.num_draws and self.method not in ("enumeration", "known"):
            drawn = f" ({self.num_draws:,} draws)"
        reason = f" But {self.reason.rstrip('.')}." if self.reason else ""
        return f"The optimum was reached {words[self.method]}{drawn}.{reason}"

    def listing(self) -> Listing:
        """One row for each temperature: what was reached, what could be, and the gap between."""
        share = self.share
        rows = []
        for i, beta in enumerate(self.betas):
            part = at(share, i)
            rows.append(
                (
                    beta_text(beta),
                    with_error(at(self.objective, i)),
                    with_ends(at(self.optimum, i)),
                    _tiny(at(self.gap, i), at(self.optimum, i)),
                    percent(None if part is None else float(part.mean)),
                    UNKNOWN if beta is None else with_error(at(self.reward, i)),
                    with_error(at(self.kl, i)),
                )
            )
        return Listing(("β", "J", "J*", "gap", "share", "E[R]", "KL"), rows)

    def weight_listing(self) -> Listing:
        """One row for each temperature: limits of log Z from both sides, the distance to p*, and the weights."""
        rows = []
        for i, beta in enumerate(self.betas):
            upper = None if self.upper is None else self.upper.limit
            rows.append(
                (
                    beta_text(beta),
                    with_ends(at(self.log_evidence, i)),
                    number(float(np.reshape(self.lower.limit, -1)[i])),
                    number(None if upper is None else float(np.reshape(upper, -1)[i])),
                    with_error(at(self.kl_reverse, i)),
                    with_error(at(self.kl_forward, i)),
                    "exact"
                    if self.method == "enumeration" and self.num_draws == 0
                    else number(float(np.reshape(self.ess, -1)[i]), 3),
                    number(float(np.reshape(self.khat, -1)[i]), 2),
                    percent(float(np.reshape(self.missed, -1)[i])),
                )
            )
        sides = ("from below", "from above") if self.log_evidence is not None else ("J*/β from below", "from above")
        return Listing(("β", "log Z", *sides, "KL(q‖p*)", "KL(p*‖q)", "ESS", "k̂", "missed"), rows)

    def _blocks(self) -> Sequence[Block]:
        legend = Line(f"({_legend(self)}; from below and above: 97.5% limits)")
        first, second = self.listing(), self.weight_listing()
        if len(first.rows) > 1:
            return first, second, legend, Line(self.how)
        whole = Listing((*first.headings, *second.headings[1:]), [(*first.rows[0], *second.rows[0][1:])])
        return whole.turned(), legend, Line(self.how)


def _legend(evidence: Evidence) -> str:
    rewarded = "J, J*, gap and E[R] in reward units; KL and log Z in nats"
    units = rewarded if evidence.beta is not None else "all in nats"
    return f"{units}; ± is one standard error, [ ] a 95% interval; share = gap / (J* − J(π₀))"


def _tiny(gap: Interval | None, optimum: Interval | None) -> str:
    """Write a gap; single precision cannot tell less than a millionth of J* from nothing."""
    if gap is None or optimum is None:
        return with_ends(gap)
    finest = 1e-6 * abs(float(optimum.mean))
    ends = (float(gap.mean), float(gap.floor), float(gap.ceiling))
    return f"<{finest:.0e}" if finest > max(abs(end) for end in ends) else with_ends(gap)


class Check(NamedTuple):
    """One question asked of a fit, and its answer.

    Attributes:
        name: what is asked, in two or three words.
        value: what was measured, the worst over β; nan where it could not be.
        threshold: where warning or failure begins.
        least: whether the threshold is the least good value; it is the greatest by default.
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
    least: bool = False

    @property
    def limit(self) -> str:
        """The threshold, with the side that is good."""
        return f"{'≥' if self.least else '≤'} {number(self.threshold, 3)}"


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """Whether a fit can be trusted.

    Attributes:
        verdict: pass, fail, or unknown where p* cannot be reached.
        sentence: why, and what would settle it.
        checks: every question that was asked.
        evidence: what the first of them rests on; None where p* cannot be approached at all.
    """

    verdict: Verdict
    sentence: str
    checks: tuple[Check, ...]
    evidence: Evidence | None

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def _blocks(self) -> Sequence[Block]:
        numbers = () if self.evidence is None else self.evidence._blocks()
        return (Line(self.sentence, self.verdict), checks_listing(self.checks), *numbers)


def checks_listing(checks: Sequence[Check]) -> Listing:
    """One row for each check, what to do as its note."""
    rows = [(f"{MARKS[c.outcome]} {c.outcome}", c.name, number(c.value, 3), c.limit) for c in checks]
    return Listing(("outcome", "check", "value", "limit"), rows, "llrr", [c.advice for c in checks])


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Frontier(Shown):
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

    def listing(self) -> Listing:
        """One row for each temperature, with the gold metric where there is one."""
        listing = self.evidence.listing()
        if self.gold is None:
            return listing
        gold = [with_error(at(self.gold, i)) for i in range(len(listing.rows))]
        rows = [(*row, cell) for row, cell in zip(listing.rows, gold, strict=True)]
        return Listing((*listing.headings, "gold"), rows)

    def _blocks(self) -> Sequence[Block]:
        turn = [] if self.turning_point is None else [Line(f"Gold is greatest at β = {self.turning_point:.3g}.")]
        legend = Line(f"({_legend(self.evidence)})")
        return (self.listing(), legend, checks_listing(self.checks), *turn)


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Comparison(Shown):
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

    def listing(self) -> Listing:
        """One row for each fit, with its differences to the first."""
        told = (self.objective, self.delta_objective, self.reward, self.delta_reward, self.kl, self.delta_kl)
        rows = [
            (name, *("" if i == 0 and k % 2 else with_error(at(one, i)) for k, one in enumerate(told)))
            for i, name in enumerate(self.names)
        ]
        return Listing(("fit", "J", "ΔJ", "E[R]", "ΔE[R]", "KL", "ΔKL"), rows)

    def _blocks(self) -> Sequence[Block]:
        return (self.listing(), Line("Δ is the difference to the first, on common draws; ± is one standard error."))


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
