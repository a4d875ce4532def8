"""`DuelsModel`: Bradley and Terry's model of comparisons, updated by Laplace's approximation after each answer."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax

from bayesrl.arguments import CountAboveOne, FiniteNumbersOrNone, Positive, checked
from bayesrl.control.exploration.beliefs import sample_by_precision
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.models.base import ACTION_VALUES, EnvironmentModel, Sites, check_sizes, observe_masked
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.errors import ControlError
from bayesrl.preferences.score_models import SCORE, WEIGHTS
from bayesrl.typing import PRNGKey

_NEWTON_STEPS = 30


@checked(ControlError)
@dataclass(frozen=True, eq=False)
class DuelsModel(EnvironmentModel):
    """Scores of items, known by comparisons: P(i is better than j) = σ(s_i − s_j), for `Duels`.

    The program draws `score`, N(0, scale²) for each item, or `weights`, N(0, scale²) for each feature, and observes the
    answers as `reward`; its action values are the scores. The posterior is Laplace's approximation, made anew after
    each answer; rules that use draws of it want `BayesianAgent(..., num_samples=256)` or more.

    Args:
        num_items: how many items.
        features: of the items, [items, features]: s = features · weights; by default, each has a score of its own.
        scale: prior standard deviation, log-odds.

    Raises:
        ControlError: features are not one row for each item.

    Example:
        >>> from bayesrl import control
        >>> control.DuelsModel(3, features=[[0.0], [1.0], [2.0]]).table.shape
        (3, 1)

    References:
        Bradley & Terry (1952), "Rank analysis of incomplete block designs".
    """

    num_items: CountAboveOne
    features: FiniteNumbersOrNone = None
    scale: Positive = 1.0

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or len(self.table) != self.num_items or not self.table.shape[1]:
            raise ControlError(
                f"features have shape {self.table.shape}; give numbers [items, features], one row for each of "
                f"{self.num_items} items"
            )

    @property
    def table(self) -> np.ndarray:
        """What maps the latent site to scores, [items, latent]."""
        return np.eye(self.num_items) if self.features is None else np.asarray(self.features, float)

    @property
    def _site(self) -> str:
        return SCORE if self.features is None else WEIGHTS

    def __call__(self, experience: Experience, seen: Any = None) -> None:
        """Draw the scores, observe the answers; see `EnvironmentModel`."""
        latent = numpyro.sample(self._site, dist.Normal(0.0, self.scale).expand([self.table.shape[1]]).to_event(1))
        logits = self._contrasts(experience) @ latent
        observe_masked("reward", dist.Bernoulli(logits=logits), experience.reward, _answered(experience))
        numpyro.deterministic(ACTION_VALUES, self.values({self._site: latent}, experience, seen))

    def check(self, env: EnvAdapter) -> None:
        """Refuse another environment; see `EnvironmentModel.check`."""
        check_sizes(env, self.num_items + 1, self.num_items)

    def check_experience(self, experience: Experience) -> None:
        """Refuse answers other than 0 and 1; see `EnvironmentModel.check_experience`."""
        strange = np.asarray(experience.mask) & ~np.isin(np.asarray(experience.reward), (0.0, 1.0))
        if strange.any():
            raise ControlError(
                f"an answer was {float(experience.reward[int(strange.argmax())])}; use 1, the first is better, or 0"
            )

    def init(self, key: PRNGKey, env: EnvAdapter) -> Any:
        """Return the prior; see `EnvironmentModel.init`."""
        size = self.table.shape[1]
        return np.zeros(size, np.float32), np.eye(size, dtype=np.float32) / np.float32(self.scale)

    def refit(self, key: PRNGKey, state: Any, experience: Experience) -> Any:
        """Find the mode by Newton's method, from the last one, and the Cholesky factor of the precision there."""
        contrasts, answered = self._contrasts(experience), _answered(experience)
        prior = jnp.eye(contrasts.shape[1]) / self.scale**2

        def at(mode: Array) -> tuple[Array, Array]:
            p = jax.nn.sigmoid(contrasts @ mode)
            slope = contrasts.T @ jnp.where(answered, experience.reward - p, 0.0) - prior @ mode
            return slope, prior + (contrasts * jnp.where(answered, p * (1 - p), 0.0)[:, None]).T @ contrasts

        def newton(_: Any, mode: Array) -> Array:
            slope, precision = at(mode)
            step = jnp.linalg.solve(precision, slope)
            # Damped by the Newton decrement, it converges from anywhere, and quadratically at the end.
            return mode + step / (1 + jnp.sqrt(jnp.maximum(slope @ step, 0.0)))

        mode = lax.fori_loop(0, _NEWTON_STEPS, newton, state[0])
        return mode, jnp.linalg.cholesky(at(mode)[1])

    def sample(self, key: PRNGKey, state: Any, experience: Experience, num_samples: int) -> Sites:
        """Draw from N(mode, −Hessian⁻¹); see `EnvironmentModel.sample`."""
        return {self._site: sample_by_precision(key, state[0], state[1], (num_samples,))}

    def values(self, sites: Sites, experience: Experience, seen: Any = None) -> Array:
        """Return the scores, whichever item was named first; see `EnvironmentModel.values`."""
        return self._rows(sites[self._site])

    def mean_values(self, state: Any, experience: Experience, seen: Any = None) -> Array:
        """Return the scores of the mode; see `EnvironmentModel.mean_values`."""
        return self._rows(state[0])

    def _rows(self, latent: Array) -> Array:
        scores = jnp.asarray(self.table, jnp.float32) @ latent
        return jnp.broadcast_to(scores, (self.num_items + 1, self.num_items))

    def _contrasts(self, experience: Experience) -> Array:
        """Return what the latent site is multiplied with, first item minus second, [rows, latent]."""
        table = jnp.asarray(self.table, jnp.float32)
        # Of a row that names the first item, the mask takes no notice.
        first = jnp.maximum(jnp.asarray(experience.observation) - 1, 0)
        return table[first] - table[jnp.asarray(experience.action)]


def _answered(experience: Experience) -> Array:
    return jnp.asarray(experience.mask) & (jnp.asarray(experience.observation) > 0)
