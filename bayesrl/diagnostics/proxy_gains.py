"""`Overoptimisation`: gains over the prior policy along a sweep, and whether the end of it can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bayesrl.arguments import checked
from bayesrl.diagnostics.checks import Check, Outcome
from bayesrl.display.formatting import estimate_at, format_estimate, format_number, format_percent
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError
from bayesrl.statistics.estimates import Estimate


class LikelyTurn(NamedTuple):
    """Where the true reward turns down, under its posterior.

    Attributes:
        place: the middle one of the three neighbouring points that most probably hold its turn, in the order of KL.
        chance: probability that these three hold it, given that it turns within the sweep.
        p_turns: probability that it turns within the sweep, and is not greatest at the end.
    """

    place: int
    chance: float
    p_turns: float


def likely_turn_of(gains: np.ndarray) -> LikelyTurn:
    """Find where joint draws of the gains, [points, draws] in the order of KL, are greatest before the end."""
    last = len(gains) - 1
    turns = gains.argmax(0)
    inside = turns[turns < last]
    shares = np.bincount(inside, minlength=last + 1) / max(len(inside), 1)
    windows = np.convolve(shares, np.ones(3))[1:-1]
    return LikelyTurn(int(windows.argmax()), float(windows.max()), len(inside) / len(turns))


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Overoptimisation(Displayable):
    """How far a reward that is not known may be followed; see `overoptimisation`.

    Gains are differences of expectations from the prior policy, averaged over contexts, in reward units; arrays are
    [points], in the order of KL.

    Attributes:
        by: what is swept: "beta" or "n", of the best of n.
        strength: the β or n of each point.
        kl: KL to the prior policy, nats.
        proxy: gain in the reward that the policy follows.
        predicted: posterior mean of the gain in the true reward, with the standard error of the policy's draws.
        lower: lower end of the interval of the true gain.
        upper: its upper end.
        p_worse: posterior probability that the true gain is negative.
        p_best: posterior probability that the true reward is greatest at this point of the sweep.
        bought: share of the uncertainty about single draws that the policy bears, in [0, 1]: Var E_q[d] / E_q Var d,
            with d = r(x) − E_π₀[r] and variances over the posterior; 0 for the prior, 1 for a policy that always does
            the same.
        gold: gain in the gold metric, if there is one.
        level: of the interval.
        turning_point: β or n of the greatest lower end, if it falls beyond; None if it still rises at the end.
        likely_turn: where the true reward most probably turns down, if it does; see `likely_turn_of`.
        gold_turning_point: the same of measured gold; None without gold, too.
        exact: whether expectations are sums over all that the policy may draw.
        num_draws: joint draws of the reward.
    """

    by: Literal["beta", "n"]
    strength: np.ndarray
    kl: Estimate
    proxy: Estimate
    predicted: Estimate
    lower: np.ndarray
    upper: np.ndarray
    p_worse: np.ndarray
    p_best: np.ndarray
    bought: np.ndarray
    gold: Estimate | None
    level: float
    turning_point: float | None
    likely_turn: LikelyTurn
    gold_turning_point: float | None
    exact: bool
    num_draws: int

    @property
    def symbol(self) -> str:
        """The symbol of what is swept."""
        return "β" if self.by == "beta" else "n"

    def table(self) -> Table:
        """One row for each point, in the order of KL."""
        rows = []
        for i, strength in enumerate(self.strength):
            kl, proxy, predicted = (format_estimate(estimate_at(part, i)) for part in self._measured)
            ends = f"[{format_number(self.lower[i], 3)}, {format_number(self.upper[i], 3)}]"
            shares = (format_percent(part[i]) for part in (self.p_worse, self.p_best, self.bought))
            gold = [] if self.gold is None else [format_estimate(estimate_at(self.gold, i))]
            rows.append((f"{strength:.3g}", kl, proxy, predicted, ends, *shares, *gold))
        interval = f"{self.level:.0%}"
        told = ("proxy", "true, predicted", interval, "P(worse)", "P(best)", "bought")
        return Table((self.symbol, "KL", *told, *(["gold"] if self.gold is not None else [])), rows)

    @property
    def _measured(self) -> tuple[Estimate, Estimate, Estimate]:
        return self.kl, self.proxy, self.predicted

    @property
    def explanation(self) -> str:
        """Where to stop, in a sentence or two."""
        told = [_turning(self, self.turning_point, "the lower end of the predicted gain")]
        turn = self.likely_turn
        if turn.p_turns > 0:
            at = f"most probably near {self.symbol} = {self.strength[turn.place]:.3g}"
            told.append(f"The true gain turns down with probability {format_percent(turn.p_turns)}, {at}.")
        if self.gold is not None:
            told.append(_turning(self, self.gold_turning_point, "the measured gain in gold"))
        return " ".join(told)

    def _blocks(self) -> Sequence[DisplayBlock]:
        made = "by sums" if self.exact else "from draws of the policy"
        head = f"Gains over the prior policy, {made}, under {self.num_draws:,} joint draws of the reward:"
        return (Line(head), self.table(), Line(self.explanation))


def _turning(found: Overoptimisation, point: float | None, what: str) -> str:
    what = what[0].upper() + what[1:]
    if point is None:
        return f"{what} is greatest at the end of the sweep."
    return f"{what} is greatest at {found.symbol} = {point:.3g}, and less beyond."


def trust_check(found: Overoptimisation) -> Check:
    """Ask whether the policy follows its reward further than what is known of it carries, at its greatest KL."""
    reference = "posterior of E_q[r] − E_π₀[r], at the greatest KL of the sweep"
    value, limit = float(found.p_worse[-1]), (1 - found.level) / 2
    ends = f"[{format_number(found.lower[-1], 3)}, {format_number(found.upper[-1], 3)}]"
    at = f"{found.symbol} = {found.strength[-1]:.3g}"
    gain = f"{format_number(float(found.predicted.mean[-1]), 3)} {ends}"
    told = f"value is P(worse than the prior policy) at {at}, where the true reward is predicted to gain {gain}"
    outcome: Outcome = "pass"
    if found.predicted.mean[-1] < 0:
        outcome = "fail"
        told += (
            ": the reward that was followed leads away from the true one. Follow it less, or ask for more comparisons"
        )
    elif found.turning_point is not None:
        outcome = "warn"
        told += f"; the lower end is greatest at {found.symbol} = {found.turning_point:.3g}: stop there"
    elif value > limit:
        outcome = "warn"
        told += ": ask for more comparisons, or fit with attitude='pessimistic'"
    return Check("trust", value, limit, outcome, f"{told}.", reference)
