"""Fits that aim at another optimum than p* of KL: what their settings say."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bayesrl.objectives.generators import estimand_of
from bayesrl.statistics.averages import DivergenceFn, kept_estimates
from bayesrl.statistics.estimates import Estimate


def divergence_of(settings: Mapping[str, Any]) -> DivergenceFn | None:
    """Return the function of log t, t = q/π₀, whose mean is D_f of the regulariser of a fit; None for KL."""
    estimand = estimand_of(settings.get("regularizer", "kl"), settings.get("alpha"))
    return None if estimand is None else lambda x: estimand(jnp.asarray(x, float))


def minimised_loss(settings: Mapping[str, Any], beta: Any, history: Mapping[str, Any]) -> np.ndarray | None:
    """Return β·loss along the training, [chunk, *beta, restart], of a fit that does not maximise J, else None.

    For a fit to the best of n draws it is β·KL(pₙ‖q); for one to judgements, the mean over them of their loss.
    """
    if not {"best_of_n", "direct"} & settings.keys() or not len(history.get("step", ())):
        return None
    return np.asarray(np.asarray(beta, float)[..., None] * np.asarray(history["loss"], float))


def objective_for_choosing(
    statistics: Mapping[str, Any],
    beta: Any,
    lead: int,
    marginal: Estimate | None,
    settings: Mapping[str, Any],
    history: Mapping[str, Any],
) -> np.ndarray:
    """Return what the best restart has most of, [*beta, restart]: J, or the nearness to what it learns from."""
    if (loss := minimised_loss(settings, beta, history)) is not None:
        return -loss[-1]
    known = marginal
    known = known if known is None or np.isfinite(known.mean) else Estimate(np.zeros(()), np.zeros(()))
    told = kept_estimates(statistics, beta, lead, known, divergence_of(settings))
    return np.asarray(told.objective.mean)
