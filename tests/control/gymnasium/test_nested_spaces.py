"""Spaces of several parts: what is read of observations, what environments are given, masks, and learning in them."""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space, iterate

import bayesrl
from bayesrl import control
from bayesrl.control import ActorCritic, GymnasiumSource, LinearPolicy, NetworkPolicy, TablePolicy
from bayesrl.control.gymnasium.spaces import describe_actions, describe_observations
from bayesrl.control.learning.adapters import adapt_environment
from bayesrl.errors import ControlError
from bayesrl.svi.problem_setup import set_up

KEY = jax.random.key(0)

ACTIONS = [
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([[2, 3], [4, 1]]),
    spaces.MultiDiscrete([3, 2], start=[-1, 5]),
    spaces.MultiBinary(3),
    spaces.MultiBinary([2, 2]),
    spaces.Box(-1, 2, (2,), np.int32),
    spaces.Box(0, 3, (), np.int8),
    spaces.Tuple((spaces.Discrete(3, start=1), spaces.MultiBinary(2))),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Dict({"x": spaces.MultiDiscrete([2, 2])})}),
    spaces.MultiBinary(12),
    spaces.MultiDiscrete([30, 7, 5]),
    spaces.Tuple((spaces.Discrete(200), spaces.Discrete(300, start=7))),
    spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 5, (1, 2), np.float64)}),
    spaces.Tuple((spaces.Box(-1, 1, ()), spaces.Box(-np.inf, np.inf, (3,)))),
]

OBSERVATIONS = [
    (spaces.MultiDiscrete([2, 3]), 6, ()),
    (spaces.MultiDiscrete([3, 2], start=[-1, 5]), 6, ()),
    (spaces.MultiBinary(4), 16, ()),
    (spaces.MultiBinary(20), None, (20,)),
    (spaces.MultiDiscrete([100, 100, 2]), None, (201,)),
    (spaces.Tuple((spaces.Discrete(32), spaces.Discrete(11), spaces.Discrete(2))), 704, ()),
    (spaces.Box(-3, 3, (2, 2), np.int32), None, (2, 2)),
    (spaces.Dict({"p": spaces.Box(0, 255, (3, 2), np.uint8), "q": spaces.Discrete(3, start=4)}), None, (9,)),
    (spaces.Dict({"z": spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.MultiBinary(2))), "y": spaces.Discrete(2)}), None, (5,)),
    (spaces.Dict({"only": spaces.Discrete(5)}), 5, ()),
    (spaces.Tuple((spaces.Box(-2, 2, ()),)), None, (1,)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*Casting input x")
@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_all_that_the_prior_draws_are_actions_of_the_space(space: Any) -> None:
    actions = describe_actions(space)
    drawn = np.asarray(actions.prior().sample(KEY, (40,)))
    assert drawn.shape == (40, *actions.shape)
    for given in iterate(batch_space(space, 40), actions.to_environment(drawn)):
        assert space.contains(given), given
    assert space.contains(actions.one(drawn[0]))
    actions.check_prior(actions.prior())


@pytest.mark.parametrize("space", ACTIONS[:9], ids=str)
def test_every_action_of_finitely_many_is_given_once(space: Any) -> None:
    actions = describe_actions(space)
    assert actions.num is not None
    given = [repr(actions.one(np.asarray(a))) for a in range(actions.num)]
    assert len(set(given)) == actions.num


@pytest.mark.parametrize(("space", "num", "shape"), OBSERVATIONS, ids=lambda value: str(value)[:40])
def test_observations_are_told_apart(space: Any, num: int | None, shape: tuple[int, ...]) -> None:
    seen = describe_observations(space)
    assert (seen.num, seen.shape) == (num, shape)
    space.seed(0)
    values = [space.sample() for _ in range(30)]
    batch = _batched(space, values)
    told = seen.from_environment(batch)
    assert told.shape == (30, *shape)
    assert np.isfinite(told).all()
    if num is not None:
        assert told.min() >= 0
        assert told.max() < num
    alike = {repr(value): i for i, value in enumerate(values)}
    rows = {told[i].tobytes() for i in alike.values()}
    assert len(rows) == len(alike), "different observations are told apart"
    np.testing.assert_array_equal(seen.one(values[0]), told[0])


def _batched(space: Any, values: list[Any]) -> Any:
    from gymnasium.vector.utils import concatenate, create_empty_array

    return concatenate(space, values, create_empty_array(space, len(values)))


@pytest.mark.parametrize("sizes", [(2, 3), (5,), (1, 4, 1), (2, 2, 2, 2), (7, 1, 3)])
def test_digits_and_numbers_are_the_same(sizes: tuple[int, ...]) -> None:
    numbers = np.arange(np.prod(sizes))
    digits = np.stack(np.unravel_index(numbers, sizes), -1)
    assert describe_actions(spaces.MultiDiscrete(sizes)).to_environment(numbers).tolist() == digits.tolist()
    assert describe_observations(spaces.MultiDiscrete(sizes)).from_environment(digits).tolist() == numbers.tolist()
    assert [int(x) for x in jnp.unravel_index(jnp.asarray(3 % numbers.size), sizes)] == digits[
        3 % numbers.size
    ].tolist()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, 1, (1,)))),
            "either all integers within bounds or all floats",
        ),
        (spaces.Box(-(2**40), 2**40, (1,), np.int64), "is not supported"),
        (spaces.Dict({"a": spaces.Text(3)}), "is not supported"),
    ],
)
def test_actions_that_are_not_supported_are_refused(space: Any, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        describe_actions(space)


class Guess(gymnasium.Env[Any, Any]):
    """Shows a number of parts, and pays 1 where the action is the same, in one of `steps` steps."""

    def __init__(self, *, masked: str = "", steps: int = 1) -> None:
        self.masked, self.steps = masked, steps
        inner = spaces.Tuple((spaces.Discrete(2, start=1), spaces.MultiBinary(1)))
        self.observation_space: Any = spaces.Dict({"shown": inner})
        if masked == "within":
            self.observation_space["action_mask"] = spaces.MultiBinary(4)
        self.action_space: Any = spaces.Discrete(4, start=3) if masked else spaces.MultiDiscrete([2, 2])

    def _given(self) -> Any:
        self.shown = self.np_random.integers(2, size=2)
        self.allowed = np.ones(4, np.int8)
        self.allowed[[0, 3]] = self.np_random.integers(2, size=2)
        seen: dict[str, Any] = {"shown": (1 + self.shown[0], self.shown[1:].astype(np.int8))}
        if self.masked == "within":
            seen["action_mask"] = self.allowed
        return seen, {"action_mask": self.allowed.copy()} if self.masked == "beside" else {}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._given()

    def step(self, action: Any) -> Any:
        if self.masked:
            assert self.allowed[int(action) - 3], "this action is not allowed"
            reward = float(int(action) - 3 in (1, 2))
        else:
            reward = float((np.asarray(action) == self.shown).all())
        self.count += 1
        seen, info = self._given()
        return seen, reward, self.count == self.steps, False, info


def batch_of(source: GymnasiumSource, guide: Any) -> Any:
    setup = set_up(KEY, source.policy(), (), 1.0, guide, ActorCritic(), 1, source)
    return source(jax.random.key(1), jax.tree.map(lambda x: x[0], setup.params), setup.programs)


def test_a_table_learns_observations_and_actions_of_several_parts() -> None:
    """Four contexts of four actions: E[R] of the optimum is e²/(e² + 3)."""
    source = GymnasiumSource(Guess, num_envs=32, window=4, num_updates=4)
    assert (source.observations.num, source.actions.num) == (4, 4)
    fitted = bayesrl.fit(
        KEY, source.policy(), beta=0.5, guide=TablePolicy(), objective=ActorCritic(trace=1.0), source=source,
        num_steps=120, progress=False,
    )  # fmt: skip
    earned = fitted.estimate(jax.random.key(1), 400).reward
    assert abs(float(earned.mean[0]) - np.exp(2) / (np.exp(2) + 3)) < 4.5 * float(earned.se[0]) + 0.03


@pytest.mark.parametrize(("masked", "guide"), [("within", NetworkPolicy(hidden=4)), ("beside", TablePolicy())])
def test_actions_that_are_not_allowed_are_never_taken(masked: str, guide: Any) -> None:
    """One that is would end its episode with an error, of which none may be."""
    source = GymnasiumSource(
        lambda: Guess(masked=masked, steps=3), num_envs=8, window=40, max_failures=0, action_masks=True
    )
    draws = batch_of(source, guide)
    seen, taken = np.asarray(draws.sites["observation"]), np.asarray(draws.sites["action"])
    assert seen.shape[-1] == 1 + 4
    allowed = np.take_along_axis(seen[..., 1:], taken[..., None], -1)[..., 0]
    assert (allowed[np.asarray(draws.sites["counts"])] == 1).all()
    assert np.isfinite(np.asarray(draws.log_prior["action"])).all()
    share = np.asarray(draws.log_prior["action"])[draws.sites["counts"]]
    np.testing.assert_allclose(share, -np.log(seen[..., 1:].sum(-1)[draws.sites["counts"]]), rtol=1e-5)


def test_masks_are_asked_for_and_found() -> None:
    assert GymnasiumSource(lambda: Guess(masked="within"), num_envs=1).observations.masked == 4
    assert GymnasiumSource(lambda: Guess(masked="within"), num_envs=1, action_masks=False).observations.masked == 0
    assert GymnasiumSource(lambda: Guess(masked="beside"), num_envs=1).observations.masked == 0
    assert GymnasiumSource("Taxi-v4", num_envs=1, action_masks=True).observations.shape == (7,)
    with pytest.raises(ControlError, match=r"action_masks=True, .*gives no action_mask of 2 actions"):
        GymnasiumSource("CartPole-v1", num_envs=1, action_masks=True)


def test_learn_plays_spaces_of_several_parts() -> None:
    agent = control.BayesianAgent(control.LinearValues(num_actions=4, num_observations=4, noise=0.5))
    found = control.learn(KEY, Guess(), agent, num_episodes=120, progress=False)
    assert found.history["return"][-40:].mean() > 0.8
    jack = adapt_environment("Blackjack-v1")
    assert (jack.num_observations, jack.num_actions, jack.optimum) == (704, 2, None)
    assert "publishes no model" in jack.unknown


class Count(gymnasium.Env[Any, Any]):
    """Counts its steps; each episode ends after three, or is cut off after `limit`."""

    observation_space, action_space = spaces.Box(-1, 100, (1,), np.float64), spaces.Discrete(2)

    def __init__(self, limit: int = 0, begin: int = 0) -> None:
        self.limit, self.begin = limit, begin

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.count = self.begin
        return np.array([self.count + 0.5]), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        ended = self.limit == 0 and self.count - self.begin == 3
        cut = self.limit > 0 and self.count - self.begin == self.limit
        return np.array([float(self.count)]), float(self.count), ended, cut, {}


def side_by_side(mode: Any, limit: int, copy: bool = True) -> Any:
    return lambda: SyncVectorEnv([lambda: Count(limit), lambda: Count(limit, 10)], copy=copy, autoreset_mode=mode)


@pytest.mark.parametrize(("mode", "copy"), [(mode, i > 0) for i, mode in enumerate(AutoresetMode)])
def test_the_three_ways_of_starting_anew_record_the_same_steps(mode: Any, copy: bool) -> None:
    """By hand: what counts, what was earned, and what values the rest of an episode that was cut off."""
    draws = batch_of(GymnasiumSource(side_by_side(mode, 2, copy), num_envs=2, window=6), LinearPolicy())
    sites = {name: np.asarray(value)[0] for name, value in draws.sites.items()}
    assert sites["observation"][:, 0].tolist() == [0.5, 1, 2, 0.5, 1, 2, 0.5]
    assert sites["counts"].tolist() == [True, True, False, True, True, False, False]
    assert sites["earned"][sites["counts"]].tolist() == [1, 2, 1, 2]
    assert not sites["terminated"].any()
    assert np.asarray(draws.sites["observation"])[1, :, 0].tolist() == [10.5, 11, 12, 10.5, 11, 12, 10.5]
    assert float(draws.metrics["length"][0]) == 2
    ended = batch_of(GymnasiumSource(side_by_side(mode, 0, copy), num_envs=2, window=8), LinearPolicy())
    sites = {name: np.asarray(value)[0] for name, value in ended.sites.items()}
    rows = np.flatnonzero(sites["terminated"])
    assert sites["earned"][rows].tolist() == [3] * len(rows)
    assert sites["counts"][rows].all()
    # After its own end nothing needs to be valued: only the mode that takes a step for it has a row that does not count.
    next_step = mode is AutoresetMode.NEXT_STEP
    assert sites["counts"].tolist() == ([True] * 3 + [False] + [True] * 3 + [False, False] if next_step else [True] * 8 + [False])  # fmt: skip


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodes_are_whole_in_all_three(mode: Any) -> None:
    source = GymnasiumSource(side_by_side(mode, 0), num_envs=2, window=4)
    setup = set_up(KEY, source.policy(), (), 1.0, LinearPolicy(), ActorCritic(), 1, source)
    draws, _ = source.episodes(KEY, jax.tree.map(lambda x: x[0], setup.params), setup.programs, 5)
    assert np.asarray(draws.metrics["length"]).tolist() == [3] * 5
    assert sorted(np.asarray(draws.metrics["return"]).tolist()) == [6, 6, 6, 36, 36]


def test_vector_environments_of_another_kind_are_refused() -> None:
    with pytest.raises(ControlError, match="the function makes 2 side by side; pass num_envs=2"):
        GymnasiumSource(side_by_side(AutoresetMode.NEXT_STEP, 2), num_envs=8)

    def silent() -> Any:
        made = side_by_side(AutoresetMode.NEXT_STEP, 2)()
        made.metadata = {}
        return made

    with pytest.raises(ControlError, match=r"metadata\['autoreset_mode'\]=None"):
        GymnasiumSource(silent, num_envs=2)
