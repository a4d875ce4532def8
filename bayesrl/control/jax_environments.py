"""Environments written in plain JAX, of the common `reset(key, params)` / `step(key, state, action, params)` shape."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bayesrl.arguments import Count, checked
from bayesrl.control.environments import Environment, Outcome
from bayesrl.core.primitives import environment
from bayesrl.errors import ControlError


class Noise(dist.Distribution):
    """Two random words, of which an environment makes a key: nature's draw, whose density does not matter."""

    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self) -> None:
        super().__init__((), (2,))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, 2] words."""
        return jax.random.bits(key, (*sample_shape, 2), jnp.uint32)

    def log_prob(self, value: Any) -> Array:
        """Give zero: it cancels."""
        return jnp.zeros(jnp.shape(value)[:-1])

    def tree_flatten(self) -> Any:
        """Hold nothing."""
        return (), ()

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> "Noise":
        """Make it again."""
        return cls()


@checked(ControlError)
@dataclass(frozen=True)
class JaxEnvironment(Environment):
    """An environment of gymnax's shape as a program: its randomness becomes the sites `start` and `noise`.

    `env.reset(key, params)` gives (observation, state) and `env.step(key, state, action, params)` gives (observation,
    state, reward, done, info). Rollouts stop counting at `done`, which is taken for a true end, a time limit of the
    environment's own too; where it has a method `step_env`, which does not reset by itself, that is used.

    Args:
        env: the environment.
        actions: distribution of actions that policies start from; `env.action_space(params)` may be discrete with
            a number `n`, and then it is uniform by default.
        params: of the environment; by default `env.default_params`.
        num_observations: how many there are, where they are integers from 0 on.

    Raises:
        ControlError: `env` has not this shape, or there is no default for `params` or `actions`.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from bayesrl.control import JaxEnvironment, Rollout
        >>> class Walk:
        ...     def reset(self, key, params):
        ...         return jnp.zeros(1), jnp.zeros(())
        ...     def step(self, key, state, action, params):
        ...         new = state + 2.0 * action - 1.0
        ...         return new[None], new, new, jnp.abs(new) > 3, {}
        >>> program = Rollout(JaxEnvironment(Walk(), dist.Bernoulli(0.5), params=None), horizon=5)
    """

    env: Any
    actions: dist.Distribution | None = None
    params: Any = "default"
    num_observations: Count | None = None

    def __post_init__(self) -> None:
        missing = [name for name in ("reset", "step") if not callable(getattr(self.env, name, None))]
        if missing:
            raise ControlError(
                f"env={self.env!r} has no method {missing[0]!r}; pass one with reset(key, params) and "
                "step(key, state, action, params)"
            )
        if isinstance(self.params, str) and not hasattr(self.env, "default_params"):
            raise ControlError(f"{type(self.env).__name__} has no default_params; pass params=..., or params=None")
        if self.actions is None and self._num_actions is None:
            raise ControlError(
                f"{type(self.env).__name__} has no finite action_space(params).n; pass actions=..., the distribution "
                "of actions that policies start from"
            )

    @property
    def _num_actions(self) -> int | None:
        space = self.env.action_space(self._params) if hasattr(self.env, "action_space") else None
        number = getattr(space, "n", None)
        return None if number is None else int(number)

    def reset(self) -> Any:
        """Draw the site `start`, [2], and give (observation, state)."""
        words = environment("start", Noise(), observable=False)
        seen, state = self._parts(self.env.reset(_key(words), self._params), "reset", "observation, state")
        if not isinstance(seen, Array | np.ndarray | np.number | int | float):
            raise ControlError(
                f"{type(self.env).__name__} gives an observation of type {type(seen).__name__}; give one array"
            )
        return jnp.asarray(seen), state

    def observe(self, state: Any) -> Any:
        """Give the observation, all that the agent sees."""
        return state[0]

    def step(self, state: Any, action: Any) -> Outcome:
        """Draw the site `noise`, [2], and take a step."""
        words = environment("noise", Noise(), observable=False)
        take = getattr(self.env, "step_env", self.env.step)
        given = take(_key(words), state[1], action, self._params)
        seen, after, reward, done, _ = self._parts(given, "step", "observation, state, reward, done, info")
        self._check_same("observation", state[0], seen)
        self._check_same("state", state[1], after)
        same = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, state[1])
        return Outcome((jnp.asarray(seen, state[0].dtype), same), jnp.asarray(reward, float), jnp.asarray(done, bool))

    def prior(self, observation: Any) -> dist.Distribution:
        """Give the distribution of actions that policies start from."""
        if self.actions is not None:
            return self.actions
        assert self._num_actions is not None
        return dist.Categorical(logits=jnp.zeros(self._num_actions))

    def _parts(self, given: Any, method: str, names: str) -> Any:
        if isinstance(given, tuple) and len(given) == len(names.split(", ")):
            return given
        told = f"{len(given)} things" if isinstance(given, tuple) else f"a {type(given).__name__}"
        raise ControlError(f"{method} of {type(self.env).__name__} gives {told}; give ({names})")

    def _check_same(self, what: str, before: Any, after: Any) -> None:
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (before, after)]
        if shapes[0] != shapes[1]:
            raise ControlError(
                f"the {what} of {type(self.env).__name__} has shape {shapes[0]} after reset, and {shapes[1]} "
                "after step; let it keep its shape"
            )

    @property
    def _params(self) -> Any:
        return self.env.default_params if isinstance(self.params, str) else self.params


def _key(words: Array) -> Any:
    return jax.random.wrap_key_data(words.astype(jnp.uint32))
