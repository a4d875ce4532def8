"""log p(y) of a policy with both data y and rewards: J and KL(q‖p(x|y)) need it, and no single draw shows it."""

import math
from typing import Any

import numpy as np
from scipy.special import logsumexp

from bayesrl.compilation.random_keys import split_keys
from bayesrl.core.draws import Totals
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import solve
from bayesrl.exact.enumeration import exact_metrics
from bayesrl.exact.tabulation import freeze_program, tabulate_stages
from bayesrl.posterior.sampling import draw_fit
from bayesrl.statistics.definitions import has_marginal, is_conditioned
from bayesrl.statistics.estimates import Estimate
from bayesrl.typing import Params, PRNGKey, Program


def log_marginal(key: PRNGKey, programs: Programs, params: Params) -> Estimate | None:
    """Return log p(y) averaged over contexts, nats: nan if it is unknown, None unless there are data and rewards.

    Enumerates the program if it is finite and small. Otherwise takes the log of the mean of p(y|x)·π₀/m over draws of
    m, the equal mixture of prior and fit, with a standard error by the delta method.

    Args:
        key: consumed whole, if it takes draws.
        programs: of the fit; taken over all data instead of mini-batches.
        params: unconstrained, of one fit, whose draws help.
    """
    if not is_conditioned(programs.structure):
        return None
    programs, known = programs.over_all_data(), None
    if has_marginal(programs.structure) and not programs.learned and programs.episodes is None:
        try:
            exact = marginal_of(programs.policy, programs.args, _MOST_COUNT)
        except EngineError:
            known = _by_draws(key, programs, params)
        else:
            known = Estimate(np.asarray(exact.mean()), np.zeros(()))
    return Estimate(np.asarray(np.nan), np.asarray(np.nan)) if known is None else known


LEAST_EFFECTIVE = 100
"""Least effective sample size of the weights, in each context, for their mean to count as known."""

_MOST_COUNT = 2**16
_DRAWS, _LEAST, _NUMBERS = 2**14, 2**8, 2**23


def marginal_of(policy: Program, args: tuple[Any, ...], max_count: int = 2**20) -> np.ndarray:
    """Compute log p(y) of the observed sites of a finite program with rewards, over all of its data, [contexts], nats.

    Raises:
        EngineError: as `enumerate_posterior`.
    """
    program = freeze_program(policy, args, 1.0)
    stages, _ = tabulate_stages(program, {}, max_count)
    # For what it refuses: contexts that read one another have no p(y) each.
    exact_metrics(program, {}, stages)
    return solve(stages, 1.0, rewarded=False).value


def _by_draws(key: PRNGKey, programs: Programs, params: Params) -> Estimate | None:
    half = int(np.clip(_NUMBERS // programs.structure.width, _LEAST, _DRAWS))
    fit_key, prior_key = split_keys(key)
    drawn = [draw_fit(prior_key, programs, params, half, by_fit=False)[1]]
    if programs.guide is not None:
        drawn.append(draw_fit(fit_key, programs, params, half)[1])
    log_weight = np.concatenate([_weights(totals, len(drawn)) for totals in drawn])
    log_weight = np.where(np.isnan(log_weight), -np.inf, log_weight)
    if not (log_weight > -np.inf).any(0).all():
        return None
    top = log_weight.max(0)
    weight = np.exp(log_weight - top)
    effective = weight.sum(0) ** 2 / (weight**2).sum(0)
    if effective.min() < LEAST_EFFECTIVE:
        return None
    mean = weight.mean(0)
    # Delta method: relative deviations, averaged over contexts. Prior and fit are separate strata of fixed size, so
    # their variances add within each.
    wave = (weight / mean - 1).mean(1).reshape(len(drawn), -1)
    se = math.sqrt(float(wave.var(1, ddof=1).sum()) / wave.shape[1]) / len(drawn)
    return Estimate(np.asarray((np.log(mean) + top).mean()), np.asarray(se))


def _weights(totals: Totals, parts: int) -> np.ndarray:
    """Log of p(y|x)·π₀/m, [draws, contexts], where m is the prior, or the equal mixture of prior and fit."""
    likelihood, ratio = (np.asarray(x, float).reshape(len(x), -1) for x in (totals.log_likelihood, totals.ratio))
    if parts == 1:
        return likelihood
    # m/π₀ = ½ + ½·q/π₀, so no weight exceeds 2·p(y|x).
    both = np.stack([np.zeros_like(ratio), -ratio])
    return likelihood - (logsumexp(both, axis=0) - math.log(2))
