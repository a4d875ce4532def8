"""Draws of p* by NUTS if all sites are continuous: an upper side of log Z that is correct asymptotically."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from bayesrl.core.handlers import tilt
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.evidence.mixture_sample import target_log_weights
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import MIN_ESS, TemperedSample
from bayesrl.errors import EngineError
from bayesrl.statistics.estimates import Estimate, Interval
from bayesrl.typing import Numbers, Params, PRNGKey

_MAX_RHAT = 1.05
_LEAST_DRAWS = 128
_USUAL_DRAWS = 400
"""A budget for this many draws of a chain decides how deep its trees may grow."""


class ChainLength(NamedTuple):
    """How long chains run: their number, warm-up and draws, and the greatest depth of a tree."""

    num_chains: int = 2
    num_warmup: int = 500
    num_draws: int = 1000
    max_depth: int = 10


def chain_length(budget: int) -> ChainLength:
    """Return the longest chains that evaluate the program at most so often.

    Raises:
        EngineError: these would be too short to be judged.
    """
    own = budget // 2
    depth = int(np.clip(math.log2(own / _USUAL_DRAWS + 1), 2, 10))
    moves = own // (2**depth - 1)
    if moves < 2 * _LEAST_DRAWS:
        least = 2 * 2 * _LEAST_DRAWS * 3
        raise EngineError(f"budget={budget:,} is too small for two chains, which take at least {least:,}")
    return ChainLength(2, moves // 3, moves - moves // 3, depth)


def nuts_draws(
    key: PRNGKey, programs: Programs, beta: float | None, length: ChainLength
) -> tuple[dict[str, Numbers], int]:
    """Draw from p* by NUTS, {site: [chain, draw, ...]}; also return how many gradients that took.

    Raises:
        EngineError: an action site is discrete.

    References:
        Hoffman & Gelman (2014), "The No-U-Turn sampler".
    """
    from numpyro.infer import MCMC, NUTS

    class Counting(NUTS):
        """Adds up the steps of its trees."""

        def sample(self, state: Any, *args: Any) -> Any:
            new = super().sample(state, *args)
            return new._replace(num_steps=state.num_steps + new.num_steps)

    discrete = [name for name in programs.structure.actions if programs.structure[name].discrete]
    if discrete:
        raise EngineError(f"NUTS cannot draw discrete site {discrete[0]!r}; use method='auto' or 'rejection'")
    target = programs.policy if beta is None else tilt(programs.policy, beta)
    sampler = MCMC(
        Counting(target, max_tree_depth=length.max_depth),
        num_warmup=length.num_warmup,
        num_samples=length.num_draws,
        num_chains=length.num_chains,
        # Parallel chains would need a device each.
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(key, *programs.args)
    drawn = sampler.get_samples(group_by_chain=True)
    taken = int(np.sum(jax.device_get(sampler.last_state.num_steps)))
    return {name: drawn[name] for name in programs.structure.actions}, taken


def bracket_by_nuts(
    key: PRNGKey,
    programs: Programs,
    params: Params,
    beta: float | None,
    found: Evidence,
    sampled: TemperedSample,
    length: ChainLength = ChainLength(),  # noqa: B008
) -> tuple[Evidence, int]:
    """Add the upper side that a bracket lacks: EUBO = E_p*[w] = log Z + KL(p*‖q) over NUTS draws.

    Also return how many gradients the chains took.
    """
    from arviz_stats.base.array import array_stats

    sites, taken = nuts_draws(key, programs, beta, length)
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in sites.items()}
    w = target_log_weights(programs, params, flat, beta)
    per_draw = w.mean(1).reshape(length.num_chains, length.num_draws)
    rhat = float(array_stats.rhat(per_draw, chain_axis=0, draw_axis=1))
    # R-hat of a constant is undefined, and a constant w needs no convergence: hence the test of its spread.
    if not rhat < _MAX_RHAT and float(per_draw.std()) > 1e-6:
        reason = f"NUTS has not converged (R-hat {rhat:.2f} on w), so its draws bound nothing"
        return replace(found, caveat=reason), taken
    se = float(array_stats.mcse(per_draw, chain_axis=0, draw_axis=1, method="mean"))
    # A constant w has no error, and its Monte Carlo error is nan.
    se = se if math.isfinite(se) else 0.0
    given = 0.0 if found.log_marginal is None or beta is None else float(found.log_marginal.mean)
    mean = float(per_draw.mean()) - given
    upper = Estimate(np.asarray(mean), np.asarray(se))
    return _join(found, sampled, upper, w - given, beta), taken


def _join(drawn: Evidence, sampled: TemperedSample, upper: Estimate, w: np.ndarray, beta: float | None) -> Evidence:
    """Let NUTS and the weights confirm each other: if they agree, trust their standard errors."""
    scale, rounding = 1.0 if beta is None else beta, sampled.rounding
    assert drawn.log_evidence is not None
    assert drawn.kl_forward is not None
    log_z, forward, objective = drawn.log_evidence, drawn.kl_forward, drawn.objective * (1 / scale)
    reverse = sampled.estimator.interval(sampled.reverse(), rounding)._replace(mean=log_z.mean - objective.mean)
    caveat, missed = "the upper side is asymptotic: it rests on NUTS having reached all of p*", drawn.missed_mass
    # EUBO = log Z + KL(p*‖q): the chain estimates the left side, the weights the right.
    difference = float(upper.mean - log_z.mean - forward.mean)
    error = math.sqrt(sum(float(part.se) ** 2 for part in (upper, log_z, forward)))
    limit = np.asarray(upper.mean + 1.96 * upper.se + rounding)
    if sampled.ess >= MIN_ESS and abs(difference) <= 4 * error + 1e-3:
        log_z, forward, reverse = (_calibrate(part, rounding) for part in (log_z, forward, reverse))
        reverse = reverse._replace(lower=np.maximum(reverse.lower, 0.0))
        log_z = log_z._replace(conservative_lower=np.minimum(log_z.conservative_lower, log_z.lower))
        # The conservative interval contains the calibrated one: the weights know log Z better than a short chain.
        limit = np.maximum(limit, log_z.upper)
        missed = np.asarray((w - float(log_z.mean) > math.log(10)).mean())
    else:
        caveat = f"{caveat}; the weights do not confirm it"
        # E_p*[w] ≥ log Z ≥ E_q[w], so NUTS draws that contradict this do so by chance.
        limit = np.maximum(limit, objective.upper)
        reverse = reverse._replace(se=log_z.se, lower=np.asarray(np.nan), upper=np.asarray(np.nan))
    log_z = log_z._replace(conservative_upper=limit)
    reverse = reverse._replace(
        conservative_lower=np.maximum(log_z.conservative_lower - objective.conservative_upper, 0.0),
        conservative_upper=np.maximum(limit - objective.conservative_lower, 0.0),
    )
    return replace(
        drawn,
        method="nuts",
        upper=upper,
        caveat=caveat,
        log_evidence=log_z,
        optimum=log_z * scale,
        gap=reverse * scale,
        kl_reverse=reverse,
        kl_forward=forward,
        missed_mass=missed,
    )


def _calibrate(interval: Interval, rounding: float) -> Interval:
    error = 1.96 * interval.se + rounding
    return interval._replace(lower=interval.mean - error, upper=interval.mean + error)
