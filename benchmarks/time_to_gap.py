"""Wall time to an exact gap of 1%, against stock NumPyro.

The gap is exact, as a share of J* − J(π₀), of the parameters that each fit would give if it ended
there. Both sides take their best of 16 settings, particles 16 / 64 / 256 / 1,024 × Adam at .003 / .01 /
.03 / .1: one seed chooses two, five seeds the best of these. Where bayesrl enumerates it has the four
rates only. On digits, where the images of a mini-batch average the noise already, NumPyro has 1 / 4 / 16 /
64 particles, which is kinder to it. A crossing counts if the gap stays below 1% until twice as many
steps. Then both run that many steps, seed by seed in turn and compiled beforehand: NumPyro's SVI with
`TraceGraph_ELBO` inside one jit, bayesrl in the loop of `fit`, with its chunks, history and checks.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from bayesrl.objectives import ReverseKL
from benchmarks import problems
from benchmarks.problems import Benchmark
from benchmarks.racing import Crossing, Racer, first_crossing, own, stock
from benchmarks.results import table, target

LEVEL = 0.01
PARTICLES = (16, 64, 256, 1024)
RATES = (0.03, 0.01, 0.1, 0.003)
SEEDS = range(5)
CAP = 10.0
"""Seconds of stepping after which a run that has not crossed gives up."""
CAP_FIRST = 4.0
"""The same while one seed chooses among all settings."""

type GuideSampler = Callable[[Benchmark, int], Racer]


class Setting(NamedTuple):
    """Particles and learning rate, with their fit."""

    particles: int
    rate: float
    racer: Racer


class Raced(NamedTuple):
    """A setting and where it crosses, by seed."""

    setting: Setting
    crossings: list[Crossing | None]

    def median_seconds(self) -> float:
        """Median over the seeds; infinity if most never cross."""
        return statistics.median(math.inf if crossing is None else crossing.seconds for crossing in self.crossings)


class Case(NamedTuple):
    """One line of the table."""

    name: str
    problem: Benchmark
    sampler: GuideSampler
    particles: tuple[int, ...]
    rival_particles: tuple[int, ...]
    wanted: float


def run() -> str:
    """Race on the problems in the targets."""
    bandit, digits = problems.bandit(), problems.digits()
    chains = [problems.chain(stochastic=stochastic) for stochastic in (True, False)]
    cases = [
        Case(f"{digits.name} (its ten arms enumerated)", digits, _sampled, (64,), (1, 4, 16, 64), 5),
        Case(bandit.name, bandit, _sampled, PARTICLES, PARTICLES, 5),
        Case(f"{bandit.name}, enumerated", bandit, _enumerated, (1,), PARTICLES, 10),
        *(Case(chain.name, chain, _sampled, PARTICLES, PARTICLES, 5) for chain in chains),
    ]
    rivals: dict[str, Raced | None] = {}
    rows, short = [], []
    for case in cases:
        if case.problem.name not in rivals:
            rivals[case.problem.name] = best_setting(case.problem, stock, case.rival_particles)
        row, ratio = _race(case, rivals[case.problem.name])
        print(*row, sep=" | ", flush=True)
        rows.append(row)
        if ratio < case.wanted:
            short.append(f"{case.name} at {ratio:.1f}×")
    header = ["problem", "bayesrl: setting", "steps", "time", "NumPyro: setting", "steps", "time", "ratio", "target"]
    words = target("at least 5× less, 10× where enumerated", met=not short, why_not="; ".join(short))
    return f"{table(header, rows)}\n\n{__doc__.partition('\n\n')[2].strip()}\n\n{words}"


def _sampled(problem: Benchmark, num_particles: int) -> Racer:
    return own(problem, ReverseKL(num_particles=num_particles))


def _enumerated(problem: Benchmark, _: int) -> Racer:
    return own(problem, ReverseKL(enumerated=("arm",)))


def best_setting(problem: Benchmark, sampler: GuideSampler, particles: tuple[int, ...]) -> Raced | None:
    """Choose the fastest of all settings by one seed, then of the best two by all seeds; None if none crosses."""
    found: list[tuple[Crossing, Setting]] = []
    for num in particles:
        racer = sampler(problem, num)
        for rate in RATES:
            # A setting much slower than the best so far will not be chosen, so its run may stop early.
            cap = min([CAP_FIRST, *(1.5 * crossing.seconds for crossing, _ in found)])
            crossing = first_crossing(racer, problem, SEEDS[0], rate, LEVEL, cap)
            if crossing is not None:
                found.append((crossing, Setting(num, rate, racer)))
    raced = []
    for crossing, setting in sorted(found, key=lambda pair: pair[0].seconds)[:2]:
        others = [first_crossing(setting.racer, problem, seed, setting.rate, LEVEL, CAP) for seed in SEEDS[1:]]
        raced.append(Raced(setting, [crossing, *others]))
    return min(raced, key=Raced.median_seconds) if raced else None


def _race(case: Case, rival: Raced | None) -> tuple[list[object], float]:
    """Return a line of the table, and the ratio (a lower bound if the rival never crosses)."""
    mine = best_setting(case.problem, case.sampler, case.particles)
    if mine is None:
        return [case.name, f"never within {CAP_FIRST:.0f} s", *[""] * 7], 0.0
    pairs = [(_seconds(mine, seed), _seconds(rival, seed)) for seed in SEEDS]
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    bound = "> " if rival is None or rival.median_seconds() == math.inf else ""
    cells = [*_cells(mine, [pair[0] for pair in pairs]), *_cells(rival, [pair[1] for pair in pairs])]
    return [case.name, *cells, f"{bound}{ratio:.1f}×", f"{case.wanted:.0f}×"], ratio


def _seconds(raced: Raced | None, seed: int) -> float:
    """Time a run to its crossing, in seconds; the cap if it has none."""
    if raced is None:
        return CAP_FIRST
    crossing = raced.crossings[seed]
    if crossing is None:
        return CAP
    return raced.setting.racer.clock(seed, raced.setting.rate)(crossing.steps)


def _cells(raced: Raced | None, times: list[float]) -> list[str]:
    if raced is None:
        return ["any of 16", "never", f"> {CAP_FIRST:.0f} s"]
    particles, rate, _ = raced.setting
    name = f"{particles:,} at {rate:g}"
    steps = statistics.median(math.inf if crossing is None else crossing.steps for crossing in raced.crossings)
    if steps == math.inf:
        return [name, "never", f"> {CAP:.0f} s"]
    return [name, f"{steps:,.0f}", f"{1000 * statistics.median(times):,.0f} ms"]
