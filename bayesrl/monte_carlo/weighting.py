"""From weighted draws to a posterior: log Z, expectations and their standard errors, per context."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError
from bayesrl.exact.grid import metric_by_context
from bayesrl.exact.weighted_draws import WeightedDraws, context_axes, metrics_from_draws
from bayesrl.monte_carlo.proposals import refuse_bad_rewards
from bayesrl.statistics.estimates import Estimate, Estimates, InfluenceEstimate
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.typing import PRNGKey


class ScoredDraws(NamedTuple):
    """Draws with their scores on the host, [draws, contexts], contexts flat.

    Attributes:
        sites: values of the latent sites, [draws, ...].
        log_base: log of prior × likelihood over proposal, nats.
        log_likelihood: log p(y|x), nats.
        reward: total reward, reward units.
        rewards: rewards by site, [draws, ...].
        metrics: values of the deterministic sites that are known per context.
        evaluations: what the draws cost.
    """

    sites: dict[str, Any]
    log_base: np.ndarray
    log_likelihood: np.ndarray
    reward: np.ndarray
    rewards: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    evaluations: Evaluations = Evaluations()

    @classmethod
    def of(
        cls, draws: Draws, totals: Totals, structure: Structure, evaluations: Evaluations | None = None
    ) -> "ScoredDraws":
        """Bring draws [draws, ...] and their totals to the host, contexts flat; by default each was evaluated once."""
        num = len(np.asarray(totals.reward))

        def flat(values: Any) -> np.ndarray:
            return np.asarray(values, float).reshape(num, -1)

        found = {name: metric_by_context(x, structure[name], structure, 1) for name, x in draws.metrics.items()}
        return cls(
            draws.sites,
            flat(totals.log_likelihood + totals.ratio),
            flat(totals.log_likelihood),
            flat(totals.reward),
            draws.rewards,
            {name: flat(value) for name, value in found.items() if value is not None},
            Evaluations.of_both(num) if evaluations is None else evaluations,
        )


class WeightedLane(NamedTuple):
    """Weighted draws at one temperature: normalised log-weights [draws, contexts], and what they estimate."""

    log_weights: np.ndarray
    evidence: InfluenceEstimate
    objective: InfluenceEstimate
    reward: InfluenceEstimate
    kl: InfluenceEstimate
    metrics: dict[str, InfluenceEstimate]


def weigh(
    draws: ScoredDraws,
    log_weight: np.ndarray,
    beta: float | None,
    *,
    marginal: InfluenceEstimate | None = None,
    num_groups: int | None = None,
) -> WeightedLane:
    """Weigh draws at one temperature.

    Args:
        draws: the draws.
        log_weight: of target over proposal, [draws, contexts], nats; need not be normalised.
        beta: reward units per nat; None without rewards.
        marginal: log p(y) if there are both rewards and data.
        num_groups: how many groups of equal size the draws come in, one after another, independent of one another;
            None for independent draws.
    """
    groups = num_groups or len(log_weight)
    top, above = _log_mean_weight(log_weight, groups)
    evidence = InfluenceEstimate(top + above.mean, above.influence)
    weights = np.exp(log_weight - top)
    weights = weights / weights.sum(0)
    reward = _weighted_mean(weights, draws.reward, groups)
    if beta is None:
        objective, kl = evidence, _weighted_mean(weights, draws.log_likelihood, groups).plus(evidence, -1.0)
    else:
        # Under p* log q/π₀ is R/β − log Z, so KL needs no scores of its own.
        kl = _weighted_mean(weights, draws.reward / beta - top, groups).plus(above, -1.0)
        if marginal is not None:
            # Beside rewards Z is relative to p(y): the same draws may estimate both, so errors partly cancel.
            evidence, kl = evidence.plus(marginal, -1.0), kl.plus(marginal)
        objective = evidence.times(beta)
    log_weights = np.log(weights, out=np.full_like(weights, -np.inf), where=weights > 0)
    metrics = {name: _weighted_mean(weights, values, groups) for name, values in draws.metrics.items()}
    return WeightedLane(log_weights, evidence, objective, reward, kl, metrics)


def log_mean_weight(log_weight: np.ndarray, num_groups: int) -> InfluenceEstimate:
    """Estimate log E[w] from log-weights [draws, contexts] in independent groups, nats."""
    top, above = _log_mean_weight(log_weight, num_groups)
    return InfluenceEstimate(top + above.mean, above.influence)


def _log_mean_weight(log_weight: np.ndarray, num_groups: int) -> tuple[np.ndarray, InfluenceEstimate]:
    """Return the greatest log-weight of each context, and the log of the mean weight relative to it.

    Apart, because beside a log-weight of 1e20 the log of a mean has no digits left for how many weights there are.
    """
    top = log_weight.max(0)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(log_weight - top)
    mean = weights.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return top, InfluenceEstimate(np.log(mean), _by_group(weights / mean - 1, num_groups))


def _weighted_mean(weights: np.ndarray, values: np.ndarray, num_groups: int) -> InfluenceEstimate:
    # A weight of 0 must drop a reward of −∞; the product would be nan.
    finite = np.where(weights > 0, values, 0.0)
    mean = (weights * finite).sum(0)
    return InfluenceEstimate(mean, _by_group(len(weights) * weights * (finite - mean), num_groups))


def _by_group(influence: np.ndarray, num_groups: int) -> np.ndarray:
    return influence.reshape(num_groups, -1, influence.shape[-1]).mean(1)


def refuse_worthless(structure: Structure, draws: ScoredDraws) -> None:
    """Refuse draws of which none can have a weight in some context.

    Raises:
        PolicyError: a reward is nan or inf.
        EngineError: a density is nan, or every draw of a context is impossible.
    """
    refuse_bad_rewards(draws.rewards)
    bad = np.isnan(draws.log_base).any(-1)
    if bad.any():
        raise EngineError(
            f"a log-probability is nan for {int(bad.sum())} of {len(bad)} "
            "draws; check the parameters of the policy and of the proposal, and that both have the same support"
        )
    empty = ~((draws.log_base > -np.inf) & (draws.reward > -np.inf)).any(0)
    if empty.any():
        raise EngineError(
            f"no draw has a weight in {int(empty.sum())} of {empty.size} contexts: every reward or likelihood is -inf "
            f"(reward sites {list(structure.names('reward'))}); draw more, or from a better proposal"
        )


def weighted_draws(
    key: PRNGKey,
    program: Programs,
    draws: ScoredDraws,
    lanes: Sequence[WeightedLane],
    beta: np.ndarray | None,
    marginal: InfluenceEstimate | None = None,
    *,
    explanation: str = "",
) -> WeightedDraws:
    """Put the lanes of all temperatures together.

    Args:
        key: for metrics that mix contexts; consumed whole.
        program: the frozen policy.
        draws: of all lanes; a lane's log-weights are −inf for those of others.
        lanes: one per temperature.
        beta: temperatures, [*beta]; None without rewards.
        marginal: log p(y), if the program has data.
        explanation: for the result.
    """
    structure, shape = program.structure, program.structure.context_shape
    lead = () if beta is None else beta.shape

    def stacked(values: list[np.ndarray]) -> np.ndarray:
        return np.stack(values).reshape((*lead, *shape))

    def averaged(values: list[InfluenceEstimate]) -> Estimate:
        means = [value.over_contexts() for value in values]
        return Estimate(*(np.stack(side).reshape(lead) for side in zip(*((x.mean, x.se) for x in means), strict=True)))

    estimates = Estimates(
        objective=averaged([x.objective for x in lanes]),
        reward=averaged([x.reward for x in lanes]),
        kl=averaged([x.kl for x in lanes]),
        metrics={name: averaged([x.metrics[name] for x in lanes]) for name in draws.metrics},
    )
    result = WeightedDraws(
        sites=jax.device_put(dict(draws.sites)),
        log_weights=np.stack([x.log_weights for x in lanes]).reshape((*lead, -1, *shape)),
        log_evidence=Estimate(stacked([x.evidence.mean for x in lanes]), stacked([x.evidence.se for x in lanes])),
        log_marginal=None if marginal is None else Estimate(*(x.reshape(shape) for x in (marginal.mean, marginal.se))),
        optimum=None if structure.names("environment") else stacked([x.objective.mean for x in lanes]),
        ess=stacked([1 / np.exp(2 * x.log_weights).sum(0) for x in lanes]),
        estimates=estimates,
        beta=beta,
        structure=structure,
        axes=context_axes(structure),
        explanation=explanation,
        evaluations=draws.evaluations,
    )
    rest = [name for name in structure.names("metric") if name not in draws.metrics]
    if rest:
        found = metrics_from_draws(key, result, program, rest)
        estimates = estimates._replace(metrics={**estimates.metrics, **found})
    return replace(result, estimates=estimates)
