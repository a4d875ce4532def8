"""Fits with another regulariser than KL: what their settings say."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bayesrl.objectives.generators import estimand_of
from bayesrl.statistics.averages import DivergenceFn


def divergence_of(settings: Mapping[str, Any]) -> DivergenceFn | None:
    """Return the function of log t, t = q/π₀, whose mean is D_f of the regulariser of a fit; None for KL."""
    estimand = estimand_of(settings.get("regularizer", "kl"), settings.get("alpha"))
    return None if estimand is None else lambda x: estimand(jnp.asarray(x, float))
