"""Real environments as a source of draws: what is recorded, what is corrected, and what may go wrong."""

from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from counting import compilations
from gymnasium import spaces

import bayesrl
from bayesrl.compilation.random_keys import key_data, split_keys
from bayesrl.control import (
    ActorCritic,
    GymnasiumSource,
    LinearPolicy,
    NetworkPolicy,
    TablePolicy,
    epsilon_greedy,
    prior_mixture,
    squashed_normal,
)
from bayesrl.control.gymnasium.spaces import describe_actions, describe_observations
from bayesrl.control.gymnasium.vector_env import VectorRunner
from bayesrl.errors import ControlError, PolicyError
from bayesrl.svi.problem_setup import set_up

OPENED: list["Counter"] = []


class Counter(gymnasium.Env[Any, Any]):
    """Counts its steps: observation and reward are the step number; it ends by itself after `length` steps."""

    def __init__(self, length: int = 3, *, fails_at: int = -1, pays: float = 1.0) -> None:
        self.observation_space = spaces.Box(-1, 100, (1,), np.float64)
        self.action_space = spaces.Discrete(2, start=5)
        self.length, self.fails_at, self.pays = length, fails_at, pays
        self.closed, self.seeds, self.taken = False, [], []
        OPENED.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.seeds.append(seed)
        self.count = 0
        return np.array([0.0]), {}

    def step(self, action: Any) -> Any:
        self.taken.append(int(action))
        self.count += 1
        if self.count == self.fails_at:
            raise RuntimeError("the motor is stuck")
        return np.array([float(self.count)]), self.pays * self.count, self.count == self.length, False, {}

    def close(self) -> None:
        self.closed = True


class Bandit(gymnasium.Env[Any, Any]):
    """One step: arm k pays k/2."""

    observation_space = spaces.Discrete(1)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return 0, {}

    def step(self, action: Any) -> Any:
        return 0, 0.5 * int(action), True, False, {}


def batch_of(source: GymnasiumSource, **options: Any) -> Any:
    program = source.policy(discount=0.9)
    told: dict[str, Any] = {"guide": LinearPolicy()} | options
    setup = set_up(jax.random.key(0), program, (), 1.0, told["guide"], ActorCritic(), 1, source)
    programs, params = setup.programs, jax.tree.map(lambda x: x[0], setup.params)
    return source(jax.random.key(1), params, programs), programs, params, setup


def limited(length: int, limit: int) -> Any:
    return lambda: gymnasium.wrappers.TimeLimit(Counter(length), limit)


def test_termination_is_told_from_time_limits() -> None:
    """Each row by hand: steps, then one reset that does not count, and a last step that only values what follows."""
    draws, *_ = batch_of(GymnasiumSource(limited(3, 50), num_envs=1, window=9))
    sites = {name: np.asarray(value)[0] for name, value in draws.sites.items()}
    assert sites["observation"][:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert sites["counts"].tolist() == [True, True, True, False, True, True, True, False, True, False]
    assert sites["terminated"].tolist() == [False, False, True, False, False, False, True, False, False, False]
    assert sites["earned"].tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1, 0]
    np.testing.assert_allclose(draws.guide_metrics["continue$"][0, :4], [0.9, 0.9, 0.0, 0.9], rtol=1e-6)
    cut, *_ = batch_of(GymnasiumSource(limited(50, 2), num_envs=1, window=5))
    assert np.asarray(cut.sites["terminated"]).sum() == 0
    assert np.asarray(cut.sites["counts"])[0].tolist() == [True, True, False, True, True, False]
    assert np.asarray(draws.rewards["reward"])[0].tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1, 0]
    assert float(draws.metrics["return"][0]) == 6
    assert float(draws.metrics["length"][0]) == 3


def test_actions_are_offset_and_episodes_have_seeds_of_their_own() -> None:
    OPENED.clear()
    batch_of(GymnasiumSource(Counter, num_envs=2, window=8, seed=40))
    first, second = OPENED[-2:]
    assert set(first.taken) <= {5, 6}
    assert first.seeds == [40, 42, 44]
    assert second.seeds == [41, 43, 45]


def test_the_same_seeds_give_the_same_batch() -> None:
    one, other = (batch_of(GymnasiumSource("CartPole-v1", num_envs=2, window=20, seed=3))[0] for _ in range(2))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), one, other)))
    different = batch_of(GymnasiumSource("CartPole-v1", num_envs=2, window=20, seed=4))[0]
    assert (np.asarray(one.sites["observation"]) != np.asarray(different.sites["observation"])).any()


def test_episodes_are_whole_and_discounted() -> None:
    source = GymnasiumSource(limited(4, 50), num_envs=2, window=3)
    _, programs, params, _ = batch_of(source)
    draws, totals = source.episodes(jax.random.key(2), params, programs, 5)
    worth = 1 + 0.9 * 2 + 0.81 * 3 + 0.729 * 4
    np.testing.assert_allclose(totals.reward, np.full(5, worth), rtol=1e-6)
    np.testing.assert_allclose(totals.log_prior, (1 + 0.9 + 0.81 + 0.729) * np.log(0.5) * np.ones(5), rtol=1e-5)
    np.testing.assert_allclose(totals.log_q, totals.log_prior, rtol=1e-5)
    assert np.asarray(draws.metrics["return"]).tolist() == [10] * 5
    assert draws.sites["observation"].shape == (5, 4, 1)


def test_a_bandit_reaches_its_known_optimum() -> None:
    source = GymnasiumSource(Bandit, num_envs=32, window=4, num_updates=2)
    fitted = bayesrl.fit(
        jax.random.key(0),
        source.policy(),
        beta=0.5,
        guide=TablePolicy(),
        objective=ActorCritic(trace=1.0),
        source=source,
        num_steps=600,
        progress=False,
    )
    truth = jax.nn.softmax(jnp.arange(3.0))
    found = jax.nn.softmax(fitted.params["action$table"][0, 0])
    np.testing.assert_allclose(found, truth, atol=0.03)
    optimum = 0.5 * np.log(np.exp(np.arange(3.0)).mean())
    estimate = fitted.estimate(jax.random.key(1), 400).objective
    assert abs(float(estimate.mean[0]) - optimum) < 4 * float(estimate.se[0]) + 0.01
    verdict = bayesrl.diagnose(jax.random.key(2), fitted)
    assert verdict.verdict == "unknown"
    assert bayesrl.diagnose(jax.random.key(2), fitted, optimum=lambda beta: optimum).verdict in ("pass", "unknown")


@pytest.mark.parametrize(
    "behaviour", [prior_mixture(1.0), prior_mixture(0.3), epsilon_greedy(0.4)], ids=["prior", "mixed", "greedy"]
)
def test_other_behaviours_are_corrected_for(behaviour: Any) -> None:
    """Mean gradient of 400 batches against the exact one, three numbers within 4.5 standard errors (2e-5)."""
    source = GymnasiumSource(Bandit, num_envs=64, window=2, num_updates=1, behaviour=behaviour)
    _, programs, params, setup = batch_of(source, guide=TablePolicy())
    table = jnp.array([[0.3, -0.2, 0.5]])
    params = {**params, "action$table": table}
    objective = ActorCritic(trace=1.0, clip=None)

    def loss(table: Any, draws: Any) -> Any:
        moved = {**params, "action$table": table}
        return objective.surrogate(moved, programs.again(moved, draws), programs, 0.5)[0]

    gradient = jax.jit(jax.grad(loss))
    found = np.stack([np.asarray(gradient(table, source(jax.random.key(i), params, programs)))[0] for i in range(400)])

    def exact(table: Any) -> Any:
        log_q = jax.nn.log_softmax(table[0])
        return -(jnp.exp(log_q) * (0.5 * jnp.arange(3) / 0.5 - log_q)).sum()

    apart = found.mean(0) - np.asarray(jax.grad(exact)(table))[0]
    # Ratios are cut at 1 in the critic's target alone; at one step the gradient is exact for any critic.
    assert (np.abs(apart) < 4.5 * found.std(0) / 20 + 1e-6).all()
    assert setup.betas.shape == (1,)


def test_restarts_and_temperatures_have_environments_of_their_own() -> None:
    source = GymnasiumSource(Bandit, num_envs=4, window=2)
    fitted = bayesrl.fit(
        jax.random.key(0), source.policy(), beta=jnp.array([0.5, 1.0]), guide=TablePolicy(), objective=ActorCritic(),
        source=source, num_steps=3, num_restarts=2, progress=False,
    )  # fmt: skip
    assert fitted.batch_shape == (2, 2)
    assert fitted.draws["action"].shape[:2] == (2, 2)
    assert fitted.estimate(jax.random.key(1), 8).objective.mean.shape == (2, 2)


def test_an_episode_that_fails_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    calls = iter(range(1000))  # made for its spaces, for the size of its returns, and then to be played
    source = GymnasiumSource(
        lambda: Counter(6, fails_at=2 if next(calls) == 2 else -1), num_envs=1, window=8, max_failures=2
    )
    draws, *_ = batch_of(source)
    counts = np.asarray(draws.sites["counts"])[0]
    assert counts.tolist()[:3] == [False, False, False]
    assert counts[3:8].all()
    assert "the episode of seed 0 ended in step 1 with RuntimeError: the motor is stuck" in caplog.text


def test_too_many_failures_stop_the_fit_with_everything_saved(tmp_path: Path) -> None:
    OPENED.clear()
    source = GymnasiumSource(lambda: Counter(6, fails_at=5), num_envs=1, window=8, num_updates=1, max_failures=3)
    program = source.policy()
    with pytest.raises(ControlError, match="4 episodes ended with an error, and 3 are allowed"):
        bayesrl.fit(
            jax.random.key(0), program, beta=1.0, guide=LinearPolicy(), objective=ActorCritic(), source=source,
            num_steps=50, directory=tmp_path / "run", progress=False,
        )  # fmt: skip
    assert all(env.closed for env in OPENED)
    source.failures.most = 1000
    loaded = bayesrl.load(
        tmp_path / "run", program, guide=LinearPolicy(), objective=ActorCritic(),
        source=GymnasiumSource(Counter, num_envs=1),
    )  # fmt: skip
    assert loaded.interrupted
    assert 0 < int(loaded.history["step"][-1]) < 50


def test_rewards_that_are_no_numbers_are_refused() -> None:
    source = GymnasiumSource(lambda: Counter(3, pays=float("nan")), num_envs=2, window=4)
    with pytest.raises(ControlError, match="environment 0 gave reward nan in step 0 of an episode"):
        batch_of(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GymnasiumSource("Nowhere-v1"), "'Nowhere-v1' cannot be made"),
        (lambda: GymnasiumSource(Counter()), "environment=a Counter; use a text or a function"),  # type: ignore[arg-type]
        (lambda: GymnasiumSource(lambda: 3), "cannot be made: .*; let the function give a gymnasium.Env"),
        (lambda: GymnasiumSource("CartPole-v1", num_envs=0), "num_envs=0; use a whole number of at least 1"),
        (lambda: GymnasiumSource("CartPole-v1", window=2.5), "window=2.5"),  # type: ignore[arg-type]
        (lambda: describe_observations(spaces.Text(3)), r"observation space Text\(.*not supported; Discrete and Box"),
        (lambda: describe_actions(spaces.Text(3)), r"action space Text\(.*is not supported"),
        (lambda: prior_mixture(1.5), "prior_mixture got share=1.5; use a number from 0 to 1"),
        (
            lambda: epsilon_greedy(0.0).behave(jax.random.key(0), *[dist.Bernoulli(0.5)] * 2),
            "never tries other actions",
        ),
        (lambda: squashed_normal(0.0, np.inf), "use a finite number, or an array"),
    ],
)
def test_bad_input(make: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ControlError, match=message):
        make()


@pytest.mark.parametrize("start", [bayesrl.fit, bayesrl.init])
def test_a_recorded_program_cannot_be_fitted_alone(start: Any) -> None:
    """`init` has no argument `source`, so the remedy names `fit`."""
    program = GymnasiumSource(Bandit, num_envs=1, window=1).policy()
    message = (
        "recorded from an environment that is not a program, so it cannot be fitted alone; use bayesrl.fit\\(..., s"
    )
    with pytest.raises(PolicyError, match=message):
        start(jax.random.key(0), program, beta=1.0)


@pytest.mark.parametrize(
    ("guide", "message"),
    [(None, "asks the guide for one action at a time"), (LinearPolicy(stationary=False), "their time is unknown")],
)
def test_guides_that_cannot_play_are_refused(guide: Any, message: str) -> None:
    source = GymnasiumSource(Bandit, num_envs=1, window=2)
    with pytest.raises(bayesrl.errors.GuideError, match=message):
        bayesrl.fit(jax.random.key(0), source.policy(), beta=1.0, guide=guide, source=source, progress=False)


def test_squashed_actions_stay_inside() -> None:
    def squashed(observation: Any, time: Any) -> Any:
        return squashed_normal(jnp.array([-2.0]), jnp.array([2.0]), scale=1.5)

    source = GymnasiumSource("Pendulum-v1", num_envs=2, window=8)
    program = source.policy(prior=squashed)
    fitted = bayesrl.fit(
        jax.random.key(0), program, beta=1.0, guide=NetworkPolicy(hidden=8), objective=ActorCritic(), source=source,
        num_steps=4, progress=False,
    )  # fmt: skip
    actions = np.asarray(fitted.draws["action"])
    assert actions.shape[-1] == 1
    assert np.abs(actions[np.isfinite(actions)]).max() <= 2.0
    assert np.isfinite(fitted.history["objective"]).all()


def test_an_episode_that_never_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayesrl.control.gymnasium import source as gymnasium_source

    monkeypatch.setattr(gymnasium_source, "MOST_STEPS", 20)
    source = GymnasiumSource(lambda: Counter(10**9), num_envs=1, window=2)
    _, programs, params, _ = batch_of(source)
    with pytest.raises(ControlError, match="an episode has gone on for 21 steps; let the environment end it"):
        source.episodes(jax.random.key(0), params, programs, 1)
    with pytest.raises(ControlError, match="num_episodes=0"):
        source.episodes(jax.random.key(0), params, programs, 0)


def playing(source: GymnasiumSource, number: int = 1) -> VectorRunner:
    """Environments in play without a policy, so that nothing is compiled."""
    return source._open(number, source.seed)


def test_an_error_in_reset_takes_the_next_seed(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(Counter):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            if seed in (7, 9):
                raise OSError("the door is shut")
            return super().reset(seed=seed)

    OPENED.clear()
    source = GymnasiumSource(Stubborn, num_envs=1, seed=7, max_failures=2)
    played = playing(source)
    ended = [bool(played.step(np.zeros(1, int)).ended[0]) for _ in range(4)]
    assert ended == [False, False, True, False]
    assert OPENED[-1].seeds == [10]
    assert "the episode of seed 7 ended in step 0 with OSError: the door is shut" in caplog.text
    assert all(env.closed for env in OPENED[:-1])


def test_environments_that_cannot_be_reset_are_closed() -> None:
    class Broken(Counter):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            raise OSError("no power")

    OPENED.clear()
    source = GymnasiumSource(Broken, num_envs=3, max_failures=1)
    with pytest.raises(ControlError, match=r"2 episodes ended with an error, and 1 are allowed.*no power"):
        playing(source, 3)
    assert all(env.closed for env in OPENED)


def test_environments_opened_before_one_that_cannot_be_made_are_closed() -> None:
    OPENED.clear()
    calls = iter([True, True, False])

    def make() -> Any:
        if not next(calls):
            raise OSError("no seat left")
        return Counter()

    source = GymnasiumSource(make, num_envs=2)
    with pytest.raises(ControlError, match="cannot be made: no seat left"):
        playing(source, 2)
    assert [env.closed for env in OPENED] == [True, True]


def test_an_environment_that_cannot_be_made_anew_is_told_so() -> None:
    calls = iter([True, True, False])

    def make() -> Any:
        if not next(calls):
            raise OSError("no seat left")
        return Counter(fails_at=1)

    played = playing(GymnasiumSource(make, num_envs=1))
    with pytest.raises(ControlError, match=r"cannot be made again after the episode of seed 0 .*no seat left"):
        played.step(np.zeros(1, int))


def test_what_an_environment_calls_failed_is_its_own_business() -> None:
    class Robot(Counter):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], {"failed": True}

    step = playing(GymnasiumSource(Robot, num_envs=1)).step(np.zeros(1, int))
    assert step.counts.all()
    assert not step.failed.any()


def test_observations_that_are_no_numbers_are_refused() -> None:
    class Blind(Counter):
        def step(self, action: Any) -> Any:
            return np.array([np.nan]), *super().step(action)[1:]

    with pytest.raises(ControlError, match="environment 0 gave an observation nan in step 1 of an episode"):
        playing(GymnasiumSource(Blind, num_envs=2), 2).step(np.zeros(2, int))


def test_lakes_start_anywhere_and_are_played_by_a_table() -> None:
    """FrozenLake's integers, moved to start at 10, give the batch of those that start at 0."""

    class Moved(gymnasium.ObservationWrapper[Any, Any, Any]):
        def __init__(self, env: Any) -> None:
            super().__init__(env)
            self.observation_space = spaces.Discrete(16, start=10)

        def observation(self, observation: Any) -> Any:
            return observation + 10

    plain, moved = (
        batch_of(GymnasiumSource(make, num_envs=2, window=12), guide=TablePolicy())[0]
        for make in (lambda: gymnasium.make("FrozenLake-v1"), lambda: Moved(gymnasium.make("FrozenLake-v1")))
    )
    assert plain.sites["observation"].dtype == jnp.int32
    for name, value in plain.sites.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(moved.sites[name]))


def test_programs_are_compiled_once_and_a_closed_source_begins_anew() -> None:
    traced: list[int] = []

    def prior(observation: Any, time: Any) -> Any:
        traced.append(1)
        return bayesrl.control.gymnasium.spaces.Actions(2).prior()

    source = GymnasiumSource(Counter, num_envs=2, window=3, num_updates=1)
    setup = set_up(jax.random.key(0), source.policy(prior=prior), (), 1.0, LinearPolicy(), ActorCritic(), 2, source)
    params = jax.tree.map(lambda x: x[0], setup.params)
    first = source(jax.random.key(1), params, setup.programs)
    source.episodes(jax.random.key(1), params, setup.programs, 2)
    so_far = len(traced)
    with compilations() as names:
        source(jax.random.key(2), params, setup.programs)
        assert len(traced) == so_far, "what is recorded is traced once"
        source.lane(1)(jax.random.key(2), params, setup.programs)
        source.episodes(jax.random.key(2), params, setup.programs, 2)
    assert names == [], "another lane, and episodes, which are read anew, compile nothing"
    source.close()
    again = source(jax.random.key(1), params, setup.programs)
    np.testing.assert_array_equal(np.asarray(first.sites["observation"]), np.asarray(again.sites["observation"]))
    np.testing.assert_array_equal(np.asarray(first.sites["action"]), np.asarray(again.sites["action"]))
    with pytest.raises(ControlError, match="of 4 steps, and this source records 9 and what follows"):
        GymnasiumSource(Counter, num_envs=1, window=9)(jax.random.key(0), params, setup.programs)


def test_episodes_are_in_the_order_of_their_seeds() -> None:
    """Episode j is that of the j-th seed, however long it is, so that the first draws are no shorter than others."""

    class Varied(Counter):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.length = 1 + (seed or 0) % 5
            return super().reset(seed=seed)

    source = GymnasiumSource(Varied, num_envs=3, window=2)
    _, programs, params, _ = batch_of(source)
    key = jax.random.key(4)
    first = int(np.asarray(key_data(split_keys(key)[1]))[0] % 2**30)
    draws, _ = source.episodes(key, params, programs, 8)
    assert np.asarray(draws.metrics["length"]).tolist() == [1 + (first + j) % 5 for j in range(8)]
    observation = np.asarray(draws.sites["observation"])[..., 0]
    for row, length in zip(observation, np.asarray(draws.metrics["length"], int), strict=True):
        np.testing.assert_array_equal(row[:length], np.arange(length))
        assert np.isnan(row[length:]).all()


def test_a_run_is_resumed_with_its_source(tmp_path: Path) -> None:
    OPENED.clear()
    source = GymnasiumSource(Bandit, num_envs=4, window=1, num_updates=1)
    options: dict[str, Any] = {"guide": TablePolicy(), "objective": ActorCritic(), "source": source, "progress": False}
    bayesrl.fit(jax.random.key(0), source.policy(), beta=0.5, num_steps=4, directory=tmp_path / "run", **options)
    resumed = bayesrl.resume(tmp_path / "run", source.policy(), num_steps=8, **options)
    assert resumed.history["step"].tolist() == list(range(1, 9))
    assert not resumed.interrupted
    # In every other window of one step all environments are being reset.
    assert all(np.isfinite(values).all() for values in resumed.history.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1; use a whole number from 0"),
        ({"max_failures": -1}, "max_failures=-1"),
        ({"behaviour": 0.3}, "behaviour=0.3; use a function or an Exploration"),
        ({"options": {"length": 3}}, "use functools.partial"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(ControlError, match=message):
        GymnasiumSource(Counter, **options)


@pytest.mark.parametrize(
    "give",
    [
        lambda seen, *rest: (np.zeros(3), *rest),
        lambda seen, earned, *rest: (seen, np.array([1.0]), *rest),
        lambda seen, earned, ended, cut, info: (seen, earned, ended, info),
    ],
    ids=["observation", "reward", "four"],
)
def test_what_does_not_fit_the_interface_is_refused(give: Any) -> None:
    class Odd(Counter):
        def step(self, action: Any) -> Any:
            return give(*super().step(action))

    with pytest.raises(ControlError, match=r"failed: .*check_env says what does not fit Gymnasium.s interface"):
        playing(GymnasiumSource(Odd, num_envs=2), 2).step(np.zeros(2, int))


@pytest.mark.parametrize("reward", [1.0, 0.001, -300.0, 0.0])
def test_a_critic_is_of_the_size_of_returns(reward: float) -> None:
    """Undiscounted, 1 to 11 rewards are still to come in episodes of 11 steps, 46 in the mean square."""
    made = lambda: gymnasium.wrappers.TransformReward(Counter(11), lambda _: reward)  # noqa: E731
    found = GymnasiumSource(made, num_envs=1).policy(discount=1.0).return_scale
    assert found == pytest.approx(abs(reward) * np.sqrt(46.0) if reward else 1.0, rel=0.03)


def test_cartpole_is_learned() -> None:
    """The ready model at its defaults plays the real environment to 475 of 500, the mark that Gymnasium sets."""
    problem = bayesrl.load_problem("cartpole")
    fitted = bayesrl.fit(
        jax.random.key(0), problem.policy, beta=problem.beta, progress=False, **problem.fit_options
    )  # fmt: skip
    assert float(fitted.estimate(jax.random.key(100), 100).metrics["return"].mean.item()) >= 475.0
