"""What is compiled: a fit of a rollout once, its actions once."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import compilations

import bayesrl
from bayesrl.control import ActorCritic, CartPole, NetworkPolicy, Rollout, TablePolicy, from_gymnasium, tabular_rollout

KEYS = list(jax.random.split(jax.random.key(0), 4))


def fit(key: Any, program: Any, guide: Any, num_steps: int = 4) -> bayesrl.Posterior:
    return bayesrl.fit(
        key, program, beta=0.1, guide=guide, objective=ActorCritic(num_particles=8), num_steps=num_steps, progress=False
    )


@pytest.fixture(scope="module")
def pole() -> bayesrl.Posterior:
    return fit(KEYS[0], Rollout(CartPole(), 5), NetworkPolicy(hidden=4))


def test_a_lake_is_fitted_again_without_compiling() -> None:
    def lake(discount: float = 0.9) -> Any:
        return tabular_rollout(from_gymnasium("FrozenLake-v1", discount=discount), horizon=5)

    with compilations() as first:
        fit(KEYS[0], lake(), TablePolicy())
    assert len(first) <= 15, first
    with compilations() as again:
        fit(KEYS[1], lake(), TablePolicy())
        fit(KEYS[1], lake(discount=0.8), TablePolicy(), num_steps=6)
    assert again == []


def test_actions_are_chosen_without_compiling(pole: bayesrl.Posterior) -> None:
    """A median of 200 within a millisecond; here it is some tenth of that."""
    seen = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    keys = list(jax.random.split(KEYS[2], 200))
    with compilations() as first:
        pole.act(keys[0], seen[0])
    assert first == ["act"]
    times = []
    with compilations() as later:
        for key, observation in zip(keys, seen, strict=True):
            start = time.perf_counter()
            int(pole.act(key, observation))
            times.append(time.perf_counter() - start)
    assert later == []
    assert np.median(times) < 1e-3


def test_another_fit_acts_by_the_same_program(pole: bayesrl.Posterior) -> None:
    pole.act(KEYS[0], np.zeros(4, np.float32))
    other = fit(KEYS[1], Rollout(CartPole(), 5), NetworkPolicy(hidden=4))
    with compilations() as names:
        other.act(KEYS[0], np.zeros(4, np.float32))
    assert names == []


def test_actions_inside_of_jit_and_vmap_are_the_same() -> None:
    """The first call of all is one that JAX traces: what it leaves behind must not be kept."""
    pole = fit(KEYS[0], Rollout(CartPole(), 5), NetworkPolicy(hidden=4), num_steps=1)
    seen = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    keys = jax.random.split(KEYS[3], 20)
    traced = jax.jit(pole.act)
    inside = [int(traced(key, observation)) for key, observation in zip(keys, seen, strict=True)]
    nothing_is_traced = jax.jit(lambda: pole.act(KEYS[0], seen[0]))
    assert int(nothing_is_traced()) == int(pole.act(KEYS[0], seen[0]))
    assert [int(pole.act(key, observation)) for key, observation in zip(keys, seen, strict=True)] == inside
    assert jax.vmap(pole.act)(keys, jnp.asarray(seen)).tolist() == inside


def test_numbers_are_no_part_of_the_program() -> None:
    lake = fit(KEYS[0], tabular_rollout(from_gymnasium("FrozenLake-v1"), horizon=5), TablePolicy())
    lake.act(KEYS[0], 0)
    with compilations() as names:
        found = [int(lake.act(KEYS[i % 4], i)) for i in range(16)]
    assert names == []
    assert found == [int(lake.act(KEYS[i % 4], np.asarray(i))) for i in range(16)]
