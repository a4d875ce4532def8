"""Both sides of log Z by particles: free runs below, runs that hold a draw of p* above, in a number of evaluations."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from bayesrl.compilation.random_keys import fold_in
from bayesrl.diagnostics.engines.engine_answers import Answer, Finding, weighed
from bayesrl.diagnostics.engines.problem_lanes import EngineProblem, Lane
from bayesrl.diagnostics.evidence.by_particles import Above, bracket_of_runs, from_chains
from bayesrl.diagnostics.evidence.by_sampling import find_bounds
from bayesrl.diagnostics.evidence.mixture_sample import draw_mixture_sample
from bayesrl.errors import EngineError
from bayesrl.exact.weighted_draws import context_axes
from bayesrl.monte_carlo.particles.conditional_chains import SWEEPS, Runs, run_particles
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
"""Independent runs on each side; together they make a limit."""

_FEWEST = 8
"""Fewest particles of runs that hold a draw: with fewer the draw itself is most of what they know."""

_PLAN_DRAWS = 1024
_EPS = float(np.finfo(np.float32).eps)
_CONSTANCY, _LEAST_SHARE = 0.9, 0.05
_MOST_PARTICLES = 4096


@dataclass(frozen=True)
class _Counted:
    """Runs an engine, and keeps what each run costs; see `ParticleEngine`."""

    engine: ParticleEngine
    spent: list[Evaluations]

    def run(
        self, key: PRNGKey, beta: float | None, reference: dict[str, Any] | None = None
    ) -> tuple[ScoredDraws, np.ndarray]:
        found = self.engine.run(key, beta, reference)
        self.spent.append(found[0].evaluations)
        return found

    def renewing(self) -> ParticleEngine:
        other = self.engine.renewing()
        return self if other is self.engine else _Counted(other, self.spent)


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
        """Run within the budget: both sides if they fit in, else the lower one."""
        engine = self._engine(2)
        weights, rewards = self._weights()
        marginal = self._marginal()
        exact = self._exact_draws(rewards)
        num, sweeps = self._plan(engine, weights, has_draws=exact is not None)
        counted = _Counted(self._engine(num), [])
        forward = run_particles(fold_in(self.key, 1), counted, self.lane.beta, num, None)
        above = self._above(counted, num, forward, exact, sweeps)
        for one in counted.spent:
            self.spent = self.spent.plus(one)
        self.num_draws = _RUNS * num
        return self._told(forward, above, marginal)

    def _above(
        self, engine: ParticleEngine, num: int, forward: Runs, exact: dict[str, Any] | None, sweeps: tuple[int, ...]
    ) -> Above:
        """Run on draws of p*: given ones, or those of chains; not at all where the budget ends before."""
        contexts = forward.log_z.shape[1]
        if not sweeps:
            nothing = np.zeros((1, _RUNS, contexts))
            return Above(nothing, f"budget={self.problem.budget:,} ends before the upper side", np.zeros(contexts) > 0)
        key, beta = fold_in(self.key, 2), self.lane.beta
        if exact is not None:
            runs = run_particles(key, engine, beta, num, exact)
            return Above(runs.log_z[None], "", np.ones(contexts, bool))
        return from_chains(key, self.lane.alone, engine, beta, num, forward, *sweeps)

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

    def _marginal(self) -> Interval | None:
        """Estimate log p(y) from weighted draws of the prior, if there are data beside rewards."""
        lane, problem = self.lane, self.problem
        if lane.beta is None or not problem.structure.names("observed"):
            return None
        sample = draw_mixture_sample(fold_in(self.key, 4), lane.alone, {}, problem.each // 4)
        self.spent = self.spent.plus(Evaluations.of_both(len(sample.reward)))
        return weighed(problem, lane, sample)[0].log_marginal

    def _plan(self, engine: ParticleEngine, weights: np.ndarray, *, has_draws: bool) -> tuple[int, tuple[int, ...]]:
        """Plan how many particles of a run the rest of the budget allows, and how long chains of runs may be.

        Returns:
            The number of particles, and the lengths at which chains are judged; empty for the lower side alone.
        """
        pilots, before = 0, 0
        if isinstance(engine, TemperedParticles):
            steps = _num_temperatures(weights)
            each = 2 + steps * evaluations_of_sweep(engine.programs, context_axes(engine.programs.structure))
            pilots = 1
        else:
            timed: Any = engine
            each, before = timed.evaluations_per_particle(), timed.evaluations_beforehand(self.lane.beta)
        left = max(self.problem.each - self.spent.policy - before, 0) // (each * _RUNS)
        # Runs that hold a draw have a path of their own, with a pilot of its own.
        if has_draws and left // (2 + 2 * pilots) >= _FEWEST:
            return min(left // (2 + 2 * pilots), _MOST_PARTICLES), (1,)
        shortest = 1 + 2 * pilots + SWEEPS[0]
        if not has_draws and (num := left // shortest) >= _FEWEST:
            return min(num, _MOST_PARTICLES), SWEEPS[:1]
        if (num := left // (1 + pilots)) < 2:
            least = (2 * each * (1 + pilots) * _RUNS + self.spent.policy + before) * len(self.problem.lanes)
            raise EngineError(
                f"budget={self.problem.budget:,} is too small for {_RUNS} runs of 2 particles, which take about "
                f"{least:,} evaluations"
            )
        return min(num, _MOST_PARTICLES), ()

    def _told(self, forward: Runs, above: Above, marginal: Interval | None) -> Finding:
        bracket = bracket_of_runs(forward.log_z, above, marginal)
        by_context = bracket.by_context
        # Runs that agree to the last digit are still in single precision.
        found = bracket.interval
        digits = _EPS * np.maximum(np.abs(found.mean), 1.0)
        found = found._replace(se=np.hypot(found.se, digits), lower=found.lower - digits, upper=found.upper + digits)
        shape = self.problem.structure.context_shape
        errors = np.hypot(*(x.std(0) / math.sqrt(max(len(x) - 1, 1)) for x in by_context[1:]))
        weights = forward.log_weights.reshape(-1, forward.log_weights.shape[-1])
        shares = np.exp(weights - logsumexp(weights, axis=0))
        return Finding.of_log_z(
            found,
            self.lane,
            Interval.normal(by_context.log_z.reshape(shape), errors.reshape(shape)),
            float((1 / (shares**2).sum(0)).min()),
            bracket.caveat,
        )


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
