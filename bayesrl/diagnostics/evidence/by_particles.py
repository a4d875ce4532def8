"""Both sides of log Z by sequential Monte Carlo: forward runs from below, runs that hold a draw of p* from above."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy import special
from scipy.special import logsumexp

from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.evidence.confidence_limits import NUM_GROUPS, markov_lower
from bayesrl.diagnostics.evidence.mixture_sample import target_log_weights
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import Bounds, TemperedSample
from bayesrl.errors import EngineError
from bayesrl.exact.weighted_draws import context_axes, gather_by_context, numpy_generator
from bayesrl.monte_carlo.particles.engines import ParticleEngine, ParticleOptions
from bayesrl.monte_carlo.rejection_sampling import rejection
from bayesrl.monte_carlo.sequential_monte_carlo import choose_engine
from bayesrl.statistics.estimates import Estimate, Interval, mean_of_draws
from bayesrl.typing import Params, PRNGKey

_SWEEPS = 32
"""Conditional runs that a path goes through before it counts as a draw of p*; the first quarter warms up."""

_MOST_PARTICLES = 512
_MAX_RHAT = 1.1
_FALSE_ALARMS = 1e-3
_NOTHING = 1e-8
_PILOT = 4
_SPREAD = 1.0
"""Where log Ẑ of single runs spreads by more than this, nats, its standard error is not to be trusted."""


class _Runs(NamedTuple):
    """Replications of particles: paths [replications, particles, ...], and log-weights with contexts last, nats."""

    sites: dict[str, np.ndarray]
    log_weights: np.ndarray

    @property
    def log_z(self) -> np.ndarray:
        """Log Ẑ of each replication, [replications, contexts], nats."""
        return np.asarray(logsumexp(self.log_weights, axis=1) - math.log(self.log_weights.shape[1]))


def bracket_by_particles(
    key: PRNGKey,
    programs: Programs,
    params: Params,
    beta: float | None,
    found: Evidence,
    sampled: TemperedSample,
    bounds: Bounds,
    num_samples: int,
    twist: Any = None,
) -> Evidence:
    """Bracket one fit from particles of the prior or of the fit, whichever a pilot finds better.

    Below: E[Ẑ] = Z for every forward run. Above: E[1/Ẑ] = 1/Z for runs conditional on a draw of p*. Both limits are
    Markov's, and hold for any number of runs. The draws are exact if rejection gives them; else they come from chains
    of conditional runs, and the upper side is asymptotic.

    Args:
        key: consumed whole.
        programs: programs on all data, the policy frozen.
        params: of the one fit.
        beta: reward units per nat; None without rewards.
        found: the bracket from draws of fit and prior.
        sampled: those draws.
        bounds: on the rewards, if they are proven or given.
        num_samples: greatest number of particles in all forward runs.
        twist: of `smc`.

    References:
        Grosse, Ghahramani & Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte Carlo".
    """
    num = int(np.clip(num_samples // NUM_GROUPS, 2, _MOST_PARTICLES))
    engine = _better_engine(fold_in(key, 0), programs, params, beta, num, twist)
    forward = _run(fold_in(key, 1), engine, beta, num, None)
    exact = _exact_draws(fold_in(key, 2), programs, beta, bounds, num_samples)
    caveat, met = "", True
    if exact is None:
        exact, met = _chain(fold_in(key, 3), programs, engine, beta, num, forward)
        caveat = "the upper side is asymptotic: it rests on chains of conditional particles having reached all of p*"
    backward = _run(fold_in(key, 4), engine, beta, num, exact)
    if not met:
        caveat = "the chains of conditional particles have not met, so log Z has no upper side"
    return _joined(programs, params, beta, found, sampled, forward, backward, caveat, has_upper=met)


def _better_engine(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, num: int, twist: Any
) -> ParticleEngine:
    """Propose from the prior or from the fit: log Ẑ is too low on average, and the better proposal's is higher."""
    # A small pilot, as only the order of the two matters.
    small = ParticleOptions(min(num, 64), _PILOT, 0.5, "systematic", twist)
    proposals = [None, (programs, params)]
    means = []
    for i, proposal in enumerate(proposals):
        try:
            engine = choose_engine(replace(programs, guide=None, transforms={}), proposal, "auto", small)
            means.append(float(_run(fold_in(key, i), engine, beta, small.num_particles, None).log_z.mean()))
        except EngineError as error:
            # A twist that does not fit is the caller's mistake, and the first proposal shows it.
            if twist is not None and i == 0:
                raise error
            means.append(-math.inf)
    best = proposals[int(np.argmax(means))]
    options = small._replace(num_particles=num, num_replications=NUM_GROUPS)
    return choose_engine(replace(programs, guide=None, transforms={}), best, "auto", options)


def _run(key: PRNGKey, engine: ParticleEngine, beta: float | None, num: int, reference: Any) -> _Runs:
    draws, log_weights = engine.run(key, beta, reference)
    sites = {name: np.asarray(x).reshape(-1, num, *np.shape(x)[1:]) for name, x in draws.sites.items()}
    return _Runs(sites, log_weights.reshape(-1, num, log_weights.shape[-1]))


def _exact_draws(
    key: PRNGKey, programs: Programs, beta: float | None, bounds: Bounds, num_samples: int
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
            num_samples=NUM_GROUPS,
            reward_bound=bounds.reward.reshape(programs.structure.context_shape),
            max_proposals=max(num_samples, 4),
        )
    except EngineError:
        return None
    if drawn.ess is None or drawn.ess.min() < NUM_GROUPS:
        return None
    return {name: np.asarray(x) for name, x in drawn.sites.items()}


def _chain(
    key: PRNGKey, programs: Programs, engine: ParticleEngine, beta: float | None, num: int, forward: _Runs
) -> tuple[dict[str, np.ndarray], bool]:
    """Walk one chain per run towards p* by conditional particles; return its last paths, and whether chains have met.

    References:
        Andrieu, Doucet & Holenstein (2010), "Particle Markov chain Monte Carlo methods", section 4.5.
    """
    structure = programs.structure
    # Sweeps take the numbers from 0.
    rng = numpy_generator(fold_in(key, 2**20))
    paths, trail = _one_of_each(rng, forward, structure), []
    for sweep in range(_SWEEPS):
        runs = _run(fold_in(key, sweep), engine, beta, num, paths)
        paths = _one_of_each(rng, runs, structure)
        trail.append(runs.log_z.mean(1))
    return paths, _have_met(np.stack(trail[_SWEEPS // 4 :], 1))


def _have_met(values: np.ndarray) -> bool:
    """Whether chains [chains, sweeps] agree (R-hat), and their mean over chains does not drift (a t-test)."""
    chains, sweeps = values.shape
    within, between = values.var(1, ddof=1).mean(), values.mean(1).var(ddof=1)
    # Without any spread R-hat is undefined: the chains agree or they do not.
    if within < _NOTHING:
        return bool(between < _NOTHING)
    rhat = math.sqrt((sweeps - 1) / sweeps + between / within)
    drift = values[:, sweeps // 2 :].mean(1) - values[:, : sweeps // 2].mean(1)
    t = abs(drift.mean()) / (drift.std(ddof=1) / math.sqrt(chains))
    return bool(rhat < _MAX_RHAT and t < special.stdtrit(chains - 1, 1 - _FALSE_ALARMS / 2))


def _one_of_each(rng: np.random.Generator, runs: _Runs, structure: Any) -> dict[str, np.ndarray]:
    """Choose one path of each run in proportion to its weight, in each context on its own."""
    gumbel = rng.gumbel(size=runs.log_weights.shape)
    # Gumbel's trick: one array of noise draws for all runs and contexts, and never takes a weight of 0.
    index = (runs.log_weights + gumbel).argmax(1)  # [replications, contexts]
    axes, shape = context_axes(structure), structure.context_shape
    return {
        name: np.concatenate([gather_by_context(x[r], index[r : r + 1], axes[name], shape) for r in range(len(x))])
        for name, x in runs.sites.items()
    }


def _joined(
    programs: Programs,
    params: Params,
    beta: float | None,
    found: Evidence,
    sampled: TemperedSample,
    forward: _Runs,
    backward: _Runs,
    caveat: str,
    *,
    has_upper: bool,
) -> Evidence:
    """Put the limits of particles in the place of those of weighted draws; J and the prior's objective stay."""
    scale, rounding = 1.0 if beta is None else beta, sampled.rounding
    shape = programs.structure.context_shape
    given = 0.0 if found.log_marginal is None or beta is None else float(found.log_marginal.mean)
    low, high = forward.log_z - given, backward.log_z - given
    contexts = low.shape[1]
    by_context = logsumexp(low, axis=0) - math.log(len(low))
    influence = np.exp(low - by_context) - 1
    log_z, (_, se) = np.asarray(by_context.mean()), mean_of_draws(influence.mean(1))
    lower = Estimate(*mean_of_draws(low.mean(1)))
    upper = Estimate(*mean_of_draws(high.mean(1))) if has_upper else None
    least = np.asarray(markov_lower(low.sum(1)) / contexts - rounding)
    # E[1/Ẑ] = 1/Z, so the lower limit of −log Z, with its sign turned, is the upper one of log Z.
    most = np.asarray(-markov_lower(-high.sum(1)) / contexts + rounding if has_upper else np.inf)
    # Forward runs alone may all have missed a mode, and say nothing of it. The spread is of single runs, not of their
    # mean: where it is wide, Ẑ is skewed and a few runs decide.
    trusted = bool(has_upper and low.std(0).max() < _SPREAD and high.std(0).max() < _SPREAD)
    evidence = Interval.normal(log_z, se)._replace(conservative_lower=least, conservative_upper=most)
    if not trusted:
        nothing = np.asarray(np.nan)
        evidence = evidence._replace(lower=nothing, upper=nothing)
        caveat = caveat or "single runs of particles differ by more than a nat, so only conservative limits are given"
    objective = found.objective * (1 / scale)
    gap = _gap(evidence, objective, trusted=trusted)
    mean_w, influence_of_w = _mean_under_target(programs, params, beta, forward)
    # KL(p*‖q) = E_p*[w] − log Z, of the same runs: their errors partly cancel.
    _, forward_se = mean_of_draws(influence_of_w - influence.mean(1))
    kl_forward = Interval.normal(max(mean_w - given - float(log_z), 0.0), forward_se)
    if not trusted:
        kl_forward = Interval.between(0.0, np.inf)._replace(mean=kl_forward.mean, se=kl_forward.se)
    return replace(
        found,
        method="smc",
        lower=lower,
        upper=upper,
        caveat=caveat,
        log_evidence=evidence,
        by_context=Interval.normal(
            by_context.reshape(shape), (influence.std(0, ddof=1) / math.sqrt(len(influence))).reshape(shape)
        ),
        optimum=evidence * scale,
        gap=gap * scale,
        kl_reverse=gap,
        kl_forward=kl_forward,
        num_samples=found.num_samples + 2 * low.shape[0] * forward.log_weights.shape[1],
    )


def _mean_under_target(programs: Programs, params: Params, beta: float | None, runs: _Runs) -> tuple[float, np.ndarray]:
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
