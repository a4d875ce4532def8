"""Draws of p* by NUTS if all sites are continuous: an upper side of log Z that is correct asymptotically."""

import math
from dataclasses import replace

import numpy as np

from bayesrl.core.handlers import tilt
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.evidence.mixture_sample import target_log_weights
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import MIN_ESS, TemperedSample
from bayesrl.errors import EngineError
from bayesrl.statistics.estimates import Estimate, Interval
from bayesrl.typing import Numbers, Params, PRNGKey

NUM_CHAINS, NUM_WARMUP, NUM_DRAWS = 2, 500, 1000
_MAX_RHAT = 1.05


def nuts_draws(key: PRNGKey, programs: Programs, beta: float | None) -> dict[str, Numbers]:
    """Draw from p* by NUTS, {site: [chain, draw, ...]}.

    Raises:
        EngineError: an action site is discrete.

    References:
        Hoffman & Gelman (2014), "The No-U-Turn sampler".
    """
    from numpyro.infer import MCMC, NUTS

    discrete = [name for name in programs.structure.actions if programs.structure[name].discrete]
    if discrete:
        raise EngineError(f"NUTS cannot draw discrete site {discrete[0]!r}; use method='auto' or 'rejection'")
    target = programs.policy if beta is None else tilt(programs.policy, beta)
    sampler = MCMC(
        NUTS(target),
        num_warmup=NUM_WARMUP,
        num_samples=NUM_DRAWS,
        num_chains=NUM_CHAINS,
        # Parallel chains would need a device each.
        chain_method="vectorized",
        progress_bar=False,
    )
    sampler.run(key, *programs.args)
    drawn = sampler.get_samples(group_by_chain=True)
    return {name: drawn[name] for name in programs.structure.actions}


def bracket_by_nuts(
    key: PRNGKey, programs: Programs, params: Params, beta: float | None, found: Evidence, sampled: TemperedSample
) -> Evidence:
    """Add the upper side that a bracket lacks: EUBO = E_p*[w] = log Z + KL(p*‖q) over NUTS draws."""
    from arviz_stats.base.array import array_stats

    sites = nuts_draws(key, programs, beta)
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in sites.items()}
    w = target_log_weights(programs, params, flat, beta)
    per_draw = w.mean(1).reshape(NUM_CHAINS, NUM_DRAWS)
    rhat = float(array_stats.rhat(per_draw, chain_axis=0, draw_axis=1))
    # R-hat of a constant is undefined, and a constant w needs no convergence: hence the test of its spread.
    if not rhat < _MAX_RHAT and float(per_draw.std()) > 1e-6:
        reason = f"NUTS has not converged (R-hat {rhat:.2f} on w), so its draws bound nothing"
        return replace(found, caveat=reason)
    se = float(array_stats.mcse(per_draw, chain_axis=0, draw_axis=1, method="mean"))
    # A constant w has no error, and its Monte Carlo error is nan.
    se = se if math.isfinite(se) else 0.0
    given = 0.0 if found.log_marginal is None or beta is None else float(found.log_marginal.mean)
    mean = float(per_draw.mean()) - given
    upper = Estimate(np.asarray(mean), np.asarray(se))
    return _join(found, sampled, upper, w - given, beta)


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
