"""Actions that are not allowed: never taken, never planned with, never the best; told in four ways, kept and restored."""

from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from gymnasium import spaces

import bayesrl
from bayesrl import control
from bayesrl.control import BayesianAgent, KLControlAgent, LinearValues, TabularModel, learn
from bayesrl.control.exploration.beliefs import SampleBelief
from bayesrl.control.learning.adapters import GymnasiumAdapter, adapt_environment
from bayesrl.control.learning.models.base import ProgramModel
from bayesrl.errors import ControlError

KEY = jax.random.key(0)
HORIZON = 6
STAY, RIGHT, JUMP = range(3)
ALLOWED = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
"""From the second and the last of four states one may jump back to the first, which pays 1; each step costs .1."""
BEST = 3 * (1 - 2 * 0.1)
RULES = [
    control.thompson(),
    control.k_learning(),
    control.bayes_ucb(),
    control.epsilon_greedy(0.5),
    control.boltzmann(0.5),
    control.random(),
]


class Row(gymnasium.Env[Any, Any]):
    """Tells its masks in `info`, by a method, or within its observations, and breaks where they are not heeded."""

    action_space = spaces.Discrete(3, start=4)
    render_mode = None

    def __init__(self, how: str = "info", *, moody: bool = False) -> None:
        self.how, self.moody, self.s = how, moody, 0
        self.P = {s: {a + 4: [(1.0, *self._after(s, a), False)] for a in range(3)} for s in range(4)}
        self.observation_space: Any = spaces.Discrete(4)
        if how == "within":
            self.observation_space = spaces.Dict({"at": spaces.Discrete(4), "action_mask": spaces.MultiBinary(3)})
        if how == "vector":
            self.observation_space = spaces.Dict({"at": spaces.Box(0, 3, (1,)), "action_mask": spaces.MultiBinary(3)})
        if how == "method":
            self.action_masks = self.mask

    @staticmethod
    def _after(s: int, a: int) -> tuple[int, float]:
        return (s, (s + 1) % 4, 0)[a], (-0.1, -0.1, 1 - 0.1)[a]

    def mask(self) -> np.ndarray:
        mask = ALLOWED[self.s].copy()
        if self.moody and self.np_random.random() < 0.5:
            mask[STAY] = False
        self.last = mask
        return mask

    def _given(self) -> Any:
        mask = self.mask()
        info = {"action_mask": mask.astype(np.int8)} if self.how == "info" else {}
        at: Any = np.array([self.s], np.float32) if self.how == "vector" else self.s
        return {"at": at, "action_mask": mask.astype(np.int8)} if self.how in ("within", "vector") else self.s, info

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.s = 0
        return self._given()

    def step(self, action: Any) -> Any:
        allowed = self.last if self.moody else ALLOWED[self.s]
        assert allowed[int(action) - 4], "this action is not allowed"
        self.s, reward = self._after(self.s, int(action) - 4)
        seen, info = self._given()
        return seen, reward, False, False, info


def row(how: str = "info", **options: Any) -> Any:
    return gymnasium.wrappers.TimeLimit(Row(how, **options), HORIZON)


def model(**options: Any) -> TabularModel:
    return TabularModel(num_states=4, num_actions=3, horizon=HORIZON, noise=0.1, **options)


def played(environment: Any, agent: Any, rule: Any = None, episodes: int = 12, **options: Any) -> Any:
    return learn(KEY, environment, agent, exploration=rule, num_episodes=episodes, progress=False, **options)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_no_rule_takes_what_is_not_allowed(rule: Any) -> None:
    """An error of the environment's would end the run; each rule tries all that is allowed in these 72 steps."""
    found = played(row(), BayesianAgent(model()), rule)
    lived = found.agent_state.memory.arrays()
    taken = np.zeros((4, 3), bool)
    taken[lived["observation"], lived["action"]] = True
    assert not (taken & ~ALLOWED).any()
    assert (
        found.agent_state.masks.table[found.agent_state.masks.known] == ALLOWED[found.agent_state.masks.known]
    ).all()


@pytest.mark.parametrize("how", ["method", "within"])
def test_all_ways_of_telling_are_one(how: str) -> None:
    found, same = played(row(how), BayesianAgent(model())), played(row(), BayesianAgent(model()))
    np.testing.assert_array_equal(found.history["return"], same.history["return"])
    assert found.env.masked


def test_the_best_is_found_and_said_to_be_the_best() -> None:
    found = played(row(), BayesianAgent(model()), episodes=40)
    assert found.history["return"][-8:].tolist() == pytest.approx([BEST] * 8)
    assert found.env.optimum == pytest.approx(BEST)
    assert found.history["regret"][-8:].tolist() == pytest.approx([0] * 8, abs=1e-6)
    told = found.decide(KEY, 0)
    assert told.p_optimal[RIGHT] > 0.9
    assert told.p_optimal[JUMP] == 0
    assert np.isnan(told.regret[JUMP])
    assert found.decide(KEY, 0, allowed=[True, False, False]).p_optimal.tolist() == [1, 0, 0]
    assert found.act(KEY, 0, allowed=np.array([True, False, False])) == STAY
    assert found.act(KEY, 3) in np.flatnonzero(ALLOWED[3])


def test_planning_is_among_what_is_allowed() -> None:
    """Of transitions and rewards drawn from the prior: dynamic programming with a prior that never does the rest."""
    agent = model()
    allowed = ALLOWED.copy()
    experience = adapt_environment(row()).example()._replace(allowed=allowed)
    sites = jax.jit(lambda state: agent.sample(KEY, state, experience, 3))(agent.empty())
    told = jax.jit(jax.vmap(lambda one: agent.values(one, experience)))(sites)
    for i in range(3):
        table = np.concatenate([np.asarray(sites["transitions"][i], float), np.full((1, 3, 5), 0.2)])
        mdp = control.TabularMDP.from_dense(
            table / table.sum(-1, keepdims=True),
            np.concatenate([np.asarray(sites["rewards"][i], float), np.zeros((1, 3))]),
            terminal=np.arange(5) == 4, horizon=HORIZON, start=np.full(5, 0.2),
            prior=np.concatenate([allowed / allowed.sum(-1, keepdims=True), np.full((1, 3), 1 / 3)]),
        )  # fmt: skip
        values = np.where(allowed, np.asarray(told[i, 0]), -np.inf).max(-1)
        assert control.soft_value_iteration(mdp, 0.0).objective == pytest.approx(values.sum() / 5, abs=1e-4)
    # And the bound of K-learning is one on the values of the expected model.
    center = np.asarray(jax.jit(lambda state: agent.mean_values(state, experience))(agent.empty()))
    worth = np.where(allowed, center[0], -np.inf).max(-1)[0]
    bound, of_all = (
        float(jax.jit(lambda state, among=among: agent.cumulants(state, *among).bound)(agent.empty()))
        for among in ((allowed,), ())
    )
    assert of_all > bound > worth


def test_published_optima_are_of_what_is_allowed() -> None:
    assert GymnasiumAdapter(row(), None).optimum == pytest.approx(BEST)
    assert GymnasiumAdapter(row("method"), True).optimum == pytest.approx(BEST)
    moody = adapt_environment(row(moody=True))
    assert (moody.optimum, moody.unknown) == (None, "state 0 does not always allow the same actions")
    # Without masks, jumping on the spot would be best, and is not to be had.
    unheeded = GymnasiumAdapter(row(), False)
    assert unheeded.optimum is None
    assert "this action is not allowed" in unheeded.unknown


@pytest.mark.parametrize("agent", [LinearValues(num_actions=3, num_observations=4), KLControlAgent(0.1, batch=4)])
def test_masks_that_change_serve_agents_that_do_not_plan(agent: Any) -> None:
    found = played(row(moody=True), agent if isinstance(agent, KLControlAgent) else BayesianAgent(agent), episodes=16)
    assert found.env.masked
    if isinstance(agent, KLControlAgent):
        assert (found.agent_state.probs()[~ALLOWED] == 0).all()


def test_masks_that_change_are_refused_by_models_that_plan() -> None:
    with pytest.raises(ControlError, match=r"allowed actions \[.*\] before and \[.*\] now, and the model plans"):
        played(row(moody=True), BayesianAgent(model()))
    assert ProgramModel(model()).plans
    assert not ProgramModel(LinearValues(num_actions=3)).plans


@pytest.mark.parametrize(
    "agent",
    [
        BayesianAgent(LinearValues(num_actions=3)),
        KLControlAgent(0.1, batch=4, policy=control.NetworkPolicy(hidden=4, depth=1)),
    ],
    ids=["values", "network"],
)
def test_vectors_are_masked(agent: Any) -> None:
    """What is learned from is the observation without its mask, but policies see both."""
    found = played(row("vector"), agent, control.epsilon_greedy(0.3))
    assert found.env.shape == (1,)
    assert found.act(KEY, np.array([2.0], np.float32), allowed=[False, True, False]) == RIGHT


@pytest.mark.parametrize("agent", [BayesianAgent(model()), KLControlAgent(0.1, batch=4)], ids=["bayesian", "kl"])
def test_a_masked_run_goes_on_where_it_stopped(tmp_path: Path, agent: Any) -> None:
    whole = played(row(), agent, episodes=10)
    stopped = played(row(), agent, episodes=10, directory=tmp_path, callback=lambda told: told["episode"] == 6)
    assert stopped.num_episodes == 6
    again = played(row(), agent, episodes=10, directory=tmp_path)
    np.testing.assert_array_equal(again.history["return"], whole.history["return"])
    np.testing.assert_array_equal(again.agent_state.masks.table, whole.agent_state.masks.table)
    with pytest.raises(bayesrl.errors.RunFolderError):
        learn(KEY, row("none"), agent, num_episodes=10, directory=tmp_path, progress=False)


def test_rules_of_yours_are_held_to_the_masks() -> None:
    def heedless(key: Any, belief: Any, episode: Any) -> Any:
        return jnp.full(belief.mean.shape[:-1], JUMP)

    with pytest.raises(ControlError, match=r"action 2 was chosen in step 0, and the environment allows only \[0, 1\]"):
        played(row(), BayesianAgent(model()), heedless)
    drawn = SampleBelief(jnp.array([[1.0, 5.0], [3.0, 7.0]]), None, jnp.array([True, False]))
    assert drawn.mean.tolist() == [2.0, -np.inf]
    assert drawn.variance.tolist() == [1.0, 0.0]
    assert drawn.quantile(jnp.asarray(0.5)).tolist() == [2.0, -np.inf]
    assert drawn.sample(KEY)[1] == -np.inf


class Program(control.Environment):
    """The same row as a program."""

    num_observations = 4

    def reset(self) -> Any:
        return jnp.asarray(0)

    def step(self, state: Any, action: Any) -> Any:
        after = jnp.stack([state, (state + 1) % 4, jnp.zeros_like(state)])[action]
        allowed = jnp.asarray(ALLOWED)[state, action]
        reward = jnp.where(allowed, jnp.array([-0.1, -0.1, 0.9])[action], -1000.0)
        return control.Transition(after, reward, jnp.asarray(False))

    def prior(self, observation: Any) -> Any:
        return dist.Categorical(logits=jnp.zeros(3))

    def allowed(self, observation: Any) -> Any:
        return jnp.asarray(ALLOWED)[observation]


def test_programs_tell_masks_too() -> None:
    world = adapt_environment(Program(), HORIZON)
    found = played(world, BayesianAgent(model()), control.random())
    assert world.masked
    assert found.history["return"].min() > -1
    unmasked = played(
        adapt_environment(Program(), HORIZON, action_masks=False), BayesianAgent(model()), control.random()
    )
    assert unmasked.history["return"].min() < -900


class Silent(Row):
    """Allows nothing in the third state."""

    def mask(self) -> np.ndarray:
        self.last = super().mask() & (self.s != 2)
        return self.last


class Pairs(gymnasium.Env[Any, Any]):
    """Actions are pairs, and the mask tells of the values of one after those of the other."""

    observation_space, action_space = spaces.Discrete(1), spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return 0, {"action_mask": np.array([1, 0, 0, 1, 1])}

    def step(self, action: Any) -> Any:
        assert action[0] == 0
        assert action[1] > 0
        return 0, float(action[1] == 2), True, False, self.reset()[1]


def test_masks_of_several_integers() -> None:
    found = played(Pairs(), BayesianAgent(LinearValues(num_actions=6, num_observations=1)), control.random())
    assert set(found.agent_state.memory.arrays()["action"].tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: played("CartPole-v1", BayesianAgent(LinearValues(num_actions=2)), action_masks=True), r"gives no masks: neither"),
        (lambda: played(control.river_swim(), KLControlAgent(1.0), action_masks=True), r"TabularMDP has none; leave action"),
        (lambda: played(control.CartPole(), KLControlAgent(1.0), action_masks=True), r"CartPole gives no masks for its 2"),
        (lambda: played(gymnasium.wrappers.TimeLimit(Silent(), HORIZON), BayesianAgent(model()), control.random(), 30), "allows no action in step"),
        (lambda: played(row(), BayesianAgent(model())).decide(KEY, 0, allowed=[True]), r"give a flag for each of 3 actions"),
        (lambda: played(row(), BayesianAgent(model())).decide(KEY, 0, allowed=[False] * 3), r"give a flag for each of 3 actions"),
    ],
)  # fmt: skip
def test_bad_masks(make: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ControlError, match=message):
        make()


def test_sources_ask_methods_too() -> None:
    source = control.GymnasiumSource(lambda: row("method"), num_envs=2, window=6, max_failures=0, action_masks=True)
    fitted = bayesrl.fit(
        KEY, source.policy(), beta=0.1, guide=control.TablePolicy(), objective=control.ActorCritic(), source=source,
        num_steps=2, progress=False,
    )  # fmt: skip
    seen, taken = (
        np.asarray(fitted.estimate(KEY, 4) and fitted.sample(KEY, 4)[name])[0] for name in ("observation", "action")
    )
    assert ALLOWED[seen[..., 0], taken].all()
