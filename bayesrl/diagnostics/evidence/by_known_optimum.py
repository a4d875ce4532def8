"""The evidence of one fit from its own draws, if the optimum is known or only J can be estimated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import jax
import numpy as np

from bayesrl.argument_types import Requirement
from bayesrl.arguments import user_code
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.draws import Totals
from bayesrl.diagnostics.diagnosed_fit import trains_policy
from bayesrl.diagnostics.evidence.confidence_limits import mean_interval, weighted_start
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.evidence.tempered_sample import at_most
from bayesrl.errors import EngineError
from bayesrl.posterior.posterior import Posterior
from bayesrl.posterior.regularized import divergence_of
from bayesrl.posterior.sampling import draw_prior
from bayesrl.statistics.definitions import divergence, is_control
from bayesrl.statistics.estimates import Estimate, Interval
from bayesrl.typing import Numbers, PRNGKey
from bayesrl.value_checks import format_value, is_function

DRAWS_PER_BATCH = 2**12
_SURE = 5.0
"""Standard errors in half of a conservative interval."""

_NUM_EPISODES = 100
"""Episodes to play if the environment is not a program."""


type KnownOptimum = Annotated[
    Callable[[float], float],
    Requirement("a function that returns J* per context at a temperature, such as lambda beta: 0.65", is_function),
]
"""Returns the known optimum J* per context, reward units, at a temperature.

It may have two more methods: `evaluate(posterior)` returns (J, E[R], KL(q‖π₀)) of one fit exactly, or None if that
is impossible; `prior_objective(beta)` returns J(π₀).
"""


def bracket_by_known_optimum(
    key: PRNGKey, one: Posterior, beta: float | None, optimum: KnownOptimum, num_samples: int
) -> Evidence:
    """Bracket one fit whose optimum is known: J, E[R] and KL(q‖π₀) from its own draws, J(π₀) from the prior's.

    This needs no density ratio, so it also covers discounted rollouts and environments that are not programs.

    Raises:
        EngineError: the optimum is not a finite number, or the fit is clearly better than it.
    """
    scale = 1.0 if beta is None else beta
    known = evaluate_optimum(optimum, beta)
    found = estimate_evidence(key, one, beta, num_samples, "", optimum)
    _refuse_beaten(float(known.mean), found, beta)
    objective = at_most(found.objective, known.mean)
    side = Estimate(known.mean / scale, known.se)
    # The gap is smallest where J is largest, so J's ends change places.
    gap = Interval(
        known.mean - objective.mean,
        objective.se,
        *(
            np.maximum(known.mean - end, 0.0)
            for end in (objective.upper, objective.lower, objective.conservative_upper, objective.conservative_lower)
        ),
    )
    # With nature or discounts J* is an optimum of control, with another regulariser one of its own: without log Z.
    odd = is_control(one._programs_for().structure) or found.regularizer != "kl"
    return replace(
        found,
        method="known",
        lower=side,
        upper=side,
        log_evidence=None if odd else known * (1 / scale),
        optimum=known,
        objective=objective,
        gap=gap,
        kl_reverse=None if odd else gap * (1 / scale),
    )


def estimate_evidence(
    key: PRNGKey,
    one: Posterior,
    beta: float | None,
    num_samples: int,
    caveat: str,
    optimum: KnownOptimum | None = None,
) -> Evidence:
    """Estimate J, E[R], KL(q‖π₀) and J(π₀) of one fit, but not its optimum; `optimum` may know them exactly."""
    programs = one._programs_for()
    scale = 1.0 if beta is None else beta
    num = num_samples if programs.episodes is None else _NUM_EPISODES
    own_key, prior_key = split_keys(key)
    evaluate = getattr(optimum, "evaluate", None)
    with user_code("optimum.evaluate", EngineError, "let it give (J, E[R], KL) of a fit, or None"):
        exact = None if evaluate is None else evaluate(one)
    marginal, other, told = one.log_marginal(fold_in(key, 2)), divergence_of(one.settings), None
    if exact is not None and other is not None:
        raise EngineError(
            f"optimum.evaluate gives J with KL, and the fit has regularizer={one.settings['regularizer']!r}; pass a "
            "function of β alone that gives J* of this regulariser"
        )
    if exact is None:
        totals = _draw(one.totals, own_key, num)
        nats = totals.log_likelihood + totals.ratio
        objective, reward = (mean_interval(x, _SURE) for x in (totals.reward + scale * nats, totals.reward))
        if other is not None:
            terms = np.asarray(other(-totals.ratio), float)
            objective, told = mean_interval(totals.reward - scale * terms, _SURE), mean_interval(terms, _SURE)
        kl = mean_interval(divergence(totals, conditioned=marginal is not None), _SURE)
        if marginal is not None:
            objective, kl = _shift(objective, -scale, marginal), _shift(kl, 1.0, marginal)
    else:
        objective, reward, kl = (Interval.exact(value) for value in exact)
    found = Evidence.unbracketed(
        beta,
        objective,
        reward,
        kl,
        caveat,
        prior_objective=_prior_objective(prior_key, one, beta, optimum, num, conditioned=marginal is not None),
        log_marginal=None if marginal is None else _shift(Interval.exact(0.0), 1.0, marginal),
        num_samples=num if exact is None else 0,
    )
    if told is None:
        return found
    return replace(found, divergence=told, regularizer=one.settings["regularizer"], alpha=one.settings.get("alpha"))


def _prior_objective(
    key: PRNGKey, one: Posterior, beta: float | None, optimum: KnownOptimum | None, num: int, *, conditioned: bool
) -> Interval | None:
    """J(π₀): mean reward under the prior, weighted by p(y|x) if π₀ means p(x|y); log p(y|x) without rewards."""
    programs = one._programs_for()
    evaluate = getattr(optimum, "prior_objective", None)
    with user_code(
        "optimum.prior_objective", EngineError, "let it give J of the prior at a temperature, a finite number"
    ):
        if evaluate is not None:
            return Interval.exact(float(evaluate(1.0 if beta is None else beta)))
    if optimum is None and (not programs.structure.actions or trains_policy(programs)):
        return None
    first = one._lanes()[0]
    prior = _draw(lambda k, n: draw_prior(k, programs, first, n)[1], key, num)
    if conditioned and beta is not None:
        return weighted_start(prior.reward, prior.log_likelihood)
    return mean_interval(prior.log_likelihood if beta is None else prior.reward, _SURE)


def evaluate_optimum(optimum: KnownOptimum, beta: float | None) -> Interval:
    """Ask for the optimum at a temperature.

    Raises:
        EngineError: it is not a finite number.
    """
    with user_code("optimum", EngineError, "let it give J* per context at a temperature, a finite number"):
        given: Any = optimum(1.0 if beta is None else beta)
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):
        raise EngineError(f"optimum gave {format_value(given)} for beta={beta}; give J* per context, a finite number")
    return Interval.exact(value)


def _refuse_beaten(known: float, found: Evidence, beta: float | None) -> None:
    """Refuse an optimum that the fit exceeds: by more than its rounding, and than rare draws it has not seen explain.

    Raises:
        EngineError: naming both.
    """
    least, num = float(found.objective.conservative_lower), int(found.num_samples)
    if least - known > max(0.01, 10 / num if num else 0.0) * max(abs(least), abs(known)):
        raise EngineError(
            f"optimum gave J* = {known:g} for beta={beta}, but the fit has J ≥ {least:.4g}, and no policy beats the "
            "best; give J* of this policy, per context, in reward units"
        )


def _draw(draw: Callable[[PRNGKey, int], Totals], key: PRNGKey, num: int) -> Any:
    """Draw in batches, so that long rollouts fit into memory; totals are [draws, contexts], in double precision."""

    def flat(values: Numbers) -> np.ndarray:
        array = np.asarray(values, float)  # of one fit, whose axes are dropped
        return array.reshape(array.shape[1] if array.ndim > 1 and array.shape[0] == 1 else array.shape[0], -1)

    parts = [
        jax.tree.map(flat, draw(fold_in(key, i), min(DRAWS_PER_BATCH, num - done)))
        for i, done in enumerate(range(0, num, DRAWS_PER_BATCH))
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _shift(interval: Interval, factor: float, marginal: Estimate) -> Interval:
    """Add a multiple of log p(y); its error widens both intervals."""
    shift = Interval.normal(factor * np.asarray(marginal.mean, float), abs(factor) * np.asarray(marginal.se), 5.0)
    moved = Interval(*(np.asarray(a + b) for a, b in zip(interval, shift, strict=True)))
    return moved._replace(se=np.hypot(interval.se, shift.se))
