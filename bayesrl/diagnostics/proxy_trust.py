"""`overoptimisation`: how far a reward that is not known may be followed, before what it stands for suffers."""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import logsumexp

from bayesrl.arguments import CountAboveOne, CountOrZero, Level, Untraced, UnusedOption, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.programs import Programs
from bayesrl.diagnostics.diagnosed_fit import PolicyOrPosterior, full_data_fit
from bayesrl.diagnostics.drawn_rewards import DrawnRewards, RewardDraws, beliefs_of
from bayesrl.diagnostics.proxy_gains import Overoptimisation, likely_turn_of
from bayesrl.errors import EngineError
from bayesrl.exact.grid import Axis, digits, num_assignments, path_axes, scatter
from bayesrl.exact.tabulation import check_grid_size, freeze_program, score_by_context
from bayesrl.exact.weighted_draws import numpy_generator, shared_sites
from bayesrl.monte_carlo.best_of_draws import Counts, best_of
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import draw_fit
from bayesrl.statistics.best_of_n_law import best_of_n_law, rank_rewards
from bayesrl.statistics.estimates import Estimate
from bayesrl.typing import Beta, PRNGKey

_MOST_ENUMERATED = 2**14
_NOTHING, _ROUNDING = 1e-9, 1e-6
_FEW = 500


def _of_fit(given: Any) -> bool:
    return isinstance(given["policy"], Posterior)


_UNUSED = (
    UnusedOption("beta", _of_fit, "a fit has its own β"),
    UnusedOption("n", _of_fit, "it is of programs; a fit has its β"),
)


@checked(EngineError, *_UNUSED, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def overoptimisation(
    key: PRNGKey,
    policy: PolicyOrPosterior,
    *args: Any,
    beta: Beta | None = None,
    n: Counts | None = None,
    belief: str | None = None,
    gold: str | None = None,
    level: Level = 0.9,
    num_samples: CountAboveOne = 1000,
    num_draws: CountAboveOne = 1000,
    max_count: CountOrZero = _MOST_ENUMERATED,
) -> Overoptimisation:
    """Predict, from the posterior of a reward, what the true reward does as the policy follows its proxy further.

    The program's reward, or one of its deterministic sites, is a `rewards.uncertain(...)`. Run under one joint draw of
    the reward after another, the program tells E_q[r] − E_π₀[r] for each: its mean and interval at every β (or n),
    where the lower end turns down, how probably the policy is worse than the prior, and how much of what is not known
    it bought. Differences from the prior policy are what comparisons can know: a constant cancels in them.

    The interval is right if the posterior is; it says nothing of a reward that no draw of the posterior is like.

    Args:
        key: consumed whole.
        policy: a `Posterior` that was fitted at several β (or at one); or a program.
        *args: arguments of the program.
        beta: temperatures of a finite program, whose optimum at each is found by sums.
        n: numbers of draws of the prior whose best by the proxy is taken, instead of `beta`.
        belief: name of a deterministic site that holds the uncertain reward, where the policy follows another proxy; by
            default the total reward.
        gold: name of a deterministic site with the true reward, to be measured beside it.
        level: of the intervals.
        num_samples: draws of the policy at each point, where it is not enumerated.
        num_draws: joint draws of the reward, at most; a posterior that holds fewer gives all of them.
        max_count: most assignments to sum over.

    Returns:
        `Overoptimisation`.

    Raises:
        EngineError: nothing in the program is uncertain; a program is given without `beta` or `n`, or is too large for
            `beta`; sites are named that do not exist; nature, or data, is in the way.
        PolicyError: the posterior was loaded without its policy.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl import rewards
        >>> reward = rewards.uncertain((np.array([0.0, 0.5, 0.6]), np.diag([0.01, 0.01, 1.0])))
        >>> def bandit():
        ...     item = numpyro.sample("item", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("score", reward(item))
        >>> found = bayesrl.overoptimisation(jax.random.key(0), bandit, beta=jnp.array([0.05, 0.3, 1.0]))
        >>> found.strength.round(2).tolist(), round(found.turning_point, 2)
        ([1.0, 0.3, 0.05], 1.0)

    References:
        Gao, Schulman & Hilton (2023), "Scaling laws for reward model overoptimization".
    """
    draw_key, own_key = split_keys(key)
    if isinstance(policy, Posterior):
        fit = full_data_fit(policy)
        programs = fit._programs_for()
        draws = RewardDraws.of(numpy_generator(draw_key), programs, belief, gold, num_draws)
        points = _points_of_fit(own_key, fit, draws, num_samples, max_count)
    else:
        programs = freeze_program(policy, args, beta, ranks_by_reward=beta is None)
        if (beta is None) == (n is None):
            raise EngineError(
                "give a program either beta=, temperatures, or n=, numbers of draws to choose from; or pass a posterior"
            )
        draws = RewardDraws.of(numpy_generator(draw_key), programs, belief, gold, num_draws)
        points = _points_of_program(own_key, draws, beta, n, num_samples, max_count)
    return _summarised(points, level, draws.num_draws)


class _Points(NamedTuple):
    """Expectations under the prior and at each point of a sweep, per context.

    Attributes:
        by: what is swept.
        strength: β or n of each point, [points].
        kl: nats, with standard errors, [points].
        laws: what the prior's draws earn, then those of each point.
        weights: log-probabilities of rows, [1 + points, rows, contexts], of one table of what all rows earn; None if
            each law has draws of its own.
    """

    by: Literal["beta", "n"]
    strength: np.ndarray
    kl: Estimate
    laws: Sequence[DrawnRewards]
    weights: np.ndarray | None


# ---- finite programs -------------------------------------------------------------------------


def _finite(programs: Programs, max_count: int) -> tuple[Axis, ...] | None:
    """Return the axes of all that a program may draw, if that is little and no nature."""
    structure = programs.structure
    if structure.names("environment", "observed") or shared_sites(structure):
        return None
    try:
        axes = path_axes(structure)
        check_grid_size(axes, structure, max_count)
    except EngineError:
        return None
    return axes


def _assignments(programs: Programs, axes: tuple[Axis, ...]) -> dict[str, Any]:
    """Return all that a program may draw, {site: [rows, ...]}."""
    structure, num = programs.structure, num_assignments(axes)
    rows = [np.broadcast_to(d[:, None], (num, structure.num_contexts)) for d in digits(axes, np.arange(num))]
    return {name: np.asarray(value) for name, value in scatter(axes, rows, structure.context_shape).items()}


def _points_of_program(
    key: PRNGKey, draws: RewardDraws, beta: Any, n: Any, num_samples: int, max_count: int
) -> _Points:
    programs, structure = draws.programs, draws.programs.structure
    if nature := structure.names("environment", "observed"):
        raise EngineError(
            f"site {nature[0]!r} is nature's or observed, so the optimum of the program is no tilt of its draws; fit "
            "it, and pass the posterior"
        )
    axes = _finite(programs, max_count)
    if axes is None and beta is not None:
        raise EngineError(
            f"the program is not finite, has more than max_count={max_count:,} assignments, or contexts share a site, "
            "so its optimum is not a sum; fit it at several β and pass the posterior, or sweep n="
        )
    strength = np.ravel(np.asarray(beta if beta is not None else n, float))
    if axes is None:
        numbers = [1, *strength.astype(int).tolist()]
        found = best_of(key, programs.policy, *programs.args, n=numbers, num_samples=num_samples, max_count=0)
        drawn = [
            draws.evaluate({name: np.asarray(value[i]) for name, value in found.sites.items()})
            for i in range(len(numbers))
        ]
        return _Points("n", strength, Estimate(*(np.asarray(part)[1:] for part in found.kl)), drawn, None)
    sites = _assignments(programs, axes)
    scores = score_by_context(programs, {}, sites)
    log_prior = np.sum([np.asarray(value, float).sum(-1) for value in scores.latent.values()], 0)
    reward = np.sum([np.asarray(value, float) for value in scores.rewards.values()], 0)
    if beta is not None:
        tilted = [log_prior + reward / b for b in strength]
        laws = [log_p - logsumexp(log_p, axis=0) for log_p in tilted]
    else:
        ranks = rank_rewards(reward)
        laws = [log_prior + best_of_n_law(log_prior, ranks, int(k)).log_ratio for k in strength]
    return _exactly("beta" if beta is not None else "n", strength, log_prior, laws, draws.evaluate(sites))


def gains_of_table(
    strength: np.ndarray, log_prior: np.ndarray, laws: Sequence[np.ndarray], rows: DrawnRewards, level: float = 0.9
) -> Overoptimisation:
    """Return the gains of policies that are tables over finitely many rows.

    Args:
        strength: β of each policy, [policies].
        log_prior: log π₀ of the rows, [rows, contexts], nats.
        laws: log q of the rows under each policy, [rows, contexts], nats.
        rows: what the rows earn.
        level: of the intervals.
    """
    return _summarised(_exactly("beta", strength, log_prior, laws, rows), level, rows.true.shape[1])


def _exactly(
    by: Literal["beta", "n"],
    strength: np.ndarray,
    log_prior: np.ndarray,
    laws: Sequence[np.ndarray],
    rows: DrawnRewards,
) -> _Points:
    """Take expectations as sums over rows."""
    kl = []
    for law in laws:
        with np.errstate(invalid="ignore"):
            terms = np.where(law > -np.inf, np.exp(law) * (law - log_prior), 0.0)
        kl.append(max(float(terms.sum(0).mean()), 0.0))
    weights = np.stack([log_prior - logsumexp(log_prior, axis=0), *laws])
    return _Points(by, strength, Estimate(np.asarray(kl), np.zeros(len(kl))), [rows], weights)


# ---- fits ------------------------------------------------------------------------------------


def _points_of_fit(key: PRNGKey, fit: Posterior, draws: RewardDraws, num_samples: int, max_count: int) -> _Points:
    programs = draws.programs
    if observed := programs.structure.names("observed"):
        raise EngineError(
            f"site {observed[0]!r} is observed, so the prior policy is p(x | data), and nothing draws from it here; "
            "fit the data first, and use posterior.policy as the prior of another fit"
        )
    if fit.beta is None:
        raise EngineError("the fit has no reward, so it follows none; pass a fit of a program with rewards")
    strength = np.atleast_1d(np.asarray(fit.beta, float))
    axes = _finite(programs, max_count)
    if axes is not None and not programs.episodes:
        sites = _assignments(programs, axes)
        scores = fit.scores(sites)
        contexts = programs.structure.num_contexts
        log_q = np.asarray(scores.log_q, float).reshape(len(strength), -1, contexts)
        log_prior = np.asarray(scores.log_prior, float).reshape(len(strength), -1, contexts)[0]
        laws = [law - logsumexp(law, axis=0) for law in log_q]
        return _exactly("beta", strength, log_prior, laws, draws.evaluate(sites))
    laws, kl = [_prior_draws(fold_in(key, 0), fit, draws, num_samples)], []
    for i, b in enumerate(strength):
        one = fit if np.ndim(fit.beta) == 0 else fit.select(beta=float(b))
        found, totals = one._draw(fold_in(key, i + 1), num_samples, ())
        num = len(one.batch_shape)
        laws.append(draws.evaluate({name: np.asarray(value)[(0,) * num] for name, value in found.sites.items()}))
        ratio = -np.asarray(totals.ratio, float)[(0,) * num].reshape(num_samples, -1).mean(-1)
        kl.append((ratio.mean(), ratio.std(ddof=1) / math.sqrt(num_samples)))
    return _Points("beta", strength, Estimate(*np.asarray(kl).T), laws, None)


def _prior_draws(key: PRNGKey, fit: Posterior, draws: RewardDraws, num_samples: int) -> DrawnRewards:
    found, _ = draw_fit(key, fit._programs_for(), fit._lanes()[0], num_samples, by_fit=False)
    return draws.evaluate({name: np.asarray(value) for name, value in found.sites.items()})


# ---- what all of them say --------------------------------------------------------------------


class _Law(NamedTuple):
    """Expectations under one law, per context, and what they rest on.

    Attributes:
        true: E[r] under each joint draw, [draws, contexts].
        proxy: E[R], with its standard error over draws of the policy, averaged over contexts.
        gold: the same of gold.
        within: E Var(r(x) − E_π₀[r]), variances over the posterior, [contexts].
        noise: standard error of the posterior mean, averaged over contexts.
        num: how many draws of the policy it rests on; inf for sums.
    """

    true: np.ndarray
    proxy: tuple[float, float]
    gold: tuple[float, float]
    within: np.ndarray
    noise: float
    num: float


def _law(rows: DrawnRewards, log_weights: np.ndarray | None, base: np.ndarray | None) -> _Law:
    """Average what rows earn; `base` is E_π₀[r] under each joint draw, [draws, contexts]."""
    num = len(rows.proxy)
    weights = np.full(rows.proxy.shape, 1 / num) if log_weights is None else np.exp(log_weights)

    def averaged(values: np.ndarray | None) -> tuple[float, float]:
        if values is None:
            return math.nan, math.nan
        mean = float((weights * np.where(weights > 0, values, 0.0)).sum(0).mean())
        return mean, 0.0 if log_weights is not None else float(values.mean(-1).std(ddof=1) / math.sqrt(num))

    true = np.einsum("nc,nkc->kc", weights, rows.true)
    base = true if base is None else base
    spread = (rows.true - base).var(1)
    noise = 0.0 if log_weights is not None else float(rows.true.mean((1, 2)).std(ddof=1) / math.sqrt(num))
    within = (weights * spread).sum(0)
    return _Law(
        true, averaged(rows.proxy), averaged(rows.gold), within, noise, math.inf if log_weights is not None else num
    )


def _summarised(points: _Points, level: float, num_draws: int) -> Overoptimisation:
    weights = points.weights
    if weights is None:
        prior = _law(points.laws[0], None, None)
        laws = [_law(rows, None, prior.true) for rows in points.laws[1:]]
    else:
        prior = _law(points.laws[0], weights[0], None)
        laws = [_law(points.laws[0], log_p, prior.true) for log_p in weights[1:]]
    order = np.argsort(points.kl.mean, kind="stable")
    laws = [laws[i] for i in order]
    gains = np.stack([(law.true - prior.true).mean(-1) for law in laws])
    tail = (1 - level) / 2
    lower, upper = np.quantile(gains, [tail, 1 - tail], axis=1)

    def gain(name: Literal["proxy", "gold"]) -> Estimate:
        start, error = getattr(prior, name)
        mean, se = np.asarray([getattr(law, name) for law in laws]).T
        return Estimate(mean - start, np.hypot(se, error))

    gold = None if math.isnan(prior.gold[0]) else gain("gold")
    strength = points.strength[order]
    best = np.bincount(gains.argmax(0), minlength=len(laws)) / gains.shape[1]
    return Overoptimisation(
        by=points.by,
        strength=strength,
        kl=Estimate(np.asarray(points.kl.mean)[order], np.asarray(points.kl.se)[order]),
        proxy=gain("proxy"),
        predicted=Estimate(gains.mean(1), np.asarray([math.hypot(law.noise, prior.noise) for law in laws])),
        lower=lower,
        upper=upper,
        p_worse=(gains < -_ROUNDING * np.abs(gains).max()).mean(1),
        p_best=best,
        bought=np.asarray([_bought(law, prior) for law in laws]),
        gold=gold,
        level=level,
        turning_point=_peak(strength, lower),
        likely_turn=likely_turn_of(gains),
        gold_turning_point=None if gold is None else _peak(strength, np.asarray(gold.mean)),
        exact=weights is not None,
        num_draws=num_draws,
    )


def _bought(law: _Law, prior: _Law) -> float:
    """Return Var E_q[d] / E_q Var d, means over contexts; of draws without the part that their number adds."""
    between, within = float((law.true - prior.true).var(0).mean()), float(law.within.mean())
    if within <= 0:
        return 0.0
    share = between / within
    if math.isfinite(law.num):
        share = (law.num * share - 1) / (law.num - 1)
    return min(max(share, 0.0), 1.0)


def _peak(strength: np.ndarray, values: np.ndarray) -> float | None:
    """Return the strength of the greatest value, if values end below it."""
    top = int(values.argmax())
    span = _NOTHING * max(float(np.abs(values).max()), _NOTHING)
    return float(strength[top]) if values[-1] < values[top] - span else None


def trust_of(key: PRNGKey, posterior: Posterior, gold: str | None = None) -> Overoptimisation | None:
    """Return what `overoptimisation` finds of a fit, from fewer draws; None if nothing in its rewards is uncertain.

    Raises:
        BayesRLError: it cannot be found.
    """
    # Who never made an uncertain reward need not wait for a trace of the program.
    if "bayesrl.rewards" not in sys.modules or posterior.programs is None or posterior.beta is None:
        return None
    if not beliefs_of(posterior.programs):
        return None
    known = gold if gold in posterior.programs.structure.names("metric") else None
    found: Overoptimisation = overoptimisation(key, posterior, gold=known, num_samples=_FEW, num_draws=_FEW)
    return found
