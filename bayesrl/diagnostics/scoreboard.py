"""Scoring a fit: what it achieves at each β, what could be achieved, and the gap between them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.keys import key_from_seed, split_keys
from bayesrl.core.programs import Programs, declared_params
from bayesrl.core.structure import Structure
from bayesrl.diagnostics.evidence.by_known_optimum import KnownOptimum, evaluated, started
from bayesrl.diagnostics.evidence.confidence_limits import weighted_start
from bayesrl.diagnostics.scores import Score, Scoreboard
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.enumeration import enumerate_target, evaluate_exactly
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import draw_prior
from bayesrl.statistics.estimates import Estimate, Estimates
from bayesrl.statistics.quantities import is_conditioned
from bayesrl.svi.fitting import LEAST_DRAWS
from bayesrl.typing import Params, PRNGKey

MAX_COUNT = 2**17
"""Assignments, or states × assignments, that are enumerated in seconds."""

_DRAWN_NUMBERS = 4_000_000


@trace_cache()
def score(
    key: PRNGKey,
    posterior: Posterior,
    *new_args: Any,
    exact: KnownOptimum | None = None,
    max_count: int = MAX_COUNT,
) -> Scoreboard:
    """Score a fit on all of its data, or on other arguments such as held-out data.

    gap = J* − J(q). J* comes from `exact` or from enumeration, J(q) from enumeration where the
    program is small enough, else from fresh draws.

    Args:
        key: consumed whole.
        posterior: with its programs.
        *new_args: other arguments for the program.
        exact: gives J* per context, reward units, at a temperature.
        max_count: largest number of assignments to enumerate.

    Returns:
        `Scoreboard`, a row per β.

    Raises:
        PolicyError: the posterior was loaded without its policy.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.diagnostics.scoreboard import score
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> row = score(jax.random.key(1), posterior).rows[0]
        >>> round(row.optimum, 3), row.share < 0.01  # log((1 + e + e²) / 3)
        (1.309, True)
    """
    draw_key, prior_key = split_keys(key)
    best = posterior.select(restart="best")
    over_all = over_all_data(best, *new_args)
    programs = _programs(over_all)
    betas = [None] if posterior.beta is None else [float(b) for b in np.atleast_1d(posterior.beta)]
    first = jax.tree.map(lambda x: x[0], over_all._lanes()[0])
    target, note = _target(programs, first, posterior.beta, max_count)
    optima = _optima(target, betas, exact)
    if all(math.isfinite(optimum) for optimum in optima):
        note = ""
    estimates = _known(exact, over_all, betas)
    if estimates is None:
        estimates = _exact_estimates(over_all, best if not new_args else None, betas, max_count)
    if estimates is None:
        estimates = _by_beta(over_all.estimate(draw_key, _num_draws(programs, len(betas))), len(betas))
    start = _start(prior_key, programs, first, betas[0], max_count, exact)
    restarts = np.asarray(posterior.objective_by_restart()).argmax(-1).reshape(-1)
    rows = []
    for i, beta in enumerate(betas):
        if i > 0 and (programs.structure.names("observed") or started(exact, beta) is not None):
            start = _start(prior_key, programs, first, beta, max_count, exact)
        optimum = optima[i] if math.isfinite(optima[i]) else None
        evidence = _log_evidence(programs.structure, target, optima[i], i, beta)
        rows.append(Score(beta, int(restarts[i]), estimates[i], start, optimum, evidence))
    return Scoreboard(tuple(rows), programs.structure.num_contexts, target, note)


def over_all_data(posterior: Posterior, *new_args: Any) -> Posterior:
    """Give the same fit over all of its data instead of mini-batches, or over other data, without draws.

    Args:
        posterior: with its programs.
        *new_args: other arguments for the program, in the place of those fitted.

    Raises:
        PolicyError: the posterior was loaded without its policy.
    """
    programs = _programs(posterior)
    held = programs.over_all_data(*new_args)
    if held is programs:
        return posterior
    return replace(posterior, programs=held, draws={}, statistics={}, prior_draws={})


def _programs(posterior: Posterior) -> Programs:
    if posterior.programs is None:
        raise PolicyError(
            "this posterior was loaded without its policy, so it cannot be scored anew; "
            "load it with bayesrl.load(directory, policy, *args)"
        )
    return posterior.programs


def _trains_policy(programs: Programs) -> bool:
    """Tell whether the fit trained parameters of the policy itself: then there is no fixed prior."""
    return programs.learned and bool(declared_params(key_from_seed(0), programs.policy, *programs.args)[0])


def _target(programs: Programs, params: Params, beta: Any, max_count: int) -> tuple[WeightedDraws | None, str]:
    """Enumerate p*, or say why it cannot be."""
    if _trains_policy(programs):
        return None, "the policy's own parameters were trained, so there is no fixed optimum"
    if not programs.structure.actions:
        return None, "the policy draws nothing, so there is nothing to enumerate"
    try:
        return enumerate_target(programs, params, beta, max_count), ""
    except EngineError as error:
        return None, str(error)


def _optima(target: WeightedDraws | None, betas: Sequence[float | None], exact: KnownOptimum | None) -> list[float]:
    if exact is not None:
        return [float(exact(1.0 if beta is None else beta)) for beta in betas]
    if target is None or target.optimum is None:
        return [math.nan] * len(betas)
    return [float(optimum) for optimum in np.asarray(target.optimum).reshape(len(betas), -1).mean(1)]


def _log_evidence(
    structure: Structure, target: WeightedDraws | None, optimum: float, index: int, beta: float | None
) -> float | None:
    if target is not None and target.log_evidence is not None:
        lanes = 1 if target.beta is None else target.beta.size
        return float(np.asarray(target.log_evidence).reshape(lanes, -1)[index].mean())
    if structure.names("environment") or not math.isfinite(optimum):
        return None
    return optimum / (1.0 if beta is None else beta)


def _known(exact: KnownOptimum | None, over_all: Posterior, betas: Sequence[float | None]) -> list[Estimates] | None:
    """Give J, E[R] and KL of each β as far as they are known exactly, beside metrics from draws."""
    found = [evaluated(exact, over_all if beta is None else over_all.select(beta=beta)) for beta in betas]
    if any(numbers is None for numbers in found):
        return None
    drawn = _by_beta(over_all.estimate(key_from_seed(0), _num_draws(_programs(over_all), len(betas))), len(betas))
    return [
        Estimates(_number(numbers[0]), _number(numbers[1]), _number(numbers[2]), own.metrics)
        for numbers, own in zip(found, drawn, strict=True)
        if numbers is not None
    ]


def _exact_estimates(
    over_all: Posterior, fitted: Posterior | None, betas: Sequence[float | None], max_count: int
) -> list[Estimates] | None:
    """Give J, E[R] and KL of each β exactly, or None where a program is too large for that.

    Metrics come from the draws that `fitted` carries, or from fresh ones.
    """
    found = []
    for beta in betas:
        exact = _exactly(over_all if beta is None else over_all.select(beta=beta), max_count)
        if exact is None:
            return None
        found.append(exact)
    structure = _programs(over_all).structure
    names = structure.names("metric")
    if not names:
        return found
    if fitted is None or any(name not in fitted.draws for name in names):
        drawn = over_all.estimate(key_from_seed(0), _num_draws(_programs(over_all), len(betas))).metrics
    else:
        lead = len(fitted.batch_shape)
        drawn = {name: _mean_of_draws(np.asarray(fitted.draws[name], float), lead) for name in names}
    return [
        e._replace(metrics={name: _number(_flat(m.mean)[i], _flat(m.se)[i]) for name, m in drawn.items()})
        for i, e in enumerate(found)
    ]


def _mean_of_draws(values: np.ndarray, lead: int) -> Estimate:
    """Average a metric's draws [*lead, draw, ...]."""
    by_draw = values.reshape(*values.shape[: lead + 1], -1).mean(-1)
    return Estimate(by_draw.mean(-1), by_draw.std(-1, ddof=1) / math.sqrt(by_draw.shape[-1]))


def _flat(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values).reshape(-1)]


def _by_beta(estimates: Estimates, count: int) -> list[Estimates]:
    return [jax.tree.map(lambda x, i=i: _flat(x)[i], estimates) for i in range(count)]


def _exactly(one: Posterior, max_count: int) -> Estimates | None:
    """Evaluate one fit exactly, or give None where the program is too large for that."""
    programs, params = one.unbatched()
    if programs.guide is None or _trains_policy(_programs(one)):
        return None
    try:
        found = evaluate_exactly(programs, params, _scalar(one.beta), max_count)
    except EngineError:
        return None
    return Estimates(_number(found.objective.mean()), _number(found.reward.mean()), _number(found.kl.mean()), {})


def _start(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, max_count: int, exact: KnownOptimum | None
) -> Estimate | None:
    """Give J(π₀): what the policy earned before the fit."""
    if _trains_policy(programs) or not programs.structure.actions:
        return None
    known = started(exact, beta)
    if known is not None:
        return _number(known)
    try:
        return _number(evaluate_exactly(programs, params, beta, max_count).prior_objective.mean())
    except EngineError:
        _, totals = draw_prior(key, programs, params, _num_draws(programs, 1))
        reward, likelihood = (np.asarray(x, float).reshape(len(x), -1) for x in (totals.reward, totals.log_likelihood))
        if beta is not None and is_conditioned(programs.structure):
            start = weighted_start(reward, likelihood)
            return _number(start.mean, start.se)
        per_draw = (likelihood if beta is None else reward).mean(1)
        return _number(per_draw.mean(), per_draw.std(ddof=1) / math.sqrt(len(per_draw)))


def _number(mean: Any, se: Any = 0.0) -> Estimate:
    """Make an estimate of plain numbers, which JSON can hold."""
    return Estimate(float(mean), float(se))  # type: ignore[arg-type]


def _scalar(beta: Any) -> float | None:
    return None if beta is None else float(beta)


def _num_draws(programs: Programs, lanes: int) -> int:
    if programs.episodes is not None:
        return 100
    structure = programs.structure
    return int(np.clip(_DRAWN_NUMBERS // (structure.width * lanes), LEAST_DRAWS, 20_000))
