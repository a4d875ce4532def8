"""Draws of a mixture of restarts, from draws of each."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from bayesrl.compilation.random_keys import key_data
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.typing import PRNGKey


def draw_from_mixture(
    key: PRNGKey, posterior: Any, programs: Programs, draws: Draws, totals: Totals
) -> tuple[Draws, Totals]:
    """Take each draw from one restart, chosen by weight, and score it under the whole mixture."""
    axis = len(posterior._fit_shape) - 1
    num = totals.reward.shape[axis + 1]
    mixture = np.asarray(posterior.mixture)
    rng = np.random.default_rng(np.asarray(key_data(key)).tolist())
    below = np.cumsum(mixture, -1)[..., None, :] <= rng.uniform(size=(*mixture.shape[:-1], num, 1))
    component = np.minimum(below.sum(-1), mixture.shape[-1] - 1)

    def pick(x: np.ndarray) -> np.ndarray:
        index = component[..., None, :].reshape(*component.shape[:-1], 1, num, *(1,) * (x.ndim - axis - 2))
        return np.take_along_axis(x, index, axis=axis)

    draws, totals = jax.tree.map(pick, (draws, totals))
    one = replace(posterior, programs=programs)
    if axis == 0:
        scored = one.scores({k: v[0] for k, v in draws.sites.items()})
    else:
        lanes = [
            replace(one.select(beta=float(b)), mixture=mixture[i]) for i, b in enumerate(np.asarray(posterior.beta))
        ]
        parts = [lane.scores({k: v[i, 0] for k, v in draws.sites.items()}) for i, lane in enumerate(lanes)]
        scored = jax.tree.map(lambda *xs: np.stack(xs), *parts)
    return draws, totals.under(scored.log_q, scored.log_ratio)
