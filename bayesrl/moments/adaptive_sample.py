"""Multipliers from weighted draws: Newton's method on a pooled sample of the prior and of a fit to the present tilt."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.moments.convex_dual import MomentTable, TiltedTable, refuse_dependent, refuse_outside, solve_dual
from bayesrl.moments.features import measured_site
from bayesrl.monte_carlo.reward_bounds import site_reward_bounds
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import draw_fit, score_draws
from bayesrl.statistics.estimates import InfluenceEstimate
from bayesrl.typing import Params, PRNGKey

_MOST_ROUNDS = 12
_MOST_AFTER = 3
_LEAST_SHARE = 0.02
_EVEN_SHARE, _EVEN = 0.1, 1000
"""Enough effective draws for standard errors: errors of λ exceed them by a third at 4% of 10,000, an eighth at 12%."""
_SHORTEST = 2.0**-7

type Fitter = Callable[[PRNGKey, np.ndarray], Posterior]
"""Fits the policy tilted by multipliers [features, groups]."""


class SampleSolution(NamedTuple):
    """Multipliers and what they give, with the influence of each draw.

    Attributes:
        multipliers: λ, [features, groups].
        table: the draws.
        tilted: their weights under λ.
        ess: effective number of draws, [contexts].
        influence: of each draw on λ, [draws, features, groups].
        pull: of each draw on the moments of q, [draws, features, groups].
        log_z: log Z(λ), per context.
        kl: KL(q‖π₀), per context.
    """

    multipliers: np.ndarray
    table: MomentTable
    tilted: TiltedTable
    ess: np.ndarray
    influence: np.ndarray
    pull: np.ndarray
    log_z: InfluenceEstimate
    kl: InfluenceEstimate


def solve_by_draws(
    key: PRNGKey,
    program: Programs,
    labels: tuple[str, ...],
    targets: np.ndarray,
    num_samples: int,
    fit_tilt: Fitter,
    *,
    shared: bool,
) -> SampleSolution:
    """Find multipliers from weighted draws.

    Where the weights of the prior's draws are too uneven, λ goes as far along the way to the target as they carry it,
    the policy is fitted to that tilt, and draws of the fit join those of the prior: a mixture proposal, whose weights
    are at most twice those of the prior alone.

    Raises:
        EngineError: a target is out of reach, or the draws do not get there.
    """
    prior = _draw(fold_in(key, 0), program, {}, num_samples, labels)
    table = MomentTable(prior.log_weight, prior.features, targets, labels, shared)
    low, high = _proven_range(program, table)
    refuse_outside(table, low, high)
    refuse_dependent(table, f"in all of {num_samples:,} draws of the prior")
    conditioned = bool(program.structure.names("observed"))
    reached, arrived, last = np.zeros_like(targets), 0, np.zeros(targets.shape[1])
    for number in range(_MOST_ROUNDS):
        # As long as λ is 0 the draws aim at the prior given the data, whose means are where the way starts.
        if not reached.any():
            start = table.tilt(reached).means
        multipliers, share = _as_far_as_carried(table, start, reached)
        # Data can leave the prior's draws no weight before any tilt: then the first fit is one to the data.
        if (share == 0).any() and (number or not conditioned):
            break
        # No group came farther than in the round before, so another fit would not help.
        if number and (share < 1).any() and (share <= last).all():
            break
        last = share
        # A sample that has only just arrived rests on a fit to a tilt before the last: fit once more.
        even = table_ess(table, multipliers).min() >= min(_EVEN_SHARE * len(table.log_base), _EVEN)
        if (share == 1).all() and ((even and (number == 0 or arrived)) or arrived == _MOST_AFTER):
            return _solution(table, multipliers, strata=1 if number == 0 else 2, conditioned=conditioned)
        reached, arrived = multipliers, arrived + bool((share == 1).all())
        fit_key, draw_key = split_keys(fold_in(key, 1 + number))
        fitted = fit_tilt(fit_key, multipliers)
        log_base, values = _pooled(draw_key, program, fitted, num_samples, labels)
        table = table._replace(log_base=log_base, features=values)
    raise _unreached(table, reached)


class _Sample(NamedTuple):
    sites: dict[str, np.ndarray]
    features: np.ndarray
    log_weight: np.ndarray  # of the prior against the proposal, with the likelihood
    log_likelihood: np.ndarray


def _draw(key: PRNGKey, program: Programs, params: Params, num: int, labels: tuple[str, ...]) -> _Sample:
    program.structure.check_memory(num * (1 + len(labels)), EngineError)
    draws, totals = draw_fit(key, program, params, num)
    features = np.stack([np.asarray(draws.rewards[measured_site(x)], float).reshape(num, -1) for x in labels])
    for label, values in zip(labels, features, strict=True):
        refuse_not_finite(label, values, np.ones(values.shape, bool), "draws")
    likelihood = np.asarray(totals.log_likelihood, float).reshape(num, -1)
    ratio = np.asarray(totals.ratio, float).reshape(num, -1)
    return _Sample(draws.sites, features, likelihood + ratio, likelihood)


def refuse_not_finite(label: str, values: np.ndarray, counts: np.ndarray, what: str) -> None:
    """Refuse features that are not finite numbers wherever they count, [rows, contexts]."""
    bad = ~np.isfinite(values) & counts
    if bad.any():
        raise EngineError(
            f"feature {label!r} is {values[bad][0]} for {int(bad.any(-1).sum()):,} of {len(bad):,} {what}, so it has "
            "no mean; make it finite"
        )


def _proven_range(program: Programs, table: MomentTable) -> tuple[np.ndarray, np.ndarray]:
    bounds = site_reward_bounds(program.policy, program.structure, program.args)
    ends = [np.stack([bounds[measured_site(x)][i].reshape(-1) for x in table.labels]) for i in (0, 1)]
    return table.grouped(ends[0]), table.grouped(ends[1])


def _as_far_as_carried(table: MomentTable, start: np.ndarray, reached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve for targets between the prior's means and those asked for, as far as enough draws carry weight.

    Returns:
        λ, [features, groups], and the share of the way, [groups].
    """
    least = _LEAST_SHARE * len(table.log_base)
    share, found = np.zeros(start.shape[1]), reached.copy()
    trial = 1.0
    while trial >= _SHORTEST and (share == 0).any():
        multipliers, solved = solve_dual(table.with_targets(start + trial * (table.targets - start)))
        carried = table_ess(table, multipliers) >= least
        # A shared λ needs enough draws in every context.
        own = carried.all(keepdims=True) if table.shared else carried
        better = solved & own & (share == 0)
        share, found = np.where(better, trial, share), np.where(better, multipliers, found)
        trial *= 0.75
    return found, share


def table_ess(table: MomentTable, multipliers: np.ndarray) -> np.ndarray:
    """Return the effective number of draws under a tilt, [contexts]."""
    if not np.isfinite(multipliers).all():
        return np.zeros(table.log_base.shape[1])
    return 1 / (table.tilt(multipliers).weights ** 2).sum(0)


def _unreached(table: MomentTable, reached: np.ndarray) -> EngineError:
    tilted = table.tilt(reached)
    group = int((np.abs(tilted.means - table.targets) / (1e-12 + np.abs(table.targets))).max(0).argmax())
    pairs = zip(table.labels, table.targets[:, group], tilted.means[:, group], strict=True)
    text = ", ".join(f"{label!r}: {mean:.4g} of {target:.4g}" for label, target, mean in pairs)
    return EngineError(
        f"the draws do not carry the multipliers to the targets; the means got to ({text}), with an effective number "
        f"of {table_ess(table, reached).min():.0f} of {len(table.log_base):,} draws. Check that the targets can be met "
        "together, choose some nearer to the prior's means, or raise num_samples"
    )


def _pooled(
    key: PRNGKey, program: Programs, fitted: Posterior, num: int, labels: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Pool new draws of the prior with as many of a fit, weighted against the mixture of both."""
    other, params = fitted.unbatched()
    both = replace(program, guide=other.guide, transforms=other.transforms)
    prior_key, fit_key = split_keys(key)
    prior, fresh = _draw(prior_key, program, {}, num, labels), _draw(fit_key, both, params, num, labels)
    shape = prior.log_weight.shape
    rescored = np.asarray(score_draws(both, params, prior.sites).ratio, float).reshape(shape)
    # Both strata have half of the draws: w = π₀/(½·π₀ + ½·q) = 1/(½ + ½·q/π₀).
    ratio = np.concatenate([rescored, fresh.log_weight - fresh.log_likelihood])
    likelihood = np.concatenate([prior.log_likelihood, fresh.log_likelihood])
    return likelihood + math.log(2) - np.logaddexp(0.0, -ratio), np.concatenate([prior.features, fresh.features], 1)


def _solution(table: MomentTable, multipliers: np.ndarray, *, strata: int, conditioned: bool) -> SampleSolution:
    """Weight the draws by the solution; influences by the delta method.

    λ solves Σ ωᵢ·(fᵢ − t) = 0, so a draw moves it by −H⁻¹·N·ωᵢ·(fᵢ − t), and log Z and KL through it too. The numbers
    of draws of prior and fit are fixed, so only what varies within each of them is error.
    """

    def within(influence: np.ndarray) -> np.ndarray:
        parts = influence.reshape(strata, -1, *influence.shape[1:])
        return (parts - parts.mean(1, keepdims=True)).reshape(influence.shape)

    tilted = table.tilt(multipliers)
    num = len(tilted.weights)
    pull = np.moveaxis(
        table.grouped(num * tilted.weights * (table.features - table.spread(table.targets)[:, None])), 0, 1
    )
    of_groups = -np.einsum("gkl,nlg->nkg", np.linalg.inv(tilted.covariance), pull)
    influence = np.broadcast_to(of_groups, (*of_groups.shape[:2], tilted.weights.shape[1]))
    size = np.exp(table.log_base)
    # Against the prior alone Σ base is known to be N; with data it is estimated, and log Z is relative to p(y).
    log_z = tilted.log_z if conditioned else tilted.log_z + np.log(size.mean(0))
    relative = num * (tilted.weights - size / size.sum(0)) if conditioned else num * tilted.weights - 1.0
    factors = table.spread(multipliers)
    # A shared λ moves the log Z of each context by that context's own means.
    each = table._replace(shared=False).tilt(factors)
    reward = np.einsum("kc,knc->nc", factors, table.features)
    mean = np.einsum("kc,kc->c", factors, each.means)
    through = np.einsum("kc,ckl,nlc->nc", factors, each.covariance, influence)
    return SampleSolution(
        multipliers,
        table,
        tilted,
        table_ess(table, multipliers),
        within(of_groups),
        within(pull),
        InfluenceEstimate(log_z, within(relative + np.einsum("nkc,kc->nc", influence, each.means))),
        InfluenceEstimate(mean - log_z, within(num * tilted.weights * (reward - mean) - relative + through)),
    )
