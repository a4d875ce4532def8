"""What a function closes over is an argument of its program, not a constant in it; errors come as they were raised."""

import gc
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bayesrl.core.compiling import Compiled, compiled
from bayesrl.core.host import on_host
from bayesrl.errors import LanguageModelError


class Network(eqx.Module):
    weight: Array
    name: str


def test_weights_are_no_constants() -> None:
    """The compiled text does not grow with what is closed over: 1,000,000 weights are not in it."""
    weights = jnp.arange(1_000_000.0)
    network = Network(weights, "big")
    made = Compiled(lambda factor, x: factor * (network.weight * x).sum())
    assert float(made(2.0, jnp.ones(()))) == pytest.approx(float(2 * weights.sum()), rel=1e-5)
    ((run, closed_over, *_),) = made._made.values()
    assert any(array is weights for array in closed_over), "the very array is passed in, no copy of it"
    assert len(run.lower(closed_over, [jnp.ones(())]).as_text()) < 10_000
    plain = jax.jit(lambda x: (network.weight * x).sum())
    assert len(plain.lower(jnp.ones(())).as_text()) > 1_000_000, "plain jit writes them in"


def test_what_was_compiled_goes_with_the_function() -> None:
    """A process can map so many pieces of memory only; every program that is kept takes some twenty."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what it has mapped")

    def count() -> int:
        return len(maps.read_text().splitlines())

    def run(number: int) -> None:
        compiled(lambda x: jnp.cumsum(jnp.sin(x * number))[0])(jnp.ones(7))

    run(0)
    gc.collect()
    before = count()
    for number in range(1, 21):
        run(number)
    gc.collect()
    assert count() - before < 20 * 10


def test_it_is_traced_once_for_each_static_value_and_shape() -> None:
    traces: list[Any] = []

    @Compiled
    def scaled(factor: float, x: Array, network: Any) -> Array:
        traces.append((factor, x.shape, network.name))
        return factor * x.sum() * network.weight

    one, other = (Network(jnp.asarray(2.0), name) for name in ("one", "other"))
    for _ in range(3):
        assert float(scaled(2.0, jnp.ones(3), one)) == 12
        assert float(scaled(2.0, 2 * jnp.ones(3), Network(jnp.asarray(3.0), "one"))) == 36
    assert traces == [(2.0, (3,), "one")]
    scaled(3.0, jnp.ones(3), one)
    scaled(2.0, jnp.ones(4), one)
    scaled(2.0, jnp.ones(3), other)
    scaled(2.0, jnp.ones(3, jnp.int32), one)
    assert len(traces) == 5
    assert float(scaled(3.0, jnp.ones(3), one)) == 18
    assert len(traces) == 5


def test_without_a_static_value() -> None:
    shift = jnp.arange(3.0)
    moved = compiled(lambda x, times: times * (x + shift))
    assert moved(jnp.ones(3), 2).tolist() == [2.0, 4.0, 6.0]
    assert moved(jnp.ones(3), 3).tolist() == [3.0, 6.0, 9.0]


def test_functions_of_compiled_functions_are_traced_through() -> None:
    """Under vmap and grad of the caller it is a function like others."""
    weights = jnp.arange(3.0)
    made = Compiled(lambda _, x: (weights * x**2).sum())
    np.testing.assert_allclose(jax.grad(lambda x: made(None, x))(jnp.ones(3)), 2 * weights)
    np.testing.assert_allclose(jax.vmap(lambda x: made(None, x))(jnp.eye(3)), weights)


def test_only_so_many_programs_are_kept() -> None:
    traced: list[int] = []

    @Compiled
    def plus(number: int, x: Array) -> Array:
        traced.append(number)
        return x + number

    for number in range(65):
        assert float(plus(number, jnp.zeros(()))) == number
    plus(64, jnp.zeros(()))
    assert len(traced) == 65
    assert float(plus(0, jnp.zeros(()))) == 0
    assert len(traced) == 66


@pytest.mark.parametrize("inside", ["plain", "scan", "vmap"])
def test_errors_of_host_functions_come_as_they_were_raised(inside: str) -> None:
    class OwnError(LanguageModelError):
        pass

    def fails(x: Any) -> Any:
        if np.max(x) > 2:
            raise OwnError(f"{float(np.max(x)):g} is too much")
        return np.asarray(x, np.float32)

    def call(x: Array) -> Array:
        return on_host(fails, jax.ShapeDtypeStruct(x.shape, jnp.float32), x)

    @Compiled
    def run(_: Any, x: Array) -> Array:
        if inside == "scan":
            return jax.lax.scan(lambda c, y: (c + call(y), None), jnp.zeros(()), x)[0]
        return (jax.vmap(call)(x) if inside == "vmap" else call(x)).sum()

    assert float(run(None, jnp.ones(2))) == 2
    with pytest.raises(OwnError, match="3 is too much"):
        run(None, 3 * jnp.ones(2))
    assert float(run(None, jnp.ones(2))) == 2, "it goes on afterwards"
