"""What an environment answers and its own spaces, or the interface, do not allow: refused by name, never read otherwise."""

from decimal import Decimal
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from bayesrl.control import GymnasiumSource
from bayesrl.control.gymnasium.spaces import describe_observations
from bayesrl.control.learning.adapters import adapt_environment
from bayesrl.control.learning.env_adapter import EpisodePolicy
from bayesrl.errors import ControlError

KEY = jax.random.key(0)
ACT = EpisodePolicy(lambda time, seen, allowed: (0, 0.0))


class Answers(gymnasium.Env[Any, Any]):
    """Gives what it is told to give; fails in every third step where it is told to."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: Any = None, seen: Any = 0, reward: Any = 0.0, *, fails: bool = False) -> None:
        self.observation_space = spaces.Discrete(3) if space is None else space
        self.seen, self.reward, self.fails, self.count = seen, reward, fails, 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.seen, {}

    def step(self, action: Any) -> Any:
        self.count += 1
        if self.fails and self.count % 3 == 0:
            raise RuntimeError("on purpose")
        return self.seen, self.reward, False, self.count % 5 == 0, {}


@pytest.mark.parametrize("reward", [1, True, np.float16(1), np.array(1.0), jnp.float32(1), Decimal(1)])
def test_a_reward_is_one_number(reward: Any) -> None:
    assert adapt_environment(Answers(reward=reward)).play(KEY, ACT).reward.tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (np.array([1.5]), r"gave the reward array\(\[1.5\]\); let it give one finite number"),
        (np.array([1.0, 2.0]), r"gave the reward array\(\[1., 2.\]\)"),
        ([1.0], r"gave the reward \[1.0\]"),
        (None, "gave the reward None"),
        (1 + 0j, "gave the reward"),
        ({}, "gave the reward {}"),
        (float("nan"), "gave reward nan in step 0; make it finite"),
        (float("inf"), "gave reward inf in step 0"),
        (1e39, "gave reward 1e.39 in step 0; make it finite, in single precision"),
    ],
)
def test_other_rewards_are_refused(reward: Any, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        adapt_environment(Answers(reward=reward)).play(KEY, ACT)


OUTSIDE: list[tuple[Any, Any]] = [
    (spaces.Discrete(3), 3),
    (spaces.Discrete(3), -1),
    (spaces.Discrete(3, start=5), 1),
    (spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3))), (1, 3)),
    (spaces.MultiDiscrete([2, 3], start=[1, 5]), np.array([0, 5])),
    (spaces.MultiBinary(2), np.array([0, 2], np.int8)),
    (spaces.Dict({"a": spaces.Discrete(5000), "b": spaces.Box(0, 1, (1,))}), {"a": 5000, "b": np.zeros(1, np.float32)}),
]


@pytest.mark.parametrize(("space", "seen"), OUTSIDE, ids=[str(space) for space, _ in OUTSIDE])
def test_observations_outside_of_their_space_are_refused(space: Any, seen: Any) -> None:
    """A table would have been read at another place."""
    source = GymnasiumSource(lambda: Answers(space, seen), num_envs=2, window=2)
    with pytest.raises(ControlError, match="and its space holds"):
        source._open(2, 0)
    with pytest.raises(ControlError, match="gave the observation"):
        adapt_environment(Answers(space, seen)).begin(KEY)


def test_half_an_integer_is_no_observation() -> None:
    with pytest.raises(ControlError, match=r"gave the observation 1\.5"):
        adapt_environment(Answers(seen=1.5)).begin(KEY)
    assert adapt_environment(Answers(seen=np.float32(2.0))).begin(KEY) == 2


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([2, 2], start=[4, 4])])
def test_an_episode_that_fails_shows_what_was_seen_last(space: Any) -> None:
    """Zero, which stood for it, is no observation of such a space."""
    source = GymnasiumSource(lambda: Answers(space, space.sample(), fails=True), num_envs=1, window=4)
    playing = source._open(1, 0)
    steps = [playing.step(np.zeros(1, int)) for _ in range(8)]
    assert [bool(step.failed[0]) for step in steps].count(True) == 2
    playing.close()


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_boxes_of_truth_values_are_counted_like_multi_binary(shape: tuple[int, ...]) -> None:
    inside = spaces.Tuple((spaces.Box(0, 1, shape, bool), spaces.Discrete(2)))
    told = describe_observations(inside)
    assert told.num == 2 ** (int(np.prod(shape)) + 1)
    assert told.one((np.ones(shape, bool), 1)) == told.num - 1
    assert adapt_environment(Answers(spaces.Box(0, 1, shape, bool), np.ones(shape, bool))).shape == shape
