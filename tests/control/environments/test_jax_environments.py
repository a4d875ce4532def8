"""Environments of the common JAX shape, as programs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl.control import ActorCritic, JaxEnvironment, NetworkPolicy, Rollout
from bayesrl.errors import ControlError
from bayesrl.svi.problem_setup import set_up


class Drift:
    """A walk that is pushed by ±1 and drifts by a random number; it ends beyond ±3 and pays its place."""

    default_params = 0.5

    def reset(self, key: Any, params: float) -> Any:
        start = 0.1 * jax.random.normal(key)
        return start[None], {"place": start, "step": 0}

    def step(self, key: Any, state: Any, action: Any, params: float) -> Any:
        place = state["place"] + (2.0 * action - 1.0) + params * jax.random.normal(key)
        return place[None], {"place": place, "step": state["step"] + 1}, place, jnp.abs(place) > 3, {}

    def action_space(self, params: float) -> Any:
        class Space:
            n = 2

        return Space()


def test_noise_is_replayed_and_steps_are_those_of_the_environment() -> None:
    program = Rollout(JaxEnvironment(Drift()), 6)
    setup = set_up(jax.random.key(0), program, (), 1.0, NetworkPolicy(hidden=4), ActorCritic(), 1)
    programs, params = setup.programs, jax.tree.map(lambda x: x[0], setup.params)
    draws = jax.jit(lambda params: programs.draw(jax.random.key(1), params, 12, share=False))(params)
    env, rewards = Drift(), np.asarray(draws.rewards["reward"])
    sites = jax.tree.map(np.asarray, draws.sites)
    reset = jax.jit(lambda words: env.reset(jax.random.wrap_key_data(words), 0.5))
    step = jax.jit(lambda words, state, action: env.step(jax.random.wrap_key_data(words), state, action, 0.5))
    for i in range(12):
        _, state = reset(sites["start"][i])
        over = False
        for t in range(6):
            if over:
                assert rewards[i, t] == 0
                continue
            _, state, reward, done, _ = step(sites["noise"][i, t], state, sites["action"][i, t])
            np.testing.assert_allclose(rewards[i, t], reward, rtol=1e-5)
            over = bool(done)


def test_a_fit_improves_it_with_replayed_batches_and_mirror_descent() -> None:
    """The prior earns 0 on average; pushing right until 3 is passed earns about 1 + 2 + 3."""
    program = Rollout(JaxEnvironment(Drift(), dist.Bernoulli(0.5)), 6)
    fitted = bayesrl.fit(
        jax.random.key(0),
        program,
        beta=0.5,
        guide=NetworkPolicy(hidden=8, depth=1),
        objective=ActorCritic(reference="previous"),
        source=bayesrl.ReuseDraws(num_particles=64, num_updates=4),
        num_steps=200,
        progress=False,
    )
    earned = fitted.estimate(jax.random.key(1), 500).reward
    assert float(earned.mean[0]) > 4.0
    assert float(fitted.history["reward"][0, 0]) < 3.0
    moved = fitted.history["metrics/update_kl"]
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() > 0


class Bare:
    """No action space, no default parameters."""

    def reset(self, key: Any, params: Any) -> Any: ...
    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any: ...


class Told(Bare):
    """Gives what it is told to give."""

    def __init__(self, first: Any, then: Any = None) -> None:
        self.first, self.then = first, then

    def reset(self, key: Any, params: Any) -> Any:
        return self.first

    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return self.then


def played(first: Any, then: Any = None) -> Any:
    program = Rollout(JaxEnvironment(Told(first, then), dist.Bernoulli(0.5), params=None), 3)
    return bayesrl.importance(jax.random.key(0), program, beta=1.0, num_samples=2)


HERE, THERE = jnp.zeros(1), jnp.zeros(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JaxEnvironment(3), "env=3 has no method 'reset'"),
        (lambda: JaxEnvironment(Bare()), "Bare has no default_params; pass params="),
        (lambda: JaxEnvironment(Bare(), params=None), "Bare has no known action space; pass actions="),
        (lambda: JaxEnvironment(Bare(), 3, params=None), "actions=3; use a Distribution"),
        (
            lambda: JaxEnvironment(Bare(), dist.Bernoulli(0.5), params=None, num_observations=0),
            "num_observations=0; use a whole number of at least 1",
        ),
        (lambda: played(HERE), r"reset of Told gives a \w+; give \(observation, state\)"),
        (lambda: played(({}, HERE)), "Told gives the observation {}; give an array, or several"),
        (lambda: played((HERE, HERE), (HERE, HERE, 0.0, False)), "step of Told gives 4 things; give .*, done, info"),
        (
            lambda: played((HERE, HERE), (THERE, HERE, 0.0, False, {})),
            r"observation of Told has shape \(1,\) after reset",
        ),
        (lambda: played((HERE, HERE), (HERE, THERE, 0.0, False, {})), r"state of Told has shape \(1,\) after reset"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        make()
