"""How environments of JAX are shaped: who does what with observation, reward and step of an episode's end.

| | a step gives | key | reward | the end | cut off | what starts the next episode |
|---|---|---|---|---|---|---|
| gymnax | `step_env`, five values | given | third | fourth | `is_truncated` | nothing |
| its wrappers | `step`, six values | given | third | fourth | fifth | `step`; `info` has the last observation |
| gymnax < 1 | `step`, five values | given | third | fourth | `info["truncated"]` or nothing | `step` |
| brax | a state | held | `reward` | `done` | `info["truncation"]` | a wrapper, taken off |
| jumanji | state, time step | held | `reward` | last, discount 0 | last, discount > 0 | a wrapper, taken off |
| navix | a time step | held | `reward` | `step_type` 2 | `step_type` 1 | the next `step` |
| pgx | a state | given | `rewards` | `terminated` | `truncated` | nothing |

Gymnax begins with `reset(key, params)`, pgx with `init(key)`, the others with `reset(key)`.
A rollout stops at an end, so that what a later step would start is never used.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.control.gymnasium.nested_spaces import digits_of
from bayesrl.control.gymnasium.spaces import MASK, MOST_JOINT, Actions
from bayesrl.errors import ControlError

_FINAL = ("final_observation", "final_obs", "terminal_observation")
_CUT = ("truncated", "truncation", "TimeLimit.truncated")


class EnvStep(NamedTuple):
    """Where an environment stands after a step.

    Attributes:
        observation: what is seen, any pytree of arrays; of the step itself, not of a next episode.
        state: the environment's own.
        reward: reward units.
        terminated: whether the episode came to its own end.
        truncated: whether it was cut off, by a time limit, say.
    """

    observation: Any
    state: Any
    reward: Any
    terminated: Any
    truncated: Any


class EnvInterface(NamedTuple):
    """One row of the table.

    Attributes:
        name: of the library.
        keyed: whether a step takes a key.
        start: from (environment, words of a key, params) to (observation, state).
        step: from (environment, words of a key, state, action, params) to `EnvStep`.
    """

    name: str
    keyed: bool
    start: Callable[[Any, Array, Any], tuple[Any, Any]]
    step: Callable[[Any, Array, Any, Any, Any], EnvStep]


def detect_interface(env: Any) -> EnvInterface:
    """Recognise the shape of an environment.

    Raises:
        ControlError: it has none of them.
    """
    if callable(getattr(env, "init", None)) and not callable(getattr(env, "reset", None)):
        return PGX
    if _num_arguments(env.step) >= 4:
        return GYMNAX
    try:
        first = jax.eval_shape(env.reset, jax.ShapeDtypeStruct((2,), jnp.uint32))
    except Exception as error:
        raise ControlError(
            f"reset(key) of {type(env).__name__} cannot be looked at: {type(error).__name__}: {error}"
        ) from error
    if isinstance(first, tuple) and len(first) == 2 and _has(first[1], "observation", "discount", "step_type"):
        return JUMANJI
    if _has(first, "observation", "step_type", "reward"):
        return NAVIX
    if _has(first, "obs", "reward", "done"):
        return BRAX
    raise ControlError(
        f"{type(env).__name__} has the shape of no library that is known: reset(key) gives {type(first).__name__}; "
        "let it give what brax, jumanji or navix do, or take (key, params) and give (observation, state)"
    )


def strip_autoreset(env: Any) -> Any:
    """Take wrappers off that start the next episode by themselves, and so lose what the last one ended in."""
    while "AutoReset" in type(env).__name__:
        inner = vars(env).get("env", vars(env).get("_env"))
        if inner is None:
            break
        env = inner
    return env


def _num_arguments(method: Any) -> int:
    try:
        told = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return 4
    return 4 if any(p.kind is p.VAR_POSITIONAL for p in told) else sum(p.kind is not p.VAR_KEYWORD for p in told)


def _has(thing: Any, *names: str) -> bool:
    return all(hasattr(thing, name) for name in names)


def _typed(words: Array) -> Any:
    return jax.random.wrap_key_data(words.astype(jnp.uint32))


def _gymnax_start(env: Any, words: Array, params: Any) -> tuple[Any, Any]:
    seen, state = unpack(env, env.reset(_typed(words), params), "reset", "observation, state")
    return seen, state


def _gymnax_step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
    # One that is lent by what is wrapped would be given the wrapper's state.
    own = callable(getattr(type(env), "step_env", None))
    given = (env.step_env if own else env.step)(_typed(words), state, action, params)
    if isinstance(given, tuple) and len(given) == 6:
        seen, after, reward, terminated, truncated, info = given
    else:
        seen, after, reward, done, info = unpack(env, given, "step", "observation, state, reward, done, info")
        terminated, truncated = _ends(env, after, done, info, params, own=own)
    if own:
        return EnvStep(seen, after, reward, terminated, truncated)
    final = next((info[name] for name in _FINAL if name in info), None) if isinstance(info, dict) else None
    if final is None:
        return EnvStep(seen, after, reward, terminated, truncated)
    if repr(jax.tree.structure(final)) != repr(jax.tree.structure(seen)) or _shapes(final) != _shapes(seen):
        # What the episode ended in is not seen as the policy sees it, so nothing can be valued there.
        return EnvStep(seen, after, reward, jnp.logical_or(terminated, truncated), jnp.zeros((), bool))
    over = jnp.logical_or(terminated, truncated)
    last = jax.tree.map(lambda a, b: jnp.where(over, a, b), final, seen)
    return EnvStep(last, after, reward, terminated, truncated)


def _ends(env: Any, after: Any, done: Any, info: Any, params: Any, *, own: bool) -> tuple[Any, Any]:
    """Tell an end from a time limit, where anything tells."""
    told = info if isinstance(info, dict) else {}
    name = next((name for name in _CUT if name in told), None)
    if name is not None:
        cut = jnp.asarray(told[name], bool)
        ended = told.get("terminated", jnp.logical_and(done, ~cut))
        return jnp.asarray(ended, bool), cut
    if own and callable(getattr(type(env), "is_truncated", None)):
        return done, env.is_truncated(after, params)
    return done, jnp.zeros((), bool)


def _brax_step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
    after = env.step(state, action)
    done = jnp.asarray(after.done, bool)
    cut = jnp.logical_and(done, jnp.asarray((getattr(after, "info", None) or {}).get("truncation", 0), bool))
    return EnvStep(after.obs, after, after.reward, jnp.logical_and(done, ~cut), cut)


def _jumanji_step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
    after, told = env.step(state, action)
    last, going_on = jnp.asarray(told.step_type) == 2, jnp.asarray(told.discount) > 0
    return EnvStep(told.observation, after, told.reward, last & ~going_on, last & going_on)


def _navix_step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
    after = env.step(state, action)
    kind = jnp.asarray(after.step_type)
    return EnvStep(after.observation, after, after.reward, kind == 2, kind == 1)


def _pgx_seen(state: Any) -> dict[str, Any]:
    return {"observation": state.observation, MASK: state.legal_action_mask}


def _pgx_step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
    takes_key = _num_arguments(env.step) >= 3
    after = env.step(state, action, words) if takes_key else env.step(state, action)
    if jnp.shape(after.rewards) != (1,):
        raise ControlError(
            f"{type(env).__name__} has {jnp.size(after.rewards)} players; give it a step that plays the others' moves, "
            "and one reward"
        )
    return EnvStep(_pgx_seen(after), after, after.rewards[0], after.terminated, after.truncated)


def _held(env: Any, words: Array, params: Any, name: str) -> tuple[Any, Any]:
    state = env.reset(words)
    return getattr(state, name), state


def _jumanji_start(env: Any, words: Array, params: Any) -> tuple[Any, Any]:
    state, told = env.reset(words)
    return told.observation, state


def _pgx_start(env: Any, words: Array, params: Any) -> tuple[Any, Any]:
    state = env.init(words)
    return _pgx_seen(state), state


def unpack(env: Any, given: Any, method: str, names: str) -> Any:
    """Give what a method gave, where it is a tuple of these names.

    Raises:
        ControlError: it is not.
    """
    if isinstance(given, tuple) and len(given) == len(names.split(", ")):
        return given
    told = f"{len(given)} things" if isinstance(given, tuple) else f"a {type(given).__name__}"
    raise ControlError(f"{method} of {type(env).__name__} gives {told}; give ({names})")


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


GYMNAX = EnvInterface("gymnax", True, _gymnax_start, _gymnax_step)
BRAX = EnvInterface("brax", False, lambda env, words, params: _held(env, words, params, "obs"), _brax_step)
JUMANJI = EnvInterface("jumanji", False, _jumanji_start, _jumanji_step)
NAVIX = EnvInterface("navix", False, lambda env, words, params: _held(env, words, params, "observation"), _navix_step)
PGX = EnvInterface("pgx", True, _pgx_start, _pgx_step)


def reshape_mask(mask: Array, sizes: tuple[int, ...], shape: tuple[int, ...]) -> Array | None:
    """Give a mask in the shape of logits, or None where it does not say which actions are allowed.

    Args:
        mask: of all actions, flat or with an axis for each integer; or of the values of each integer, [integers, most].
        sizes: how many values each of several integers takes; empty where actions are no such.
        shape: [actions] of all of them together, or [integers, most] of each integer on its own.
    """
    if mask.shape == shape:
        return None if mask.shape == sizes and len(shape) > 1 else mask
    of_all, of_each = mask.shape == sizes, bool(sizes) and mask.shape == (len(sizes), max(sizes))
    if of_all == of_each or shape != (math.prod(sizes),):
        return None
    if of_all:
        return mask.ravel()
    digits = digits_of(np.arange(math.prod(sizes)), sizes)
    return mask[np.arange(len(sizes)), digits].all(-1)


def describe_jax_actions(env: Any, shape: EnvInterface, params: Any) -> Actions | None:
    """Describe the actions of an environment, or give None where it has no space of them that is known.

    Of several integers the least values are told as `low`.
    """
    if shape is PGX:
        first = jax.eval_shape(env.init, jax.ShapeDtypeStruct((2,), jnp.uint32))
        return Actions(int(np.shape(first.legal_action_mask)[-1]))
    if shape is BRAX and hasattr(env, "action_size"):
        bound = np.ones(int(env.action_size), np.float32)
        return Actions(None, 0, -bound, bound)
    space = getattr(env, "action_space", getattr(env, "action_spec", None))
    if space is None:
        return None
    space = space(params) if shape is GYMNAX and callable(space) else space() if inspect.ismethod(space) else space
    number = getattr(space, "n", getattr(space, "num_values", None))
    low, high = (getattr(space, a, getattr(space, b, None)) for a, b in (("low", "minimum"), ("high", "maximum")))
    if number is not None and np.ndim(number) == 0:
        return Actions(int(number), 0 if low is None else int(np.asarray(low)))
    if number is not None:
        sizes = tuple(int(n) for n in np.ravel(number))
        least = np.zeros(len(sizes), int) if low is None else np.broadcast_to(np.asarray(low), np.shape(number)).ravel()
        joint = math.prod(sizes)
        return Actions(joint if joint <= MOST_JOINT else None, low=least, sizes=sizes) if np.ndim(number) == 1 else None
    if low is None or high is None:
        return None
    whole = tuple(getattr(space, "shape", ()) or ())
    if np.issubdtype(np.dtype(getattr(space, "dtype", float)), np.integer):
        return Actions(int(np.asarray(high)) - int(np.asarray(low)) + 1, int(np.asarray(low))) if whole == () else None
    least, most = (np.broadcast_to(np.asarray(side, np.float32), whole) for side in (low, high))
    return Actions(None, 0, least, most)
