"""The loop: what is learned, that it goes on where it stopped, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl import control
from bayesrl.control import (
    ArmsModel,
    BayesianAgent,
    KLControlAgent,
    LastLayerValues,
    LinearValues,
    TabularModel,
    bandits,
    learn,
)
from bayesrl.control.environments.tabular_examples import n_chain
from bayesrl.control.exploration.rules import exploration_from_name
from bayesrl.control.learning.adapters import BanditEnv, adapt_environment
from bayesrl.control.learning.agents.kl_control import agent_from_name
from bayesrl.control.learning.env_adapter import EpisodePolicy
from bayesrl.control.learning.models.base import ProgramModel
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.control.learning.result import LearnResult
from bayesrl.errors import BayesRLError, ControlError, RunFolderError

KEY = jax.random.key(0)
SWIM = control.river_swim(num_states=4, horizon=12)
MODEL = TabularModel.of(SWIM, noise=0.1)
AGENT = BayesianAgent(MODEL)


def assert_same(a: LearnResult, b: LearnResult) -> None:
    assert a.history.keys() == b.history.keys()
    for name, values in a.history.items():
        np.testing.assert_array_equal(values, b.history[name], err_msg=name)


@pytest.mark.parametrize("rule", [control.thompson(), control.k_learning()], ids=["thompson", "k_learning"])
def test_the_deep_sea_is_solved_by_purpose(rule: Any) -> None:
    sea = control.deep_sea(size=6)
    found = learn(
        KEY, sea, BayesianAgent(TabularModel.of(sea, noise=0.01)), exploration=rule, num_episodes=150, progress=False
    )
    assert (found.solved_after() or 1000) < 150
    assert found.history["return"][-10:].mean() == pytest.approx(0.99)
    assert found.decide(KEY, 0).p_optimal[1] > 0.95
    assert np.abs(found.history["regret"][-1]) < 1e-9


@pytest.mark.parametrize("rule", [control.epsilon_greedy(0.1), control.boltzmann(0.1)], ids=["greedy", "boltzmann"])
def test_the_deep_sea_is_not_solved_by_dithering(rule: Any) -> None:
    """Chance takes 2^12 episodes or so; that 100 suffice has probability 2.4% for each, and the key is fixed."""
    sea = control.deep_sea(size=12)
    found = learn(
        KEY, sea, BayesianAgent(TabularModel.of(sea, noise=0.01)), exploration=rule, num_episodes=100, progress=False
    )
    assert found.solved_after() is None
    assert found.history["return"].max() <= 0


def test_regret_is_exact_and_its_mean_that_of_returns() -> None:
    """Of 400 episodes of uniform play the regret is exact, and the mean return within 4.5 standard errors of it."""
    found = learn(KEY, SWIM, AGENT, exploration=control.random(), num_episodes=400, progress=False)
    uniform = control.evaluate_policy(SWIM, SWIM.prior)
    assert found.env.optimum == pytest.approx(control.soft_value_iteration(SWIM, 0.0).objective)
    told = found.env.optimum - found.history["regret"]
    returns = found.history["return"]
    spread = max(returns.std(), 1e-3) / 20
    assert abs(returns.mean() - uniform.reward) < 4.5 * spread
    assert abs(told.mean() - uniform.reward) < 4.5 * told.std() / 20 + 1e-6


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Bit for bit, whether it was stopped, interrupted or had come to its end."""
    whole = learn(KEY, SWIM, AGENT, num_episodes=24, progress=False)
    learn(KEY, SWIM, AGENT, num_episodes=24, progress=False, directory=tmp_path / "a", callback=_at(9))
    assert_same(learn(KEY, SWIM, AGENT, num_episodes=24, progress=False, directory=tmp_path / "a"), whole)

    def interrupt(row: dict[str, float]) -> None:
        if row["episode"] == 13:
            raise KeyboardInterrupt

    stopped = learn(KEY, SWIM, AGENT, num_episodes=24, progress=False, directory=tmp_path / "b", callback=interrupt)
    assert stopped.interrupted
    assert stopped.num_episodes == 13
    resumed = learn(KEY, SWIM, AGENT, num_episodes=24, progress=False, directory=tmp_path / "b")
    assert not resumed.interrupted
    assert_same(resumed, whole)
    np.testing.assert_array_equal(resumed.sample(KEY, 5)["rewards"], whole.sample(KEY, 5)["rewards"])
    assert_same(learn(KEY, SWIM, AGENT, num_episodes=24, progress=False, directory=tmp_path / "b"), whole)


def _at(episode: int) -> Callable[[dict[str, float]], bool]:
    return lambda row: row["episode"] == episode


@pytest.mark.parametrize("reference", ["prior", "previous"])
def test_control_goes_on_where_it_stopped(tmp_path: Path, reference: Any) -> None:
    agent = KLControlAgent(0.1, reference, batch=4)
    whole = learn(KEY, SWIM, agent, num_episodes=18, progress=False)
    stopped = learn(KEY, SWIM, agent, num_episodes=18, progress=False, directory=tmp_path, callback=_at(10))
    assert stopped.num_episodes == 10
    assert_same(learn(KEY, SWIM, agent, num_episodes=18, progress=False, directory=tmp_path), whole)


def test_fitted_posteriors_go_on_where_they_stopped(tmp_path: Path) -> None:
    agent = BayesianAgent(values_of_four_states, num_steps=10)
    whole = learn(KEY, SWIM, agent, num_episodes=8, progress=False)
    stopped = learn(KEY, SWIM, agent, num_episodes=8, progress=False, directory=tmp_path, callback=_at(5))
    assert stopped.num_episodes == 5
    assert_same(learn(KEY, SWIM, agent, num_episodes=8, progress=False, directory=tmp_path), whole)


def values_of_four_states(experience: Experience) -> None:
    q = numpyro.sample("q", dist.Normal(jnp.zeros((4, 2)), 1.0).to_event(2))
    with numpyro.plate("rows", experience.mask.shape[0]), numpyro.handlers.mask(mask=experience.mask):
        numpyro.sample("return", dist.Normal(q[experience.observation, experience.action], 0.5), obs=experience.returns)
    numpyro.deterministic("action_values", q)


def test_a_program_of_yours_is_fitted_to_the_exact_posterior() -> None:
    """SVI against conjugacy on the same experience: means within .15 posterior deviations, deviations within 20%."""
    agent = BayesianAgent(ProgramModel(values_of_four_states, num_steps=400, num_particles=64), num_samples=8)
    found = learn(KEY, SWIM, agent, exploration=control.random(), num_episodes=20, progress=False)
    agent_state: Any = found.agent_state
    exact = LinearValues(num_actions=2, num_observations=4, noise=0.5)
    experience = agent_state.memory.experience()
    mean, factor = exact.posterior(exact.condition(exact.empty(experience), experience))
    spread = np.sqrt(np.stack([np.diag(np.linalg.inv(f @ f.T)) for f in np.asarray(factor)])).T
    draws = np.asarray(found.sample(KEY, 4000)["q"])
    assert np.abs((draws.mean(0) - np.asarray(mean).T) / spread).max() < 0.15
    np.testing.assert_allclose(draws.std(0), spread, rtol=0.2)


def test_control_learns_where_rewards_are_clear() -> None:
    """On a bandit with a wide gap the policy comes to favour the best arm; regret falls to under a quarter."""
    world = BanditEnv(bandits.GaussianArms(4, noise=0.1), np.array([0.0, 0.2, 0.4, 1.0]))
    found = learn(KEY, world, KLControlAgent(0.05, learning_rate=0.2), num_episodes=400, progress=False)
    regret = found.history["regret"]
    assert regret[-100:].mean() < regret[:50].mean() / 4
    agent_state: Any = found.agent_state
    assert agent_state.probs()[0].argmax() == 3


def test_control_explores_by_rules_that_importance_corrects() -> None:
    world = BanditEnv(bandits.GaussianArms(3, noise=0.1), np.array([0.0, 0.5, 1.0]))
    agent = KLControlAgent(0.1, learning_rate=0.2)
    found = learn(KEY, world, agent, exploration=control.epsilon_greedy(0.3), num_episodes=200, progress=False)
    agent_state: Any = found.agent_state
    assert agent_state.probs()[0].argmax() == 2
    with pytest.raises(ControlError, match="bayesucb explores by a posterior"):
        learn(KEY, world, agent, exploration=control.bayes_ucb(), num_episodes=2, progress=False)


def test_vectors_are_learned_from_too() -> None:
    model = LastLayerValues(num_actions=2, hidden=16, depth=1, noise=3.0, prior_scale=10.0, num_steps=10)
    found = learn(KEY, control.CartPole(), BayesianAgent(model), num_episodes=6, progress=False)
    assert found.history["length"].min() >= 5
    assert found.decide(KEY, np.zeros(4, np.float32)).p_optimal.shape == (2,)
    assert found.act(KEY, np.zeros(4, np.float32)) in (0, 1)
    assert np.isnan(found.history["regret"]).all()


def test_contexts_are_learned_from() -> None:
    """Of a linear bandit: Thompson's regret in the last 100 of 300 pulls is under a third of that in the first 30."""
    world = BanditEnv(bandits.LinearArms(4, num_features=3, noise=0.2), np.array([1.0, -1.0, 0.5]))
    found = learn(KEY, world, BayesianAgent(ArmsModel(world.bandit)), num_episodes=300, progress=False)
    regret = found.history["regret"]
    assert regret[-100:].mean() < regret[:30].mean() / 3


def test_gymnasium_is_played_with_seeds() -> None:
    agent = BayesianAgent(TabularModel(num_states=16, num_actions=4, horizon=100, paid_at_end=True))
    first, second = (learn(KEY, "FrozenLake-v1", agent, num_episodes=8, progress=False) for _ in range(2))
    assert_same(first, second)
    assert first.env.optimum == pytest.approx(0.7442, abs=1e-4)
    assert first.env.name == "FrozenLake-v1"
    assert first.history["length"].max() <= 100


def test_confidence_and_tolerance_stop_a_run() -> None:
    world = BanditEnv(bandits.BernoulliArms(2), np.array([0.1, 0.9]))
    agent = BayesianAgent(ArmsModel(world.bandit))
    sure = learn(KEY, world, agent, num_episodes=400, confidence=0.95, progress=False)
    assert sure.num_episodes < 200
    assert sure.history["p_optimal"][-10:].min() >= 0.95
    cheap = learn(KEY, world, agent, num_episodes=400, tolerance=0.05, progress=False)
    assert cheap.num_episodes < 200
    assert cheap.history["expected_regret"][-10:].max() <= 0.05


def test_stages_are_posteriors_of_what_was_known_then() -> None:
    found = learn(KEY, SWIM, AGENT, num_episodes=30, progress=False)
    assert [stage.episode for stage in found.snapshots] == [1, 2, 5, 10, 20, 30]
    early, late = (
        np.asarray(found.sample(KEY, 300, snapshot=s)["rewards"]).std(0)
        for s in (found.snapshots[0], found.snapshots[-1])
    )
    assert (late <= early + 0.15).all()
    assert late.min() < 0.1 < early.min() * 10
    short = learn(KEY, SWIM, AGENT, num_episodes=10, progress=False)
    draws = [one.sample(KEY, 50, snapshot=one.snapshots[3])["transitions"] for one in (found, short)]
    np.testing.assert_allclose(draws[0], draws[1], atol=1e-6)


def test_predictions_and_nuts_check_the_posterior() -> None:
    """NUTS agrees with conjugacy within 5 Monte Carlo errors, and R-hat is near 1; p-values are no extremes."""
    world = BanditEnv(bandits.BernoulliArms(3), np.array([0.2, 0.5, 0.7]))
    found = learn(KEY, world, BayesianAgent(ArmsModel(world.bandit)), num_episodes=60, progress=False)
    tree = control.nuts_posterior(KEY, found)
    drawn = tree["posterior"]["instance"].to_numpy()
    exact = np.asarray(found.sample(KEY, 4000)["instance"])
    error = np.sqrt(exact.var(0) * (1 / 4000 + 1 / 300))  # as if 300 of 1,000 draws were independent
    assert (np.abs(drawn.mean((0, 1)) - exact.mean(0)) < 5 * error).all()
    within, between = drawn.var(1).mean(0), drawn.mean(1).var(0)
    assert (np.sqrt(1 + between / within) < 1.05).all()
    assert "action_values" in tree["posterior"]
    told = control.predictive_p_values(KEY, found)
    assert set(told) == {"mean of reward", "spread of reward"}
    assert min(told.values()) > 0.005


def test_predictions_tell_a_model_that_is_wrong() -> None:
    """Rewards of noise 2 under a model of noise .1."""
    world = BanditEnv(bandits.GaussianArms(2, noise=2.0), np.array([0.0, 1.0]))
    found = learn(
        KEY, world, BayesianAgent(ArmsModel(bandits.GaussianArms(2, noise=0.1))), num_episodes=60, progress=False
    )
    assert control.predictive_p_values(KEY, found)["spread of reward"] == 0
    assert {c.name: c.outcome for c in control.check_learning(KEY, found)}["data as predicted"] == "warn"


def test_everything_goes_to_a_datatree_and_a_report(tmp_path: Path) -> None:
    found = [learn(jax.random.key(k), SWIM, AGENT, num_episodes=12, progress=False) for k in (0, 1)]
    tree = bayesrl.to_datatree(found[0])
    assert set(tree.children) == {"posterior", "observed_data", "training"}
    assert tree["posterior"]["action_values"].shape == (1, 400, 12, 4, 2)
    assert tree["training"]["regret"].shape == (12,)
    path = bayesrl.write_report(jax.random.key(0), tmp_path / "r.html", {"<b>one": found, "other": found[0]})
    text = path.read_text(encoding="utf-8")
    assert "<b>one" not in text
    assert "&lt;b&gt;one" in text
    control_run = learn(KEY, SWIM, KLControlAgent(0.1), num_episodes=9, progress=False)
    assert "cumulated regret" in bayesrl.write_report(jax.random.key(0), tmp_path / "c.html", control_run).read_text(
        encoding="utf-8"
    )
    with pytest.raises(ControlError, match=r"posteriors\['fit'\] is .* beside a result of learn"):
        bayesrl.write_report(jax.random.key(0), tmp_path / "c.html", {"run": control_run, "fit": "a posterior"})
    assert set(bayesrl.to_datatree(control_run).children) == {"training"}
    with pytest.raises(ControlError, match="has no beliefs about the environment"):
        control_run.sample(KEY)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: learn(KEY, SWIM, AGENT, num_episodes=0), "num_episodes=0"),
        (lambda: learn(KEY, SWIM, AGENT, num_episodes=2.5), "num_episodes=2.5"),
        (lambda: learn(KEY, SWIM, MODEL, num_episodes=1), "use a KLControlAgent or BayesianAgent instance"),
        (lambda: learn(KEY, 3, AGENT, num_episodes=1), "environment=3; use a TabularMDP, a bandit, an Environment, or"),
        (
            lambda: learn(KEY, SWIM, AGENT, exploration=lambda k, b, t: None, num_episodes=1),
            "exploration rule .* failed",
        ),
        (lambda: learn(KEY, "No-v0", AGENT, num_episodes=1), "gymnasium.registry"),
        (lambda: learn(KEY, "Pendulum-v1", AGENT, num_episodes=1), "actions that are vectors"),
        (
            lambda: learn(KEY, SWIM, AGENT, exploration="thompson", num_episodes=1),
            "exploration='thompson'; use a rule: thompson",
        ),
        (
            lambda: learn(KEY, SWIM, AGENT, exploration=control.thompson, num_episodes=1),
            r"function thompson; use a rule: thompson\(\)",
        ),
        (lambda: learn(KEY, SWIM, AGENT, num_episodes=1, tolerance=-1.0), "tolerance=-1.0"),
        (lambda: learn(KEY, SWIM, AGENT, num_episodes=1, confidence=2.0), "confidence=2.0"),
        (
            lambda: learn(KEY, control.river_swim(), AGENT, num_episodes=1),
            "the model has 4 states and 2 actions, and the environment has 6 states",
        ),
        (
            lambda: learn(KEY, SWIM.replace(horizon=20), AGENT, num_episodes=1),
            "for 12 steps, and an episode may have 20",
        ),
        (
            lambda: learn(KEY, SWIM, BayesianAgent(lambda e: None), num_episodes=1),
            "draws nothing|no parameter|nothing to fit",
        ),
        (lambda: learn(KEY, SWIM, BayesianAgent(silent), num_episodes=1), "silent exposes no 'action_values'"),
        (lambda: learn(KEY, SWIM, BayesianAgent(misshapen), num_episodes=1), r"has shape \(3, 2\)"),
        (lambda: learn(KEY, SWIM, AGENT, exploration=lambda k, b, t: jnp.full((12, 4), 7), num_episodes=1), "action 7"),
        (lambda: BayesianAgent(3), "BayesianAgent got model=3; use a model of the unknown"),
        (lambda: BayesianAgent(TabularModel), "class TabularModel, which is not called yet; use a model"),
        (lambda: BayesianAgent(MODEL, inference="mcmc"), "inference='mcmc'"),
        (lambda: BayesianAgent(MODEL, num_samples=0), "num_samples=0"),
        (lambda: KLControlAgent(-1.0), "beta"),
        (lambda: KLControlAgent(0.1, "last"), "reference='last'"),  # type: ignore[arg-type]
        (lambda: KLControlAgent(0.1, batch=0), "batch=0"),
        (lambda: TabularModel(num_states=0, num_actions=2, horizon=3), "num_states=0"),
        (lambda: TabularModel(num_states=2, num_actions=2, horizon=3, noise=0.0), "noise=0.0"),
        (lambda: TabularModel(num_states=2, num_actions=2, horizon=3, concentration=-1.0), "concentration=-1.0"),
        (lambda: TabularModel(num_states=2, num_actions=2, horizon=3, discount=1.5), "discount=1.5"),
        (
            lambda: TabularModel(num_states=2, num_actions=2, horizon=3, successors=np.full((2, 2, 1), 5)),
            "names state 5",
        ),
        (lambda: TabularModel.of(control.grid_world(["SG"])), "has no horizon"),
        (lambda: LinearValues(num_actions=0), "num_actions=0"),
        (lambda: LinearValues(num_actions=2, noise=-1.0), "noise=-1.0"),
        (lambda: BanditEnv(bandits.BernoulliArms(2), np.zeros(3)), "draws"),
        (lambda: exploration_from_name("thomson"), "no exploration rule 'thomson'"),
        (lambda: exploration_from_name("boltzmann:x"), "'x' is not a number"),
        (lambda: agent_from_name("ppo", MODEL, beta=0.1), "no agent 'ppo'"),
        (
            lambda: learn(KEY, control.grid_world(["SG"]).replace(discount=0.9), AGENT, num_episodes=1),
            "the model has",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(BayesRLError, match=told):
        call()


def silent(experience: Experience) -> None:
    numpyro.sample("q", dist.Normal(0.0, 1.0))
    numpyro.sample("seen", dist.Normal(0.0, 1.0), obs=experience.reward.sum())


def misshapen(experience: Experience) -> None:
    q = numpyro.sample("q", dist.Normal(jnp.zeros((3, 2)), 1.0).to_event(2))
    numpyro.sample("seen", dist.Normal(0.0, 1.0), obs=experience.reward.sum())
    numpyro.deterministic("action_values", q)


def test_what_the_model_holds_to_be_impossible_is_named() -> None:
    line = TabularModel(num_states=4, num_actions=2, horizon=12, successors=np.zeros((4, 2, 1), int))
    with pytest.raises(ControlError, match="not among the successors"):
        learn(KEY, SWIM, BayesianAgent(line), num_episodes=20, progress=False)


def test_rewards_that_are_no_numbers_are_named() -> None:
    class Broken(type(adapt_environment(SWIM))):  # type: ignore[misc]
        def step(self, action: int) -> Any:
            seen, _, terminated, truncated = super().step(action)
            return seen, np.nan, terminated, truncated

    with pytest.raises(ControlError, match="reward nan in step 0"):
        Broken(SWIM).play(KEY, EpisodePolicy(lambda t, s, allowed: (0, np.nan)))


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    learn(KEY, SWIM, AGENT, num_episodes=2, progress=False, directory=tmp_path)
    for call in (
        lambda: learn(jax.random.key(1), SWIM, AGENT, num_episodes=2, directory=tmp_path),
        lambda: learn(KEY, SWIM, AGENT, exploration=control.greedy(), num_episodes=2, directory=tmp_path),
        lambda: learn(KEY, SWIM, KLControlAgent(0.1), num_episodes=2, directory=tmp_path),
        lambda: learn(KEY, n_chain(num_states=4, horizon=12), AGENT, num_episodes=2, directory=tmp_path),
    ):
        with pytest.raises(RunFolderError, match="another problem"):
            call()


@pytest.mark.parametrize("agent", [AGENT, KLControlAgent(0.1, batch=4)], ids=["bayesian", "control"])
def test_an_episode_counts_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: Any
) -> None:
    """Ctrl-C behind an update, before its row is written: the run goes on as if the episode had not been begun."""
    whole = learn(KEY, SWIM, agent, num_episodes=9, progress=False)
    with monkeypatch.context() as patched:
        agent_state = type(whole.agent_state)
        update = agent_state.update
        calls = iter(range(9))

        def cut(self: Any, *args: Any, **options: Any) -> Any:
            told = update(self, *args, **options)
            if next(calls) == 3:
                raise KeyboardInterrupt
            return told

        patched.setattr(agent_state, "update", cut)
        stopped = learn(KEY, SWIM, agent, num_episodes=9, progress=False, directory=tmp_path)
    assert stopped.interrupted
    assert stopped.num_episodes == 3
    resumed = learn(KEY, SWIM, agent, num_episodes=9, progress=False, directory=tmp_path)
    assert_same(resumed, whole)
    for name, values in whole.agent_state.arrays().items():
        np.testing.assert_array_equal(resumed.agent_state.arrays()[name], values, err_msg=name)


def test_a_run_that_played_nothing_has_an_empty_history() -> None:
    def rule(*_: Any) -> Any:
        raise KeyboardInterrupt

    found = learn(KEY, SWIM, AGENT, exploration=rule, num_episodes=3, progress=False)
    assert found.interrupted
    assert found.regret.shape == (0,)
    assert repr(found) == f"LearnResult: 0 episodes of BayesianAgent in {SWIM.name}, interrupted"
    assert found.to_datatree()["training"].sizes["episode"] == 0


def test_a_result_shows_itself_in_few_lines() -> None:
    found = learn(KEY, SWIM, AGENT, num_episodes=1, progress=False)
    first, *lines = str(found).splitlines()
    assert first == f"LearnResult: 1 episode of BayesianAgent in {SWIM.name}"
    shown = {line[:40].strip(): line[40:].strip() for line in lines}
    assert shown["steps"] == str(int(found.history["length"].sum()))
    assert float(shown["mean return of the last episode"]) == pytest.approx(found.history["return"][0], rel=1e-3)
    assert float(shown["cumulated regret"]) == pytest.approx(found.regret[-1], rel=1e-3)
    assert "<table>" in found._repr_html_()
    arms = bandits.LinearArms(2, num_features=1)
    seen = str(learn(KEY, arms, BayesianAgent(ArmsModel(arms)), num_episodes=2, progress=False))
    assert seen.endswith("(optimum unknown: the best arm changes with the features)")
    assert "cumulated regret" in seen


def test_another_world_or_model_is_another_run(tmp_path: Path) -> None:
    """Though of the same name and size."""
    bandit = bandits.BernoulliArms(2)
    arms = BayesianAgent(ArmsModel(bandit))
    learn(KEY, BanditEnv(bandit, [0.1, 0.9]), arms, num_episodes=2, progress=False, directory=tmp_path / "a")
    with pytest.raises(RunFolderError, match="another problem"):
        learn(KEY, BanditEnv(bandit, [0.9, 0.1]), arms, num_episodes=2, progress=False, directory=tmp_path / "a")
    learn(KEY, SWIM, AGENT, num_episodes=2, progress=False, directory=tmp_path / "b")
    other = BayesianAgent(TabularModel.of(SWIM, noise=0.2))
    with pytest.raises(RunFolderError, match="agent's numbers"):
        learn(KEY, SWIM, other, num_episodes=2, progress=False, directory=tmp_path / "b")
    with pytest.raises(RunFolderError, match="tables"):
        learn(KEY, SWIM.replace(horizon=11), AGENT, num_episodes=2, progress=False, directory=tmp_path / "b")


def test_an_environment_with_other_options_is_another_run_and_stays_open(tmp_path: Path) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    lakes = [gymnasium.make("FrozenLake-v1", is_slippery=slippery) for slippery in (True, False)]
    closed: list[Any] = []
    for lake in lakes:
        lake.unwrapped.close = lambda: closed.append("closed")
    agent = BayesianAgent(TabularModel(num_states=16, num_actions=4, horizon=100))
    learn(KEY, lakes[0], agent, num_episodes=1, progress=False, directory=tmp_path)
    with pytest.raises(RunFolderError, match="options"):
        learn(KEY, lakes[1], agent, num_episodes=1, progress=False, directory=tmp_path)
    assert not closed
    assert lakes[0].reset(seed=0)[0] == 0


@pytest.mark.parametrize(
    "rule",
    [lambda *_: 0, lambda _, b, __: jnp.zeros(3, int), lambda _, b, __: b.mean.max(-1)],
    ids=["scalar", "shape", "real"],
)
def test_a_rule_that_gives_no_actions_is_refused(rule: Any) -> None:
    with pytest.raises(ControlError, match="gave"):
        learn(KEY, SWIM, AGENT, exploration=rule, num_episodes=2, progress=False)


def test_rewards_that_no_arm_pays_are_refused() -> None:
    model = ArmsModel(bandits.BernoulliArms(3))
    with pytest.raises(ControlError, match="never pay"):
        learn(KEY, bandits.GaussianArms(3), BayesianAgent(model), num_episodes=9, progress=False)


def test_what_was_learned_is_asked_for_what_there_is() -> None:
    found = learn(KEY, SWIM, AGENT, num_episodes=2, progress=False)
    for ask in (
        lambda: found.decide(KEY, 1.5),
        lambda: found.decide(KEY, 1, time=12),
        lambda: found.decide(KEY, 1, num_samples=0),
        lambda: found.sample(KEY, 0),
        lambda: found.act(KEY, 4),
    ):
        with pytest.raises(ControlError, match="use"):
            ask()


@pytest.mark.parametrize("seen", [7, -1], ids=["above", "below"])
def test_observations_outside_their_space_are_refused(seen: int) -> None:
    gymnasium = pytest.importorskip("gymnasium")

    class Odd(gymnasium.Env):  # type: ignore[misc]
        observation_space, action_space = gymnasium.spaces.Discrete(3), gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return 0, {}

        def step(self, action: Any) -> Any:
            return seen, 0.0, False, False, {}

    with pytest.raises(ControlError, match="its space has one of 3 integers"):
        learn(
            KEY, Odd(), BayesianAgent(LinearValues(num_actions=2, num_observations=3)), num_episodes=2, progress=False
        )


def test_rules_of_the_same_text_are_not_taken_for_each_other() -> None:
    class Always:
        def __init__(self, action: int) -> None:
            self.action = action

        def __repr__(self) -> str:
            return "Always()"

        def __call__(self, key: Any, belief: Any, episode: Any) -> Any:
            return jnp.full(belief.mean.shape[:-1], self.action)

    played = [learn(KEY, SWIM, AGENT, exploration=Always(a), num_episodes=1, progress=False) for a in (0, 1)]
    assert [set(found.agent_state.memory.arrays()["action"].tolist()) for found in played] == [{0}, {1}]  # type: ignore[attr-defined]


def test_more_episodes_extend_an_ensemble_as_if_they_had_been_asked_for_at_first(tmp_path: Path) -> None:
    agent = BayesianAgent(control.EnsembleValues(num_actions=2, num_observations=4, num_members=2, hidden=4))
    whole = learn(KEY, SWIM, agent, num_episodes=6, progress=False)
    assert learn(KEY, SWIM, agent, num_episodes=3, progress=False, directory=tmp_path).num_episodes == 3
    assert_same(learn(KEY, SWIM, agent, num_episodes=6, progress=False, directory=tmp_path), whole)


@pytest.mark.parametrize(
    "make",
    [
        lambda: control.EnsembleValues(num_actions=2, num_members=0),
        lambda: KLControlAgent(0.1, discount=1.5),
        lambda: KLControlAgent(0.1, learning_rate=-1.0),
        lambda: adapt_environment(lambda: 5),
    ],
    ids=["members", "discount", "rate", "environment"],
)
def test_what_cannot_be_made_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ControlError):
        make()


def test_what_was_learned_before_an_error_is_kept(tmp_path: Path) -> None:
    """An environment that dies in its fourth episode leaves three, and the run goes on when it is mended."""

    class Fragile(type(adapt_environment(SWIM))):  # type: ignore[misc]
        episodes, broken = 0, True

        def begin(self, key: Any) -> Any:
            self.episodes += 1
            if self.broken and self.episodes == 4:
                raise RuntimeError("the river is dry")
            return super().begin(key)

    world = Fragile(SWIM)
    with pytest.raises(RuntimeError, match="dry"):
        learn(KEY, world, AGENT, num_episodes=6, progress=False, directory=tmp_path)
    world.broken = False
    mended = learn(KEY, world, AGENT, num_episodes=6, progress=False, directory=tmp_path)
    assert_same(mended, learn(KEY, SWIM, AGENT, num_episodes=6, progress=False))
    assert world.episodes == 4 + 3
