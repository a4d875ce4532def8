"""Fits with another regulariser than KL: what their settings say, and who must not take them for fits of KL."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bayesrl.errors import PolicyError
from bayesrl.objectives.generators import estimand_of
from bayesrl.statistics.averages import DivergenceFn


def divergence_of(settings: Mapping[str, Any]) -> DivergenceFn | None:
    """Return the function of log t, t = q/π₀, whose mean is D_f of the regulariser of a fit; None for KL."""
    estimand = estimand_of(settings.get("regularizer", "kl"), settings.get("alpha"))
    return None if estimand is None else lambda x: estimand(jnp.asarray(x, float))


def refuse_regularized(settings: Mapping[str, Any], what: str) -> None:
    """Refuse a fit with another regulariser than KL, where all numbers would be of KL.

    Raises:
        PolicyError: naming the regulariser.
    """
    name = settings.get("regularizer", "kl")
    if name != "kl":
        raise PolicyError(
            f"{what} was fitted with regularizer={name!r}, whose optimum is not p*, and log Z, gap and verdict are "
            f"those of KL; compare posterior.estimate(key, n).objective with enumerate_posterior(..., "
            f"regularizer={name!r}).optimum"
        )
