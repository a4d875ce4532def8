"""The small networks of the automatic guide; all of their tilts are zero before training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.random_keys import split_keys
from bayesrl.typing import PRNGKey

_MAX_ONE_HOT_TIME = 64
_NUM_WAVES = 8


class TiltNetwork(eqx.Module):
    """A linear map plus one hidden layer: θ = A f + C tanh(B f + b) + c, with A, C and c zero at first."""

    skip: eqx.nn.Linear
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key: PRNGKey, *, num_features: int, num_outputs: int, width: int) -> None:
        skip_key, hidden_key, out_key = split_keys(key, 3)
        self.skip = _zero(eqx.nn.Linear(num_features, num_outputs, use_bias=False, key=skip_key))
        self.hidden = eqx.nn.Linear(num_features, width, key=hidden_key)
        self.out = _zero(eqx.nn.Linear(width, num_outputs, key=out_key))

    def __call__(self, features: Array) -> Array:
        """Map features [num_features] to numbers [num_outputs]."""
        return self.skip(features) + self.out(jnp.tanh(self.hidden(features)))


class Summary(eqx.Module):
    """A recurrent summary of the previous steps of a scan."""

    cell: eqx.nn.GRUCell

    def __init__(self, key: PRNGKey, *, num_features: int, width: int) -> None:
        self.cell = eqx.nn.GRUCell(num_features, width, key=key)

    def __call__(self, features: Array, state: Array) -> Array:
        """Update the state [width] by the features [num_features] of one step."""
        new: Array = self.cell(features, state)
        return new


def _zero(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    zero: eqx.nn.Linear = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_inexact_array(leaf) else leaf, layer)
    return zero


def time_features(length: int) -> np.ndarray:
    """Describe the steps of a scan, [length, features]: one-hot for a short scan, waves for a long one."""
    if length <= 1:
        return np.zeros((length, 0), np.float32)
    if length <= _MAX_ONE_HOT_TIME:
        return np.eye(length, dtype=np.float32)
    phase = np.arange(length)[:, None] / length * 2 ** np.arange(_NUM_WAVES) * np.pi
    waves = np.concatenate([np.linspace(-1, 1, length)[:, None], np.cos(phase), np.sin(phase)], -1)
    return waves.astype(np.float32)
