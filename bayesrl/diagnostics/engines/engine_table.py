"""The result of `compare_engines`: a row for each engine, and why others do not apply."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from bayesrl.display.formatting import (
    UNKNOWN,
    estimate_at,
    format_beta,
    format_bracket,
    format_draws,
    format_estimate,
    format_number,
)
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError
from bayesrl.statistics.estimates import Interval
from bayesrl.statistics.evaluations import Evaluations

type EngineName = Literal[
    "known_optimum",
    "enumeration",
    "importance",
    "importance_from_fit",
    "rejection",
    "smc_tempered",
    "smc_sequential",
    "smc_exact_twist",
    "smc_reward_twist",
    "smc_given_twist",
    "nuts",
    "hindsight",
    "fit",
]
"""What `compare_engines` can put side by side."""

ENGINES: tuple[EngineName, ...] = get_args(EngineName.__value__)
"""All engines, in the order of the table."""


@dataclass(frozen=True)
class EngineRow:
    """What one engine says of log Z, averaged over contexts, and what that cost, for all β together.

    Attributes:
        engine: its name.
        log_evidence: log Z, [*beta], nats; None where nature plays or time is discounted.
        optimum: J*, [*beta], reward units (nats without rewards).
        gap: J* − J(q) of the fit that was given, [*beta], reward units; None without one.
        by_context: log Z of each context, [*beta, *contexts]; None if the engine does not tell it.
        ess: effective number of draws of p*, least over contexts, [*beta]; nan if it has none, or is exact.
        num_draws: number of draws that it made, at one β.
        evaluations: how often it evaluated policy and reward.
        seconds: without `compile_seconds`.
        compile_seconds: of tracing and compiling programs that no row before has compiled.
        note: what to know of its limits, a clause; empty if nothing.
    """

    engine: EngineName
    log_evidence: Interval | None
    optimum: Interval
    gap: Interval | None
    by_context: Interval | None
    ess: np.ndarray
    num_draws: int
    evaluations: Evaluations
    seconds: float
    compile_seconds: float
    note: str = ""

    def bracket(self, index: int = 0) -> Interval:
        """Log Z at one β, or J* where that is no log Z; the index is into the flat axis [*beta]."""
        found = estimate_at(self.optimum if self.log_evidence is None else self.log_evidence, index)
        assert found is not None
        return found

    def width(self, index: int = 0) -> float:
        """Width of the interval that the row shows at one β; inf if it has one side only."""
        low, high = ends_of(self.bracket(index))
        return high - low if math.isfinite(low) and math.isfinite(high) else math.inf


def ends_of(interval: Interval) -> tuple[float, float]:
    """Return the ends of the calibrated interval of one number, or of the conservative one if there is none."""
    _, _, lower, upper, floor, ceiling = (float(part) for part in interval)
    return (floor, ceiling) if math.isnan(lower) or math.isnan(upper) else (lower, upper)


@dataclass(frozen=True, repr=False)
class EngineComparison(Displayable):
    """Engines of one posterior side by side, each with the same number of evaluations of the program.

    Attributes:
        beta: temperatures, [*beta], reward units per nat; None without rewards.
        rows: the engines that apply.
        refusals: why others do not, a clause by name.
        budget: evaluations of the program that each engine had.
        objective: J of the fit that was given, [*beta], reward units; None without one.
        num_contexts: number of separate problems that each number averages over.
    """

    beta: np.ndarray | None
    rows: tuple[EngineRow, ...]
    refusals: Mapping[str, str]
    budget: int
    objective: Interval | None
    num_contexts: int

    def __getitem__(self, engine: str) -> EngineRow:
        for row in self.rows:
            if row.engine == engine:
                return row
        if engine in self.refusals:
            raise EngineError(f"engine {engine!r} has no row: {self.refusals[engine]}")
        raise EngineError(f"engine {engine!r} was not compared; the rows are {[row.engine for row in self.rows]}")

    def __contains__(self, engine: object) -> bool:
        return any(row.engine == engine for row in self.rows)

    @property
    def betas(self) -> list[float | None]:
        """Temperatures as a list; one None without rewards."""
        return [None] if self.beta is None else [float(b) for b in np.atleast_1d(self.beta).reshape(-1)]

    @property
    def tightest(self) -> EngineName:
        """The engine with the narrowest interval, at the worst β; of several exact ones the first."""
        return min(self.rows, key=lambda row: max(row.width(i) for i in range(len(self.betas)))).engine

    @property
    def quantity(self) -> str:
        """What the engines estimate: log Z, or J* where nature plays or time is discounted."""
        return "log Z" if any(row.log_evidence is not None for row in self.rows) else "J*"

    # ---- as text -----------------------------------------------------------------------------

    def table(self) -> Table:
        """One row per engine and β: log Z from both sides, the gap, and what the draws are worth."""
        gap = () if self.objective is None else ("gap",)
        headings = ("engine", self.quantity, "from below", "from above", *gap, "ESS")
        rows = [self._cells(row, i, *gap) for row in self.rows for i in range(len(self.betas))]
        return Table(headings, rows)

    def _cells(self, row: EngineRow, index: int, *gap: str) -> tuple[str, ...]:
        found, beta = row.bracket(index), self.betas[index]
        below, above = (float(end) for end in (found.conservative_lower, found.conservative_upper))
        name = label_of(row.engine) + ("" if len(self.betas) == 1 else f", β = {format_beta(beta)}")
        own = estimate_at(row.gap, index)
        gaps = [format_bracket(own, 0.0 if own is None else float(own.se), own=True) for _ in gap]
        ess = "exact" if below == above else format_draws(float(np.reshape(row.ess, -1)[index]))
        shown = format_estimate(found)
        if not (math.isnan(found.mean) or math.isfinite(found.upper)):
            shown = f"({shown})"
        return (name, shown, _limit(below), _limit(above), *gaps, ess)

    def cost_table(self) -> Table:
        """One row per engine: its draws, its evaluations of policy and reward, and seconds."""
        headings = ("engine", "draws", "policy", "reward", "seconds", "compiling")
        return Table(
            headings,
            [
                (
                    label_of(row.engine),
                    f"{row.num_draws:,}" if row.num_draws else UNKNOWN,
                    *(f"{count:,}" for count in row.evaluations),
                    f"{row.seconds:.2f}",
                    f"{row.compile_seconds:.2f}",
                )
                for row in self.rows
            ],
        )

    @property
    def legend(self) -> str:
        """What the columns mean."""
        units = "log Z in nats" if self.quantity == "log Z" else "J* in reward units"
        gap = "" if self.objective is None else "; gap = J* − J of the fit, reward units"
        contexts = f"; means of {self.num_contexts:,} contexts" if self.num_contexts > 1 else ""
        return (
            f"{units}{gap}; ± is one standard error, in ( ) where it may be blind to parts of p*; from below and above "
            f"are 97.5% limits that hold without it; ESS are effective draws of p*; policy and reward count "
            f"evaluations, for which the budget was {self.budget:,}{contexts}"
        )

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Pairs of engines and what to know of their limits, or why they do not apply."""
        told: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note:
                told.setdefault(row.note, []).append(label_of(row.engine))
        for name, reason in self.refusals.items():
            told.setdefault(f"not applied: {reason}", []).append(label_of(name))
        return [(", ".join(names), note) for note, names in told.items()]

    def _blocks(self) -> Sequence[DisplayBlock]:
        notes = [Line(f"{name}: {note.rstrip('.')}.") for name, note in self.notes]
        return (self.table(), self.cost_table(), Line(f"({self.legend})"), *notes)

    # ---- as JSON -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Describe it in JSON types, without log Z of each context; `nan` and `inf` become strings."""
        return {
            "beta": _described(self.beta),
            "budget": self.budget,
            "num_contexts": self.num_contexts,
            "objective": _described(self.objective),
            "rows": [
                {name: _described(getattr(row, name)) for name in row.__dataclass_fields__ if name != "by_context"}
                for row in self.rows
            ],
            "refusals": dict(self.refusals),
        }


def label_of(engine: str) -> str:
    """Write the name of an engine as words."""
    words = engine.replace("_", " ")
    return words.replace("smc", "SMC").replace("nuts", "NUTS")


def _limit(end: float) -> str:
    return format_number(end) if math.isfinite(end) else UNKNOWN


def _described(value: Any) -> Any:
    if isinstance(value, Interval | Evaluations):
        return {name: _described(part) for name, part in value._asdict().items()}
    if isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value, float).tolist()
    if isinstance(value, list):
        return [_described(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
