"""What is known of a program before it is run many times."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan
from oracles import ORACLES

import bayesrl
from bayesrl.core.structure import Structure, inspect

KEY = jax.random.key(0)


def structure_of(name: str) -> Structure:
    oracle = ORACLES[name]()
    return inspect(KEY, oracle.policy, *oracle.args)


@pytest.mark.parametrize(
    ("name", "shape", "number"),
    [
        ("flat", (), 1),
        ("chain", (), 1),
        ("contexts", (4,), 4),
        ("subsampled", (2,), 6),
        ("nested", (3,), 3),
        ("interacting", (), 1),
        ("weathers", (3,), 3),
        ("gaussian", (), 1),
    ],
)
def test_contexts_are_found(name: str, shape: tuple[int, ...], number: int) -> None:
    structure = structure_of(name)
    assert structure.context_shape == shape
    assert structure.num_contexts == number


def test_two_context_plates() -> None:
    def program() -> None:
        with numpyro.plate("a", 2, dim=-2), numpyro.plate("b", 3, dim=-1):
            bit = numpyro.sample("bit", dist.Bernoulli(0.5))
            bayesrl.reward("r", bit * jnp.arange(6.0).reshape(2, 3))

    structure = inspect(KEY, program)
    assert structure.context_shape == (2, 3)
    density = jax.jit(lambda bit: bayesrl.log_density(program, {"bit": bit}, beta=1.0))(np.ones((2, 3), int))
    assert np.allclose(density.total_reward, np.arange(6.0).reshape(2, 3))


def test_a_reward_outside_the_plate_joins_its_elements() -> None:
    def program(inside: bool) -> None:
        with numpyro.plate("n", 3):
            bit = numpyro.sample("bit", dist.Bernoulli(0.5))
            if inside:
                bayesrl.reward("each", 1.0 * bit)
        if not inside:
            bayesrl.reward("sum", 1.0 * bit.sum())

    assert inspect(KEY, program, True).context_shape == (3,)
    assert inspect(KEY, program, False).context_shape == ()


def test_a_plate_in_every_step_of_a_scan_is_a_context() -> None:
    def program() -> None:
        def step(state: Array, _: Any) -> tuple[Array, None]:
            with numpyro.plate("n", 3):
                bit = numpyro.sample("bit", dist.Bernoulli(0.5))
                bayesrl.reward("r", 1.0 * bit * state)
            return state + bit, None

        scan(step, jnp.zeros(3, int), jnp.arange(4))

    structure = inspect(KEY, program)
    assert structure.context_shape == (3,)
    assert structure["bit"].shape == (4, 3)
    bits = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]])
    density = jax.jit(lambda bit: bayesrl.log_density(program, {"bit": bit}, beta=1.0))(bits)
    before = np.cumsum(bits, 0) - bits
    assert np.allclose(density.steps["rewards"]["r"], (bits * before).T)


def test_kinds_supports_and_order() -> None:
    structure = structure_of("chain_with_nature")
    assert structure.names("action") == ("action",)
    assert structure.names("environment") == ("state",)
    assert structure.names("reward") == ("gain",)
    assert (structure["action"].support, structure["state"].support) == ((0, 1), (0, 1, 2))
    assert not structure["state"].hidden
    assert structure_of("hidden")["h"].hidden
    assert [s.name for s in structure_of("dependent").sites] == ["a", "first", "b", "second"]
    assert structure_of("observed").names("observed") == ("y",)
    assert not structure_of("gaussian")["x"].discrete


def test_supports_that_differ_between_elements_are_not_known() -> None:
    def program() -> None:
        with numpyro.plate("n", 2):
            count = numpyro.sample("count", dist.Binomial(jnp.array([2, 5]), 0.5))
            bayesrl.reward("r", 1.0 * count)
        same = numpyro.sample("same", dist.Binomial(3, 0.5))
        rate = numpyro.sample("rate", dist.Poisson(2.0))
        bayesrl.reward("total", 1.0 * (same + rate))

    structure = inspect(KEY, program)
    assert structure["count"].support is None
    assert structure["same"].support == (0, 1, 2, 3)
    assert structure["rate"].support is None
    assert structure["rate"].discrete


def test_what_is_drawn_before_the_first_action() -> None:
    assert structure_of("observable").drawn_before_action == ("w",)
    assert structure_of("hidden").drawn_before_action == ()
    assert structure_of("subsampled").drawn_before_action == ("context",)
    assert structure_of("weathers").drawn_before_action == ("w",)
    assert structure_of("chain_with_nature").drawn_before_action == ()


def test_events_are_laid_out_as_they_happen() -> None:
    structure = structure_of("episode")
    values = {"z": jnp.array([[10.0]]), "x": jnp.array([[1.0, 2.0, 3.0]]), "after": jnp.array([[7.0]])}
    laid = structure.in_order(values, ("z", "x", "during", "after"))
    assert laid.tolist() == [[10.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 7.0]]
    assert structure.in_order(values, ("x", "after")).tolist() == [[1.0, 2.0, 3.0, 7.0]]
