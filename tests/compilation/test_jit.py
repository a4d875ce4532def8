"""What a function closes over is an argument of its program, not a constant in it; errors come as they were raised."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import compilations
from jax import Array

from bayesrl.compilation import jit as compiling
from bayesrl.compilation.callbacks import host_call
from bayesrl.compilation.jit import ClosureJit, clear_programs, closure_jit, num_programs, trace_once
from bayesrl.errors import LanguageModelError


class Network(eqx.Module):
    weight: Array
    name: str


def test_weights_are_no_constants() -> None:
    """The compiled text does not grow with what is closed over: 1,000,000 weights are not in it."""
    weights = jnp.arange(1_000_000.0)
    network = Network(weights, "big")
    made = ClosureJit(lambda factor, x: factor * (network.weight * x).sum(), name="weigh")
    x, total = jnp.ones(()), float(2 * weights.sum())
    with compilations() as names:
        assert float(made(2.0, x)) == pytest.approx(total, rel=1e-5)
    assert names == ["weigh"]
    traced = made.traced(2.0, jnp.ones(()))
    assert any(array is weights for array in traced.consts), "the very array is passed in, no copy of it"
    assert len(traced.text([jnp.ones(())])) < 10_000
    plain = jax.jit(lambda x: (network.weight * x).sum())
    assert len(plain.lower(jnp.ones(())).as_text()) > 1_000_000, "plain jit writes them in"


def test_programs_are_bounded_and_can_be_forgotten() -> None:
    """A process can map so many pieces of memory only; every program that is kept takes some twenty."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what it has mapped")

    def count() -> int:
        return len(maps.read_text().splitlines())

    def run(number: int) -> None:
        closure_jit(lambda x: jnp.cumsum(jnp.sin(x))[:number].sum())(jnp.ones(99))

    run(1)
    clear_programs()
    gc.collect()
    before = count()
    for number in range(2, 12):
        run(number)
    assert num_programs() >= 10
    clear_programs()
    gc.collect()
    assert num_programs() == 0
    assert count() - before < 10 * 10


def test_only_so_many_programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_PROGRAMS", 3)

    def plus(size: int) -> float:
        return float(closure_jit(lambda x: x.sum() + x.prod())(jnp.ones(size)))

    for size in range(2, 6):
        assert plus(size) == size + 1
    assert num_programs() <= 3
    with compilations() as names:
        plus(5)
    assert names == []
    with compilations() as names:
        plus(2)
    assert len(names) == 1


def reward_of(kind: str) -> tuple[Any, Any]:
    """Give a function that reads something, and how to change what it reads."""
    if kind == "array":
        held = {"value": jnp.arange(3.0)}
        return (lambda x: (held["value"] * x).sum(), lambda: held.update(value=jnp.arange(3.0) + 7))
    if kind == "number":
        box = [0.7]
        return (lambda x: (box[0] * x).sum(), lambda: box.__setitem__(0, 0.9))
    if kind == "integer":
        index = [7]
        return (lambda x: (x * jnp.arange(3) + (x.astype(int) == index[0])).sum(), lambda: index.__setitem__(0, 5))
    if kind == "in place":
        table = np.array([0.1, 0.2, 0.3], np.float32)
        return (lambda x: (table * x).sum(), lambda: table.__setitem__(1, 5.0))
    if kind == "attribute":
        network = SimpleNamespace(weight=jnp.ones(3), scale=3.5)
        return (
            lambda x: (network.weight * x).sum() * network.scale,
            lambda: network.__dict__.update(scale=4.5, weight=jnp.zeros(3) + 0.3),
        )
    if kind == "default":

        def by_default(x: Array, factor: float = 0.3) -> Array:
            return (factor * x).sum()

        return by_default, lambda: setattr(by_default, "__defaults__", (0.4,))
    counter = [0.7]  # inside of loops and branches

    def nested(x: Array) -> Array:
        total, _ = jax.lax.scan(lambda c, y: (c * counter[0] + y, None), jnp.zeros(()), x)
        grown = jax.lax.while_loop(lambda v: v < 10.3 * counter[0], lambda v: 1.7 * v + 0.1, total)
        return jax.lax.cond(grown > 3.1, lambda v: v * counter[0], lambda v: v, grown) + jax.nn.softplus(0.3 * grown)

    return nested, lambda: counter.__setitem__(0, 0.9)


@pytest.mark.parametrize("kind", ["array", "number", "integer", "in place", "attribute", "default", "nested"])
def test_what_changed_is_read_anew_and_compiles_nothing(kind: str) -> None:
    function, change = reward_of(kind)
    made = ClosureJit(lambda _, x: function(x), name="reward")
    x = jnp.array([1.0, 5.0, 9.0])
    first = float(made(None, x))
    assert first == pytest.approx(float(function(x)), rel=1e-6)
    change()
    with compilations() as names:
        second = float(made(None, x))
    assert names == []
    assert second == pytest.approx(float(function(x)), rel=1e-6)
    assert second != first


def test_a_flag_that_chooses_a_branch_counts() -> None:
    flags = [True]
    made = ClosureJit(lambda _, x: x.sum() if flags[0] else x.prod())
    x = jnp.array([2.0, 5.0])
    assert float(made(None, x)) == 7
    flags[0] = False
    assert float(made(None, x)) == 10


def test_an_equal_function_defined_anew_compiles_nothing() -> None:
    def define(numbers: Any) -> Any:
        table = jnp.asarray(numbers)
        return closure_jit(lambda i: jnp.tanh(table[i]).sum())

    index = jnp.array([0, 2])
    assert float(define([1.0, 2.0, 3.0])(index)) == pytest.approx(np.tanh([1, 3]).sum(), rel=1e-6)
    with compilations() as names:
        assert float(define([4.0, 5.0, 0.5])(index)) == pytest.approx(np.tanh([4, 0.5]).sum(), rel=1e-6)
    assert names == []


def test_other_shapes_types_and_static_values_are_other_programs() -> None:
    @ClosureJit
    def scaled(power: int, x: Array) -> Array:
        return (x**power).sum()

    assert float(scaled(2, 3 * jnp.ones(3))) == 27
    assert float(scaled(3, 3 * jnp.ones(3))) == 81
    assert float(scaled(2, 3 * jnp.ones(4))) == 36
    assert scaled(2, 3 * jnp.ones(3, int)).dtype == jnp.int32
    assert scaled(2, 3 * jnp.ones(3)).dtype == jnp.float32


def test_many_calls_of_what_was_prepared_trace_once() -> None:
    traces: list[int] = []

    def counted(x: Array, factor: Array) -> Array:
        traces.append(1)
        return factor * x.sum()

    call = trace_once(counted)
    assert [float(call(jnp.ones(3), jnp.asarray(f))) for f in (1.0, 2.0, 3.0)] == [3, 6, 9]
    assert float(call(jnp.ones(4), jnp.asarray(2.0))) == 8
    assert len(traces) == 2
    assert [float(call(jnp.ones(3), factor)) for factor in (2.0, 3.0, np.float32(4.0))] == [6, 9, 12], (
        "no array: static"
    )


def test_host_functions_that_differ_share_a_program() -> None:
    def made(factor: float) -> Any:
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return closure_jit(lambda x: host_call(lambda v: np.asarray(factor * v, np.float32), shape, x) + 1)

    double, triple = made(2.0), made(3.0)
    assert float(double(jnp.asarray(5.0))) == 11
    with compilations() as names:
        assert float(triple(jnp.asarray(5.0))) == 16
    assert names == []
    assert float(double(jnp.asarray(5.0))) == 11


def test_without_a_static_value() -> None:
    shift = jnp.arange(3.0)
    moved = closure_jit(lambda x, times: times * (x + shift))
    assert moved(jnp.ones(3), 2).tolist() == [2.0, 4.0, 6.0]
    assert moved(jnp.ones(3), 3).tolist() == [3.0, 6.0, 9.0]


def test_functions_of_compiled_functions_are_traced_through() -> None:
    """Under vmap and grad of the caller it is a function like others."""
    weights = jnp.arange(3.0)
    made = ClosureJit(lambda _, x: (weights * x**2).sum())
    np.testing.assert_allclose(jax.grad(lambda x: made(None, x))(jnp.ones(3)), 2 * weights)
    np.testing.assert_allclose(jax.vmap(lambda x: made(None, x))(jnp.eye(3)), weights)


@pytest.mark.parametrize("inside", ["plain", "scan", "vmap"])
def test_errors_of_host_functions_come_as_they_were_raised(inside: str) -> None:
    class OwnError(LanguageModelError):
        pass

    def fails(x: Any) -> Any:
        if np.max(x) > 2:
            raise OwnError(f"{float(np.max(x)):g} is too much")
        return np.asarray(x, np.float32)

    def call(x: Array) -> Array:
        return host_call(fails, jax.ShapeDtypeStruct(x.shape, jnp.float32), x)

    @ClosureJit
    def run(_: Any, x: Array) -> Array:
        if inside == "scan":
            return jax.lax.scan(lambda c, y: (c + call(y), None), jnp.zeros(()), x)[0]
        return (jax.vmap(call)(x) if inside == "vmap" else call(x)).sum()

    assert float(run(None, jnp.ones(2))) == 2
    with pytest.raises(OwnError, match="3 is too much"):
        run(None, 3 * jnp.ones(2))
    assert float(run(None, jnp.ones(2))) == 2, "it goes on afterwards"
