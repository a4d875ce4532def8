"""What each engine says of log Z: from sums, weighted draws, accepted draws, chains, or a fit's own J."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.diagnostics.engines.problem_lanes import EngineProblem, Lane
from bayesrl.diagnostics.evidence.by_hindsight import bound_by_hindsight
from bayesrl.diagnostics.evidence.by_known_optimum import DRAWS_PER_BATCH, estimate_evidence, evaluate_optimum
from bayesrl.diagnostics.evidence.by_nuts import bracket_by_nuts, chain_length
from bayesrl.diagnostics.evidence.by_sampling import check_rewards
from bayesrl.diagnostics.evidence.confidence_limits import LEVEL, bernstein_width, binomial_limits
from bayesrl.diagnostics.evidence.mixture_sample import MixtureSample
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import MIN_EXACT, Bounds, TemperedSample
from bayesrl.errors import EngineError
from bayesrl.exact.enumeration import enumerate_target
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.monte_carlo.rejection_sampling import rejection
from bayesrl.statistics.definitions import is_control
from bayesrl.statistics.estimates import Interval
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import PRNGKey


class Finding(NamedTuple):
    """What an engine says at one temperature, averaged over contexts.

    Attributes:
        log_evidence: log Z, nats; None where it is not what the optimum rests on.
        optimum: J*, reward units.
        by_context: log Z of each context; None if it is not told.
        ess: effective number of draws, least over contexts; nan without draws.
        note: what to know of its limits.
    """

    log_evidence: Interval | None
    optimum: Interval
    by_context: Interval | None = None
    ess: float = math.nan
    note: str = ""

    @classmethod
    def of_log_z(
        cls, log_z: Interval, lane: Lane, by_context: Interval | None = None, ess: float = math.nan, note: str = ""
    ) -> "Finding":
        """Make what log Z says where J* = β·log Z."""
        return cls(log_z, log_z * (1.0 if lane.beta is None else lane.beta), by_context, ess, note)

    @classmethod
    def of_evidence(cls, found: Evidence, lane: Lane, ess: float) -> "Finding":
        """Take log Z from the evidence of a fit."""
        assert found.log_evidence is not None
        return cls.of_log_z(found.log_evidence, lane, found.by_context, ess, found.caveat)


class Answer(NamedTuple):
    """What an engine says at every temperature, and at what cost: its draws at one, its evaluations at all."""

    findings: list[Finding]
    num_draws: int
    evaluations: Evaluations


type Engine = Callable[[PRNGKey, EngineProblem], Answer]
"""Answers for all temperatures, or raises the error that says why it does not apply."""


def from_known_optimum(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Take what the user knows."""
    if problem.optimum is None:
        raise EngineError("no optimum is known beforehand; pass optimum= where one is")
    odd = is_control(problem.structure)
    findings = []
    for lane in problem.lanes:
        known = evaluate_optimum(problem.optimum, lane.beta)
        findings.append(Finding(None if odd else known * (1.0 if lane.beta is None else 1 / lane.beta), known))
    return Answer(findings, 0, Evaluations())


def from_enumeration(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Sum over all assignments, or over the states of a scan; with nature by soft backward induction."""
    problem.refuse_unreachable()
    count = problem.budget if problem.is_shared else problem.each
    try:
        if problem.is_shared:
            targets = [enumerate_target(problem.lanes[0].alone, {}, problem.beta, count)]
        else:
            targets = [enumerate_target(lane.alone, {}, lane.beta, count) for lane in problem.lanes]
    except EngineError as error:
        # Here the budget is what limits the count.
        raise EngineError(str(error).replace("max_count=", "budget=")) from error
    spent = Evaluations(*np.sum([target.evaluations for target in targets], 0).tolist())
    return Answer([_exact(targets, i, lane) for i, lane in enumerate(problem.lanes)], 0, spent)


def _exact(targets: list[WeightedDraws], index: int, lane: Lane) -> Finding:
    target = targets[index] if len(targets) > 1 else targets[0].select(lane.beta)
    assert target is not None
    assert target.optimum is not None
    optimum, evidence = Interval.exact(target.optimum.mean()), target.log_evidence
    if evidence is None:
        return Finding(None, optimum)
    return Finding(Interval.exact(evidence.mean.mean()), optimum, Interval.exact(evidence.mean))


def from_weighted_prior(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Weigh draws of the prior."""
    return _weighted(problem, problem.samples, key, of_fit=False)


def from_weighted_fit(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Weigh draws of which half come from the fit and half from the prior."""
    problem.require_fit()
    return _weighted(problem, problem.samples, key, of_fit=True)


def _weighted(
    problem: EngineProblem, samples: Callable[..., list[MixtureSample]], key: PRNGKey, *, of_fit: bool
) -> Answer:
    problem.refuse_unreachable()
    problem.refuse_nature()
    drawn = samples(key, of_fit=of_fit)
    findings = []
    for lane, sample in zip(problem.lanes, drawn, strict=True):
        found, sampled = weighed(problem, lane, sample)
        findings.append(Finding.of_evidence(found, lane, sampled.ess))
    different = {id(sample): len(sample.reward) for sample in drawn}
    return Answer(findings, len(drawn[0].reward), Evaluations.of_both(sum(different.values())))


def weighed(problem: EngineProblem, lane: Lane, sample: MixtureSample) -> tuple[Evidence, TemperedSample]:
    """See a sample at one temperature, without bounds on the rewards."""
    check_rewards(problem.structure, sample.reward, Bounds())
    # A draw that earns −∞ spoils averages of rewards, of which log Z is none.
    with np.errstate(invalid="ignore"):
        sampled = TemperedSample(sample, lane.beta, observed=bool(problem.structure.names("observed")))
        return sampled.evidence(problem.structure.context_shape, "importance"), sampled


def from_rejection(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Accept draws of the prior, which are then draws of p*; limits are of their number, and of bounded weights."""
    problem.refuse_unreachable()
    problem.refuse_nature()
    if problem.beta is None:
        raise EngineError("without rewards there is none to accept by")
    if not problem.is_shared:
        raise EngineError("the fit trained a policy of its own at each temperature; compare at one with select(beta=)")
    policy = problem.lanes[0].alone
    found = rejection(
        key,
        policy.policy,
        *policy.args,
        beta=problem.beta,
        # A tolerance that is never met lets all proposals count, not only those that the draws need.
        num_samples=max(problem.budget // 32, 1),
        tolerance=1e-9,
        reward_bound=problem.reward_bound,
        max_proposals=max(problem.budget, 4),
    )
    lanes = [_accepted(found, lane) for lane in problem.lanes]
    assert found.num_accepted is not None
    return Answer(lanes, int(found.num_accepted.reshape(len(lanes), -1)[0].min()), found.evaluations)


def _accepted(found: WeightedDraws, lane: Lane) -> Finding:
    one = found.select(lane.beta)
    assert one is not None
    assert one.log_evidence is not None
    assert one.num_accepted is not None
    assert one.reward_bound is not None
    accepted, tries = np.reshape(one.num_accepted, -1), found.num_proposed
    num, each = len(accepted), one.log_evidence
    # Contexts share the level, and so do the two kinds of limits, so that all hold together. Few accepted draws tell
    # more by their number, many by the weights of all proposals.
    level = LEVEL / num / 2
    counted = np.asarray([binomial_limits(int(k), tries, level) for k in accepted]).T
    top = np.reshape(one.reward_bound, -1) / lane.beta
    chance, error = np.exp(np.reshape(each.mean, -1) - top), np.reshape(each.se, -1)
    width = bernstein_width(tries * (chance * error) ** 2, tries, 1.0, level)
    few = accepted < MIN_EXACT
    with np.errstate(divide="ignore"):
        low = np.log(np.where(few, counted[0], np.maximum(chance - width, 0.0))) + top
        high = np.log(np.where(few, counted[1], np.minimum(chance + width, 1.0))) + top
    mean, se = each.mean.mean(), np.linalg.norm(each.se) / num
    trusted = accepted.min() >= MIN_EXACT
    log_z = Interval.normal(mean, se)
    if not trusted:
        log_z = log_z._replace(lower=np.asarray(np.nan), upper=np.asarray(np.nan))
    log_z = log_z._replace(conservative_lower=low.mean(), conservative_upper=high.mean())
    note = "" if trusted else f"{int(accepted.min())} accepted draws are too few for a standard error to be trusted"
    return Finding.of_log_z(log_z, lane, Interval.normal(*each), float(accepted.min()), note)


def from_nuts(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Bound log Z from above by a chain of p*, and from below by weighted draws of the fit, or of the prior."""
    problem.refuse_unreachable()
    problem.refuse_nature()
    draw_key, chain_key = split_keys(key)
    length = chain_length(problem.each)
    findings, spent = [], 0
    samples = problem.samples(draw_key, of_fit=problem.lanes[0].one is not None)
    for i, (lane, sample) in enumerate(zip(problem.lanes, samples, strict=True)):
        # A quarter of the draws leaves the rest of the budget to the chain.
        found, sampled = weighed(problem, lane, _first(sample, problem.each // 4))
        programs, params = (lane.programs, lane.params) if lane.one is not None else (lane.alone, {})
        found, steps = bracket_by_nuts(fold_in(chain_key, i), programs, params, lane.beta, found, sampled, length)
        findings.append(Finding.of_evidence(found, lane, sampled.ess))
        spent += steps + len(sampled.sample.reward)
    return Answer(findings, length.num_chains * length.num_draws, Evaluations.of_both(spent))


def _first(sample: MixtureSample, number: int) -> MixtureSample:
    """Keep as many draws of the fit, and as many of the prior."""
    half = max(min(number // 2, sample.num_fit), 64)
    rows = np.r_[0:half, sample.num_fit : sample.num_fit + half]
    kept = {name: x[rows] for name, x in sample._asdict().items() if name != "num_fit"}
    return MixtureSample(**kept, num_fit=half)


def from_hindsight(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Bound the optimum of control by an agent that knows nature's draws beforehand; below, by the fit."""
    problem.refuse_unreachable()
    if not problem.structure.names("environment"):
        raise EngineError("nature draws nothing that hindsight could know")
    problem.require_fit()
    if problem.beta is None:
        raise EngineError("without rewards there is no control")
    findings, spent = [], Evaluations()
    for i, lane in enumerate(problem.lanes):
        assert lane.beta is not None
        bound = bound_by_hindsight(fold_in(key, i), lane.programs, lane.params, lane.beta, problem.each)
        if bound.upper is None:
            raise EngineError(bound.reason)
        findings.append(Finding(None, Interval.between(-np.inf, bound.limit), note=bound.reason))
        spent = spent.plus(bound.evaluations)
    return Answer(findings, 0, spent)


def from_fit(key: PRNGKey, problem: EngineProblem) -> Answer:
    """Take J of the fit, which no optimum lies below."""
    problem.require_fit()
    findings, drawn = [], 0
    spent = Evaluations() if problem.trained is None else problem.trained.evaluations
    for i, lane in enumerate(problem.lanes):
        objective, ess, drawn = objective_of_fit(fold_in(key, i), problem, lane)
        low = Interval.between(objective.conservative_lower, np.inf)
        odd = is_control(problem.structure)
        log_z = None if odd else low * (1.0 if lane.beta is None else 1 / lane.beta)
        findings.append(Finding(log_z, low, ess=ess))
        spent = spent.plus(Evaluations.of_both(drawn))
    return Answer(findings, drawn, spent)


def objective_of_fit(key: PRNGKey, problem: EngineProblem, lane: Lane) -> tuple[Interval, float, int]:
    """Return J of the fit, what its draws are worth as draws of p*, and their number."""
    assert lane.one is not None
    # A fit that was trained here has spent most of its budget on that.
    num = max(problem.each // 4 if problem.trained is not None else problem.each, 128)
    if problem.reach or is_control(problem.structure):
        num = min(num, DRAWS_PER_BATCH)
        found = estimate_evidence(key, lane.one, lane.beta, num, problem.reach, problem.optimum)
        return found.objective, math.nan, found.num_samples
    sample = _first(problem.samples(key, of_fit=True)[problem.lanes.index(lane)], num)
    found, _ = weighed(problem, lane, sample)
    return found.objective, float(found.ess), len(sample.reward)


def gap_to(objective: Interval, optimum: Interval) -> Interval:
    """Return J* − J of independent estimates; only one end if J* has only one."""
    se = np.asarray(np.hypot(np.nan_to_num(optimum.se), objective.se))
    low = np.maximum(optimum.conservative_lower - objective.conservative_upper, 0.0)
    high = np.maximum(optimum.conservative_upper - objective.conservative_lower, 0.0)
    one_sided = np.isnan(optimum.mean) | ~np.isfinite(high)
    mean = np.maximum(optimum.mean - objective.mean, 0.0)
    trusted = np.isfinite(optimum.upper) & ~one_sided
    return Interval(
        np.where(one_sided, np.nan, mean),
        np.where(np.isfinite(high) | np.isfinite(low), se, np.nan),
        np.where(trusted, np.maximum(mean - 1.96 * se, 0.0), np.nan),
        np.where(trusted, mean + 1.96 * se, np.nan),
        low,
        high,
    )


def stacked(intervals: list[Interval], lead: tuple[int, ...]) -> Interval:
    """Join the intervals of each temperature, [*beta, ...]."""
    joined = [np.stack([np.asarray(x, float) for x in parts]) for parts in zip(*intervals, strict=True)]
    return Interval(*(x.reshape((*lead, *x.shape[1:])) for x in joined))
