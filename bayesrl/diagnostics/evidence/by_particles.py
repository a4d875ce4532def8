"""Both sides of log Z by sequential Monte Carlo: forward runs from below, runs that hold a draw of p* from above."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy import special
from scipy.special import logsumexp

from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.evidence.by_sampling import MOST_DRAWS, most_draws
from bayesrl.diagnostics.evidence.confidence_limits import LEVEL, NUM_GROUPS, markov_lower
from bayesrl.diagnostics.evidence.mixture_sample import target_log_weights
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import Bounds, TemperedSample
from bayesrl.errors import EngineError
from bayesrl.monte_carlo.particles.bridging import Bridge, bridge
from bayesrl.monte_carlo.particles.conditional_chains import SWEEPS, Runs, run_particles, walk_chains
from bayesrl.monte_carlo.particles.engines import ParticleEngine, ParticleOptions, own_engine, usual_twist
from bayesrl.monte_carlo.rejection_sampling import rejection
from bayesrl.monte_carlo.sequential_monte_carlo import choose_engine
from bayesrl.statistics.estimates import Estimate, Interval, mean_of_draws
from bayesrl.typing import Params, PRNGKey

FEW_TEMPERATURES = 60
"""Longer paths of temperature take minutes, so that only who asks for particles gets them."""

_MOST_PARTICLES = 512
_MANY_CONTEXTS = 8
_PILOT = 4
_PILOT_SPREAD = 0.5
"""Where log Ẑ of the pilot's runs spreads by more than this, nats, more particles are taken."""

_SPREAD = 1.0
"""Where log Ẑ of single runs spreads by more than this, nats, its standard error is not to be trusted."""

_FEWEST_GROUPS = 8
_SIDES_APART = 4.0
"""Standard errors between the two sides' estimates beyond which neither is trusted."""


def _sizes(programs: Programs) -> tuple[int, int]:
    """Return the number of runs and the fewest particles of each: contexts share the noise, so many need fewer."""
    contexts = math.prod(programs.structure.context_shape) // _MANY_CONTEXTS
    return (NUM_GROUPS, 64) if contexts < 1 else (NUM_GROUPS // 2 if contexts < 4 else _FEWEST_GROUPS, 16)


class Above(NamedTuple):
    """Runs that hold a draw of p*.

    Attributes:
        log_z: log Ẑ, [each, groups, contexts], nats: runs of one group depend on one another.
        caveat: what the upper side rests on; empty if the draws are exact.
        met: whether the draws may be taken for draws of p*, [contexts].
    """

    log_z: np.ndarray
    caveat: str
    met: np.ndarray

    @property
    def has_upper(self) -> bool:
        """Whether there is an upper side."""
        return bool(self.met.all())

    def of_context(self, context: int) -> "Above":
        """Return the runs of one context, as if it stood alone."""
        one = slice(context, context + 1)
        return self._replace(log_z=self.log_z[..., one], met=self.met[one])


class Bracket(NamedTuple):
    """Log Z of the mean context from runs of both kinds, nats.

    Attributes:
        interval: with both limits; without calibrated ends where `trusted` is False.
        lower: mean of log Ẑ of free runs.
        upper: mean of log Ẑ of runs that hold a draw of p*; None without an upper side.
        by_context: the estimate of each context, and what moves it.
        caveat: what the upper side rests on, and why there are no calibrated ends.
        trusted: whether the standard error is.
    """

    interval: Interval
    lower: Estimate
    upper: Estimate | None
    by_context: Bridge
    caveat: str
    trusted: bool


def bracket_by_particles(
    key: PRNGKey,
    programs: Programs,
    params: Params,
    beta: float | None,
    found: Evidence,
    sampled: TemperedSample,
    bounds: Bounds,
    num_samples: int | None,
    twist: Any,
    exact_draws: Mapping[str, Any] | None,
    most_steps: int,
) -> Evidence:
    """Bracket one fit from particles of the prior or of the fit, whichever a pilot finds better.

    Below: E[Ẑ] = Z for every forward run. Above: E[1/Ẑ] = 1/Z for runs conditional on a draw of p*. Both limits are
    Markov's, and hold for any number of runs. The draws are exact if they are given, or if rejection gives them; else
    they come from chains of conditional runs, and the upper side is asymptotic. The pilot's draws are its own, so its
    choice costs nothing of the level.

    Args:
        key: consumed whole.
        programs: programs on all data, the policy frozen.
        params: of the one fit.
        beta: reward units per nat; None without rewards.
        found: the bracket from draws of fit and prior.
        sampled: those draws.
        bounds: on the rewards, if they are proven or given.
        num_samples: greatest number of particles in all forward runs and in the fewest conditional ones, and of draws
            of the prior for exact ones; see `most_draws` for the default.
        twist: of `smc`; None takes the usual one.
        exact_draws: draws of p*, {site: [draws, ...]}, if there are any.
        most_steps: of temperature; a longer path is given up.

    References:
        Grosse, Ghahramani & Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte Carlo".
    """
    num_runs, fewest = _sizes(programs)
    num, particles = (most_draws(given, programs) for given in (num_samples, num_samples or MOST_DRAWS))
    most = int(np.clip(particles // (num_runs * (SWEEPS[0] + 2)), 2, _MOST_PARTICLES))
    ways = _ways(fold_in(key, 0), programs, params, beta, num_runs, (fewest, most), most_steps, twist)
    exact = exact_draws
    if exact is None and sampled.exact_draws.min() * num >= num_runs * len(sampled.w):
        exact = _exact_draws(fold_in(key, 2), programs, beta, bounds, num, num_runs)
    tried = []
    for i, (engine, size) in enumerate(ways):
        own_key = fold_in(key, 3 + i)
        forward = run_particles(fold_in(own_key, 0), engine, beta, size, None)
        if exact is None:
            above = from_chains(fold_in(own_key, 1), programs, engine, beta, size, forward)
        else:
            above = _from_exact_draws(fold_in(own_key, 2), engine, beta, size, num_runs, exact)
        tried.append((forward, above))
        # The next way's runs are its own, so that others came to nothing does not move them.
        if above.has_upper:
            break
    forward, above = next((pair for pair in tried if pair[1].has_upper), tried[0])
    return _joined(programs, params, beta, found, sampled, forward, above)


def _ways(
    key: PRNGKey,
    programs: Programs,
    params: Params,
    beta: float | None,
    num_runs: int,
    between: tuple[int, int],
    most_steps: int,
    given: Any,
) -> list[tuple[ParticleEngine, int]]:
    """Order the ways of proposing, from the prior or from the fit, by a pilot; at most two of them, with their sizes.

    Log Ẑ is too low on average, and the better proposal's is higher; its spread is taken off, so that noise does not
    pass for height. More particles are taken where a few leave log Ẑ noisy.
    """
    num = min(between)
    texts = own_engine(programs.policy) is not None
    twist = given if given is not None else usual_twist(programs.policy)
    candidates: list[tuple[Any, Any, float]] = [(None, twist, 0.5), ((programs, params), twist, 0.5)]
    if texts:
        # A fit that looks ahead by itself is resampled too early by weights that do not: its last way is not at all.
        candidates.append(((programs, params), None, 0.0))
    policy = replace(programs, guide=None, transforms={})

    def make(i: int, num_particles: int, replications: int) -> ParticleEngine:
        proposal, twist, below = candidates[i]
        options = ParticleOptions(num_particles, replications, below, "systematic", twist, most_steps=most_steps)
        return choose_engine(policy, proposal, "auto", options)

    runs = []
    for i in range(len(candidates)):
        try:
            # The pilot runs what the bracket will run, so that it compiles nothing of its own.
            engine = make(i, num, _PILOT if texts else num_runs)
            log_z = run_particles(fold_in(key, i), engine, beta, num, None).log_z
        except EngineError as error:
            # A twist that does not fit is the caller's mistake, and the first way shows it.
            if given is not None and i == 0:
                raise
            told = error
            continue
        spread = log_z.std(0, ddof=1)
        # Contexts average their noise away, as long as none of them is too noisy to be trusted.
        noise = max(float(np.sqrt((spread**2).mean())), float(spread.max()) * _PILOT_SPREAD / _SPREAD)
        runs.append((float((log_z.mean(0) - spread).mean()), noise, i, engine))
    if not runs:
        raise told
    ways = []
    for _, noise, i, engine in sorted(runs, key=lambda run: run[:3], reverse=True)[:2]:
        own = num
        if noise > _PILOT_SPREAD and between[1] > num:
            own = int(min(between[1], num * math.ceil((noise / _PILOT_SPREAD) ** 2)))
        ways.append((engine, num) if own == num and not texts else (make(i, own, num_runs), own))
    return ways


def _exact_draws(
    key: PRNGKey, programs: Programs, beta: float | None, bounds: Bounds, num_samples: int, num_runs: int
) -> dict[str, np.ndarray] | None:
    """Draw a path of p* for each run by rejection; None where that does not reach."""
    if beta is None or not np.isfinite(bounds.reward).all():
        return None
    try:
        drawn = rejection(
            key,
            programs.policy,
            *programs.args,
            beta=beta,
            num_samples=num_runs,
            reward_bound=bounds.reward.reshape(programs.structure.context_shape),
            max_proposals=max(num_samples, 4),
        )
    except EngineError:
        return None
    if drawn.ess is None or drawn.ess.min() < num_runs:
        return None
    return {name: np.asarray(x) for name, x in drawn.sites.items()}


def _from_exact_draws(
    key: PRNGKey,
    engine: ParticleEngine,
    beta: float | None,
    num: int,
    num_runs: int,
    exact: Mapping[str, Any],
) -> Above:
    """Run once on each draw, or where there are fewer draws than runs, equally often, [each, draws]."""
    count = min(len(next(iter(exact.values()))), num_runs)
    each, held = num_runs // count, np.arange(num_runs) % count
    runs = run_particles(key, engine, beta, num, {name: np.asarray(x)[held] for name, x in exact.items()})
    log_z = runs.log_z[: each * count].reshape(each, count, -1)
    return Above(log_z, "", np.ones(log_z.shape[-1], bool))


def from_chains(
    key: PRNGKey, programs: Programs, engine: ParticleEngine, beta: float | None, num: int, forward: Runs, *most: int
) -> Above:
    """Run on the draws that chains of conditional particles give; they are judged after `most` runs, or `SWEEPS`."""
    chains = walk_chains(key, engine, beta, num, forward, programs.structure, most or SWEEPS)
    caveat = "the upper side is asymptotic: it rests on chains of conditional particles having reached all of p*"
    if not chains.met.all():
        caveat = (
            f"chains of conditional particles have not met after {chains.num_sweeps} runs (R-hat {chains.rhat:.2f}), "
            "so log Z has no upper side"
        )
    return Above(chains.log_z, caveat, chains.met)


def _log_mean(log_values: np.ndarray) -> np.ndarray:
    return np.asarray(logsumexp(log_values, axis=0) - math.log(len(log_values)))


def _joined(
    programs: Programs,
    params: Params,
    beta: float | None,
    found: Evidence,
    sampled: TemperedSample,
    forward: Runs,
    above: Above,
) -> Evidence:
    """Put the limits of particles in the place of those of weighted draws; J and the prior's objective stay."""
    scale, shape = 1.0 if beta is None else beta, programs.structure.context_shape
    given = found.log_marginal if beta is not None else None
    bracket = bracket_of_runs(forward.log_z, above, given, sampled.rounding)
    evidence, by_context, trusted = bracket.interval, bracket.by_context, bracket.trusted
    objective = found.objective * (1 / scale)
    gap = _gap(evidence, objective, trusted=trusted)
    mean_w, influence_of_w = _mean_under_target(programs, params, beta, forward)
    # KL(p*‖q) = E_p*[w] − log Z, of the same runs: their errors partly cancel.
    forward_z = _log_mean(forward.log_z)
    influence = np.exp(forward.log_z - forward_z) - 1
    _, forward_se = mean_of_draws(influence_of_w - influence.mean(1))
    kl_forward = Interval.normal(max(mean_w - float(forward_z.mean()), 0.0), forward_se)
    if not trusted:
        kl_forward = Interval.between(0.0, np.inf)._replace(mean=kl_forward.mean, se=kl_forward.se)
    errors = np.hypot(*(x.std(0, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0.0 * x[0] for x in by_context[1:]))
    return replace(
        found,
        method="smc",
        lower=bracket.lower,
        upper=bracket.upper,
        caveat=bracket.caveat,
        log_evidence=evidence,
        by_context=Interval.normal(by_context.log_z.reshape(shape), errors.reshape(shape)),
        optimum=evidence * scale,
        gap=gap * scale,
        kl_reverse=gap,
        kl_forward=kl_forward,
        num_samples=found.num_samples + (len(forward.log_z) + above.log_z[..., 0].size) * forward.log_weights.shape[1],
    )


def bracket_of_runs(
    forward: np.ndarray, above: Above, marginal: Interval | None = None, rounding: float = 0.0
) -> Bracket:
    """Bracket log Z − log p(y) of the mean context from log Ẑ of runs.

    Args:
        forward: of free runs, [runs, contexts], nats.
        above: runs that hold a draw of p*.
        marginal: log p(y), nats; None means 0.
        rounding: possible error of single precision, nats.
    """
    given, error, doubt = _marginal(marginal)
    low, high = forward - given, above.log_z - given
    contexts = low.shape[1]
    # The mean of 1/Ẑ over runs that depend on one another has the expectation 1/Z all the same.
    means = -_log_mean(-high).mean(1)
    upper = Estimate(np.asarray(means.mean()), np.asarray(_error(means))) if above.has_upper else None
    least = np.asarray(markov_lower(low.sum(1)) / contexts - rounding - doubt[1])
    # E[1/Ẑ] = 1/Z, so the lower limit of −log Z, with its sign turned, is the upper one of log Z.
    of_upper = -markov_lower(_log_mean(-high.sum(-1))) / contexts + rounding + doubt[0]
    most = np.asarray(of_upper if above.has_upper else np.inf)
    by_context, caveat, trusted = _both_sides(low, high, above)
    log_z = np.asarray(by_context.log_z.mean())
    se = math.hypot(error, *(_error(x.mean(1)) for x in (by_context.of_forward, by_context.of_backward)))
    wide = special.stdtrit(len(low) - 1, 1 - LEVEL) * se + rounding if trusted else math.nan
    interval = Interval(log_z, np.asarray(se), log_z - wide, log_z + wide, least, most)
    return Bracket(interval, Estimate(*mean_of_draws(low.mean(1))), upper, by_context, caveat, trusted)


def _marginal(known: Interval | None) -> tuple[float, float, tuple[float, float]]:
    """Return log p(y), its standard error, and how far it may lie below and above its mean; nats."""
    if known is None:
        return 0.0, 0.0, (0.0, 0.0)
    mean = float(known.mean)
    return mean, float(known.se), (mean - float(known.conservative_lower), float(known.conservative_upper) - mean)


def _both_sides(low: np.ndarray, high: np.ndarray, above: Above) -> tuple[Bridge, str, bool]:
    """Estimate log Z from all runs that may be used; also say why its standard error is not to be trusted, if so."""
    forward = _log_mean(low)
    free = np.exp(low - forward) - 1
    # Forward runs alone may all have missed a mode, and say nothing of it.
    alone = Bridge(forward, free, np.zeros((2, low.shape[1])))
    if not above.has_upper:
        return alone, above.caveat, False
    # The spread is of single runs, not of their mean: where it is wide, Ẑ is skewed and a few runs decide.
    if max(low.std(0).max(), high.std((0, 1)).max()) >= _SPREAD:
        why = "single runs of particles differ by more than a nat, so only conservative limits are given"
        return alone, _and(above.caveat, why), False
    backward = -_log_mean(-high)
    apart = float((forward + _log_mean(-backward)).mean())
    errors = _error(free.mean(1)), _error((np.exp(-(backward + _log_mean(-backward))) - 1).mean(1))
    if len(backward) >= _FEWEST_GROUPS and abs(apart) > _SIDES_APART * math.hypot(*errors) + 1e-3:
        return alone, _and(above.caveat, "free runs of particles and conditional ones contradict each other"), False
    return (bridge(low, high) if len(backward) >= _FEWEST_GROUPS else alone), above.caveat, True


def _and(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second


def _error(values: np.ndarray) -> float:
    """Return the standard error of a mean of independent numbers; 0 of one, which has no spread to tell it."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _mean_under_target(programs: Programs, params: Params, beta: float | None, runs: Runs) -> tuple[float, np.ndarray]:
    """Average w = log(π₀·exp(R/β)/q) over p*, mean over contexts, nats; also return each run's influence on it."""
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in runs.sites.items()}
    w = target_log_weights(programs, params, flat, beta).reshape(runs.log_weights.shape)
    weights = np.exp(runs.log_weights - logsumexp(runs.log_weights, axis=(0, 1), keepdims=True))
    w = np.where(weights > 0, w, 0.0)
    mean = (weights * w).sum((0, 1))
    # Particles of one run depend on one another, so their influence is summed before its spread is taken.
    influence = len(w) * (weights * (w - mean)).sum(1).mean(-1)
    return float(mean.mean()), influence


def _gap(evidence: Interval, objective: Interval, *, trusted: bool) -> Interval:
    """Return KL(q‖p*) = log Z − J/β of independent estimates; without an upper side only its lower end exists."""
    mean = evidence.mean - objective.mean
    se = np.asarray(np.hypot(evidence.se, objective.se))
    nothing = np.asarray(np.nan)
    return Interval(
        np.maximum(mean, 0.0),
        se,
        np.maximum(mean - 1.96 * se, 0.0) if trusted else nothing,
        mean + 1.96 * se if trusted else nothing,
        np.maximum(evidence.conservative_lower - objective.conservative_upper, 0.0),
        evidence.conservative_upper - objective.conservative_lower,
    )
