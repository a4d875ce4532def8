"""The interfaces of JAX environments: how each returns observation, reward and the end of an episode; see README.

A rollout stops at an end, so it never uses an episode that a later step would start.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.arguments import user_code
from bayesrl.control.gymnasium.spaces import MASK, MOST_JOINT, Actions
from bayesrl.errors import ControlError

_FINAL = ("final_observation", "final_obs", "terminal_observation")
_CUT = ("truncated", "truncation", "TimeLimit.truncated")


class EnvStep(NamedTuple):
    """The outcome of a step of an environment.

    Attributes:
        observation: the observation of the step itself, not of a next episode; any pytree of arrays.
        state: the environment's own state.
        reward: reward units.
        terminated: whether the episode came to its own end.
        truncated: whether something else, such as a time limit, cut it off.
    """

    observation: Any
    state: Any
    reward: Any
    terminated: Any
    truncated: Any


class EnvInterface(NamedTuple):
    """How to call the environments of a library.

    Attributes:
        keyed: whether a step takes a key.
        start: a function from (environment, words of a key, params) to (observation, state).
        step: a function from (environment, words of a key, state, action, params) to `EnvStep`.
    """

    keyed: bool
    start: Callable[[Any, Array, Any], tuple[Any, Any]]
    step: Callable[[Any, Array, Any, Any, Any], EnvStep]


def detect_interface(env: Any) -> EnvInterface:
    """Detect the interface of an environment, or refuse one of no known library."""
    if callable(getattr(env, "init", None)) and not callable(getattr(env, "reset", None)):
        return PGX
    if _num_arguments(env.step) >= 4:
        return GYMNAX
    with user_code(f"reset(key) of {type(env).__name__}", ControlError, "let it take two words of a key"):
        first = jax.eval_shape(env.reset, jax.ShapeDtypeStruct((2,), jnp.uint32))
    if isinstance(first, tuple) and len(first) == 2 and _has(first[1], "observation", "discount", "step_type"):
        return JUMANJI
    if _has(first, "observation", "step_type", "reward"):
        return NAVIX
    if _has(first, "obs", "reward", "done"):
        return BRAX
    raise ControlError(
        f"{type(env).__name__} has the interface of no known library: reset(key) gives {type(first).__name__}; let it "
        "give what brax, jumanji or navix do, or take (key, params) and give (observation, state)"
    )


def strip_autoreset(env: Any) -> Any:
    """Remove wrappers that reset by themselves, since they lose the last observation of an episode."""
    while "AutoReset" in type(env).__name__:
        # Not getattr, because wrappers pass unknown names on to the environment inside.
        inner = vars(env).get("env", vars(env).get("_env"))
        if inner is None:
            break
        env = inner
    return env


def _num_arguments(method: Any) -> int:
    try:
        params = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        # A method that hides its arguments counts as gymnax's, which has the most.
        return 4
    return 4 if any(p.kind is p.VAR_POSITIONAL for p in params) else sum(p.kind is not p.VAR_KEYWORD for p in params)


def _has(thing: Any, *names: str) -> bool:
    return all(hasattr(thing, name) for name in names)


def _as_key(words: Array) -> Any:
    return jax.random.wrap_key_data(words.astype(jnp.uint32))


def _gymnax_start(env: Any, words: Array, params: Any) -> Any:
    return _unpack(env, env.reset(_as_key(words), params), "reset", "observation, state")


def _gymnax_step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
    # A wrapper may pass on the `step_env` of the environment inside, which does not know the wrapper's state.
    own = callable(getattr(type(env), "step_env", None))
    given = (env.step_env if own else env.step)(_as_key(words), state, action, params)
    if isinstance(given, tuple) and len(given) == 6:
        seen, after, reward, terminated, truncated, info = given
    else:
        seen, after, reward, done, info = _unpack(env, given, "step", "observation, state, reward, done, info")
        terminated, truncated = _split_done(env, after, done, info, params, own=own)
    # `step_env` does not reset, so its observation is the last one already.
    infos = info if isinstance(info, dict) and not own else {}
    final = next((infos[name] for name in _FINAL if name in infos), None)
    if final is not None:
        over = jnp.logical_or(terminated, truncated)
        if same_layout(final, seen):
            seen = jax.tree.map(lambda last, first: jnp.where(over, last, first), final, seen)
        else:  # policies do not see this kind of observation, so a critic cannot value it
            terminated, truncated = over, jnp.zeros((), bool)
    return EnvStep(seen, after, reward, terminated, truncated)


def _split_done(env: Any, after: Any, done: Any, info: Any, params: Any, *, own: bool) -> tuple[Any, Any]:
    """Tell an end from a time limit, if the environment does."""
    infos = info if isinstance(info, dict) else {}
    name = next((name for name in _CUT if name in infos), None)
    if name is not None:
        cut = jnp.asarray(infos[name], bool)
        ended = infos.get("terminated", jnp.logical_and(done, ~cut))
        return jnp.asarray(ended, bool), cut
    if own and callable(getattr(type(env), "is_truncated", None)):
        return done, env.is_truncated(after, params)
    return done, jnp.zeros((), bool)


def _jumanji_start(env: Any, words: Array, params: Any) -> tuple[Any, Any]:
    state, first = env.reset(words)
    return first.observation, state


def _jumanji_step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
    after, step = env.step(state, action)
    # As in dm_env: 2 is the last step, and one with a discount above 0 was cut off.
    last, going_on = jnp.asarray(step.step_type) == 2, jnp.asarray(step.discount) > 0
    return EnvStep(step.observation, after, step.reward, last & ~going_on, last & going_on)


def _of_state(read: Callable[[Any, Any], EnvStep], *, begin: str = "reset", keyed: bool = False) -> EnvInterface:
    """Make the interface of a library whose states themselves hold what was observed, earned and ended."""

    def start(env: Any, words: Array, params: Any) -> tuple[Any, Any]:
        state = getattr(env, begin)(words)
        return read(env, state).observation, state

    def step(env: Any, words: Array, state: Any, action: Any, params: Any) -> EnvStep:
        # Steps of pgx take a key only in games that draw.
        key = [words] if keyed and _num_arguments(env.step) >= 3 else []
        return read(env, env.step(state, action, *key))

    return EnvInterface(keyed, start, step)


def _read_brax(env: Any, state: Any) -> EnvStep:
    done = jnp.asarray(state.done, bool)
    cut = jnp.logical_and(done, jnp.asarray((getattr(state, "info", None) or {}).get("truncation", 0), bool))
    return EnvStep(state.obs, state, state.reward, jnp.logical_and(done, ~cut), cut)


def _read_navix(env: Any, state: Any) -> EnvStep:
    kind = jnp.asarray(state.step_type)
    return EnvStep(state.observation, state, state.reward, kind == 2, kind == 1)


def _read_pgx(env: Any, state: Any) -> EnvStep:
    if jnp.shape(state.rewards) != (1,):
        raise ControlError(
            f"{type(env).__name__} has {jnp.size(state.rewards)} players; give it a step that plays the others' moves, "
            "and one reward"
        )
    seen = {"observation": state.observation, MASK: state.legal_action_mask}
    return EnvStep(seen, state, state.rewards[0], state.terminated, state.truncated)


def _unpack(env: Any, given: Any, method: str, names: str) -> Any:
    """Return the output of a method if it is a tuple with these names, else raise."""
    if isinstance(given, tuple) and len(given) == len(names.split(", ")):
        return given
    kind = f"{len(given)} things" if isinstance(given, tuple) else f"a {type(given).__name__}"
    raise ControlError(f"{method} of {type(env).__name__} gives {kind}; give ({names})")


def same_layout(one: Any, other: Any) -> bool:
    """Check whether two pytrees have the same structure and shapes."""
    # Static parts of a structure may hold arrays, for which == gives no single answer; their texts compare.
    structures = [repr(jax.tree.structure(tree)) for tree in (one, other)]
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    return structures[0] == structures[1] and shapes[0] == shapes[1]


GYMNAX = EnvInterface(True, _gymnax_start, _gymnax_step)
BRAX = _of_state(_read_brax)
JUMANJI = EnvInterface(False, _jumanji_start, _jumanji_step)
NAVIX = _of_state(_read_navix)
PGX = _of_state(_read_pgx, begin="init", keyed=True)


def reshape_mask(mask: Array, sizes: tuple[int, ...], shape: tuple[int, ...]) -> Array | None:
    """Bring a mask into the shape of logits, or return None if it does not say which actions are allowed.

    Args:
        mask: flags of all actions, flat or with an axis per integer; or of each integer's values, [integers, most].
        sizes: how many values each of several integers takes; empty if an action is not several integers.
        shape: [actions] for all actions together, or [integers, most] for each integer on its own.
    """
    if mask.shape == shape:
        return None if mask.shape == sizes and len(shape) > 1 else mask
    of_all, of_each = mask.shape == sizes, bool(sizes) and mask.shape == (len(sizes), max(sizes))
    # A mask that fits both readings is ambiguous.
    if of_all == of_each or shape != (math.prod(sizes),):
        return None
    if of_all:
        return mask.ravel()
    digits = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), -1)
    return mask[np.arange(len(sizes)), digits].all(-1)


def describe_jax_actions(env: Any, interface: EnvInterface, params: Any) -> Actions | None:
    """Describe the actions of an environment; None if it has no known space. `low` holds the least integers."""
    if interface is PGX:
        first = jax.eval_shape(env.init, jax.ShapeDtypeStruct((2,), jnp.uint32))
        return Actions(int(np.shape(first.legal_action_mask)[-1]))
    if interface is BRAX and hasattr(env, "action_size"):
        bound = np.ones(int(env.action_size), np.float32)
        return Actions(None, 0, -bound, bound)
    space = getattr(env, "action_space", getattr(env, "action_spec", None))
    if space is None:
        return None
    space = space(params) if interface is GYMNAX and callable(space) else space() if inspect.ismethod(space) else space
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
