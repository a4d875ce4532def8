"""The evidence of one fit by rejection or importance sampling: weighted draws of a mixture of fit and prior."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from bayesrl.compilation.random_keys import dummy_key
from bayesrl.core.programs import Programs
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure
from bayesrl.core.trace import trace_abstractly, trace_program
from bayesrl.diagnostics.evidence.confidence_limits import mean_interval
from bayesrl.diagnostics.evidence.mixture_sample import MixtureSample
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import MIN_ESS, MIN_EXACT, Bounds, TemperedSample
from bayesrl.errors import EngineError, PolicyError
from bayesrl.monte_carlo.reward_bounds import reward_bounds
from bayesrl.posterior.sampling import writes_draws
from bayesrl.statistics.best_of_n_law import estimated_law, rank_rewards
from bayesrl.statistics.estimates import Estimate, Interval

MOST_DRAWS = 2**17
FIRST_DRAWS = 2**13
"""Draws of the first batch: half of the fit, half of the prior."""

_MOST_TEXTS = 2**15  # of all contexts together
_FEWEST_TEXTS = 2**10

_CELLS = 2**23
_GROUPS = 8


def bracket_by_sampling(
    programs: Programs,
    beta: float | None,
    draw: Callable[[int], MixtureSample],
    num_samples: int,
    bounds: Bounds,
) -> tuple[Evidence, TemperedSample]:
    """Bracket one fit from its draws and those of the prior: fewer than `num_samples` if they settle the gap."""
    structure = programs.structure

    def find(num: int) -> tuple[Evidence, TemperedSample]:
        sample = draw(num)
        check_rewards(structure, sample.reward, bounds)
        never = bool((sample.reward[: sample.num_fit] == -np.inf).any())
        # The J of a fit that draws −∞ is set below, so what averages warn of does not matter.
        with np.errstate(invalid="ignore" if never else "warn"):
            sampled = TemperedSample(sample, beta, observed=bool(structure.names("observed")), bounds=bounds)
            found = sampled.evidence(structure.context_shape, "importance")
        return (_without_limit(found) if never else found), sampled

    return draw_until(find, lambda found: is_sharp(found[0]), num_samples)


def draw_until[T](find: Callable[[int], T], is_known: Callable[[T], bool], num_samples: int) -> T:
    """Quadruple the number of draws until the answer is precise enough."""
    num = min(FIRST_DRAWS, num_samples)
    found = find(num)
    while num < num_samples and not is_known(found):
        num = min(4 * num, num_samples)
        found = find(num)
    return found


def most_draws(num_samples: int | None, programs: Programs) -> int:
    """Return the number of draws that fits into memory, at most the requested one, or else what takes minutes."""
    structure = programs.structure
    if num_samples is None:
        num_samples = MOST_DRAWS
        if writes_draws(programs):
            # A text costs thousands of times what another draw does, and contexts share the noise of their mean.
            num_samples = max(_FEWEST_TEXTS, _MOST_TEXTS // max(math.prod(structure.context_shape), 1))
    return max(128, min(num_samples, _CELLS // max(structure.width // 4, 1)))


def find_bounds(programs: Programs, beta: float | None, reward_bound: float | None) -> Bounds:
    """Return the greatest reward and likelihood that a draw can have, proven or given; inf without a bound."""
    structure = programs.structure
    contexts = max(math.prod(structure.context_shape), 1)
    discrete = all(_is_discrete(programs, name) for name in structure.names("observed"))
    likelihood = 0.0 if discrete else math.inf  # a probability is at most 1, a density is not
    if beta is None:
        return Bounds(np.zeros(contexts), likelihood)
    if reward_bound is not None:
        return Bounds(np.full(contexts, float(reward_bound)), likelihood)
    _, upper = reward_bounds(programs.policy, structure, programs.args)
    return Bounds(np.asarray(upper, float).reshape(-1) * np.ones(contexts), likelihood)


def _is_discrete(programs: Programs, name: str) -> bool:
    policy = FoldedKeys(programs.policy, dummy_key())
    return bool(trace_abstractly(lambda: trace_program(policy, *programs.args)).sites[name].fn.support.is_discrete)


def check_rewards(structure: Structure, reward: np.ndarray, bounds: Bounds) -> None:
    """Refuse rewards that would spoil every average, and a bound that a draw exceeds."""
    names = list(structure.names("reward"))
    if np.isnan(reward).any() or (reward == np.inf).any():
        count = int((np.isnan(reward) | (reward == np.inf)).any(1).sum())
        raise PolicyError(
            f"the rewards {names} were nan or inf for {count} of {len(reward)} draws; "
            "make the reward finite for every draw of the policy"
        )
    if not (reward > -np.inf).any(0).all():
        raise EngineError(
            f"the rewards {names} were -inf for every draw of some context, so nothing is possible there; "
            "allow at least one action, or draw more"
        )
    # Single precision may put a reward a little above its true bound.
    above = reward - bounds.reward
    if (above > 1e-4 * np.maximum(np.abs(bounds.reward), 1.0)).any():
        row, column = np.unravel_index(int(np.argmax(above)), above.shape)
        raise EngineError(
            f"a draw earned {reward[row, column]:.6g}, more than reward_bound={bounds.reward[column]:.6g}; "
            "raise the bound to what the rewards can reach"
        )


def estimate_best_of_n(sample: MixtureSample, beta: float, n: int) -> Evidence:
    """Estimate the distance of one fit to the law of the best of n draws, whose F comes from draws of the prior.

    Both divergences are averages of terms that are at least 0. Errors are those over all draws, and those between
    groups of draws of the prior that F may come from.
    """
    pool = sample.reward[sample.num_fit :]
    of_q, of_prior = sample.ratios

    def terms(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tilt = _log_best_of_n(sample.reward, part, n)
        of_target, u = of_prior * np.exp(tilt), tilt + sample.ratio
        reverse = np.where(of_q > 0, of_target - of_q * (1 + np.where(of_q > 0, u, 0.0)), of_target)
        return np.maximum(reverse, 0.0), np.maximum(of_target * (u - 1) + of_q, 0.0), of_target * (u > math.log(10))

    reverse, forward, missed = terms(pool)
    parts = [terms(part) for part in np.array_split(pool, _GROUPS)]

    def interval(values: np.ndarray, which: int) -> Interval:
        between = np.std([part[which].mean() for part in parts], ddof=1) / math.sqrt(_GROUPS)
        found = mean_interval(values)
        told = Interval.normal(found.mean, np.hypot(found.se, between))
        none, all_ = np.zeros(()), np.asarray(np.inf)
        return told._replace(lower=np.maximum(told.lower, 0.0), conservative_lower=none, conservative_upper=all_)

    apart, scale = interval(reverse, 0), estimated_law(rank_rewards(pool), n)[1].mean.mean()
    nothing, own = np.asarray(np.nan), slice(0, sample.num_fit)
    objective = Interval(-apart.mean, apart.se, -apart.upper, -apart.lower, np.asarray(-np.inf), np.zeros(()))
    return Evidence(
        beta=np.asarray(beta),
        method="importance",
        lower=Estimate(-apart.mean, apart.se),
        upper=Estimate(np.zeros(()), np.zeros(())),
        caveat="the distribution of the reward was estimated too, from draws of the prior",
        log_evidence=None,
        log_marginal=None,
        optimum=Interval.exact(0.0),
        prior_objective=Interval.exact(-beta * scale),
        objective=objective * beta,
        reward=mean_interval(sample.reward[own]),
        kl=mean_interval(-sample.ratio[own]),
        gap=apart * beta,
        kl_reverse=apart,
        kl_forward=interval(forward, 1),
        ess=nothing,
        khat=nothing,
        missed_mass=np.asarray(missed.mean()),
        num_samples=len(sample.reward),
        best_of=n,
    )


def _log_best_of_n(reward: np.ndarray, pool: np.ndarray, n: int) -> np.ndarray:
    """Return log pₙ/π₀ of draws of these rewards, [draws, contexts], where F is that of a pool with the draw in it."""
    found = np.empty_like(reward)
    for c in range(reward.shape[1]):
        ordered = np.sort(pool[:, c])
        upto = (np.searchsorted(ordered, reward[:, c], side="right") + 1) / (len(ordered) + 1)
        below = np.searchsorted(ordered, reward[:, c], side="left") / (len(ordered) + 1)
        found[:, c] = n * np.log(upto) + np.log1p(-((below / upto) ** n)) - np.log(upto - below)
    return found


def _without_limit(found: Evidence) -> Evidence:
    """Set J to −∞ for a fit that draws what earns −∞: no average over draws would show it."""
    lost, apart = Interval.exact(-np.inf), Interval.exact(np.inf)
    return dataclasses.replace(found, objective=lost, reward=lost, gap=apart, kl_reverse=apart)


def is_sharp(found: Evidence) -> bool:
    """Whether the gap is known to a fifth of itself, or to a hundredth of the possible gain."""
    assert found.gap is not None
    assert found.prior_objective is not None
    if not np.isfinite(found.objective.mean):  # the fit draws what earns −∞, and more draws would not change that
        return True
    width = float(found.gap.upper - found.gap.lower)
    gain = float(found.optimum.mean - found.prior_objective.mean)
    return width <= max(0.2 * float(found.gap.mean), 0.01 * gain)


def needs_particles(
    found: Evidence, sampled: TemperedSample, num_samples: int, *, continuous: bool, has_draws: bool
) -> bool:
    """Whether first draws say that draws do not reach p*, so that particles are worth their compilation.

    They do not where fewer than `MIN_EXACT` of all draws would be kept by rejection, and nothing else calibrates their
    weights: no small support that they cover, and no NUTS beside weights that are worth enough.
    """
    assert found.log_evidence is not None
    if is_sharp(found) or np.isfinite(found.log_evidence.upper) or not np.isfinite(found.objective.mean):
        return False
    if continuous and not has_draws and sampled.ess >= MIN_ESS:
        return False
    return has_draws or bool(sampled.exact_draws.min() * num_samples < MIN_EXACT * len(sampled.w))
