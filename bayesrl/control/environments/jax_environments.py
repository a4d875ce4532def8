"""Environments written in plain JAX, as the libraries shape them, as programs."""

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
    strip_autoreset,
)
from bayesrl.control.gymnasium.nested_spaces import digits_of
from bayesrl.control.gymnasium.recorded_rollout import mask_actions
from bayesrl.control.gymnasium.spaces import MASK, Actions
from bayesrl.core.primitives import environment
from bayesrl.errors import ControlError


class RandomWords(dist.Distribution):
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
    def tree_unflatten(cls, aux_data: Any, params: Any) -> "RandomWords":
        """Make it again."""
        return cls()


@checked(ControlError)
@dataclass(frozen=True)
class JaxEnvironment(Environment):
    """An environment of JAX as a program, as gymnax, brax, jumanji, navix and pgx shape them; see `jax_adapters`.

    Its randomness becomes the sites `start` and, where a step takes a key, `noise`. Rollouts stop counting where an
    episode ends. Where the environment tells a time limit from an end, so does `Transition.truncated`, and with
    `Rollout(unbounded=True)` what would have followed is valued. Where observations have a part `action_mask`, or pgx
    tells legal actions, the others have no share in the prior, and so none in the policy. Of actions that are several
    integers a mask may tell of all of them together, or of the values of each integer.

    `env.reset(key, params)` gives (observation, state) and `env.step(key, state, action, params)` gives (observation,
    state, reward, done, info), or (…, reward, terminated, truncated, info); where it has a method `step_env` of its
    own, which does not reset by itself, that is used. For the shapes of other libraries see the table.

    Args:
        env: the environment, of one episode and one agent.
        actions: distribution of actions that policies start from; by default that of the environment's own space:
            uniform over finitely many, Normal with half the range as its scale over bounded ones.
        params: of the environment; by default `env.default_params`, or None where it takes none.
        num_observations: how many there are, where they are integers from 0 on.

    Raises:
        ControlError: `env` has none of these shapes, or there is no default for `params` or `actions`; later, where a
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
    _shape: EnvInterface = field(init=False, repr=False, compare=False)
    _space: Actions | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = [name for name in ("reset", "init") if callable(getattr(self.env, name, None))] or ["reset"]
        missing = [name for name in (known[0], "step") if not callable(getattr(self.env, name, None))]
        if missing:
            raise ControlError(
                f"env={self.env!r} has no method {missing[0]!r}; pass one with reset(key, params) and "
                "step(key, state, action, params), or as brax, jumanji, navix or pgx have them"
            )
        object.__setattr__(self, "env", strip_autoreset(self.env))
        object.__setattr__(self, "_shape", detect_interface(self.env))
        if self._shape is GYMNAX and isinstance(self.params, str) and not hasattr(self.env, "default_params"):
            raise ControlError(f"{type(self.env).__name__} has no default_params; pass params=..., or params=None")
        object.__setattr__(self, "_space", describe_jax_actions(self.env, self._shape, self._params))
        if self.actions is None and self._space is None:
            raise ControlError(
                f"{type(self.env).__name__} has no action space that is known; pass actions=..., the distribution of "
                "actions that policies start from"
            )

    def reset(self) -> Any:
        """Draw the site `start`, [2], and give (observation, state)."""
        words = environment("start", RandomWords(), observable=False)
        seen, state = self._shape.start(self.env, words, self._params)
        if not jax.tree.leaves(seen):
            raise ControlError(f"{type(self.env).__name__} gives the observation {seen!r}; give an array, or several")
        return jax.tree.map(jnp.asarray, seen), state

    def observe(self, state: Any) -> Any:
        """Give the observation, all that the agent sees."""
        return state[0]

    def step(self, state: Any, action: Any) -> Transition:
        """Draw the site `noise`, [2], and take a step."""
        words = environment("noise", RandomWords(), observable=False) if self._shape.keyed else jnp.zeros(2, jnp.uint32)
        stood = self._shape.step(self.env, words, state[1], self._taken(action), self._params)
        seen = self._alike("observation", state[0], stood.observation)
        if jnp.shape(stood.reward):
            raise ControlError(
                f"{type(self.env).__name__} gives a reward of shape {jnp.shape(stood.reward)}; let it give one number, "
                "of one episode and one agent"
            )
        after = (seen, self._alike("state", state[1], stood.state))
        ends = [jnp.asarray(end, bool) for end in (stood.terminated, stood.truncated)]
        # What has come to its end is not also cut off.
        return Transition(after, jnp.asarray(stood.reward, float), ends[0], ends[1] & ~ends[0])

    def prior(self, observation: Any) -> dist.Distribution:
        """Give the distribution of actions that policies start from."""
        chosen = self.actions
        if chosen is None:
            assert self._space is not None
            chosen = self._space.prior()
        mask = _mask_in(observation)
        if mask is None:
            return chosen
        base = chosen.base_dist if isinstance(chosen, dist.Independent) else chosen
        allowed = mask_actions(base, self._among(jnp.asarray(mask, bool), base))
        return allowed.to_event(1) if isinstance(chosen, dist.Independent) else allowed

    def allowed(self, observation: Any) -> Array | None:
        """Give the part `action_mask` of an observation as flags of all actions; see `Environment.allowed`."""
        mask = _mask_in(observation)
        if mask is None:
            return None
        chosen = self._space.prior() if self.actions is None and self._space is not None else self.actions
        return self._among(jnp.asarray(mask, bool), chosen)

    def _among(self, mask: Array, actions: Any) -> Array:
        """Give a mask in the shape of the logits, of all actions or of the values of each of several integers."""
        logits = getattr(actions, "logits", None)
        shape: tuple[int, ...] = () if logits is None else jnp.shape(logits)
        sizes = self._space.sizes if self._space is not None and self.actions is None else ()
        told = reshape_mask(mask, sizes, shape) if shape else None
        if told is None:
            raise ControlError(
                f"{type(self.env).__name__} tells an {MASK} of shape {mask.shape}, which does not say which of its "
                f"actions are allowed, whose logits have shape {shape}; let it tell of each action, or leave it out of "
                "the observation"
            )
        return told

    def features(self, observation: Any) -> Array:
        """Give all numbers of an observation of several parts; see `Environment.features`."""
        return super().features(jax.tree.map(jnp.asarray, observation))

    def _taken(self, action: Any) -> Any:
        """Give what the environment takes of an action that was drawn."""
        space = self._space
        if space is None or self.actions is not None:
            return action
        if space.sizes:
            digits = digits_of(action, space.sizes) if space.num is not None else action
            return (digits + jnp.asarray(space.low)).astype(jnp.int32)
        if space.num is not None:
            return action + space.first
        return jnp.clip(action, jnp.asarray(space.low), jnp.asarray(space.high))

    def _alike(self, what: str, before: Any, after: Any) -> Any:
        """Give what follows in the types of what was before."""
        kinds = [repr(jax.tree.structure(tree)) for tree in (before, after)]
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (before, after)]
        # What is no leaf, such as an array that a class of the environment's holds, may not compare.
        held = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (before, after)]
        if kinds[0] != kinds[1] or held[0] != held[1]:
            raise ControlError(
                f"the {what} of {type(self.env).__name__} has shape {shapes[0]} after reset, and {shapes[1]} "
                "after step; let it keep its shape"
            )
        return jax.tree.map(_as_before, after, before)

    @property
    def _params(self) -> Any:
        return getattr(self.env, "default_params", None) if isinstance(self.params, str) else self.params


def _as_before(new: Any, old: Any) -> Any:
    if jnp.issubdtype(getattr(old, "dtype", float), jax.dtypes.extended):  # keys have no other type
        return new
    return jnp.asarray(new, jnp.result_type(old))


def _mask_in(observation: Any) -> Any:
    if isinstance(observation, dict):
        return observation.get(MASK)
    return getattr(observation, MASK, None)
