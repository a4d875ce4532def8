"""What certainty says of a fit: brackets of the evidence, checks with a verdict, frontiers, comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from bayesrl.arguments import checked
from bayesrl.diagnostics.fit_quantities import HEADINGS, INTERVALS, Measured, bracket_text
from bayesrl.display.formatting import (
    UNKNOWN,
    estimate_at,
    format_estimate,
    format_number,
    format_share,
    format_with_limit,
)
from bayesrl.display.tables import MARKS, Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError
from bayesrl.statistics.estimates import Interval

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
class Evidence(Displayable):
    """How far a fit is from the optimum: log Z from both sides, and the gap, per context, [*beta].

    It carries every quantity of a fit once: tables, figures, checks, reports and files tell these and no others, and
    J + gap = J*. Where J* is known on one side alone, it and the gap have an end and no mean, and the end of the gap is
    that of J* less J, whose standard error it has.

    Without environment sites J* = β·log Z and gap = β·KL(q‖p*). With environment sites `optimum` is
    that of control, `log_evidence` and both KLs to p* are None.

    Attributes:
        beta: temperatures, [*beta], reward units per nat; None without rewards.
        method: how log Z, or the optimum of control, was reached.
        lower: log Z from below, nats; of J*/β with environment sites.
        upper: log Z from above; None where only a lower bound is honest.
        caveat: why `upper` is None, or why no calibrated interval is given; empty otherwise.
        log_evidence: log Z averaged over contexts, nats; None with environment sites.
        by_context: log Z of each context, [*beta, *contexts]; None with environment sites.
        log_marginal: log p(y), nats; None without observed sites beside rewards. `log_evidence` is
            log Z − log p(y) there.
        optimum: J*, reward units (nats without rewards).
        prior_objective: J(π₀), reward units; None where the policy itself was trained.
        objective: J(q), reward units.
        reward: E_q[R], reward units.
        kl: KL(q‖π₀), nats.
        gap: J* − J(q), reward units; None where J* has no upper bound at all.
        kl_reverse: KL(q‖p*), nats; None with environment sites or without an upper bound.
        kl_forward: KL(p*‖q), nats; None likewise.
        ess: effective number of the fit's own draws, as draws of p*, least over contexts, [*beta]; nan where nature's
            luck or a discount moves their weights.
        khat: Pareto k̂ of the weights p*/q of these draws, greatest over contexts, [*beta]; nan where their tail is
            tied, or as `ess`.
        missed_mass: mass of p* where q puts less than a tenth of it, [*beta]; nan where unknown.
        num_samples: draws used, 0 where everything is exact.
        num_weighed: how many of the fit's own draws `ess` and `khat` are of; those that it carries where all is exact.
    """

    beta: np.ndarray | None
    method: Method
    lower: Side
    upper: Side | None
    caveat: str
    log_evidence: Interval | None
    by_context: Interval | None
    log_marginal: Interval | None
    optimum: Interval
    prior_objective: Interval | None
    objective: Interval
    reward: Interval
    kl: Interval
    gap: Interval | None
    kl_reverse: Interval | None
    kl_forward: Interval | None
    ess: np.ndarray
    khat: np.ndarray
    missed_mass: np.ndarray
    num_samples: int
    num_weighed: int = 0

    @property
    def relative_gap(self) -> Interval | None:
        """The gap as a share of J* − J(π₀), which is what there was to gain; None where that is not known.

        Where J* has one end alone, so has the share: it is that of this end, since the share grows with J*.
        """
        if self.gap is None or self.prior_objective is None:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = self.optimum.mean - self.prior_objective.mean
            known = self.gap * np.where(gain > 0, 1 / gain, np.nan)
            above = np.isfinite(self.gap.conservative_upper)
            gain = (
                np.where(above, self.optimum.conservative_upper, self.optimum.conservative_lower)
                - self.prior_objective.mean
            )
            ends = self.gap * np.where(gain > 0, 1 / gain, np.nan)
        one_sided = np.isnan(self.gap.mean)
        ends = ends._replace(conservative_upper=np.where(above, ends.conservative_upper, np.inf))
        return Interval(*(np.where(one_sided, end, part) for end, part in zip(ends, known, strict=True)))

    @property
    def measured(self) -> list[Measured]:
        """Every quantity at each β."""
        each: list[dict[str, Any]] = [
            {name: estimate_at(getattr(self, name), i) for name in INTERVALS} for i in range(len(self.betas))
        ]
        return [
            Measured(
                beta=beta,
                ess=float(np.reshape(self.ess, -1)[i]),
                khat=float(np.reshape(self.khat, -1)[i]),
                num_weighed=self.num_weighed,
                **own,
            )
            for i, (beta, own) in enumerate(zip(self.betas, each, strict=True))
        ]

    @property
    def betas(self) -> list[float | None]:
        """Temperatures as a list; one None without rewards."""
        return [None] if self.beta is None else [float(b) for b in np.atleast_1d(self.beta)]

    @property
    def explanation(self) -> str:
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
            return f"The optimum is not known: {self.caveat.rstrip('.')}. J is the mean of {self.num_samples:,} draws."
        drawn = f"; J of the fit was estimated from {self.num_samples:,} draws" if self.num_samples else ", exactly"
        if self.num_samples and self.method not in ("enumeration", "known"):
            drawn = f" ({self.num_samples:,} draws)"
        reason = f" But {self.caveat.rstrip('.')}." if self.caveat else ""
        return f"The optimum was reached {words[self.method]}{drawn}.{reason}"

    def table(self) -> Table:
        """One row for each temperature: what was reached, what could be, and the gap between."""
        headings = [
            name for name in HEADINGS if name != "log Z" and (name != "log p(y)" or self.log_marginal is not None)
        ]
        return Table(headings, [[row.cells()[name] for name in headings] for row in self.measured])

    def weight_table(self) -> Table:
        """One row for each temperature: limits of log Z from both sides, the distance to p*, and the weights."""
        rows = []
        for i, row in enumerate(self.measured):
            told, weights = row.cells(), row.weight_cells()
            upper = None if self.upper is None else float(np.reshape(self.upper.limit, -1)[i])
            rows.append(
                (
                    told["β"],
                    told["log Z"],
                    UNKNOWN if self.method == "draws" else format_number(float(np.reshape(self.lower.limit, -1)[i])),
                    format_number(upper),
                    _apart_text(estimate_at(self.kl_reverse, i)),
                    _apart_text(estimate_at(self.kl_forward, i)),
                    weights["ESS"],
                    weights["k̂"],
                    format_share(float(np.reshape(self.missed_mass, -1)[i])),
                )
            )
        sides = ("from below", "from above") if self.log_evidence is not None else ("J*/β from below", "from above")
        return Table(("β", "log Z", *sides, "KL(q‖p*)", "KL(p*‖q)", "ESS", "k̂", "missed"), rows)

    @property
    def weighed(self) -> str:
        """Which draws ESS and k̂ are of, and why k̂ is not told where it is not; a sentence."""
        rows = self.measured
        lacking = [row.no_khat for row in rows if row.no_khat]
        sentences = [f"ESS and k̂ are of {self.num_weighed:,} draws of the fit."] if self.num_weighed else []
        at_some = "" if len(lacking) == len(rows) else " at some β"
        return " ".join([*sentences, *(f"k̂ is not told{at_some}: {reason}." for reason in dict.fromkeys(lacking))])

    def _blocks(self) -> Sequence[DisplayBlock]:
        legend = Line(f"({_legend(self)}; from below and above: 97.5% limits)")
        first, second = self.table(), self.weight_table()
        told = (legend, Line(f"{self.explanation} {self.weighed}"))
        if len(first.rows) > 1:
            return first, second, *told
        whole = Table((*first.headings, *second.headings[1:]), [(*first.rows[0], *second.rows[0][1:])])
        return whole.transpose(), *told


def _legend(evidence: Evidence) -> str:
    rewarded = "J, J*, gap and E[R] in reward units; KL and log Z in nats"
    units = rewarded if evidence.beta is not None else "all in nats"
    return f"{units}; ± is one standard error, [ ] a 95% interval; share = gap / (J* − J(π₀))"


class Check(NamedTuple):
    """One question asked of a fit, and its answer.

    Attributes:
        name: what is asked, in two or three words.
        value: what was measured, the worst over β; nan where it could not be.
        threshold: where warning or failure begins.
        least: whether the threshold is the least good value; it is the greatest by default.
        outcome: pass, warn, fail, or unknown where it could not be measured.
        explanation: one sentence: what the value means, and what to do.
        reference: where the check comes from.
    """

    name: str
    value: float
    threshold: float
    outcome: Outcome
    explanation: str
    reference: str
    least: bool = False

    @property
    def told(self) -> str:
        """The value, with as many digits as tell on which side of the threshold it is."""
        return format_with_limit(self.value, self.threshold)[0]

    @property
    def limit(self) -> str:
        """The threshold, with the side that is good."""
        return f"{'≥' if self.least else '≤'} {format_with_limit(self.value, self.threshold)[1]}"


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Diagnosis(Displayable):
    """Whether a fit can be trusted.

    Attributes:
        verdict: pass, fail, or unknown where p* cannot be reached.
        explanation: why, and what would settle it.
        checks: every question that was asked.
        evidence: what the first of them rests on; None where p* cannot be approached at all.
    """

    verdict: Verdict
    explanation: str
    checks: tuple[Check, ...]
    evidence: Evidence | None

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def _blocks(self) -> Sequence[DisplayBlock]:
        numbers = () if self.evidence is None else self.evidence._blocks()
        return (Line(self.explanation, self.verdict), checks_listing(self.checks), *numbers)


def checks_listing(checks: Sequence[Check]) -> Table:
    """One row for each check, what to do as its note."""
    rows = [(f"{MARKS[c.outcome]} {c.outcome}", c.name, c.told, c.limit) for c in checks]
    return Table(("outcome", "check", "value", "limit"), rows, "llrr", [c.explanation for c in checks])


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Frontier(Displayable):
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

    def table(self) -> Table:
        """One row for each temperature, with the gold metric where there is one."""
        listing = self.evidence.table()
        if self.gold is None:
            return listing
        gold = [format_estimate(estimate_at(self.gold, i)) for i in range(len(listing.rows))]
        rows = [(*row, cell) for row, cell in zip(listing.rows, gold, strict=True)]
        return Table((*listing.headings, "gold"), rows)

    def _blocks(self) -> Sequence[DisplayBlock]:
        turn = [] if self.turning_point is None else [Line(f"Gold is greatest at β = {self.turning_point:.3g}.")]
        legend = Line(f"({_legend(self.evidence)})")
        return (self.table(), legend, checks_listing(self.checks), *turn)


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Comparison(Displayable):
    """Fits of one problem side by side, on common draws.

    Attributes:
        names: of the fits; differences are to the first.
        objective: J of each, reward units, [fit].
        reward: E[R] of each.
        kl: KL(q‖π₀) of each, nats.
        delta_objective: J less that of the first, with paired standard error, [fit].
        delta_reward: likewise E[R].
        delta_kl: likewise KL.
        log_marginal: log p(y), nats, [fit], which is one for all of them; None without data beside rewards.
    """

    names: Sequence[str]
    objective: Interval
    reward: Interval
    kl: Interval
    delta_objective: Interval
    delta_reward: Interval
    delta_kl: Interval
    log_marginal: Interval | None = None

    def table(self) -> Table:
        """One row for each fit, with its differences to the first."""
        told = (self.objective, self.delta_objective, self.reward, self.delta_reward, self.kl, self.delta_kl)
        rows = [
            (name, *("" if i == 0 and k % 2 else format_estimate(estimate_at(one, i)) for k, one in enumerate(told)))
            for i, name in enumerate(self.names)
        ]
        headings = ["fit", "J", "ΔJ", "E[R]", "ΔE[R]", "KL", "ΔKL"]
        if self.log_marginal is not None:
            headings.append("log p(y)")
            rows = [(*row, format_estimate(estimate_at(self.log_marginal, i))) for i, row in enumerate(rows)]
        return Table(headings, rows)

    def _blocks(self) -> Sequence[DisplayBlock]:
        return (self.table(), Line("Δ is the difference to the first, on common draws; ± is one standard error."))


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


def _apart_text(found: Interval | None) -> str:
    """Write how far a fit and p* are apart, or the end of it that is known; nothing that rests on worthless weights."""
    if found is None or math.isfinite(float(found.upper)):
        return format_estimate(found)
    return bracket_text(found, float(found.se), own=True)  # a standard error is not to be leaned on
