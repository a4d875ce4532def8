"""Rejection sampling: exact, independent draws of the tilted posterior if the reward has an upper bound."""

import itertools
import math
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np

from bayesrl.arguments import Count, FiniteNumbersOrNone, Positive, Untraced, UnusedOption, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.programs import Programs
from bayesrl.errors import EngineError
from bayesrl.exact.regularizers import refuse_unregularized
from bayesrl.exact.tabulation import freeze_program
from bayesrl.exact.weighted_draws import WeightedDraws, evaluate_metrics, mean_estimate, numpy_generator, shared_sites
from bayesrl.monte_carlo.chi_squared_rejection import chi_squared_spans, with_chi_squared_estimates
from bayesrl.monte_carlo.proposals import AcceptedDraws, ProposalSums
from bayesrl.monte_carlo.quasi_rejection import with_quasi_estimates
from bayesrl.monte_carlo.reward_bounds import site_reward_bounds
from bayesrl.posterior.sampling import draw_fit
from bayesrl.statistics.estimates import Estimate, Estimates
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import Beta, PRNGKey, Program

_ELEMENTS = 2**22
_LEAST_BATCH = 1024
_SPARE = 1.05  # proposals beyond the expected need, so that more are seldom needed


@checked(
    EngineError,
    Untraced("call it outside: it compiles its own programs"),
    UnusedOption("tolerance", lambda given: bool(given["quasi"]), "quasi=True plans by num_samples alone"),
    UnusedOption("tolerance", lambda given: given["regularizer"] != "kl", "only KL has a log Z"),
    UnusedOption("quasi", lambda given: given["regularizer"] != "kl", "quasi-rejection is from p* of KL"),
)
@trace_cache()
def rejection(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    num_samples: Count = 1000,
    tolerance: Positive | None = None,
    reward_bound: FiniteNumbersOrNone = None,
    quasi: bool = False,
    regularizer: Literal["kl", "chi_squared"] = "kl",
    max_proposals: Annotated[int, integer_range(4)] = 1_000_000,
) -> WeightedDraws:
    """Draw exactly and independently from the tilted posterior, per context.

    Draws of the prior are accepted with probability exp((R − B)/β), where B is an upper bound on the
    total reward. log Z = B/β + log E_π₀[exp((R − B)/β)] is estimated from all proposals, not from
    acceptance counts. A pilot batch shows how many proposals are needed. log Z then rests on that fixed
    number of further proposals, which acceptances cannot influence. With environment sites nature is
    tilted too: see `importance`.

    With `quasi=True`, B may lie below the rewards, so that more draws are accepted, with probability
    min(1, exp((R − B)/β)). They then follow q ∝ π₀·min(1, exp((R − B)/β)), which is p* where R ≤ B, and
    the result tells how far q is from p*.

    With `regularizer="chi_squared"`, draws follow the optimum of E[R] − β·E_π₀[(q/π₀ − 1)²]/2, which is
    π₀·max(0, 1 + (R − λ)/β): see `enumerate_posterior`. A first batch finds λ; given it, draws are exact at a
    temperature near β, which `explanation` tells.

    Args:
        key: consumed whole.
        policy: the program.
        *args: arguments of the program.
        beta: temperature, reward units per nat, [*beta]; required. All temperatures judge the same proposals.
        num_samples: number of exact draws to make in each context at each β.
        tolerance: target standard error of log Z in each context, nats; None for no target.
        reward_bound: B, [*contexts] or a number, reward units; None uses the bound that can be proven.
        quasi: whether rewards may exceed B, which must then be given.
        regularizer: what keeps the optimum near the prior.
        max_proposals: number of proposals at which to stop.

    Returns:
        `WeightedDraws` with one block of rows per β, in order: weights are equal inside the block of
        their own β and zero outside. `ess` counts exact draws, `explanation` says whether target or budget
        ended the run, and `num_accepted` of `num_proposed` allow exact binomial limits on log Z. With
        `quasi=True`, `quasi` holds TV and KL between q and p*, `estimates` describe q, and `log_evidence` and
        `optimum` stay those of p*, weighted from all proposals: a reward far above B that is seldom drawn makes
        them, and the distances, less certain than their errors say.

    Raises:
        EngineError: no bound is given or can be proven, a draw exceeds it, there are observed sites, contexts
            share a site, a plate is subsampled, a context has no accepted draw, `quasi=True` without a bound, or
            `regularizer="chi_squared"` with environment sites.
        PolicyError: beta does not fit the program, or a reward is NaN or +inf.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def target():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     bayesrl.reward("near", -0.5 * (x - 2.0) ** 2)  # at most 0, as can be proven
        >>> result = bayesrl.rejection(jax.random.key(0), target, beta=1.0)  # Normal(1, 1/2)
        >>> log_z = result.log_evidence
        >>> result.sites["x"].shape, bool(abs(log_z.mean + 1 + 0.5 * jnp.log(2)) < 5 * log_z.se)
        ((1000,), True)

    References:
        von Neumann (1951), "Various techniques used in connection with random digits"; Casella & Robert
        (1996), "Rao-Blackwellisation of sampling schemes", section 2; Eikema, Kruszewski, Dance, Elsahar &
        Dymetman (2022), "An approximate sampler for energy-based models with divergence diagnostics", section 3;
        Huang et al. (2025), "Is best-of-n the best of them?", for χ².
    """
    program = freeze_program(policy, args, beta)
    _refuse(program, quasi=quasi, bounded=reward_bound is not None)
    if regularizer != "kl":
        refuse_unregularized(program.structure, regularizer)
    bound = _bound(program, reward_bound)
    betas = np.asarray(beta, float)
    state = AcceptedDraws(
        program,
        bound,
        betas.reshape(-1),
        num_samples,
        declared=reward_bound is not None,
        regularizer=regularizer,
        quasi=quasi,
    )
    return _run(key, program, state, betas, num_samples, tolerance, max_proposals)


def _run(
    key: PRNGKey,
    program: Programs,
    state: AcceptedDraws,
    betas: np.ndarray,
    num_samples: Count,
    tolerance: Positive | None,
    max_proposals: Annotated[int, integer_range(4)],
) -> WeightedDraws:
    draw_key, accept_key = split_keys(key)
    linear = state.kept_excess and not state.quasi
    # The pilot and what it plans need a batch each, and λ needs one before them.
    size = _batch_size(program, betas.size, num_samples, max_proposals // (3 if linear else 2))
    proposals = (draw_fit(fold_in(draw_key, index), program, {}, size)[0] for index in itertools.count())
    rng, left = numpy_generator(accept_key), max_proposals // size
    if linear:
        state.spans, left = chi_squared_spans(state.excess_of(next(proposals)), state.betas), left - 1
        if (never := np.flatnonzero(np.isinf(state.spans).any(0))).size:
            raise EngineError(
                f"all of {size:,} draws of the prior have reward -inf in {never.size} of {state.bound.size} contexts, "
                "so no multiplier can be found; use bayesrl.enumerate_posterior(...), or large finite penalties"
            )
    # The pilot decides how many proposals follow, so it is left out of log Z: counting it would bias that.
    pilot = state.take(next(proposals), rng)
    state.excess.clear()
    counted, left = ProposalSums.empty(pilot.accepted.shape), left - 1
    for _ in range(min(left, _needed(pilot, state, num_samples, tolerance))):
        counted, left = counted.plus(state.take(next(proposals), rng)), left - 1
    total, excess = pilot.plus(counted), list(state.excess)
    # How many more are drawn depends on what was accepted, so these give draws and stay out of log Z.
    while left > 0 and state.filled.min() < num_samples:
        total, left = total.plus(state.take(next(proposals), rng)), left - 1
    _refuse_empty(state, total, counted, betas)
    explanation = _explain(state, pilot, counted, total, num_samples, tolerance, max_proposals)
    result = _result(
        program, state, counted, betas, explanation, Evaluations.of_both(size * (max_proposals // size - left))
    )
    if state.quasi:
        return with_quasi_estimates(result, np.concatenate(excess), state.bound)
    if state.spans is not None:
        return with_chi_squared_estimates(result, np.concatenate(excess), state.bound, state.spans)
    return result


def _refuse(program: Programs, *, quasi: bool, bounded: bool) -> None:
    if quasi and not bounded:
        raise EngineError(
            "quasi=True accepts below the true bound, so it needs a bound to accept by: pass reward_bound=..., such as "
            "a high quantile of the reward"
        )
    observed = program.structure.names("observed")
    if observed:
        raise EngineError(
            f"the likelihood of observed site {observed[0]!r} has no bound that rejection knows; "
            "use bayesrl.importance(...) or bayesrl.enumerate_posterior(...)"
        )
    shared = shared_sites(program.structure)
    if shared:
        raise EngineError(
            f"contexts share site {shared[0]!r}, so they cannot accept it each for itself; "
            "put the site inside the context plate"
        )


def _bound(program: Programs, declared: Any) -> np.ndarray:
    """Return the bound of each context, flat; raise an error that names a reward without one."""
    shape = program.structure.context_shape
    if declared is not None:
        given = np.asarray(declared, float)
        try:
            return np.broadcast_to(given, shape).reshape(-1)
        except ValueError as error:
            raise EngineError(
                f"reward_bound has shape {given.shape}, but the contexts have shape {shape}; pass a number, or one each"
            ) from error
    by_site = {name: b[1] for name, b in site_reward_bounds(program.policy, program.structure, program.args).items()}
    for name, upper in by_site.items():
        if not np.isfinite(upper).all():
            raise EngineError(
                f"no upper bound of reward site {name!r} can be proven, so there is no rule when to accept; pass "
                "reward_bound=..., an upper bound of the total reward in each context, or use bayesrl.importance(...)"
            )
    return np.asarray(sum(by_site.values()), float).reshape(-1)


def _batch_size(program: Programs, lanes: int, num_samples: int, most: int) -> int:
    fitting = _ELEMENTS // (program.structure.width * lanes)
    return max(1, min(most, max(_LEAST_BATCH, 4 * num_samples), fitting))


def _needed(pilot: ProposalSums, state: AcceptedDraws, num_samples: Count, tolerance: Positive | None) -> int:
    """Plan the number of further batches from the acceptance rate of the pilot."""
    mean = np.maximum(pilot.moments[0] / pilot.number, 1e-300)
    missing = np.maximum(num_samples - state.filled, 0)
    # Counts of accepted draws are nearly Poisson: plan for three standard deviations beyond the need.
    wanted = float((_SPARE * (missing + 3 * np.sqrt(missing)) / mean).max())
    if tolerance is not None:
        # By the delta method N·Var(log Z) is the variance of w relative to its squared mean.
        spread = pilot.moments[1] / pilot.number / mean**2 - 1
        wanted = max(wanted, _SPARE * float(spread.max()) / tolerance**2)
    return math.ceil(min(max(wanted, _LEAST_BATCH) / pilot.number, 1e12))


def _refuse_empty(state: AcceptedDraws, total: ProposalSums, counted: ProposalSums, betas: np.ndarray) -> None:
    empty = (state.filled == 0) | (counted.moments[0] <= 0)  # the first leaves no draws, the second no log Z
    if empty.any():
        lane = int(empty.any(1).argmax())
        chance = float((total.moments[0] / total.number)[empty].min())
        raise EngineError(
            f"none of {total.number:,} draws was accepted in {int(empty[lane].sum())} of {empty.shape[1]} contexts at "
            f"beta={betas.reshape(-1)[lane]:g}, where about {chance:.1g} of them would be; "
            "raise max_proposals or beta, pass a tighter reward_bound, or use bayesrl.importance(...) or "
            "bayesrl.fit(...)"
        )


def _explain(
    state: AcceptedDraws,
    pilot: ProposalSums,
    counted: ProposalSums,
    total: ProposalSums,
    num_samples: Count,
    tolerance: Positive | None,
    max_proposals: Annotated[int, integer_range(4)],
) -> str:
    what = "draws" if state.kept_excess else "exact draws"
    short = int((state.filled < num_samples).sum())
    if short:
        return (
            f"budget: max_proposals={max_proposals:,} ended it; {short} of {state.filled.size} contexts have fewer "
            f"than the {num_samples:,} {what} asked for, the leanest {state.filled.min():,}"
        )
    se = float(_standard_errors(counted, state.betas).max())
    if tolerance is not None and se > 1.1 * tolerance:
        missed = f"the standard error of log Z is {se:.2g}, above {tolerance:g}"
        if total.number + pilot.number > max_proposals:
            return f"budget: max_proposals={max_proposals:,} ended it; {missed}"
        return f"plan: {missed}, for the first {pilot.number:,} proposals foretold less spread; lower the tolerance"
    return f"target: {num_samples:,} {what} in every context, of {total.number:,} proposals"


# ---- the result ------------------------------------------------------------------------------


def _standard_errors(tally: ProposalSums, betas: np.ndarray) -> np.ndarray:
    """Return the standard error of log Z by the delta method, [lanes, contexts]."""
    mean = tally.moments[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        # The moments are sums, so this is (E[w²]/E[w]² − 1)/N.
        variance = np.maximum(tally.moments[1] / mean**2 - 1 / tally.number, 0.0)
    return np.sqrt(np.where(mean > 0, variance, np.inf))


def _expectations(tally: ProposalSums, bound: np.ndarray, betas: np.ndarray) -> tuple[Estimate, Estimate, Estimate]:
    """Return log Z, E[R] and KL under p*, self-normalised over all proposals, [lanes, contexts]."""
    first, square, excess, square_excess, square_excess2 = tally.moments
    beta = betas[:, None]
    log_z = Estimate(bound / beta + np.log(first / tally.number), _standard_errors(tally, betas))
    below = excess / first  # E[R] − B
    spread = (square_excess2 - 2 * below * square_excess + below**2 * square) / first**2
    cross = (square_excess - below * square) / first**2  # Σ w²·(d − E[d])
    # KL = E[R]/β − log Z; the influence of one proposal is w·((d − E[d])/β − 1) + 1/N.
    kl_variance = spread / beta**2 - 2 * cross / beta + log_z.se**2
    reward_se, kl_se = (np.sqrt(np.maximum(variance, 0.0)) for variance in (spread, kl_variance))
    return log_z, Estimate(bound + below, reward_se), Estimate((bound + below) / beta - log_z.mean, kl_se)


def _over_contexts(each: Estimate, lead: tuple[int, ...], scale: Any = 1.0) -> Estimate:
    """Average `scale` times an expectation over contexts, whose proposals are independent."""
    mean, se = np.asarray(scale * each.mean), np.asarray(scale * each.se)
    return Estimate(mean.mean(1).reshape(lead), (np.sqrt((se**2).sum(1)) / se.shape[1]).reshape(lead))


def _result(
    program: Programs,
    state: AcceptedDraws,
    counted: ProposalSums,
    betas: np.ndarray,
    explanation: str,
    evaluations: Evaluations,
) -> WeightedDraws:
    structure, shape, lead = program.structure, program.structure.context_shape, betas.shape
    evidence, reward, kl = _expectations(counted, state.bound, state.betas)
    num = int(state.filled.max())
    blocks = [state.sites(lane, num) for lane in range(len(state.betas))]
    log_weights = np.full((len(blocks), len(blocks), num, len(state.bound)), -np.inf)
    for lane, filled in enumerate(state.filled):
        log_weights[lane, lane] = np.where(np.arange(num)[:, None] < filled, -np.log(filled), -np.inf)
    scale = state.betas[:, None]
    return WeightedDraws(
        sites={name: jnp.asarray(np.concatenate([b[name] for b in blocks])) for name in blocks[0]},
        log_weights=log_weights.reshape((*lead, -1, *shape)),
        log_evidence=Estimate(*(x.reshape((*lead, *shape)) for x in evidence)),
        log_marginal=None,
        optimum=None if structure.names("environment") else (scale * evidence.mean).reshape((*lead, *shape)),
        ess=state.filled.astype(float).reshape((*lead, *shape)),
        estimates=Estimates(
            _over_contexts(evidence, lead, scale),
            _over_contexts(reward, lead),
            _over_contexts(kl, lead),
            _metrics(program, state, lead),
        ),
        beta=betas,
        structure=structure,
        axes=state.axes,
        num_proposed=counted.number,
        num_accepted=counted.accepted.reshape((*lead, *shape)),
        reward_bound=state.bound.reshape(shape),
        explanation=explanation,
        evaluations=evaluations,
    )


def _metrics(program: Programs, state: AcceptedDraws, lead: tuple[int, ...]) -> dict[str, Estimate]:
    """Average deterministic sites over the exact draws that all contexts have."""
    names = program.structure.names("metric")
    lanes = [state.sites(lane, int(filled.min())) for lane, filled in enumerate(state.filled)] if names else []
    found = [evaluate_metrics(program, names, sites) for sites in lanes]
    return {name: mean_estimate([values[name] for values in found], lead) for name in names}
