"""Self-normalised importance sampling: log Z from weighted draws of the prior or of a fitted guide."""

import math
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from scipy.special import logsumexp

from bayesrl.argument_types import Requirement
from bayesrl.arguments import CountAboveOne, Untraced, checked
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import split_keys
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError
from bayesrl.exact.grid import metric_by_context
from bayesrl.exact.tabulation import freeze_program
from bayesrl.exact.weighted_draws import WeightedDraws, context_axes, metrics_from_draws
from bayesrl.monte_carlo.proposals import refuse_bad_rewards
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.sampling import draw_fit
from bayesrl.statistics.estimates import Estimate, Estimates, InfluenceEstimate
from bayesrl.typing import Beta, Params, PRNGKey, Program


def _can_propose(value: Any) -> bool:
    return value is None or isinstance(value, Posterior) or (isinstance(value, tuple) and len(value) == 2)


type Proposal = Annotated[
    Posterior | tuple[Programs, Params] | None,
    Requirement(f"a Posterior, {Posterior.GIVEN_BY}, or None for the prior", _can_propose, any_type=True),
]
"""What to draw from instead of the prior: a posterior, or the result of its `unbatched`."""


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def importance(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    proposal: Proposal = None,
    num_samples: CountAboveOne = 10_000,
) -> WeightedDraws:
    """Estimate the tilted posterior from weighted draws, per context.

    log Z ≈ log (1/N)·Σᵢ wᵢ with w = π₀·exp(R/β)·p(y|x)/q. Standard errors use the delta method.
    With environment sites the weights tilt nature too: `log_evidence` is that of the optimistic
    posterior, J* ≤ β·log Z, and `estimates` describe that posterior; `optimum` is then None.

    Args:
        key: consumed whole.
        policy: the program.
        *args: arguments of the program.
        beta: temperature, reward units per nat, [*beta]; required with rewards, refused without.
            All temperatures weight the same draws.
        proposal: what to draw from: a posterior with one temperature and restart, such as a fit of the same policy;
            None draws from the prior.
        num_samples: number of draws N, made and scored in batches of bounded memory.

    Returns:
        `WeightedDraws`, with the effective number of draws of each context.

    Raises:
        EngineError: fewer than 2 draws, a subsampled plate, or a context where no draw has a weight.
        PolicyError: beta does not fit the program, a reward is NaN or +inf, or the proposal holds several fits.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def count():
        ...     x = numpyro.sample("x", dist.Poisson(10.0))
        ...     bayesrl.reward("growth", x * jnp.log(1.1))
        >>> result = bayesrl.importance(jax.random.key(0), count, beta=1.0)  # Poisson(11), log Z = 1
        >>> bool(abs(result.log_evidence.mean - 1) < 5 * result.log_evidence.se)
        True

    References:
        Owen (2013), "Monte Carlo theory, methods and examples", section 9.2, equations 9.6 to 9.9.
    """
    program = freeze_program(policy, args, beta)
    programs, params = program, dict[str, Any]()
    if proposal is not None:
        other, params = proposal.unbatched() if isinstance(proposal, Posterior) else proposal
        programs = replace(program, guide=other.guide, transforms=other.transforms)
    draw_key, metric_key = split_keys(key)
    batch = _draw(draw_key, programs, params, num_samples)
    _refuse_worthless(program.structure, batch)
    betas = None if beta is None else np.asarray(beta, float)
    observed = bool(program.structure.names("observed"))
    lanes = [
        _weigh(batch, b, observed=observed)
        for b in ([None] if betas is None else [float(b) for b in betas.reshape(-1)])
    ]
    return _result(metric_key, program, batch, lanes, betas)


class _Batch(NamedTuple):
    """Draws with their scores on the host, [draws, contexts], contexts flat."""

    sites: dict[str, Any]
    log_base: np.ndarray  # log of prior × likelihood over proposal
    log_likelihood: np.ndarray
    reward: np.ndarray
    rewards: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]


def _draw(key: PRNGKey, programs: Programs, params: Params, num_samples: int) -> _Batch:
    structure = programs.structure
    structure.check_memory(num_samples, EngineError)
    draws, totals = draw_fit(key, programs, params, num_samples)

    def flat(values: Any) -> np.ndarray:
        return np.asarray(values, float).reshape(num_samples, -1)

    metrics = {name: metric_by_context(value, structure[name], structure, 1) for name, value in draws.metrics.items()}
    return _Batch(
        draws.sites,
        flat(totals.log_likelihood + totals.ratio),
        flat(totals.log_likelihood),
        flat(totals.reward),
        draws.rewards,
        {name: flat(value) for name, value in metrics.items() if value is not None},
    )


class _Weighted(NamedTuple):
    """The weighted draws at one temperature."""

    log_weights: np.ndarray
    evidence: InfluenceEstimate
    marginal: InfluenceEstimate
    objective: InfluenceEstimate
    reward: InfluenceEstimate
    kl: InfluenceEstimate


def _weigh(batch: _Batch, beta: float | None, *, observed: bool) -> _Weighted:
    """Weight the draws at one temperature."""
    log_weight = batch.log_base if beta is None else batch.log_base + batch.reward / beta
    evidence, marginal = _log_mean(log_weight), _log_mean(batch.log_base)
    weights = np.exp(log_weight - logsumexp(log_weight, axis=0, keepdims=True))
    reward = _weighted_mean(weights, batch.reward)
    if beta is None:
        objective, kl = evidence, _weighted_mean(weights, batch.log_likelihood).plus(evidence, -1.0)
    else:
        # Beside rewards Z is relative to p(y): the same draws estimate both, so errors partly cancel.
        evidence = evidence.plus(marginal, -1.0) if observed else evidence
        objective, kl = evidence.times(beta), reward.times(1 / beta).plus(evidence, -1.0)
    log_weights = np.log(weights, out=np.full_like(weights, -np.inf), where=weights > 0)
    return _Weighted(log_weights, evidence, marginal, objective, reward, kl)


def _log_mean(log_weight: np.ndarray) -> InfluenceEstimate:
    with np.errstate(divide="ignore", invalid="ignore"):
        result = logsumexp(log_weight, axis=0) - math.log(len(log_weight))
        return InfluenceEstimate(result, np.exp(log_weight - result) - 1)


def _weighted_mean(weights: np.ndarray, values: np.ndarray) -> InfluenceEstimate:
    # A weight of 0 must drop a reward of −∞; the product would be nan.
    finite = np.where(weights > 0, values, 0.0)
    mean = (weights * finite).sum(0)
    return InfluenceEstimate(mean, len(weights) * weights * (finite - mean))


def _refuse_worthless(structure: Structure, batch: _Batch) -> None:
    refuse_bad_rewards(batch.rewards)
    if np.isnan(batch.log_base).any():
        raise EngineError(
            f"a log-probability is nan for {int(np.isnan(batch.log_base).any(-1).sum())} of {len(batch.log_base)} "
            "draws; check the parameters of the policy and of the proposal, and that both have the same support"
        )
    empty = ~((batch.log_base > -np.inf) & (batch.reward > -np.inf)).any(0)
    if empty.any():
        raise EngineError(
            f"no draw has a weight in {int(empty.sum())} of {empty.size} contexts: every reward or likelihood is -inf "
            f"(reward sites {list(structure.names('reward'))}); draw more, or from a better proposal"
        )


def _result(
    key: PRNGKey, program: Programs, batch: _Batch, lanes: list[_Weighted], beta: np.ndarray | None
) -> WeightedDraws:
    structure, shape = program.structure, program.structure.context_shape
    lead = () if beta is None else beta.shape
    observed, nature = bool(structure.names("observed")), bool(structure.names("environment"))

    def stacked(values: list[np.ndarray]) -> np.ndarray:
        return np.stack(values).reshape((*lead, *shape))

    def averaged(values: list[InfluenceEstimate]) -> Estimate:
        means = [value.over_contexts() for value in values]
        return Estimate(*(np.stack(side).reshape(lead) for side in zip(*((x.mean, x.se) for x in means), strict=True)))

    estimates = Estimates(
        objective=averaged([x.objective for x in lanes]),
        reward=averaged([x.reward for x in lanes]),
        kl=averaged([x.kl for x in lanes]),
        metrics={
            name: averaged([_weighted_mean(np.exp(x.log_weights), values) for x in lanes])
            for name, values in batch.metrics.items()
        },
    )
    marginal = lanes[0].marginal
    result = WeightedDraws(
        sites=jax.device_put(dict(batch.sites)),
        log_weights=np.stack([x.log_weights for x in lanes]).reshape((*lead, -1, *shape)),
        log_evidence=Estimate(stacked([x.evidence.mean for x in lanes]), stacked([x.evidence.se for x in lanes])),
        log_marginal=Estimate(*(x.reshape(shape) for x in (marginal.mean, marginal.se))) if observed else None,
        optimum=None if nature else stacked([x.objective.mean for x in lanes]),
        ess=stacked([1 / np.exp(2 * x.log_weights).sum(0) for x in lanes]),
        estimates=estimates,
        beta=beta,
        structure=structure,
        axes=context_axes(structure),
    )
    rest = [name for name in structure.names("metric") if name not in batch.metrics]
    if rest:
        found = metrics_from_draws(key, result, program, rest)
        estimates = estimates._replace(metrics={**estimates.metrics, **found})
    return replace(result, estimates=estimates)
