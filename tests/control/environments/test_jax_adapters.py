"""The shapes of gymnax, brax, jumanji, navix and pgx: who tells what at the end of an episode, and what is made of it.

The same walk is written in each shape: it counts up by its action, pays its place, ends by itself at 3 and is cut off
after `limit` steps.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro import handlers

from bayesrl.compilation.random_keys import as_hash_key
from bayesrl.control import ActorCritic, JaxEnvironment, Rollout, TablePolicy
from bayesrl.control.learning.adapters import adapt_environment
from bayesrl.control.rollout import PolicyOutput
from bayesrl.errors import ControlError
from bayesrl.svi.problem_setup import set_up

KEY = jax.random.key(0)


class Space:
    def __init__(self, **told: Any) -> None:
        self.__dict__.update(told)


class Walk(NamedTuple):
    place: Array
    time: Array


def walked(state: Walk, action: Any) -> Walk:
    return Walk(state.place + action, state.time + 1)


def begun() -> Walk:
    return Walk(jnp.zeros((), int), jnp.zeros((), int))


def seen(state: Walk) -> Array:
    return jnp.asarray(state.place, float)[None]


class Shaped:
    def __init__(self, limit: int = 5) -> None:
        self.limit = limit

    def ended(self, state: Walk) -> Array:
        return state.place >= 3

    def cut(self, state: Walk) -> Array:
        return state.time >= self.limit


class Gymnax(Shaped):
    """Of gymnax 1: `step` starts anew, `step_env` does not and leaves time limits to `is_truncated`."""

    default_params = None

    def action_space(self, params: Any) -> Any:
        return Space(n=2, shape=(), dtype=jnp.int32)

    def reset(self, key: Any, params: Any = None) -> Any:
        return seen(begun()), begun()

    def step_env(self, key: Any, state: Walk, action: Any, params: Any) -> Any:
        after = walked(state, action)
        return seen(after), after, after.place.astype(float), self.ended(after), {}

    def is_truncated(self, state: Walk, params: Any) -> Array:
        return self.cut(state)

    def step(self, key: Any, state: Walk, action: Any, params: Any = None) -> Any:
        last, after, reward, terminated, info = self.step_env(key, state, action, params)
        truncated = self.is_truncated(after, params)
        over = terminated | truncated
        told = {**info, "terminated": terminated, "truncated": truncated, "final_observation": last}
        new = jax.tree.map(lambda a, b: jnp.where(over, a, b), (seen(begun()), begun()), (last, after))
        return *new, reward, terminated, truncated, told


class Logged:
    """A wrapper as gymnax has them, which lends all else of what it wraps."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, key: Any, params: Any = None) -> Any:
        first, state = self._env.reset(key, params)
        return first, {"inner": state, "total": jnp.zeros(())}

    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        now, inner, reward, *rest = self._env.step(key, state["inner"], action, params)
        return now, {"inner": inner, "total": state["total"] + reward}, reward, *rest


class Older(Gymnax):
    """Five values, and `info` tells what was cut off."""

    step_env = None

    def step(self, key: Any, state: Walk, action: Any, params: Any = None) -> Any:
        after = walked(state, action)
        ended, cut = self.ended(after), self.cut(after)
        told = {"truncated": cut & ~ended, "terminated": ended}
        return seen(after), after, after.place.astype(float), ended | cut, told


@jax.tree_util.register_dataclass
@dataclass
class BraxState:
    pipeline_state: Any
    obs: Any
    reward: Any
    done: Any
    info: Any


class Brax(Shaped):
    action_size = 1

    def reset(self, rng: Any) -> Any:
        zero = jnp.zeros(())
        return BraxState(begun(), seen(begun()), zero, zero, {"truncation": zero})

    def step(self, state: Any, action: Any) -> Any:
        after = walked(state.pipeline_state, (action[0] > 0).astype(int))
        ended = self.ended(after).astype(float)
        done = jnp.where(self.cut(after), 1.0, ended)
        info = {"truncation": jnp.where(self.cut(after), 1.0 - ended, 0.0)}
        return BraxState(after, seen(after), after.place.astype(float), done, info)


class AutoResetWrapper:
    """Shows the first observation at the end, so that what was cut off there could not be valued."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self, rng: Any) -> Any:
        return self.env.reset(rng)

    def step(self, state: Any, action: Any) -> Any:
        after = self.env.step(state, action)
        after.obs = jnp.where(after.done > 0, -99.0, after.obs)
        return after


class TimeStep(NamedTuple):
    step_type: Any
    reward: Any
    discount: Any
    observation: Any


class Grid(NamedTuple):
    place: Any
    action_mask: Any


class Jumanji(Shaped):
    """Its discount is 0 at an end and 1 where a time limit cuts off; the second action is allowed alone at first."""

    action_spec = Space(num_values=2, minimum=0, maximum=1, shape=(), dtype=np.dtype("int32"))

    def _told(self, state: Walk, kind: Any, discount: Any) -> TimeStep:
        mask = jnp.stack([state.place > 0, jnp.asarray(True)])
        return TimeStep(kind, state.place.astype(float), discount, Grid(seen(state), mask))

    def reset(self, key: Any) -> Any:
        return begun(), self._told(begun(), jnp.asarray(0, jnp.int8), jnp.ones(()))

    def step(self, state: Walk, action: Any) -> Any:
        after = walked(state, action)
        last = self.ended(after) | self.cut(after)
        kind = jnp.where(last, 2, 1).astype(jnp.int8)
        return after, self._told(after, kind, jnp.where(self.ended(after), 0.0, 1.0))


class NavixStep(NamedTuple):
    t: Any
    observation: Any
    reward: Any
    step_type: Any
    state: Any


class Navix(Shaped):
    """The step after an end is a reset, which no rollout comes to."""

    action_space = Space(shape=(), dtype=jnp.int32, minimum=jnp.asarray(0), maximum=jnp.asarray(1))

    def reset(self, key: Any) -> Any:
        zero = jnp.zeros((), int)
        return NavixStep(zero, seen(begun()), jnp.zeros(()), zero, begun())

    def step(self, timestep: Any, action: Any) -> Any:
        after = walked(timestep.state, action)
        kind = jnp.where(self.ended(after), 2, jnp.where(self.cut(after), 1, 0))
        new = NavixStep(after.time, seen(after), after.place.astype(float), kind, after)
        return jax.lax.cond(timestep.step_type > 0, lambda: self.reset(None), lambda: new)


class PgxState(NamedTuple):
    observation: Any
    rewards: Any
    terminated: Any
    truncated: Any
    legal_action_mask: Any
    inner: Any


class Pgx(Shaped):
    """One player; an illegal action ends the game with a loss."""

    num_players = 1

    def _state(self, state: Walk, reward: Any) -> PgxState:
        legal = jnp.stack([state.place > 0, jnp.asarray(True)])
        return PgxState(seen(state), reward, self.ended(state), self.cut(state) & ~self.ended(state), legal, state)

    def init(self, key: Any) -> Any:
        return self._state(begun(), jnp.zeros(self.num_players))

    def step(self, state: PgxState, action: Any, key: Any = None) -> Any:
        after = self._state(walked(state.inner, action), jnp.zeros(self.num_players) + state.inner.place + action)
        illegal = ~state.legal_action_mask[action]
        lost = after._replace(rewards=jnp.full(self.num_players, -100.0), terminated=jnp.asarray(True))
        return jax.tree.map(lambda a, b: jnp.where(illegal, a, b), lost, after)


SHAPES: dict[str, Any] = {
    "gymnax": Gymnax,
    "gymnax, wrapped": lambda limit=5: Logged(Gymnax(limit)),
    "gymnax before": Older,
    "brax": Brax,
    "brax, reset": lambda limit=5: AutoResetWrapper(Brax(limit)),
    "jumanji": Jumanji,
    "navix": Navix,
    "pgx": Pgx,
}


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("brax")])
def test_the_same_walk_is_the_same_in_every_shape(name: str) -> None:
    """Step by step: place, reward, the end at 3, and what a limit of 4 steps cuts off, where 3 is not reached."""
    for limit, steps in ((4, [1, 0, 1, 0]), (3, [1, 1, 1])):
        environment = JaxEnvironment(SHAPES[name](limit))
        world = adapt_environment(environment)
        begin = world.begin(as_hash_key(np.zeros(2, np.uint32)))
        at = -1 if name == "pgx" else 0  # its mask comes first
        assert begin[at] == 0
        place = 0
        for i, action in enumerate(steps):
            observed, reward, terminated, truncated = world.step(action)
            place += action
            over = i == len(steps) - 1
            assert (observed[at], reward) == (place, place)
            assert terminated == (over and place == 3)
            assert truncated == (over and place < 3)


@pytest.mark.parametrize(("name", "unbounded"), [*((name, True) for name in SHAPES), ("gymnax", False)])
def test_what_is_cut_off_is_valued_by_what_it_ended_in(name: str, unbounded: bool) -> None:
    """Where the horizon and limits only cut off, go_on is γ there and 0 at ends; else 0 at both."""
    environment = JaxEnvironment(SHAPES[name](4))
    program = Rollout(environment, 6, discount=0.5, unbounded=unbounded)

    def choose(observation: Any, time: Array) -> PolicyOutput:
        return PolicyOutput(environment.prior(observation), jnp.zeros(()))

    def one(key: Any) -> Any:
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=key):
            last, _ = program.run(choose)
        return jax.tree.leaves(last)[-1], trace["length"]["value"], trace["continue$"]["value"]

    last, length, go_on = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(KEY, 60)))
    # What it ended in is the place itself, and nothing of a next episode; of a grid the mask follows on the place.
    place = last.reshape(60, -1)[:, 0] if name != "jumanji" else None
    at_end = go_on[np.arange(60), length - 1]
    assert (length <= 4).all()
    ended = at_end == 0.0
    if unbounded:
        assert ended.any()
        assert (length[~ended] == 4).all()
        np.testing.assert_allclose(at_end[~ended], 0.5)
        assert place is None or ((place == 3) == ended).all()
    else:
        assert ended.all()


def test_masks_are_of_the_prior_and_so_of_the_policy() -> None:
    for name in ("jumanji", "pgx"):
        environment = JaxEnvironment(SHAPES[name]())
        first = environment.observe(_begun(environment))
        assert np.asarray(environment.prior(first).probs).tolist() == [0.0, 1.0]
        assert environment.features(first).shape == (3,)


class Pairs(Jumanji):
    """Actions are several integers; the mask is what it is told to be."""

    def __init__(self, sizes: tuple[int, ...], mask: Any) -> None:
        super().__init__()
        self.mask = jnp.asarray(mask)
        self.action_spec = Space(num_values=np.array(sizes), minimum=np.zeros(len(sizes), int), shape=(len(sizes),))

    def _told(self, state: Walk, kind: Any, discount: Any) -> TimeStep:
        return super()._told(state, kind, discount)._replace(observation=Grid(seen(state), self.mask))


FLAGS = np.arange(300) % 3 > 0


@pytest.mark.parametrize(
    ("sizes", "mask", "wanted"),
    [
        ((6,), FLAGS[:6], FLAGS[:6]),
        ((2, 3), FLAGS[:6].reshape(2, 3), None),  # of six pairs, or of two integers with three values
        ((3, 4), FLAGS[:12].reshape(3, 4), FLAGS[:12]),
        ((3, 4), FLAGS[:12], FLAGS[:12]),
        ((3, 4), FLAGS[:8].reshape(2, 4), np.outer(FLAGS[:3], FLAGS[4:8]).ravel()),
        ((2, 2, 2), FLAGS[:6].reshape(3, 2), np.einsum("i,j,k->ijk", *FLAGS[:6].reshape(3, 2)).ravel()),
        ((2, 2), FLAGS[:4].reshape(2, 2), None),
        ((20, 20), FLAGS[:40].reshape(2, 20), FLAGS[:40].reshape(2, 20)),  # too many pairs for one distribution
        ((20, 20), np.ones((20, 20)), None),
        ((3, 4), FLAGS[:7], None),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_masks_of_several_integers_are_read_or_refused(sizes: Any, mask: Any, wanted: Any) -> None:
    environment = JaxEnvironment(Pairs(sizes, mask))
    first = environment.observe(_begun(environment))
    if wanted is None:
        with pytest.raises(ControlError, match=r"gives an action_mask of shape .*which does not say which"):
            environment.prior(first)
        return
    prior = environment.prior(first)
    drawn = np.asarray(prior.sample(KEY, (2000,)))
    if wanted.ndim == 1:
        assert set(drawn.tolist()) == set(np.flatnonzero(wanted).tolist())
        assert np.asarray(environment.allowed(first)).tolist() == wanted.tolist()
    else:
        assert prior.event_shape == (len(sizes),)
        for i, row in enumerate(wanted):
            assert set(drawn[:, i].tolist()) == set(np.flatnonzero(row).tolist())


def test_masks_that_a_given_prior_cannot_heed_are_refused() -> None:
    environment = JaxEnvironment(Jumanji(), dist.Bernoulli(0.5))
    with pytest.raises(ControlError, match=r"gives an action_mask of shape \(2,\)"):
        environment.prior(environment.observe(_begun(environment)))
    heeding = JaxEnvironment(Jumanji(), dist.Categorical(jnp.array([0.9, 0.1])))
    assert np.asarray(heeding.prior(heeding.observe(_begun(heeding))).probs).tolist() == [0.0, 1.0]


def _begun(environment: Any) -> Any:
    with handlers.block(), handlers.seed(rng_seed=0):
        return environment.reset()


@pytest.mark.parametrize(
    ("space", "drawn", "taken"),
    [
        (Space(n=3), (), 2),
        (Space(low=-2.0, high=2.0, shape=(1,), dtype=np.float32), (1,), [2.0]),
        (Space(num_values=np.array([6, 1, 3]), minimum=np.array([0, 0, 0]), shape=(3,)), (), [5, 0, 2]),
        (Space(num_values=np.array([60, 10, 3]), minimum=np.array([0, 2, 0]), shape=(3,)), (3,), [59, 11, 2]),
        (Space(minimum=2, maximum=4, shape=(), dtype=np.int32), (), 4),
    ],
)
def test_action_spaces_of_all_kinds(space: Any, drawn: tuple[int, ...], taken: Any) -> None:
    env: Any = Gymnax()
    env.action_space = lambda params: space
    environment = JaxEnvironment(env)
    prior = environment.prior(jnp.zeros(1))
    sampled = np.asarray(prior.sample(KEY, (2000,)))
    assert sampled.shape[1:] == drawn
    most = sampled.max(0)
    assert (
        np.asarray(environment._to_environment(jnp.asarray(most + (50.0 if most.dtype.kind == "f" else 0)))).tolist()
        == taken
    )


def test_counted_observations_of_a_table() -> None:
    class Counted(Gymnax):
        def reset(self, key: Any, params: Any = None) -> Any:
            return begun().place, begun()

        def step_env(self, key: Any, state: Walk, action: Any, params: Any) -> Any:
            after = walked(state, action)
            return after.place, after, after.place.astype(float), self.ended(after), {}

    program = Rollout(JaxEnvironment(Counted(), num_observations=4), 5)
    assert set_up(KEY, program, (), 1.0, TablePolicy(), ActorCritic(), 1).params["action$table"].shape[1:] == (4, 2)


class Two(Pgx):
    num_players = 2


class Teams(Jumanji):
    def _told(self, state: Walk, kind: Any, discount: Any) -> TimeStep:
        return super()._told(state, kind, discount)._replace(reward=jnp.zeros(3))


class Strange(Shaped):
    def reset(self, key: Any) -> Any:
        return 3

    def step(self, state: Any, action: Any) -> Any: ...


class Growing(Navix):
    def step(self, timestep: Any, action: Any) -> Any:
        return timestep._replace(observation=jnp.zeros(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Two, "Two has 2 players; give it a step that plays the others"),
        (Teams, r"Teams gives a reward of shape \(3,\); let it give one number"),
        (Strange, "Strange has the interface of no known library"),
        (Growing, r"the observation of Growing has shape \(1,\) after reset, and \(2,\) after step"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_environment_of_one_agent_is_refused(make: Any, message: str) -> None:
    def play() -> None:
        world = adapt_environment(JaxEnvironment(make()))
        world.begin(as_hash_key(np.zeros(2, np.uint32)))
        world.step(1)

    with pytest.raises(ControlError, match=message):
        play()
