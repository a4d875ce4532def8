"""Environments of JAX libraries as programs."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bayesrl.arguments import AnyWithoutNaN, Count, checked
from bayesrl.control.environments.base import Environment, Transition
from bayesrl.control.environments.jax_adapters import (
    GYMNAX,
    EnvInterface,
    describe_jax_actions,
    detect_interface,
    reshape_mask,
    same_layout,
    strip_autoreset,
)
from bayesrl.control.gymnasium.recorded_rollout import mask_actions
from bayesrl.control.gymnasium.spaces import MASK, Actions
from bayesrl.core.primitives import environment
from bayesrl.errors import ControlError


class RandomWords(dist.Distribution):
    """Two random words that an environment turns into a key: nature's draw, whose density does not matter."""

    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self) -> None:
        super().__init__((), (2,))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw [*sample_shape, 2] words."""
        return jax.random.bits(key, (*sample_shape, 2), jnp.uint32)

    def log_prob(self, value: Any) -> Array:
        """Return zero: the density cancels."""
        return jnp.zeros(jnp.shape(value)[:-1])


@checked(ControlError)
@dataclass(frozen=True)
class JaxEnvironment(Environment):
    """A JAX environment as a program: gymnax, brax, jumanji, navix, pgx, or any with such an interface; see README.

    Its randomness becomes the sites `start` and, if a step takes a key, `noise`. A rollout stops counting when an
    episode ends. If the environment tells a time limit from an end, `Transition.truncated` does too, and
    `Rollout(unbounded=True)` values what would have followed. An `action_mask` in the observation, or pgx's legal
    actions, can exclude actions; those have probability 0 in the prior, and so in the policy. If an action is several
    integers, a mask has a flag for each combination, or for each value of each integer.

    In gymnax's interface, `env.reset(key, params)` returns (observation, state), and `env.step(key, state, action,
    params)` returns (observation, state, reward, done, info), or (…, reward, terminated, truncated, info). A method
    `step_env` of the environment's own class, which does not reset, takes precedence over `step`.

    Args:
        env: the environment, of one episode and one agent.
        actions: distribution of actions from which policies start; the default follows the environment's own space:
            uniform over finitely many actions, Normal with half the range as its scale over bounded ones.
        params: parameters of the environment; by default `env.default_params`, or None if it takes none.
        num_observations: how many observations there are, if they are integers from 0 on.

    Raises:
        ControlError: `env` has none of these interfaces, or there is no default for `params` or `actions`; later, if a
            mask does not say which actions are allowed.

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
    params: AnyWithoutNaN = "default"
    num_observations: Count | None = None
    _interface: EnvInterface = field(init=False, repr=False, compare=False)
    _space: Actions | None = field(init=False, repr=False, compare=False)
    _default: dist.Distribution = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        begin = next((name for name in ("reset", "init") if callable(getattr(self.env, name, None))), "reset")
        missing = [name for name in (begin, "step") if not callable(getattr(self.env, name, None))]
        if missing:
            raise ControlError(
                f"env={self.env!r} has no method {missing[0]!r}; pass one with reset(key, params) and "
                "step(key, state, action, params), or as brax, jumanji, navix or pgx have them"
            )
        env = strip_autoreset(self.env)
        interface = detect_interface(env)
        object.__setattr__(self, "env", env)
        object.__setattr__(self, "_interface", interface)
        if interface is GYMNAX and isinstance(self.params, str) and not hasattr(env, "default_params"):
            raise ControlError(f"{type(env).__name__} has no default_params; pass params=..., or params=None")
        space = describe_jax_actions(env, interface, self._params) if self.actions is None else None
        if self.actions is None and space is None:
            raise ControlError(
                f"{type(env).__name__} has no known action space; pass actions=..., the distribution of actions that "
                "policies start from"
            )
        object.__setattr__(self, "_space", space)
        object.__setattr__(self, "_default", self.actions if space is None else space.prior())

    def reset(self) -> Any:
        """Draw the site `start`, [2], and return (observation, state)."""
        words = environment("start", RandomWords(), observable=False)
        seen, state = self._interface.start(self.env, words, self._params)
        if not jax.tree.leaves(seen):
            raise ControlError(f"{type(self.env).__name__} gives the observation {seen!r}; give an array, or several")
        return jax.tree.map(jnp.asarray, seen), state

    def observe(self, state: Any) -> Any:
        """Return the observation, which is all that the agent sees."""
        return state[0]

    def step(self, state: Any, action: Any) -> Transition:
        """Draw the site `noise`, [2], and take a step."""
        keyed = self._interface.keyed
        words = environment("noise", RandomWords(), observable=False) if keyed else jnp.zeros(2, jnp.uint32)
        after = self._interface.step(self.env, words, state[1], self._to_environment(action), self._params)
        if jnp.shape(after.reward):
            raise ControlError(
                f"{type(self.env).__name__} gives a reward of shape {jnp.shape(after.reward)}; let it give one number, "
                "of one episode and one agent"
            )
        parts = {"observation": (state[0], after.observation), "state": (state[1], after.state)}
        terminated, truncated = (jnp.asarray(end, bool) for end in (after.terminated, after.truncated))
        return Transition(
            tuple(self._cast(name, *pair) for name, pair in parts.items()),
            jnp.asarray(after.reward, float),
            terminated,
            truncated & ~terminated,  # an episode that has come to its end is not also cut off
        )

    def prior(self, observation: Any) -> dist.Distribution:
        """Return the distribution of actions from which policies start."""
        independent = isinstance(self._default, dist.Independent)
        base = self._default.base_dist if independent else self._default
        allowed = self._allowed(observation, base)
        if allowed is None:
            return self._default
        return mask_actions(base, allowed).to_event(1) if independent else mask_actions(base, allowed)

    def allowed(self, observation: Any) -> Array | None:
        """Return the part `action_mask` of an observation as flags of all actions; see `Environment.allowed`."""
        return self._allowed(observation, self._default)

    def _allowed(self, observation: Any, actions: Any) -> Array | None:
        """Read the mask of an observation, in the shape of the logits of `actions`; None if there is no mask."""
        held = observation.get(MASK) if isinstance(observation, dict) else getattr(observation, MASK, None)
        if held is None:
            return None
        mask, shape = jnp.asarray(held, bool), jnp.shape(getattr(actions, "logits", 0.0))
        sizes = () if self._space is None else self._space.sizes
        flags = reshape_mask(mask, sizes, shape) if shape else None
        if flags is None:
            raise ControlError(
                f"{type(self.env).__name__} gives an {MASK} of shape {mask.shape}, which does not say which of its "
                f"actions are allowed, whose logits have shape {shape}; let it give a flag for each action, or leave "
                "it out of the observation"
            )
        return flags

    def features(self, observation: Any) -> Array:
        """Return all numbers of an observation, which may have several parts; see `Environment.features`."""
        return super().features(jax.tree.map(jnp.asarray, observation))

    def _to_environment(self, action: Any) -> Any:
        """Convert a drawn action to the environment's own form."""
        space = self._space
        if space is None:
            return action
        if space.sizes:
            digits = action if space.num is None else jnp.stack(jnp.unravel_index(action, space.sizes), -1)
            return (digits + jnp.asarray(space.low)).astype(jnp.int32)
        if space.num is not None:
            return action + space.first
        return jnp.clip(action, jnp.asarray(space.low), jnp.asarray(space.high))

    def _cast(self, what: str, before: Any, after: Any) -> Any:
        """Cast the next value to the types of the previous one, as a scan needs."""
        if not same_layout(before, after):
            shapes = [jax.tree.map(jnp.shape, tree) for tree in (before, after)]
            raise ControlError(
                f"the {what} of {type(self.env).__name__} has shape {shapes[0]} after reset, and {shapes[1]} "
                "after step; let it keep its shape"
            )

        def cast(new: Any, old: Any) -> Any:
            # A state may hold typed keys, which cannot be cast.
            is_key = jnp.issubdtype(getattr(old, "dtype", float), jax.dtypes.extended)
            return new if is_key else jnp.asarray(new, jnp.result_type(old))

        return jax.tree.map(cast, after, before)

    @property
    def _params(self) -> Any:
        # Other parameters may be arrays, for which == "default" gives no single answer.
        return getattr(self.env, "default_params", None) if isinstance(self.params, str) else self.params
