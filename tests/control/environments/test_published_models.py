"""Published models against what is played: wrappers are seen, and a table that lies is found out."""

import itertools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import (
    ClipReward,
    DelayObservation,
    FlattenObservation,
    NormalizeReward,
    OrderEnforcing,
    RecordEpisodeStatistics,
    RepeatAction,
    StickyAction,
    TimeAwareObservation,
    TimeLimit,
    TransformAction,
    TransformObservation,
    TransformReward,
)

from bayesrl.compilation.random_keys import as_hash_key
from bayesrl.control import from_gymnasium, soft_value_iteration
from bayesrl.control.learning.adapters import GymnasiumAdapter
from bayesrl.control.learning.env_adapter import EpisodePolicy
from bayesrl.errors import ControlError

LAKE = ["SFFH", "FFFG"]
DOWN, RIGHT = 1, 2


def lake(**options: Any) -> Any:
    return gymnasium.make("FrozenLake-v1", **{"desc": LAKE, "is_slippery": False, "max_episode_steps": 9} | options)


def slippery(**options: Any) -> Any:
    return lake(is_slippery=True, **options)


SLIPPERY = GymnasiumAdapter(slippery()).optimum or np.nan


class Moved(gymnasium.ObservationWrapper[Any, Any, Any]):
    """States are counted backwards, from 10 on."""

    def __init__(self, env: Any, merge: int = 1) -> None:
        super().__init__(env)
        self.merge = merge
        self.observation_space = spaces.Discrete(8, start=10)

    def observation(self, observation: Any) -> Any:
        return 17 - observation // self.merge


class Halved(gymnasium.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> Any:
        return reward / 2 - 0.25


class Idle(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Changes nothing."""

    def render(self) -> Any:
        return None


class Bonus(gymnasium.Wrapper[Any, Any, Any, Any]):
    def step(self, action: Any) -> Any:
        seen, reward, *rest = super().step(action)
        return seen, reward + 1, *rest


class Elsewhere(gymnasium.Wrapper[Any, Any, Any, Any]):
    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        self.unwrapped.s = 2  # type: ignore[attr-defined]
        return 2, {}


class Sooner(TimeLimit):
    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return rest[0], rest[1], rest[2], True, info


def permuted(env: Any) -> Any:
    return TransformAction(env, lambda a: (a + 2) % 4, spaces.Discrete(4))


def down_or_right(env: Any, start: int = 0) -> Any:
    return TransformAction(env, lambda a: (DOWN, RIGHT)[a - start], spaces.Discrete(2, start=start))


@pytest.mark.parametrize(
    ("make", "optimum"),
    [
        (lake, 1.0),
        (lambda: TransformReward(lake(), lambda r: 10.0 * r), 10.0),
        (lambda: TransformReward(lake(), lambda r: -r), 0.0),
        (lambda: TransformReward(TransformReward(lake(), lambda r: r + 1), lambda r: 2 * r), 2.0 * 8 + 4.0),
        (lambda: ClipReward(lake(), 0.0, 0.3), 0.3),
        (lambda: Halved(lake()), -0.25 * 3 + 0.25),
        (lambda: permuted(lake()), 1.0),
        (lambda: permuted(slippery()), SLIPPERY),
        (lambda: TransformAction(lake(), lambda a: 0 if a < 2 else 3, spaces.Discrete(4)), 0.0),
        (lambda: down_or_right(lake()), 1.0),
        (lambda: down_or_right(lake(), start=7), 1.0),
        (lambda: Moved(lake()), 1.0),
        (lambda: Moved(slippery()), SLIPPERY),
        (lambda: FlattenObservation(slippery()), SLIPPERY),
        (lambda: Idle(RecordEpisodeStatistics(OrderEnforcing(slippery()))), SLIPPERY),
        (lambda: TimeLimit(lake(), 3), 0.0),
        (lambda: TimeLimit(TimeLimit(lake(), 4), 100), 1.0),
        (lambda: TimeLimit(lake(max_episode_steps=3), 100), 0.0),
        (lambda: gymnasium.make("FrozenLake-v1", desc=["SFG"], is_slippery=False).unwrapped, 1.0),
        (lambda: gymnasium.make("CliffWalking-v1"), -13.0),
        (lambda: gymnasium.make("CliffWalking-v1", is_slippery=True).unwrapped, None),
    ],
)
def test_the_optimum_is_that_of_what_is_played(make: Callable[[], Any], optimum: float | None) -> None:
    world = GymnasiumAdapter(make())
    assert world.optimum is not None, world.unknown
    if optimum is not None:
        assert world.optimum == pytest.approx(optimum, abs=1e-9)


def test_changed_tables_are_read_as_they_are_now() -> None:
    env = lake()
    for outcomes in env.unwrapped.P[2].values():
        outcomes[:] = [(p, to, 5.0 if to == 6 else r, end) for p, to, r, end in outcomes]
    # Two steps to the state above, then in, out, in, out, in, out, in.
    assert GymnasiumAdapter(env).optimum == pytest.approx(4 * 5.0)


def test_the_optimum_is_reached_and_never_passed() -> None:
    """On each environment the model's best policy is played: 200 episodes, 4.5 standard errors of the optimum."""
    for env in (
        TransformReward(permuted(Moved(slippery())), lambda r: 10 * r - 1),
        TimeLimit(down_or_right(slippery(max_episode_steps=30)), 6),
        TransformReward(gymnasium.make("Taxi-v4", is_rainy=True, max_episode_steps=40), lambda r: r / 10),
    ):
        world = GymnasiumAdapter(env)
        tables = from_gymnasium(env, discount=1.0, horizon=world.max_steps)
        best = soft_value_iteration(tables, 0.0).policy.argmax(-1)
        act = EpisodePolicy(lambda t, seen, _, best=best: (int(best[t][int(seen)]), 0.0))  # type: ignore[misc]
        rng = np.random.default_rng(0)
        played = [world.play(as_hash_key(rng.integers(2**32, size=2, dtype=np.uint32)), act) for _ in range(200)]
        returns = np.array([episode.reward.sum() for episode in played])
        assert world.optimum == pytest.approx(returns.mean(), abs=4.5 * returns.std() / 200**0.5 + 1e-9)
        assert max(len(episode.reward) for episode in played) <= world.max_steps


def noisy() -> Any:
    rng = np.random.default_rng(0)
    return TransformReward(lake(), lambda r: r + rng.normal())


def patched() -> Any:
    env = lake()
    env.unwrapped.step = lambda action: (0, 1.0, False, False, {})
    return env


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: NormalizeReward(lake()), "NormalizeReward may change what is played"),
        (lambda: StickyAction(lake(), 0.25), "StickyAction may change"),
        (lambda: RepeatAction(lake(), 2), "RepeatAction may change"),
        (lambda: DelayObservation(lake(), 1), "DelayObservation may change"),
        (lambda: TimeAwareObservation(lake()), "TimeAwareObservation may change"),
        (lambda: Bonus(lake()), "Bonus may change"),
        (lambda: Elsewhere(lake()), "Elsewhere may change"),
        (lambda: Sooner(lake(), 100), "Sooner may change"),
        (lambda: TransformReward(Bonus(lake()), lambda r: r), "Bonus may change"),
        (lambda: Moved(lake(), merge=2), "states 0 and 1 are observed as the same, 17"),
        (
            lambda: TransformObservation(lake(), lambda s: s // 4, spaces.Discrete(2)),
            "states 0 and 1 are observed as the same",
        ),
        (noisy, "to which the published model gives probability 0"),
        (patched, "probability 0"),
        (lambda: gymnasium.make("CartPole-v1"), "publishes no model"),
        (
            lambda: gymnasium.make("FrozenLake-v1", desc=["SF", "FF"], is_slippery=False).unwrapped,
            "has no end|never reaches",
        ),
    ],
)
def test_what_the_model_does_not_tell_is_unknown(make: Callable[[], Any], reason: str) -> None:
    env = make()
    with pytest.raises(ControlError, match=reason):
        from_gymnasium(env, discount=1.0)
    if env.action_space == spaces.Discrete(4):
        world = GymnasiumAdapter(env)
        assert world.optimum is None
        assert world._tables is None


class Chain(gymnasium.Env[Any, Any]):
    """Five states in a row; action 1 goes right and pays 1 at the end, where the episode ends. `lie` plays otherwise."""

    observation_space, action_space = spaces.Discrete(5), spaces.Discrete(2)

    def __init__(self, lie: str = "", *, often: float = 1.0, place: str = "s") -> None:
        self.lie, self.often, self.place, self.visits = lie, often, place, 0
        self.P = {s: {a: [self._moved(s, a)] for a in (0, 1)} for s in range(5)}
        if lie in ("frequency", "rows"):
            self.P = {s: {a: [(0.5, *row[0][0][1:]), (0.5, s, 0.0, False)] for a, row in r.items()} for s, r in
                      ((s, {a: [[self._moved(s, a)]] for a in (0, 1)}) for s in range(5))}  # fmt: skip

    def _moved(self, s: int, a: int) -> tuple[float, int, float, bool]:
        to = min(s + 1, 4) if a else max(s - 1, 0)
        return 1.0, to, float(to == 4), to == 4

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = 0
        self.tired = self.np_random.random() < self.often
        if self.lie == "start" and self.tired:
            self.at = 1
        return self.at, {}

    @property
    def at(self) -> int:
        return int(getattr(self, self.place))

    @at.setter
    def at(self, value: int) -> None:
        setattr(self, self.place, value)

    def step(self, action: Any) -> Any:
        _, to, reward, ended = self._moved(self.at, int(action))
        cut, chance = False, self.np_random.random() < self.often
        if self.lie == "reward" and to == 4:
            reward = 0.9
        elif self.lie == "slips" and chance:
            to, reward, ended = self.at, 0.0, False
        elif self.lie == "goes on" and to == 4:
            ended = False
        elif self.lie == "cuts" and to == 3:
            cut = True
        elif self.lie == "hidden" and self.tired and action == 1 and to < 4:
            to = self.at
        elif self.lie == "beyond" and to == 3:
            to = 7
        elif self.lie == "raises" and to == 3:
            raise RuntimeError("the wheel came off")
        elif self.lie == "frequency" and self.np_random.random() < 0.3:
            to, reward, ended = self.at, 0.0, False
        elif self.lie == "third":
            self.visits += to == 4
            reward += 3.0 * (self.visits % 3 == 2)
        self.at = to
        return to, reward, ended, cut, {}


@pytest.mark.parametrize("place", ["s", "position", "_state"])
def test_a_table_that_is_true_is_taken_wherever_the_state_is_kept(place: str) -> None:
    assert GymnasiumAdapter(TimeLimit(Chain(place=place), 9)).optimum == pytest.approx(1.0)


@pytest.mark.parametrize("place", ["s", "_state"])
@pytest.mark.parametrize(
    ("lie", "often"),
    [
        ("reward", 1.0),
        ("slips", 0.3),
        ("slips", 0.02),
        ("goes on", 1.0),
        ("cuts", 1.0),
        ("hidden", 0.3),
        ("hidden", 0.05),
        ("beyond", 1.0),
        ("raises", 1.0),
        ("frequency", 1.0),
        ("start", 0.1),
        ("third", 1.0),
    ],
)
def test_a_table_that_lies_is_found_out(lie: str, often: float, place: str) -> None:
    with pytest.raises(ControlError, match=r"published model|initial_state_distrib|episodes start in 2 states"):
        from_gymnasium(Chain(lie, often=often, place=place))


@pytest.mark.parametrize(
    "options",
    [
        {"fickle_passenger": True},
        {"fickle_passenger": True, "fickle_probability": 0.05},
        {"fickle_passenger": True, "is_rainy": True},
        {"fickle_passenger": True, "is_rainy": True, "rainy_probability": 0.5, "fickle_probability": 1.0},
    ],
)
def test_a_fickle_passenger_is_found_out(options: dict[str, Any]) -> None:
    with pytest.raises(ControlError, match="gives probability 0: it does not say what `step` does"):
        from_gymnasium(gymnasium.make("Taxi-v4", **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Taxi-v4", {}),
        ("Taxi-v4", {"is_rainy": True}),
        ("FrozenLake-v1", {"map_name": "8x8"}),
        ("FrozenLake-v1", {"success_rate": 0.9}),
        ("CliffWalking-v1", {"is_slippery": True}),
        ("Taxi-v4", {"fickle_passenger": True, "fickle_probability": 0.0}),
    ],
)
def test_tables_of_gymnasium_that_are_true_are_taken(name: str, options: dict[str, Any]) -> None:
    env = gymnasium.make(name, **options)
    mdp = from_gymnasium(env)
    for state, actions in env.unwrapped.P.items():  # type: ignore[attr-defined]
        for action, outcomes in actions.items():
            for after in {after for _, after, _, ended in outcomes if not ended}:
                published = sum(p for p, there, _, ended in outcomes if there == after and not ended)
                taken = mdp.probabilities[state, action][mdp.successors[state, action] == after].sum()
                assert taken == pytest.approx(published)


def test_other_frequencies_than_published_are_found_out() -> None:
    """The same support, other odds: of slipping, where all outcomes are as likely, and of the first state."""
    for success, told in itertools.product((0.2, 0.5), (1 / 3, 0.8)):
        env = gymnasium.make("FrozenLake-v1", success_rate=success)
        other = gymnasium.make("FrozenLake-v1", success_rate=told)
        real = env.unwrapped.P  # type: ignore[attr-defined]

        class Otherwise(type(env.unwrapped)):  # type: ignore[misc]
            def step(self, a: Any, real: Any = real) -> Any:
                shown, self.P = self.P, real
                try:
                    return super().step(a)
                finally:
                    self.P = shown

        other.unwrapped.__class__ = Otherwise
        with pytest.raises(ControlError, match="not as frequent in play"):
            from_gymnasium(other)
    start = gymnasium.make("FrozenLake-v1", desc=["SSG"])
    start.unwrapped.initial_state_distrib = np.array([0.5, 0.5, 0.0])  # type: ignore[attr-defined]
    from_gymnasium(start)
    twin = gymnasium.make("FrozenLake-v1", desc=["SSG"])
    kept = twin.unwrapped

    class Rigged(type(kept)):  # type: ignore[misc]
        def reset(self, **options: Any) -> Any:
            told, info = super().reset(**options)
            self.s = 0 if self.np_random.random() < 0.6 else told
            return int(self.s), info

    kept.__class__ = Rigged
    with pytest.raises(ControlError, match="first states of episodes are not as frequent"):
        from_gymnasium(twin)


def test_trying_leaves_the_environment_as_it_was() -> None:
    env = RecordEpisodeStatistics(slippery())
    env.reset(seed=3)
    state = env.unwrapped.np_random.bit_generator.state
    from_gymnasium(env)
    assert env.unwrapped.np_random.bit_generator.state == state
    assert env.episode_count == 0
    assert env.step(1)[0] in (0, 1, 4)
    drawn = lake(render_mode="rgb_array")
    drawn.unwrapped.window_surface = (thing for thing in ())  # cannot be copied, as a window cannot
    assert from_gymnasium(drawn).num_states == 8
    assert drawn.unwrapped.render_mode == "rgb_array"


def test_states_are_those_that_are_observed() -> None:
    plain, moved = from_gymnasium(slippery(), discount=0.9), from_gymnasium(Moved(slippery()), discount=0.9)
    order = 7 - np.arange(8)
    np.testing.assert_allclose(plain.dense(), moved.dense()[order][:, :, order])
    assert moved.start.tolist() == plain.start[order].tolist()
    assert (plain.layout, moved.layout) == ((2, 4), None)
    assert from_gymnasium(down_or_right(lake())).action_names == ("down", "right")
