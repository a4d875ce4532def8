"""One gate for arguments: what a signature does not allow is refused in our words, and nothing else changes."""

import inspect
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from bayesrl import control
from bayesrl.arguments import (
    AnyNumbers,
    Count,
    CountOrZero,
    FiniteNumbers,
    FiniteNumbersOrNone,
    FlagsOrNone,
    Level,
    Location,
    NonNegative,
    Positive,
    Seed,
    UnitInterval,
    UnusedOption,
    checked,
    integer_range,
    real_range,
)
from bayesrl.control import bandits
from bayesrl.control.environments.tabular_examples import n_chain
from bayesrl.errors import ControlError, EngineError, PolicyError
from bayesrl.typing import Beta, PRNGKey, Program
from bayesrl.value_checks import format_value

KEY = jax.random.key(0)


@checked(EngineError, UnusedOption("rate", lambda given: given["mode"] == "table", "only mode='net' trains"))
def solve(
    key: PRNGKey,
    policy: Program,
    *args: Any,
    beta: Beta | None = None,
    num: Count = 3,
    none: CountOrZero = 0,
    few: Annotated[int, integer_range(4, 7)] = 4,
    seed: Seed = 0,
    share: UnitInterval = 0.5,
    level: Level = 0.9,
    size: NonNegative = 0.0,
    odd: Annotated[float, real_range(1, below=2)] = 1.0,
    rate: Positive | None = None,
    mode: Literal["table", "net"] = "net",
    names: Sequence[str] = (),
    scales: Mapping[str, float] | None = None,
    pair: tuple[int, int] = (1, 2),
    series: tuple[float, ...] = (),
    data: Float[Array, "n d"] | None = None,
    where: Location = "here",
    flag: bool = False,
    function: Callable[[int], int] | None = None,
    anything: Any = None,
) -> Any:
    """Give back what it got."""
    return locals()


def program() -> None:
    """Draw nothing."""


WHOLE = [
    True,
    np.True_,
    2.5,
    2.0,
    "3",
    b"3",
    None,
    np.nan,
    np.inf,
    [3],
    np.array([3]),
    jnp.ones(1),
    10**400,
    10**5000,
    1j,
]
REAL = [True, np.False_, "0.5", None, np.nan, -np.inf, [0.5], np.array([0.5]), jnp.full((1, 1), 0.5), 10**400, 1e39, 1j]
REFUSED: dict[str, tuple[list[Any], str]] = {
    "num": ([*WHOLE, 0, -1, 2**31, np.int64(-3)], "a whole number of at least 1"),
    "none": ([*WHOLE, -1], "a whole number of at least 0"),
    "few": ([*WHOLE, 3, 8], "a whole number from 4 to 7"),
    "seed": ([*WHOLE, -1, 2**32], "a whole number from 0 to 4294967295"),
    "share": ([*REAL, -0.1, 1.01, 7], "a number from 0 to 1"),
    "level": ([*REAL, 0, 1.0], "a number above 0 and below 1"),
    "size": ([*REAL, -1e-9], "a number of at least 0"),
    "odd": ([*REAL, 0.9, 2], "a number of at least 1 and below 2"),
    "rate": ([x for x in REAL if x is not None] + [0.0, -2, 1e-320], "a number above 0, or None"),
    "mode": (["nets", "", None, 3, True, np.array(["net"]), ["net"]], "'table' or 'net'"),
    "names": (["abc", b"abc", 3, None, {"a": 1}, np.array("a")], "a list of texts"),
    "scales": ([3, [1.0], "a"], "a dictionary"),
    "pair": ([(1,), [1, 2], (1, 2, 3), 1], "a tuple of 2"),
    "series": ([[0.1], 0.1, "0.1"], "a tuple of which each is a finite number"),
    "data": ([np.zeros((2, 2), np.float32), jnp.zeros(2), jnp.zeros((2, 2), int), 1.0, "x"], "shape [n, d]"),
    "where": (["", "a\0b", "\ud800", 3, None, b"a"], "a path"),
    "flag": ([1, 0, "True", None, np.array([True]), 1.0], "True or False"),
    "function": ([3, "f", KEY], "a function, or None"),
    "beta": (["hot", "0.1", True, 0, -1.0, np.nan, jnp.zeros((2, 2)), np.array([]), jnp.array([1.0, -1.0]), [0.1], 1j],
             "a number above 0, or an array of them"),
}  # fmt: skip
TAKEN: dict[str, list[Any]] = {
    "num": [1, 2**31 - 1, np.int8(4), np.uint32(5), jnp.asarray(6), np.asarray(7)],
    "none": [0, np.int64(0)],
    "share": [0, 1, 0.5, np.float32(0.5), jnp.asarray(0.25), jnp.asarray(0.5, jnp.bfloat16), np.asarray(1)],
    "rate": [None, 1e-30, 3e38, 2],
    "mode": ["table", "net"],
    "names": [(), ["a", "b"], ("",)],
    "scales": [{}, {"a": 1.5}, {"a": np.float32(1)}],
    "pair": [(0, -1)],
    "series": [(), (0.1, 2)],
    "data": [None, jnp.zeros((3, 1)), jnp.zeros((0, 2))],
    "where": ["a", Path("a") / "b", " ", "Größe"],
    "flag": [True, np.True_],
    "function": [None, len, lambda n: n, dict],
    "beta": [None, 1, 0.1, np.float32(2), jnp.asarray(0.5), np.array([0.5]), jnp.array([1.0, 2.0]), np.array([1, 2])],
    "anything": [None, object(), 1j, "x"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, unchecked: None) -> None:
    values, wanted = REFUSED[name]
    for value in values:
        with pytest.raises((EngineError, PolicyError)) as caught:
            solve(KEY, program, **{name: value})
        message = str(caught.value)
        assert message.startswith(f"solve got {name}="), message
        beyond = "at least" in wanted and "whole" in wanted and type(value) is int and value >= 2**31
        assert ("a whole number of at most 2147483647" if beyond else wanted) in message, message
        assert "\n" not in message
        assert len(message) < 300
        assert isinstance(caught.value, PolicyError if name == "beta" else EngineError)


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, unchecked: None) -> None:
    for value in TAKEN[name]:
        got = solve(KEY, program, **{name: value})[name]
        if name in ("num", "none", "share", "rate", "flag") and value is not None:
            assert type(got) in (int, float, bool)
            assert got == value
        else:
            assert got is value


def test_keys_and_programs(unchecked: None) -> None:
    for key in (KEY, jax.random.PRNGKey(0), jnp.zeros(2, jnp.uint32), jax.random.key(1, impl="rbg")):
        solve(key, program)
    keys = [
        0,
        None,
        "key",
        jax.random.split(KEY),
        np.zeros(2, np.uint32),
        jnp.zeros(2),
        jnp.zeros(4, jnp.uint32),
        [KEY],
    ]
    for bad in keys:
        with pytest.raises(EngineError, match=r"solve got key=.*use a JAX random key: jax\.random\.key\(seed\)"):
            solve(bad, program)
    for what in (3, None, "program", dict, jnp.zeros(3)):
        with pytest.raises(PolicyError, match=r"solve got policy=.*use a NumPyro program"):
            solve(KEY, what)
    jax.eval_shape(lambda key: solve(key, program)["num"] * jnp.ones(2), KEY)


def test_places_and_names_are_both_looked_at(unchecked: None) -> None:
    @checked(EngineError)
    def both(num: Count, /, other: Count, *rest: Any, last: Count = 1, **further: Any) -> int:
        return num + other + last + len(rest)

    assert both(1, 2, "x", last=np.int64(3), free=0) == 7
    for call in (lambda: both(0, 1), lambda: both(1, 0), lambda: both(1, other=0), lambda: both(1, 1, last=0)):
        with pytest.raises(EngineError, match=r"got (num|other|last)=0; use a whole number of at least 1"):
            call()
    for wrong in (both, lambda: both(1), lambda: solve(KEY, program, nam=3)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"missing|unexpected"):
            wrong()


def test_options_that_nothing_would_read(unchecked: None) -> None:
    with pytest.raises(EngineError, match=r"rate=0\.1, which nothing would read: only mode='net' trains; leave it out"):
        solve(KEY, program, rate=0.1, mode="table")
    for given in ({"rate": None, "mode": "table"}, {"mode": "table"}, {"rate": 0.1}, {"rate": 0.1, "mode": "net"}):
        solve(KEY, program, **given)


@checked(PolicyError)
@dataclass(frozen=True)
class Rule:
    """A rule."""

    num: Count = 3
    rate: Positive | None = None

    def times(self, share: UnitInterval) -> float:
        """Multiply."""
        return self.num * share

    @classmethod
    def of(cls, num: Count) -> "Rule":
        """Make one."""
        return cls(num)

    @staticmethod
    def half(num: Count) -> float:
        """Halve."""
        return num / 2

    def _own(self, num: Count) -> int:
        return num


@checked(PolicyError)
class Net(eqx.Module):
    """A module."""

    weight: Array
    width: Count = eqx.field(static=True, default=2)


def test_classes(unchecked: None) -> None:
    assert hash(Rule(num=np.int64(4))) == hash(Rule(4))
    assert replace(Rule(), num=5).times(0.5) == 2.5
    assert Rule()._own(0) == 0
    for call, words in (
        (lambda: Rule(0), "Rule got num=0"),
        (lambda: Rule(rate=-1.0), r"Rule got rate=-1\.0; use a number above 0, or None"),
        (lambda: replace(Rule(), num=True), "Rule got num=True"),
        (lambda: Rule().times(2), r"Rule\.times got share=2; use a number from 0 to 1"),
        (lambda: Rule.of(0), r"Rule\.of got num=0"),
        (lambda: Rule.half("2"), r"Rule\.half got num='2'"),
        (lambda: Net(jnp.zeros(2), width=0), "Net got width=0"),
        (lambda: Net(3), "Net got weight=3; use an array"),
    ):
        with pytest.raises(PolicyError, match=words):
            call()
    doubled = jax.jit(lambda net: net.weight * net.width)(Net(jnp.ones(2)))
    np.testing.assert_array_equal(doubled, 2.0)
    changed = jax.tree.map(lambda x: None, Net(jnp.ones(2)))  # what maps over trees makes is not looked at
    assert changed.weight is None


def test_traced_numbers_are_looked_at_by_shape_and_type(unchecked: None) -> None:
    gradient = jax.grad(lambda rate: Rule(rate=rate).rate * 3.0)(0.5)
    assert gradient == 3.0
    with pytest.raises(PolicyError, match="rate=an array of shape"):
        jax.vmap(lambda x: Rule(rate=x).num)(jnp.ones((2, 3)))


def test_traced_arrays_pass(unchecked: None) -> None:
    @checked(PolicyError)
    def total(values: AnyNumbers, finite: FiniteNumbers, which: FlagsOrNone = None) -> Any:
        return jnp.where(which, values + finite, 0.0).sum()

    ones = jnp.ones(3)
    assert jax.jit(total)(ones, ones, jnp.array([True, False, True])) == 4.0


def test_traced_arrays_are_taken(unchecked: None) -> None:
    @checked(EngineError)
    def add(numbers: AnyNumbers, finite: FiniteNumbersOrNone = None, flags: FlagsOrNone = None) -> Any:
        return numbers + (0 if finite is None else finite) + (0 if flags is None else flags)

    ones = jnp.ones((2, 2))
    np.testing.assert_array_equal(jax.jit(add)(ones, ones, ones > 0), 3.0)
    np.testing.assert_array_equal(jax.vmap(add)(ones, ones, ones > 2), 2.0)
    for bad in ({"finite": np.nan}, {"flags": 2}, {"flags": "yes"}, {"finite": None, "numbers": None}):
        with pytest.raises(EngineError, match=r"add got .*; use "):
            add(**{"numbers": 1.0, **bad})


def test_nothing_else_changes() -> None:
    assert list(inspect.signature(solve).parameters)[:4] == ["key", "policy", "args", "beta"]
    assert str(inspect.signature(Rule)) == "(num: Count = 3, rate: Positive | None = None) -> None"
    assert inspect.getdoc(solve) == "Give back what it got."
    assert solve.__name__ == "solve"
    assert inspect.signature(Rule.of).parameters["num"].annotation is Count
    assert inspect.isfunction(Rule.half)


def test_a_call_costs_microseconds(unchecked: None) -> None:
    solve(KEY, program, num=3)
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            Rule(num=3, rate=0.5)
        taken.append((time.perf_counter() - start) / 100)
    assert min(taken) < 1e-4  # 5 microseconds, on a machine with nothing else to do


def test_values_are_told_on_one_short_line() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (
        10**5000,
        "x" * 999,
        "\x1b[2J\n",
        list(range(999)),
        Rude(),
        Rude,
        jnp.zeros((3, 2)),
        KEY,
        len,
        [Rude()],
    ):
        text = format_value(value)
        assert len(text) < 120
        assert text.isprintable()


def test_the_gate_is_light() -> None:
    code = "import sys, bayesrl.arguments\nassert not {'jax', 'beartype', 'jaxtyping', 'numpyro'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda: control.deep_sea(size=10**9),
        lambda: n_chain(num_states=10**9),
        lambda: control.river_swim(num_states=2 * 10**9),
        lambda: control.TabularModel(num_states=10**6, num_actions=10**3, horizon=2),
        lambda: bandits.play_bandit(KEY, bandits.BernoulliArms(2), control.thompson(), num_steps=10**6, num_runs=10**6),
    ],
)
def test_what_would_not_fit_is_refused_by_arithmetic(make: Callable[[], Any]) -> None:
    with pytest.raises(ControlError, match=r"would take .* GB of memory, and there are .*; (use|pass|ask)"):
        make()
