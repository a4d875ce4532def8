"""Both sides of log Z by particles: free runs below, runs that hold a draw of p* above, in a number of evaluations."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from bayesrl.compilation.random_keys import fold_in
from bayesrl.diagnostics.engines.engine_answers import Answer, Finding, estimate_of
from bayesrl.diagnostics.engines.problem_lanes import EngineProblem, Lane
from bayesrl.diagnostics.evidence.by_sampling import find_bounds
from bayesrl.diagnostics.evidence.confidence_limits import markov_lower
from bayesrl.errors import EngineError
from bayesrl.exact.weighted_draws import context_axes
from bayesrl.monte_carlo.particles.engines import ParticleEngine, ParticleOptions, TemperedParticles
from bayesrl.monte_carlo.particles.tempering import evaluations_of_sweep
from bayesrl.monte_carlo.rejection_sampling import rejection
from bayesrl.monte_carlo.sequential_monte_carlo import Form, choose_engine
from bayesrl.monte_carlo.weighting import ScoredDraws
from bayesrl.posterior.sampling import draw_fit
from bayesrl.statistics.estimates import Interval
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import PRNGKey

_RUNS = 16
"""Independent runs on each side; their smallest log Ẑ is a limit."""

_PLAN_DRAWS = 1024
_EPS = float(np.finfo(np.float32).eps)
_CONSTANCY, _LEAST_SHARE = 0.9, 0.05
_MOST_PARTICLES = 4096
_SPREAD = 1.0
"""Where log Ẑ of single runs spreads by more than this, nats, its standard error is not to be trusted."""


@dataclass
class _Counted:
    """Runs an engine, and adds up what that costs; see `ParticleEngine`."""

    engine: ParticleEngine
    spent: Evaluations

    def run(
        self, key: PRNGKey, beta: float | None, reference: dict[str, Any] | None = None
    ) -> tuple[ScoredDraws, np.ndarray]:
        found = self.engine.run(key, beta, reference)
        self.spent = self.spent.plus(found[0].evaluations)
        return found


class ParticleAnswer:
    """Answers by particles of one form, with one twist.

    Args:
        form: along time or temperatures.
        twist: what they look ahead by.
        asked: whether the twist is the one that the user may give.
    """

    def __init__(self, form: Form, twist: Any = None, *, asked: bool = False) -> None:
        self.form, self.twist, self.asked = form, twist, asked

    def __call__(self, key: PRNGKey, problem: EngineProblem) -> Answer:
        """Answer; see `Engine`."""
        problem.refuse_unreachable()
        problem.refuse_nature()
        if self.asked and problem.twist is None:
            raise EngineError("no twist was given; pass twist=, a value of what is still to come, as smc takes it")
        twist = problem.twist if self.asked else self.twist
        findings, spent, num = [], Evaluations(), 0
        for i, lane in enumerate(problem.lanes):
            own = _Sides(fold_in(key, i), problem, lane, self.form, twist)
            findings.append(own.finding())
            spent, num = spent.plus(own.spent), max(num, own.num_draws)
        return Answer(findings, num, spent)


class _Sides:
    """Runs of particles at one temperature."""

    def __init__(self, key: PRNGKey, problem: EngineProblem, lane: Lane, form: Form, twist: Any) -> None:
        self.key, self.problem, self.lane, self.form, self.twist = key, problem, lane, form, twist
        # An exact twist looks ahead from the prior, where every value of a step is tried.
        proposes = problem.is_given and twist is None
        self.proposal = (lane.programs, lane.params) if proposes else None
        self.programs = lane.programs if proposes else lane.alone
        self.spent, self.num_draws = Evaluations(), 0

    def finding(self) -> Finding:
        """Run within the budget."""
        engine = self._engine(2)
        weights, rewards = self._weights()
        exact = self._exact_draws(rewards)
        num = self._num_particles(engine, weights, conditional=exact is not None)
        counted = _Counted(self._engine(num), Evaluations())
        forward = counted.run(fold_in(self.key, 1), self.lane.beta)
        low = _log_z(forward[1], num)
        high = None
        if exact is not None:
            high = _log_z(counted.run(fold_in(self.key, 2), self.lane.beta, exact)[1], num)
        self.spent, self.num_draws = self.spent.plus(counted.spent), len(forward[1])
        return self._told(low, high, forward[1])

    def _engine(self, num_particles: int) -> ParticleEngine:
        options = ParticleOptions(num_particles, _RUNS, 0.5, "systematic", self.twist)
        return choose_engine(self.lane.alone, self.proposal, self.form, options)

    def _weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Return log-weights of some draws of what proposes, and their rewards, [draws, contexts]."""
        params = self.lane.params if self.proposal is not None else {}
        num = min(_PLAN_DRAWS, max(self.problem.each // 4, 2))
        _, totals = draw_fit(fold_in(self.key, 0), self.programs, params, num)
        self.spent = Evaluations.of_both(num)
        w = totals.log_weight(1.0 if self.lane.beta is None else self.lane.beta)
        return np.asarray(w, float).reshape(num, -1), np.asarray(totals.reward, float).reshape(num, -1)

    def _exact_draws(self, rewards: np.ndarray) -> dict[str, Any] | None:
        """Draw a path of p* for each run by rejection, where a quarter of the budget probably suffices."""
        lane, problem = self.lane, self.problem
        bound = find_bounds(lane.alone, lane.beta, problem.reward_bound).reward
        if lane.beta is None or problem.structure.names("observed") or not np.isfinite(bound).all():
            return None
        most = problem.each // 4
        chance = np.exp((np.minimum(rewards - bound, 0.0)) / lane.beta).mean(0).min()
        if chance * most < 4 * _RUNS:
            return None
        try:
            drawn = rejection(
                fold_in(self.key, 3),
                lane.alone.policy,
                *lane.alone.args,
                beta=lane.beta,
                num_samples=_RUNS,
                reward_bound=bound.reshape(problem.structure.context_shape),
                max_proposals=max(most, 4),
            )
        except EngineError:
            return None
        self.spent = self.spent.plus(drawn.evaluations)
        assert drawn.ess is not None
        return None if drawn.ess.min() < _RUNS else {name: np.asarray(x) for name, x in drawn.sites.items()}

    def _num_particles(self, engine: ParticleEngine, weights: np.ndarray, *, conditional: bool) -> int:
        """Plan how many particles of a run the rest of the budget allows."""
        each, passes = 2, 2 if conditional else 1
        if isinstance(engine, TemperedParticles):
            steps = _num_temperatures(weights)
            each = 2 + steps * evaluations_of_sweep(engine.programs, context_axes(engine.programs.structure))
            passes += 1  # the pilot
        elif (cost := getattr(engine, "evaluations_per_particle", None)) is not None:
            each = cost()
        left = self.problem.each - self.spent.policy
        num = left // (each * passes * _RUNS)
        if num < 2:
            least = 2 * each * passes * _RUNS + self.spent.policy
            raise EngineError(
                f"budget={self.problem.budget:,} is too small for {_RUNS} runs of 2 particles, which take about "
                f"{least * len(self.problem.lanes):,} evaluations"
            )
        return int(min(num, _MOST_PARTICLES))

    def _told(self, low: np.ndarray, high: np.ndarray | None, log_weights: np.ndarray) -> Finding:
        contexts = low.shape[1]
        mean, se = estimate_of(low)
        # Runs that agree to the last digit are still in single precision.
        log_z = Interval.normal(mean, np.hypot(se, _EPS * np.maximum(np.abs(mean), 1.0)))
        least = markov_lower(low.sum(1)) / contexts
        most = math.inf if high is None else -markov_lower(-high.sum(1)) / contexts
        spread = max(low.std(0).max(), 0.0 if high is None else high.std(0).max())
        note = ""
        if high is None or spread >= _SPREAD:
            note = "without an upper side" if high is None else f"single runs differ by {spread:.2g} nats"
            note = f"{note}, so no standard error is trusted"
            log_z = log_z._replace(lower=np.asarray(np.nan), upper=np.asarray(np.nan))
        log_z = log_z._replace(conservative_lower=np.asarray(least), conservative_upper=np.asarray(most))
        each = logsumexp(low, axis=0) - math.log(len(low))
        se = (np.exp(low - each) - 1).std(0, ddof=1) / math.sqrt(len(low))
        shape = self.problem.structure.context_shape
        by_context = Interval.normal(each.reshape(shape), se.reshape(shape))
        weights = np.exp(log_weights - logsumexp(log_weights, axis=0))
        ess = float((1 / (weights**2).sum(0)).min())
        return Finding.of_log_z(log_z, self.lane, by_context, ess, note)


def _log_z(log_weights: np.ndarray, num_particles: int) -> np.ndarray:
    """Return log Ẑ of each run, [runs, contexts], nats."""
    runs = log_weights.reshape(-1, num_particles, log_weights.shape[-1])
    return np.asarray(logsumexp(runs, axis=1) - math.log(num_particles))


def _num_temperatures(w: np.ndarray) -> int:
    """Guess how many steps of temperature a path takes, from log-weights of its first law, [draws, contexts].

    Steps are as long as the pilot's rule makes them while the reweighted draws are worth something; the rest of the
    path is taken to be as steep as the last of these.
    """
    w = np.where(np.isfinite(w), w, -1e30)
    now, steps, length = 0.0, 0, 1.0
    while now < 1.0 and steps < 400:
        weights = np.exp(now * w - logsumexp(now * w, axis=0))
        if steps and float((1 / (weights**2).sum(0)).min()) < _LEAST_SHARE * len(w):
            return steps + math.ceil((1.0 - now) / max(length, 1e-3))
        low, high = now, 1.0
        for _ in range(20):
            middle = 0.5 * (low + high)
            gain = np.exp((middle - now) * (w - w.max(0)))
            share = (weights * gain).sum(0) ** 2 / (weights * gain**2).sum(0)
            low, high = (middle, high) if float(share.min()) >= _CONSTANCY else (low, middle)
        length, now, steps = max(low - now, 1e-3), max(low, now + 1e-3), steps + 1
        if high == 1.0:
            break
    return steps
