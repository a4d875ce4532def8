"""Nothing answers for numbers that are gone: tables changed in place, attributes, options, what a prior reads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from counting import compilations

import bayesrl
from bayesrl.control import (
    CartPole,
    GymnasiumSource,
    NetworkPolicy,
    Rollout,
    TabularMDP,
    TabularOptimum,
    soft_value_iteration,
    tabular_rollout,
)
from bayesrl.control.environments.base import Environment, Transition

BETA = 0.5


def problem() -> TabularMDP:
    """Two states and two actions, all random, the first state too."""
    rng = np.random.default_rng(0)
    return TabularMDP.from_dense(
        rng.dirichlet(np.ones(2), (2, 2)),
        rng.normal(size=(2, 2)),
        start=np.array([0.6, 0.4]),
        prior=np.array([[0.5, 0.5], [0.8, 0.2]]),
        horizon=3,
    )


@pytest.mark.parametrize("table", ["rewards", "probabilities", "prior", "start"])
def test_tables_may_be_changed_in_place(table: str) -> None:
    mdp = problem()
    program, optimum = tabular_rollout(mdp), TabularOptimum(mdp)

    def check() -> float:
        """Enumeration of the program, planning, and what is remembered of it, agree to rounding in single precision."""
        exact = float(soft_value_iteration(mdp, BETA).objective)
        assert float(np.asarray(bayesrl.enumerate_posterior(program, beta=BETA).optimum)) == pytest.approx(
            exact, rel=1e-5
        )
        assert optimum(BETA) == exact
        return exact

    before = check()
    values: np.ndarray = getattr(mdp, table)
    values[...] = values[::-1].copy()
    with compilations() as names:
        after = check()
    assert abs(after - before) > 1e-3
    assert names == []


class Lever(Environment):
    """Pulling a lever pays what it says."""

    num_observations = 1

    def __init__(self, pays: Any) -> None:
        self.pays = pays

    def reset(self) -> Any:
        return jnp.asarray(0)

    def step(self, state: Any, action: Any) -> Transition:
        return Transition(state, jnp.asarray(self.pays)[action], jnp.asarray(True))

    def prior(self, observation: Any) -> dist.Distribution:
        return dist.Categorical(logits=jnp.zeros(2))


def test_environments_may_be_changed() -> None:
    world = Lever(np.array([0.0, 1.0], np.float32))
    program = Rollout(world, 1)

    def check() -> None:
        exact = BETA * np.log(np.exp(np.asarray(world.pays) / BETA).mean())
        assert float(np.asarray(bayesrl.enumerate_posterior(program, beta=BETA).optimum)) == pytest.approx(
            exact, rel=1e-5
        )

    check()
    with compilations() as names:
        world.pays[1] = 3.0
        check()
        world.pays = np.array([2.0, -1.0], np.float32)
        check()
    assert names == []


def test_other_physics_is_another_answer() -> None:
    """A pole that is hardly pushed stays up for longer: means of 64 episodes some 20 steps apart, of spread 10."""

    def length(force: float) -> float:
        program = Rollout(CartPole(force=force), 60)
        return float(bayesrl.importance(jax.random.key(0), program, beta=1e3, num_samples=64).estimates.reward.mean)

    strong = length(10.0)
    with compilations() as names:
        weak = length(0.3)
    assert weak > strong + 5
    assert names == []


def test_a_prior_in_a_real_environment_may_be_changed() -> None:
    """log π₀ of what was played is that of the prior as it is in each fit, exactly."""
    logits = np.zeros(2, np.float32)
    source = GymnasiumSource("CartPole-v1", num_envs=2, window=4, num_updates=1)
    policy = source.policy(prior=lambda observation, time: dist.Categorical(logits=jnp.asarray(logits)))

    def check() -> None:
        posterior = bayesrl.fit(
            jax.random.key(0),
            policy,
            beta=0.1,
            guide=NetworkPolicy(hidden=4),
            objective=bayesrl.control.ActorCritic(),
            source=source,
            num_steps=1,
            progress=False,
        )
        actions = np.asarray(posterior.prior_draws["action"])
        share = np.mean(actions[actions >= 0] == 1)
        expected = float(jax.nn.softmax(logits)[1])
        num = (actions >= 0).sum()
        # Five standard errors of a share: a false alarm in two million.
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / num) + 1e-9

    check()
    logits[1] = 3.0
    check()
