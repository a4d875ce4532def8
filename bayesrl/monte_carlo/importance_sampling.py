"""Self-normalised importance sampling: the evidence from weighted draws of the prior or of a fitted guide."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import logsumexp

from bayesrl.annotations import Requirement
from bayesrl.arguments import CountAboveOne, checked
from bayesrl.compilation.jit import closure_jit, trace_cache
from bayesrl.compilation.keys import fold_in, split_keys
from bayesrl.core.programs import Pair
from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.grid import elements_per_run, metric_by_context, run_with_sites
from bayesrl.exact.tabulation import FrozenProgram, freeze_program
from bayesrl.exact.weighted_draws import WeightedDraws, context_axes, metrics_from_draws
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Estimate, Estimates
from bayesrl.typing import Beta, Params, PRNGKey, Program

_ELEMENTS = 2**22


@runtime_checkable
class Proposal(Protocol):
    """What draws in the place of the prior: a pair whose guide is used, and its parameters for one fit."""

    @property
    def pair(self) -> Pair:
        """Policy and guide."""

    @property
    def params(self) -> Params:
        """Unconstrained parameters of the guide."""


class GuideProposal(NamedTuple):
    """The plainest `Proposal`: `Bound(*posterior.unbatched())`."""

    pair: Pair
    params: Params


_CAN_PROPOSE = Requirement(
    f"a Posterior, {Posterior.GIVEN_BY}, or None for the prior",
    lambda proposal: proposal is None or isinstance(proposal, Posterior) or hasattr(proposal, "pair"),
    alone=True,
)


@checked(EngineError)
@trace_cache()
def importance(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    proposal: Annotated[Posterior | Proposal | None, _CAN_PROPOSE] = None,
    num_samples: CountAboveOne = 10_000,
) -> WeightedDraws:
    """Estimate the tilted posterior by weighted draws, per context.

    log Z ≈ log (1/N)·Σᵢ wᵢ with w = π₀·exp(R/β)·p(y|x)/q. Standard errors are by the delta method.
    With environment sites the weights tilt nature too: `log_evidence` is that of the optimistic
    posterior, J* ≤ β·log Z, and `estimates` are of that posterior; `optimum` is then None.

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
        EngineError: fewer than 2 draws, a subsampled plate, or no draw with a weight in some context.
        PolicyError: beta does not fit the program, a reward is NaN or +inf, or the proposal holds several fits.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from bayesrl.monte_carlo.importance_sampling import importance
        >>> def count():
        ...     x = numpyro.sample("x", dist.Poisson(10.0))
        ...     bayesrl.reward("growth", x * jnp.log(1.1))
        >>> result = importance(jax.random.key(0), count, beta=1.0)  # Poisson(11), log Z = 1
        >>> bool(abs(result.log_evidence - 1) < 5 * result.log_evidence_se)
        True

    References:
        Owen (2013), "Monte Carlo theory, methods and examples", section 9.2, equations 9.6 to 9.9.
    """
    if isinstance(proposal, Posterior):
        proposal = GuideProposal(*proposal.unbatched())
    program = freeze_program(policy, args, beta)
    pair = Pair(program.policy, None, program.structure, args, {})
    if proposal is not None:
        pair = Pair(program.policy, proposal.pair.guide, program.structure, args, proposal.pair.transforms)
    draw_key, metric_key = split_keys(key)
    batch = _draw(draw_key, pair, jax.tree.map(jnp.asarray, {} if proposal is None else proposal.params), num_samples)
    _check(batch)
    _refuse_weightless(program.structure, batch)
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
    log_base: Any  # log of prior × likelihood over proposal
    log_likelihood: Any
    reward: Any
    rewards: dict[str, Any]
    metrics: dict[str, Any]


def _draw(key: PRNGKey, pair: Pair, params: Params, num_samples: CountAboveOne) -> _Batch:
    structure = pair.structure
    structure.check_memory(num_samples, EngineError)
    size = max(1, min(num_samples, _ELEMENTS // max(elements_per_run(structure), 1)))

    def one_batch(key: PRNGKey) -> _Batch:
        draws = pair.draw(key, params, size, share=False)
        totals = draws.totals((size, *structure.context_shape))
        flat = (size, -1)
        rewards = {
            name: jnp.broadcast_to(v.sum(-1), totals.reward.shape).reshape(flat) for name, v in draws.rewards.items()
        }
        return _Batch(
            draws.sites,
            (totals.log_likelihood + totals.ratio).reshape(flat),
            totals.log_likelihood.reshape(flat),
            totals.reward.reshape(flat),
            rewards,
            jax.vmap(lambda values: _metrics(pair, values))(draws.sites),
        )

    draw_batch = closure_jit(one_batch)
    batches = range(math.ceil(num_samples / size))
    parts = [jax.tree.map(np.asarray, draw_batch(fold_in(key, i))) for i in batches]
    whole: _Batch = jax.tree.map(lambda *xs: np.concatenate(xs)[:num_samples], *parts)
    return whole


def _metrics(pair: Pair, values: dict[str, Array]) -> dict[str, Array]:
    names = pair.structure.names("metric")
    if not names:
        return {}
    sites = run_with_sites(pair.policy, values, pair.args).sites
    found = {name: metric_by_context(sites[name], pair.structure) for name in names}
    return {name: value.reshape(-1) for name, value in found.items() if value is not None}


def _check(batch: _Batch) -> None:
    for name, value in batch.rewards.items():
        bad = (np.isnan(value) | (value == np.inf)).any(-1)
        if bad.any():
            raise PolicyError(
                f"reward site {name!r} returned nan or inf for {int(bad.sum())} of {len(bad)} draws; "
                "rewards are finite, or -inf for what must never happen"
            )
    if np.isnan(batch.log_base).any():
        raise EngineError(
            f"a log-probability is nan for {int(np.isnan(batch.log_base).any(-1).sum())} of {len(batch.log_base)} "
            "draws; check the parameters of the policy and of the proposal, and that both have the same support"
        )


@dataclass(frozen=True)
class _Weighed:
    """What one temperature makes of the draws; `waves` are influence functions, [draws, contexts]."""

    log_weights: np.ndarray
    evidence: np.ndarray
    evidence_wave: np.ndarray
    marginal: np.ndarray
    marginal_wave: np.ndarray
    reward: np.ndarray
    reward_wave: np.ndarray
    kl: np.ndarray
    kl_wave: np.ndarray
    objective: np.ndarray
    objective_wave: np.ndarray


def _weigh(batch: _Batch, beta: float | None, *, observed: bool) -> _Weighed:
    """Weight the draws at one temperature.

    An influence function tells how much each draw moves an estimate: its standard deviation over
    √N is the delta method's standard error, and averages over contexts keep what contexts share.
    """
    base, reward = batch.log_base.astype(float), batch.reward.astype(float)
    likelihood = batch.log_likelihood.astype(float)
    log_weight = base if beta is None else base + reward / beta
    log_z, z_wave = _log_mean(log_weight)
    log_y, y_wave = _log_mean(base)
    weights = np.exp(log_weight - logsumexp(log_weight, axis=0, keepdims=True))
    mean_reward, reward_wave = _weighted_mean(weights, reward)
    if beta is None:
        mean_likelihood, likelihood_wave = _weighted_mean(weights, likelihood)
        evidence, evidence_wave = log_z, z_wave
        kl, kl_wave = mean_likelihood - log_z, likelihood_wave - z_wave
        objective, objective_wave = log_z, z_wave
    else:
        evidence, evidence_wave = (log_z - log_y, z_wave - y_wave) if observed else (log_z, z_wave)
        kl, kl_wave = mean_reward / beta - evidence, reward_wave / beta - evidence_wave
        objective, objective_wave = beta * evidence, beta * evidence_wave
    return _Weighed(
        np.log(weights, out=np.full_like(weights, -np.inf), where=weights > 0),
        evidence,
        evidence_wave,
        log_y,
        y_wave,
        mean_reward,
        reward_wave,
        kl,
        kl_wave,
        objective,
        objective_wave,
    )


def _log_mean(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        result = logsumexp(log_weight, axis=0) - math.log(len(log_weight))
        return result, np.exp(log_weight - result) - 1


def _weighted_mean(weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = np.where(weights > 0, values, 0.0)
    mean = (weights * kept).sum(0)
    return mean, len(weights) * weights * (kept - mean)


def _se(wave: np.ndarray) -> np.ndarray:
    return np.asarray(wave.std(0, ddof=1) / math.sqrt(len(wave)))


def _refuse_weightless(structure: Structure, batch: _Batch) -> None:
    empty = ~((batch.log_base > -np.inf) & (batch.reward > -np.inf)).any(0)
    if empty.any():
        raise EngineError(
            f"no draw has a weight in {int(empty.sum())} of {empty.size} contexts: every reward or likelihood is -inf "
            f"(reward sites {list(structure.names('reward'))}); draw more, or from a better proposal"
        )


def _result(
    key: PRNGKey, program: FrozenProgram, batch: _Batch, lanes: list[_Weighed], beta: np.ndarray | None
) -> WeightedDraws:
    structure, shape = program.structure, program.structure.context_shape
    lead = () if beta is None else beta.shape
    observed, nature = bool(structure.names("observed")), bool(structure.names("environment"))

    def stacked(values: list[np.ndarray]) -> np.ndarray:
        return np.stack(values).reshape((*lead, *shape))

    estimates = Estimates(
        objective=_mean_over_contexts([(x.objective, x.objective_wave) for x in lanes], lead),
        reward=_mean_over_contexts([(x.reward, x.reward_wave) for x in lanes], lead),
        kl=_mean_over_contexts([(x.kl, x.kl_wave) for x in lanes], lead),
        metrics={
            name: _mean_over_contexts(
                [_weighted_mean(np.exp(x.log_weights), np.asarray(values, float)) for x in lanes], lead
            )
            for name, values in batch.metrics.items()
        },
    )
    result = WeightedDraws(
        sites=jax.device_put(dict(batch.sites)),
        log_weights=np.stack([x.log_weights for x in lanes]).reshape((*lead, -1, *shape)),
        log_evidence=stacked([x.evidence for x in lanes]),
        log_evidence_se=stacked([_se(x.evidence_wave) for x in lanes]),
        log_marginal=lanes[0].marginal.reshape(shape) if observed else None,
        log_marginal_se=_se(lanes[0].marginal_wave).reshape(shape) if observed else None,
        optimum=None if nature else stacked([x.objective for x in lanes]),
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


def _mean_over_contexts(values: list[tuple[np.ndarray, np.ndarray]], lead: tuple[int, ...]) -> Estimate:
    mean = np.stack([value.mean() for value, _ in values]).reshape(lead)
    se = np.stack([_se(wave.mean(-1)) for _, wave in values]).reshape(lead)
    return Estimate(mean, se)
