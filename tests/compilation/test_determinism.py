"""A program that draws numbers of its own on the host has no one answer, and is refused by the site that reads them."""

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.compilation.callbacks import host_call
from bayesrl.core.structure import inspect
from bayesrl.errors import PolicyError

generator = np.random.default_rng(0)
counter = itertools.count(1)
HELD = jax.random.key(3)


def pull(fn: Callable[[Any], Any], prior: Any = 0.5) -> None:
    arm = numpyro.sample("arm", dist.Bernoulli(prior))
    bayesrl.reward("payoff", fn(arm))


def counted(arm: Any) -> Any:
    return 1.0 * next(counter) * arm


def turning(arm: Any) -> Any:
    """Another program at each reading, and not only other numbers."""
    return 1.0 * arm if next(counter) % 2 else 1.0 - arm


def compiled_inside(arm: Any) -> Any:
    return jax.jit(lambda arm: arm * generator.normal())(arm)


def seen() -> None:
    effect = numpyro.sample("effect", dist.Normal(0, 1))
    numpyro.sample("seen", dist.Normal(effect, 1), obs=generator.normal())


def measured() -> None:
    pull(lambda arm: 1.0 * arm)
    numpyro.deterministic("metric", jnp.asarray(generator.normal()))


def in_time() -> None:
    def body(carry: Any, _: Any) -> tuple[Any, None]:
        pull(lambda arm: arm * (1.0 + generator.integers(10**6)))
        return carry, None

    scan(body, 0, None, length=2)


def by_hand() -> None:
    """A mini-batch as one writes it with NumPy: it would be the same one for ever."""
    rows = np.random.choice(100, 8)
    with numpyro.plate("row", 8):
        pull(lambda arm: jnp.arange(100.0)[rows] * arm)


UNSTEADY: dict[str, tuple[Callable[[], None], str]] = {
    "generator": (lambda: pull(lambda arm: arm + generator.normal()), "payoff"),
    "table": (lambda: pull(lambda arm: jnp.asarray(np.random.normal(size=2))[arm]), "payoff"),
    "prior": (lambda: pull(lambda arm: 1.0 * arm, prior=random.random()), "arm"),  # noqa: S311
    "clock": (lambda: pull(lambda arm: time.perf_counter() * arm), "payoff"),
    "counter": (lambda: pull(counted), "payoff"),
    "turning": (lambda: pull(turning), "payoff"),
    "jit": (lambda: pull(compiled_inside), "payoff"),
    "data": (seen, "seen"),
    "metric": (measured, "metric"),
    "scan": (in_time, "arm"),
    "mini-batch": (by_hand, "payoff"),
}


@pytest.mark.parametrize("name", UNSTEADY)
def test_refused(name: str) -> None:
    program, site = UNSTEADY[name]
    with pytest.raises(PolicyError, match=f"site '{site}' is computed from other numbers each time"):
        inspect(jax.random.key(0), program)


@pytest.mark.parametrize(
    "ask",
    [
        lambda program: bayesrl.enumerate_posterior(program, beta=0.5),
        lambda program: bayesrl.importance(jax.random.key(0), program, beta=0.5),
        lambda program: bayesrl.rejection(jax.random.key(0), program, beta=0.5),
        lambda program: bayesrl.fit(jax.random.key(0), program, beta=0.5, num_steps=1, progress=False),
    ],
    ids=["enumerate_posterior", "importance", "rejection", "fit"],
)
def test_by_every_engine(ask: Callable[[Any], Any]) -> None:
    """The optimum of such a bandit was told as .85, its fit's J as 1.25, 1.11 and −.25."""
    with pytest.raises(PolicyError, match="payoff"):
        ask(UNSTEADY["generator"][0])


def called(arm: Any) -> Any:
    """Functions on the host are made anew at each reading, and are the same."""
    plain = jax.pure_callback(np.float32, jax.ShapeDtypeStruct((), jnp.float32), arm)
    return plain + host_call(np.float32, jax.ShapeDtypeStruct((), jnp.float32), arm)


STEADY = {
    "callbacks": called,
    "nan": lambda arm: arm * jnp.array([jnp.nan, 1.0])[1] + np.array([np.nan, 2.0], np.float32)[1],
    "keys": lambda arm: arm * jax.random.normal(HELD) + jax.random.normal(jax.random.key(1)),
    "seeded": lambda arm: arm * np.random.default_rng(7).normal(),
    "custom rule": lambda arm: jax.nn.relu(arm * jax.nn.logsumexp(jnp.arange(3.0))),
}


@pytest.mark.parametrize("name", STEADY)
def test_read(name: str) -> None:
    assert inspect(jax.random.key(0), lambda: pull(STEADY[name])).actions == ("arm",)


def test_where_learning_starts_may_be_random() -> None:
    """Parameters of a program without rewards only start somewhere."""

    def program() -> None:
        mean = numpyro.param("mean", generator.normal(size=2))
        numpyro.sample("seen", dist.Normal(mean, 1.0), obs=jnp.array([1.0, 2.0]))

    assert inspect(jax.random.key(0), program).names("observed") == ("seen",)
