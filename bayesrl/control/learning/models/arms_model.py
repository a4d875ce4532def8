"""`ArmsModel`: a bandit as a model of the environment."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax

from bayesrl.arguments import checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import dummy_key
from bayesrl.control.bandits.arms import Bandit
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.models.base import ACTION_VALUES, EnvironmentModel, Sites, observe_masked
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.display.formatting import pluralize
from bayesrl.errors import ControlError
from bayesrl.typing import Numbers, PRNGKey


@checked(ControlError)
@dataclass(frozen=True, eq=False)
class ArmsModel(EnvironmentModel):
    """The prior of a bandit, updated by single pulls as the bandit itself does: exactly, except for `LogisticArms`.

    The program draws `instance` and observes each `reward`; its action values are the expected rewards of all arms.

    Args:
        bandit: the bandit, such as `BernoulliArms(5)`.

    Example:
        >>> from bayesrl.control import ArmsModel, bandits
        >>> ArmsModel(bandits.BernoulliArms(3)).bandit.num_arms
        3
    """

    online: ClassVar[bool] = True

    bandit: Bandit

    def __call__(self, experience: Experience, seen: Any = None) -> None:
        """Draw the instance, observe the rewards; see `EnvironmentModel`."""
        instance = numpyro.sample("instance", self.bandit.instance_prior())
        values = self._values(instance, self._seen(experience.observation))
        taken = jnp.take_along_axis(values, experience.action[:, None], -1)[:, 0]
        observe_masked("reward", self.bandit.reward_distribution(taken), experience.reward, experience.mask)
        numpyro.deterministic(ACTION_VALUES, self.values({"instance": instance}, experience, seen))

    def check(self, env: EnvAdapter) -> None:
        """Refuse another environment; see `EnvironmentModel.check`."""
        if env.num_actions != self.bandit.num_arms:
            arms, actions = pluralize(self.bandit.num_arms, "arm"), pluralize(env.num_actions, "action")
            raise ControlError(f"the model has {arms}, and the environment has {actions}; make both the same")
        wanted = self._seen_of_one().shape[1:]
        found = (0,) if env.num_observations == 1 else env.shape
        if found != wanted:
            raise ControlError(
                f"the model sees features of shape {wanted}, and the environment shows {found}; use another bandit"
            )

    def check_experience(self, experience: Experience) -> None:
        """Refuse rewards that no arm pays; see `EnvironmentModel.check_experience`."""
        # Any possible mean will do: the support does not depend on it.
        half: Any = np.full(experience.reward.shape, 0.5, np.float32)
        support: Any = self.bandit.reward_distribution(half).support
        strange = np.asarray(experience.mask) & ~np.asarray(support(np.asarray(experience.reward)))
        if strange.any():
            raise ControlError(
                f"the environment paid {float(experience.reward[int(strange.argmax())])}, which arms of {self.bandit} "
                "never pay; use another bandit"
            )

    def init(self, key: PRNGKey, env: EnvAdapter) -> Any:
        """Return the prior; see `EnvironmentModel.init`."""
        return closure_jit(lambda: self.bandit.init(1), name="start")()

    def empty(self, experience: Experience | None = None) -> Any:
        """Return the prior; see `EnvironmentModel.empty`."""
        return self.bandit.init(1)

    def condition(self, state: Any, rows: Experience) -> Any:
        """Update the bandit by one pull after another; see `EnvironmentModel.condition`."""
        seen = self._seen(rows.observation)

        def one(state: Any, row: Any) -> tuple[Any, None]:
            own, arm, reward, mask = row
            new = self.bandit.update(state, own[None], arm[None], reward[None])
            return jax.tree.map(lambda a, b: jnp.where(mask, a, b), new, state), None

        return lax.scan(one, state, (seen, rows.action, rows.reward, rows.mask))[0]

    def sample(self, key: PRNGKey, state: Any, experience: Experience, num_samples: int) -> Sites:
        """Draw instances; see `EnvironmentModel.sample`."""
        # The state is of one run; as many runs in the same state give as many draws.
        many = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (num_samples, *x.shape[1:])), state)
        return {"instance": self.bandit.sample_posterior(key, many)}

    def values(self, sites: Sites, experience: Experience, seen: Any = None) -> Array:
        """Return the expected rewards; see `EnvironmentModel.values`."""
        blank = jnp.zeros(self._seen_of_one().shape, self._seen_of_one().dtype)
        return self._values(sites["instance"], blank if seen is None else seen)

    def replace_data(self, experience: Experience, data: dict[str, Array]) -> Experience:
        """Replace the rewards by those that `bayesrl.calibrate` simulates."""
        return experience._replace(reward=data["reward"].astype(float))

    def _values(self, instance: Array, seen: Array) -> Array:
        """Compute the expected rewards of one instance, [len(seen), arms]."""
        return self.bandit.expected_rewards(jnp.broadcast_to(instance, (len(seen), *instance.shape)), seen)

    def _seen_of_one(self) -> jax.ShapeDtypeStruct:
        shape: jax.ShapeDtypeStruct = jax.eval_shape(lambda key: self.bandit.sample_context(key, 1), dummy_key())
        return shape

    def _seen(self, observations: Numbers) -> Array:
        return jnp.zeros((len(observations), 0)) if observations.ndim == 1 else jnp.asarray(observations)
