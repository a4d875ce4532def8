"""Elements of context plates that secretly interact are found by mixing draws element by element."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from numpyro.contrib.control_flow import scan
from oracles import ORACLES

import bayesrl
from bayesrl.compilation.jit import closure_jit
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.core.validation import find_interacting, refuse_interacting
from bayesrl.errors import GuideError, PolicyError


def check(policy: Any, guide: Any, params: Any, *args: Any) -> None:
    programs = Programs(policy, guide, inspect(jax.random.key(0), policy, *args), args, {})
    refuse_interacting(
        closure_jit(lambda key, params: find_interacting(key, programs, params))(jax.random.key(2), params)
    )


@pytest.mark.parametrize("name", ["contexts", "subsampled", "nested", "weathers", "interacting", "flat"])
def test_separate_problems_pass(name: str) -> None:
    oracle = ORACLES[name]()
    check(oracle.policy, oracle.guide, jax.tree.map(jnp.asarray, oracle.params), *map(jnp.asarray, oracle.args))


def in_plate(body: Any, dim: int = -1) -> Any:
    def program() -> None:
        with numpyro.plate("row", 4, dim=dim):
            x = numpyro.sample("x", dist.Normal(jnp.zeros((4,) + (1,) * (-1 - dim)), 1.0))
            body(x)

    return program


@pytest.mark.parametrize(
    ("site", "body"),
    [
        ("gain", lambda x: bayesrl.reward("gain", x * jnp.roll(x, 1))),
        ("gain", lambda x: bayesrl.reward("gain", x - x.mean())),
        ("gain", lambda x: bayesrl.reward("gain", jnp.cumsum(x))),
        ("y", lambda x: numpyro.sample("y", dist.Normal(jnp.roll(x, 1), 1.0), obs=jnp.zeros(4))),
    ],
)
def test_elements_that_read_one_another_are_refused(site: str, body: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        check(in_plate(body), None, {})
    for part in (f"site {site!r}", "plate 'row'", "outside the plate"):
        assert part in str(caught.value)


def test_an_outer_plate_and_a_vector_of_events() -> None:
    def vectors() -> None:
        with numpyro.plate("row", 4, dim=-2):
            x = numpyro.sample("x", dist.Normal(jnp.zeros((4, 1, 3)), 1.0).to_event(1))
            bayesrl.reward("gain", x.sum(-1))

    check(vectors, None, {})
    with pytest.raises(PolicyError, match="'row'"):
        check(in_plate(lambda x: bayesrl.reward("gain", x * x[::-1]), dim=-2), None, {})


def test_inside_a_scan() -> None:
    def program(mixing: bool) -> Any:
        def run() -> None:
            def step(state: Array, _: Any) -> tuple[Array, None]:
                with numpyro.plate("row", 4):
                    bit = numpyro.sample("bit", dist.Bernoulli(0.5))
                    bayesrl.reward("gain", 1.0 * bit * (state.sum() if mixing else state))
                return state + bit, None

            scan(step, jnp.zeros(4, int), jnp.arange(3))

        return run

    check(program(False), None, {})
    with pytest.raises(PolicyError, match="'gain'"):
        check(program(True), None, {})


def test_a_guide_that_reads_other_elements_is_refused() -> None:
    oracle = ORACLES["weathers"]()

    def guide() -> None:
        with numpyro.plate("context", 3):
            w = bayesrl.environment("w", dist.Bernoulli(jnp.array([0.2, 0.5, 0.7])), observable=True)
            numpyro.sample("arm", dist.Categorical(logits=jnp.stack([jnp.zeros(3), 1.0 * jnp.roll(w, 1)], -1)))

    with pytest.raises(GuideError, match=r"'arm' of the guide.*plate 'context'.*itself alone"):
        check(oracle.policy, guide, {})
