"""What the diagnostics return: checks with a verdict, frontiers, comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from bayesrl.arguments import checked
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.formatting import estimate_at, format_estimate, format_with_limit
from bayesrl.display.tables import MARKS, Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError
from bayesrl.statistics.estimates import Interval

type Outcome = Literal["pass", "warn", "fail", "unknown"]
type Verdict = Literal["pass", "fail", "unknown"]


class Check(NamedTuple):
    """One question about a fit, and its answer.

    Attributes:
        name: the question, in two or three words.
        value: the measured value, the worst over β; nan if it could not be measured.
        threshold: where warning or failure begins.
        least: whether the threshold is the least good value; by default it is the greatest.
        outcome: pass, warn, fail, or unknown if it could not be measured.
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
    def value_text(self) -> str:
        """The value, with enough digits to show on which side of the threshold it is."""
        return format_with_limit(self.value, self.threshold)[0]

    @property
    def limit(self) -> str:
        """The threshold, with the sign of its good side."""
        return f"{'≥' if self.least else '≤'} {format_with_limit(self.value, self.threshold)[1]}"


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Diagnosis(Displayable):
    """Whether you can trust a fit.

    Attributes:
        verdict: pass, fail, or unknown if p* is out of reach.
        explanation: why, and what would settle it.
        checks: every question and its answer.
        evidence: what the first checks rest on; None if p* cannot be approached at all.
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
    """One row per check, with its advice as a note."""
    rows = [(f"{MARKS[c.outcome]} {c.outcome}", c.name, c.value_text, c.limit) for c in checks]
    return Table(("outcome", "check", "value", "limit"), rows, "llrr", [c.explanation for c in checks])


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Frontier(Displayable):
    """Reward against KL over an array of β, and whether it behaves as every optimum does.

    Attributes:
        beta: temperatures, ascending, reward units per nat, [beta].
        evidence: evidence about the fit at these β.
        checks: `dJ*/dβ = −KL`, `J* non-increasing`, `J* convex`, `E[R] non-increasing`,
            `KL non-increasing`, `E[R] concave in KL`; they pass within error.
        gold: the gold metric at each β, or None.
        turning_point: β of the greatest gold while the proxy still rises; None if gold does not turn down.
    """

    beta: np.ndarray
    evidence: Evidence
    checks: tuple[Check, ...]
    gold: Interval | None
    turning_point: float | None

    def table(self) -> Table:
        """One row per temperature, with the gold metric if there is one."""
        listing = self.evidence.table()
        if self.gold is None:
            return listing
        gold = [format_estimate(estimate_at(self.gold, i)) for i in range(len(listing.rows))]
        rows = [(*row, cell) for row, cell in zip(listing.rows, gold, strict=True)]
        return Table((*listing.headings, "gold"), rows)

    def _blocks(self) -> Sequence[DisplayBlock]:
        turn = [] if self.turning_point is None else [Line(f"Gold is greatest at β = {self.turning_point:.3g}.")]
        legend = Line(f"({self.evidence.legend})")
        return (self.table(), legend, checks_listing(self.checks), *turn)


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Comparison(Displayable):
    """Fits of one problem side by side, on common draws.

    Attributes:
        names: names of the fits; differences are to the first.
        objective: J of each, reward units, [fit].
        reward: E[R] of each.
        kl: KL(q‖π₀) of each, nats.
        delta_objective: J minus that of the first, with paired standard error, [fit].
        delta_reward: the same for E[R].
        delta_kl: the same for KL.
        log_marginal: log p(y), nats, [fit], the same for all fits; None unless there are data beside rewards.
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
        """One row per fit, with its differences to the first."""
        columns = (self.objective, self.delta_objective, self.reward, self.delta_reward, self.kl, self.delta_kl)
        rows = [
            (name, *("" if i == 0 and k % 2 else format_estimate(estimate_at(one, i)) for k, one in enumerate(columns)))
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
    """A part that a domain adds to the report.

    Attributes:
        title: heading.
        caption: a sentence that says what a good result looks like.
        body: a Matplotlib figure, a table as rows of cells with the headings first, or plain text.

    Example:
        >>> import bayesrl
        >>> table = [["arm", "pulls"], ["left", "12"], ["right", "88"]]
        >>> section = bayesrl.Section("Pulls", "A fit that has learned pulls the better arm most often.", table)
        >>> section.body[2]
        ['right', '88']
    """

    title: str
    caption: str
    body: Any
