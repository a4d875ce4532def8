"""Bounds of rewards: no draw leaves them, and where the program allows they are tight."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from numpyro.contrib.control_flow import scan
from oracles import ORACLES

from bayesrl.core.handlers import full_data
from bayesrl.core.primitives import environment, reward
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.jaxprs.interval_rules import Range
from bayesrl.jaxprs.intervals import propagate_ranges
from bayesrl.monte_carlo.reward_bounds import reward_bounds, site_reward_bounds

KEY = jax.random.key(0)


def bounds(policy: Callable[..., Any], *args: Any) -> tuple[np.ndarray, np.ndarray]:
    return reward_bounds(policy, inspect(KEY, policy, *args), args)


def rewards(policy: Callable[..., Any], *args: Any, num: int = 4000) -> np.ndarray:
    structure = inspect(KEY, policy, *args)
    programs = Programs(policy, None, structure, args, {})
    draw = jax.jit(lambda key: programs.draw(key, {}, num, share=False).totals((num, *structure.context_shape)).reward)
    return np.asarray(draw(jax.random.key(1)), float)


# ---- the arithmetic --------------------------------------------------------------------------

UNARY: list[Callable[[Array], Array]] = [
    jnp.exp, jnp.tanh, jax.nn.sigmoid, jax.nn.relu, jnp.abs, jnp.square, jnp.negative, jnp.floor, jnp.round, jnp.sign,
    jax.nn.softmax, jnp.sin, jnp.cumsum, jnp.sort, jax.nn.softplus, jax.nn.gelu,
    lambda x: x**3, lambda x: x**-1, lambda x: x * x, lambda x: jnp.log(x * x + 1), lambda x: jnp.sqrt(jnp.abs(x)),
    lambda x: x - jax.scipy.special.logsumexp(x), lambda x: jnp.broadcast_to(x @ x, x.shape), lambda x: x[::-1],
    lambda x: jnp.where(x > 0.3, x, -1.0), lambda x: x[jnp.argsort(x)], lambda x: jnp.full_like(x, x.max()),
    lambda x: jnp.arange(7.0)[jnp.clip(x, 0, 6).astype(int)] + 0 * x, lambda x: jnp.cumsum(x[::-1])[::-1],
    lambda x: x.astype(int) % 3 + 0.0, lambda x: x // 2.0, lambda x: x % 0.7, lambda x: jnp.clip(x, -1, 2),
    lambda x: x.at[1].set(x[0]), lambda x: jax.lax.cond(x[0] > 0, lambda: x, lambda: -x),
    lambda x: jax.lax.scan(lambda c, v: (0.5 * c + v, c), 0.0, x)[1], lambda x: x.astype(jnp.bfloat16).astype(float),
    lambda x: jax.lax.scan(lambda c, _: (0.5 * c + 1, c.sum()), x, None, length=300)[1][-1] + 0 * x,
    lambda x: jnp.concatenate([x[1:], x[:1]]), lambda x: jnp.matmul(jnp.outer(x, x), x) * 1e-3,
    lambda x: ((x > 0) & (x < 1) | ~(x == x[0])) + 0.0 * x,  # type: ignore[list-item]
]  # fmt: skip
BINARY: list[Callable[[Array, Array], Array]] = [
    jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, jnp.minimum, jnp.divide, jnp.logaddexp, jnp.arctan2,
    lambda x, y: jnp.where(x < y, x, y * y), lambda x, y: (x <= y) * x, lambda x, y: jnp.outer(x, y).sum(0),
    lambda x, y: jnp.abs(x) ** jnp.clip(y, -2, 2),
]  # fmt: skip


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_no_value_leaves_its_range(seed: int) -> None:
    """A random composition of operations, run at 300 points of random boxes, corners among them."""
    rng = np.random.default_rng(seed)
    steps = [(rng.integers(2), rng.integers(len(UNARY)), rng.integers(len(BINARY)), rng.integers(3)) for _ in range(5)]

    def program(x: Array, y: Array) -> Array:
        stack = [x, y, jnp.linspace(-1, 2, 4)]
        for two, unary, binary, other in steps:
            new = BINARY[binary](stack[-1], stack[other]) if two else UNARY[unary](stack[-1])
            stack.append(jnp.asarray(new, jnp.float32))
        return stack[-1]

    centre, width = rng.normal(size=(2, 4)) * 2, rng.choice([0.0, 0.5, 3.0], size=(2, 4))
    low, high = (np.float32(centre + sign * width) for sign in (-1, 1))
    closed = jax.make_jaxpr(program)(low[0], low[1])
    inputs = [Range(low[i].astype(float), high[i].astype(float)) for i in (0, 1)]
    (found,) = propagate_ranges(closed, inputs)
    corners = np.where(rng.random((300, 2, 4)) < 0.5, low, high)
    inside = np.clip(rng.uniform(low, high, (300, 2, 4)), low, high).astype(np.float32)
    points = np.concatenate([corners, inside])
    values = np.asarray(jax.jit(jax.vmap(lambda p: program(p[0], p[1])))(points), float)
    number = ~np.isnan(values)
    assert ((values >= found.lower) | ~number).all()
    assert ((values <= found.upper) | ~number).all()


def test_a_table_with_a_value_for_what_lies_outside() -> None:
    """The filled-in value belongs to the range, whether the indices are few or too many to try; nan and others are refused."""
    table = jnp.array([1.0, 2.0, 3.0])
    for width in (4.0, 1e9):
        index = Range(np.full(2, -1.0), np.full(2, width))
        for fill in (9.0, -9.0):
            closed = jax.make_jaxpr(lambda i, fill=fill: table.at[i].get(mode="fill", fill_value=fill))(
                jnp.zeros(2, int)
            )
            (found,) = propagate_ranges(closed, [index])
            assert (found.lower <= min(fill, 1.0)).all()
            assert (found.upper >= max(fill, 3.0)).all()


def test_most_operations_are_understood() -> None:
    """Of bounded inputs, few compositions come out unbounded: the rules are used at all."""
    box = Range(np.full(4, 0.5), np.full(4, 1.0))
    unbounded = []
    for i, fn in enumerate(UNARY):
        closed = jax.make_jaxpr(fn)(jnp.ones(4))
        (found,) = propagate_ranges(closed, [box])
        if not np.isfinite(np.stack(found)).all():
            unbounded.append(i)
    assert len(unbounded) <= 3, unbounded


# ---- programs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
def test_draws_of_oracles_stay_inside(name: str) -> None:
    oracle = ORACLES[name]()
    args = tuple(jnp.asarray(x) for x in oracle.args)
    policy = full_data(oracle.policy)
    lower, upper = bounds(policy, *args)
    drawn = rewards(policy, *args)
    assert (drawn >= lower).all()
    assert (drawn <= upper).all()
    if name not in ("jump", "answered"):  # x itself is their reward
        assert np.isfinite(upper).all()
        # 4,000 draws of these small programs come close to the bound, or it is a bound by site or step.
        assert (
            name in ("dependent", "chain", "chain_with_nature", "episode", "walk")
            or (upper - drawn.max(0) < 0.1 + 1e-5).all()
        )


def test_mini_batches_are_bounded_whichever_is_drawn() -> None:
    oracle = ORACLES["subsampled"]()
    payoffs = jnp.asarray(oracle.args[0])
    lower, upper = bounds(oracle.policy, payoffs)
    assert lower.shape == upper.shape == (2,)
    np.testing.assert_allclose(upper, payoffs.max(), rtol=1e-6)
    np.testing.assert_allclose(lower, payoffs.min(), rtol=1e-6)


def test_tables_and_squares_are_tight() -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)

    def arms(table: Array) -> None:
        with numpyro.plate("context", 6) as i:
            arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
            reward("payoff", jnp.take_along_axis(table, arm[:, None], -1)[:, 0])
            reward("bonus", (arm == i).astype(float))

    by_site = site_reward_bounds(arms, inspect(KEY, arms, table), (table,))
    np.testing.assert_array_equal(by_site["payoff"], [table.min(1), table.max(1)])
    np.testing.assert_array_equal(by_site["bonus"], [np.zeros(6), [1, 1, 1, 1, 1, 0]])

    def target() -> None:
        x = numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        y = x - 2.0
        reward("power", -((x - 2.0) ** 2).sum() / 2)
        reward("product", -(y * y).mean())
        reward("dot", 1.0 - y @ y)

    lower, upper = bounds(target)
    assert (lower, upper) == (-np.inf, 1.0)


def test_long_scans_and_counters() -> None:
    def text(length: int) -> Callable[[], None]:
        def program() -> None:
            def step(carry: Any, t: Array) -> tuple[Any, None]:
                previous, place = carry
                token = numpyro.sample("token", dist.Categorical(logits=jnp.zeros((3, 3))[previous]))
                reward("hit", jnp.array([0.0, 1.0, 0.5])[token])
                reward("place", jax.nn.sigmoid(place) - 1.0)
                return (token, place + token), None

            scan(step, (jnp.array(0), jnp.array(0.0)), jnp.arange(length))

        return program

    for length in (20, 400):
        by_site = site_reward_bounds(text(length), inspect(KEY, text(length)), ())
        assert by_site["hit"] == (0.0, length)
        low, high = by_site["place"]
        assert low <= -0.5 * length < high <= 1e-3


def test_supports_that_depend_on_draws() -> None:
    def program() -> None:
        n = numpyro.sample("n", dist.Categorical(logits=jnp.zeros(4)))
        k = numpyro.sample("k", dist.Binomial(n + 1, 0.5))
        u = numpyro.sample("u", dist.Uniform(0.0, 1.0 + k))
        w = environment("w", dist.Dirichlet(jnp.ones(3)), observable=True)
        reward("r", k + u + w[0])
        reward("s", numpyro.sample("g", dist.Gamma(2.0, 1.0)))

    by_site = site_reward_bounds(program, inspect(KEY, program), ())
    low, high = by_site["r"]
    assert low == 0
    assert 10 <= high < 10 + 1e-4
    assert by_site["s"] == (0.0, np.inf)
    drawn = rewards(program)
    assert drawn.min() >= 0


def test_what_is_not_understood_is_unbounded() -> None:
    def program() -> None:
        x = numpyro.sample("x", dist.Uniform(0.0, 1.0))
        reward("known", x)
        reward("random", jax.random.uniform(numpyro.prng_key()))
        reward("special", jax.scipy.special.digamma(x))

    by_site = site_reward_bounds(program, inspect(KEY, program), ())
    assert np.isfinite(by_site["known"]).all()
    assert by_site["special"] == (-np.inf, np.inf)
    assert by_site["random"][1] >= 1
