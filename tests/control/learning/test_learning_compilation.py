"""How much `learn` compiles, and that nothing it answers is of what was before."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from counting import compilations
from numpyro import handlers

from bayesrl import control
from bayesrl.compilation.jit import clear_programs
from bayesrl.control import ArmsModel, BayesianAgent, KLControlAgent, TabularModel, bandits, learn
from bayesrl.control.learning.adapters import BanditEnv

KEY = jax.random.key(0)
OTHER = jax.random.key(1)
SEA = control.deep_sea(size=4)


def agent(noise: float = 0.01) -> BayesianAgent:
    return BayesianAgent(TabularModel.of(SEA, noise=noise))


def test_learning_compiles_one_program_for_each_thing_it_does() -> None:
    """Plan an episode, count it, draw from the posterior; all that is asked afterwards is by these."""
    clear_programs()
    with compilations() as names:
        found = learn(KEY, SEA, agent(), num_episodes=12, progress=False)
    assert sorted(names) == ["condition", "plan", "sample_posterior"]
    with compilations() as names:
        found.decide(OTHER, 0, num_samples=1500)
        found.decide(OTHER, 2, time=1)
        found.sample(OTHER, 7)
        found.act(OTHER, 0)
        found.to_datatree()
    assert names == []
    with compilations() as names:
        for stage in found.snapshots:
            found.sample(OTHER, snapshot=stage)
    assert names == ["condition"]  # all experience at once, which is of another length than an episode
    with compilations() as names:
        control.check_learning(OTHER, found)
    assert names == ["replicate"]


def test_learning_again_compiles_nothing() -> None:
    """With another key, with a model of other numbers, made anew: programs are known by what they compute."""
    learn(KEY, SEA, agent(), num_episodes=12, progress=False)
    with compilations() as names:
        first = learn(OTHER, SEA, agent(), num_episodes=12, progress=False)
        other = learn(OTHER, SEA, agent(noise=0.02), num_episodes=12, progress=False)
    assert names == []
    draws = [found.sample(KEY, 50)["rewards"].std(0).min() for found in (first, other)]
    assert draws[0] < draws[1]


def test_control_compiles_its_policy_and_its_update() -> None:
    """Beside what its first parameters are found by: their declaration, and a draw from the prior."""
    clear_programs()
    with compilations() as names:
        learn(KEY, SEA, KLControlAgent(0.1, batch=4), num_episodes=8, progress=False)
    assert sorted(names) == ["declare", "draw", "initial", "policy", "update"]
    with compilations() as names:
        learn(OTHER, SEA, KLControlAgent(0.2, batch=4), num_episodes=8, progress=False)
    assert names == []


def test_bandits_are_played_by_one_program() -> None:
    clear_programs()
    with compilations() as names:
        bandits.play_bandit(KEY, bandits.GaussianArms(3, noise=0.4), control.thompson(), num_steps=5, num_runs=1500)
    assert names == ["play_bandit"]
    with compilations() as names:
        bandits.play_bandit(OTHER, bandits.GaussianArms(3, noise=0.3), control.thompson(), num_steps=5, num_runs=1500)
    assert names == []


class Shifted(bandits.GaussianArms):
    """Arms whose values are shifted by what may be changed."""

    shift = np.zeros(2, np.float32)

    def expected_rewards(self, instances: Any, seen: Any) -> Any:
        return instances + jnp.asarray(self.shift)


def test_what_changed_between_two_calls_is_read_anew() -> None:
    bandit = Shifted(2, noise=0.01)
    world = BanditEnv(bandit, np.zeros(2))
    scale = [1.0]

    def model(experience: Any) -> None:
        q = numpyro.sample("q", dist.Normal(jnp.zeros((1, 2)), 1.0).to_event(2))
        with numpyro.plate("rows", experience.mask.shape[0]), handlers.mask(mask=experience.mask):
            numpyro.sample("return", dist.Normal(q[0, experience.action], 0.5), obs=experience.returns)
        numpyro.deterministic("action_values", scale[0] * q)

    conjugate, fitted = BayesianAgent(ArmsModel(bandit)), BayesianAgent(model, num_steps=3)

    def told() -> list[float]:
        runs = [learn(KEY, world, agent, num_episodes=4, progress=False) for agent in (conjugate, fitted)]
        played = bandits.play_bandit(KEY, bandit, control.random(), num_steps=4, num_runs=200)
        returns = runs[0].history["return"].mean()
        values = [float(np.abs(run.sample(KEY, 50)["action_values"]).mean()) for run in runs]
        return [float(returns), *values, float(played.mean[-1])]

    before = told()
    object.__setattr__(bandit, "shift", np.array([5.0, 5.0], np.float32))
    scale[0] = 10.0
    after = told()
    assert before[0] < 1
    assert after[0] > 4
    assert after[1] > before[1] + 2
    assert after[2] > 4 * before[2]
    assert np.isclose(after[3], before[3], rtol=1e-4)  # both arms are shifted alike
    object.__setattr__(bandit, "shift", np.array([5.0, -5.0], np.float32))
    assert told()[3] > before[3] + 5
