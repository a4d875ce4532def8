"""Comparisons against exact differences, in standard errors; and paired against unpaired ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles import ORACLES, Oracle

import bayesrl
from bayesrl.certainty.comparison import compare
from bayesrl.posterior import Posterior

KEY = jax.random.key(3)


def at(oracle: Oracle, params: dict[str, Any]) -> Posterior:
    """A posterior whose guide stands at given parameters, without a fit."""
    made = bayesrl.fit(
        KEY, oracle.policy, *oracle.args, beta=oracle.beta, guide=oracle.guide, num_steps=1, progress=False
    )
    return Posterior(**{**vars(made), "params": {name: jnp.asarray(value)[None] for name, value in params.items()}})


def moved(oracle: Oracle, seed: int, size: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(v + size * rng.normal(size=np.shape(v)), np.float32) for name, v in oracle.params.items()}


@pytest.mark.parametrize("name", ["gaussian", "observed"])
def test_oracles(name: str) -> None:
    """ΔJ of two other fits, one near and one far: 10 within 4.5 standard errors, 7e-5 false alarms; and both intervals."""
    oracle = ORACLES[name]()
    points = [oracle.params, moved(oracle, 1, 0.05), moved(oracle, 2, 0.5)]
    truth = np.array([float(oracle.objective({k: jnp.asarray(v) for k, v in p.items()})) for p in points])
    fits = {f"fit {i}": at(oracle, p) for i, p in enumerate(points)}
    found = compare(jax.random.key(1), fits, num_samples=2**14)
    delta = found.delta_objective
    assert delta.mean[0] == delta.se[0] == 0
    assert (np.abs(delta.mean - (truth - truth[0]))[1:] < 4.5 * delta.se[1:] + 1e-6).all()
    assert (np.abs(found.objective.mean - truth) < 4.5 * found.objective.se + 1e-6).all()
    assert ((delta.floor <= truth - truth[0] + 1e-6) & (truth - truth[0] - 1e-6 <= delta.ceiling)).all()
    combined = found.delta_reward.mean - oracle.beta * found.delta_kl.mean
    if name != "observed":
        np.testing.assert_allclose(combined, delta.mean, atol=1e-5)
    # Near fits: pairing takes away most of what two separate estimates would be off by.
    apart = [fit.estimate(jax.random.key(2), 2**13).objective.se for fit in list(fits.values())[:2]]
    assert delta.se[1] < 0.5 * np.hypot(*(float(se[0]) for se in apart))


def test_standard_errors_are_those_of_repetition() -> None:
    """40 comparisons: z has a root mean square in .62 to 1.42 (χ² with 40 degrees, 5e-4 on each side)."""
    oracle = ORACLES["contexts"]()
    points = [oracle.params, moved(oracle, 1, 0.1)]
    truth = [float(oracle.objective({k: jnp.asarray(v) for k, v in p.items()})) for p in points]
    fits = {str(i): at(oracle, p) for i, p in enumerate(points)}
    z = []
    for seed in range(40):
        delta = compare(jax.random.key(100 + seed), fits, num_samples=1024).delta_objective
        z.append((delta.mean[1] - (truth[1] - truth[0])) / delta.se[1])
    assert 0.62 < np.sqrt(np.mean(np.square(z))) < 1.42


def test_restarts_and_mixtures() -> None:
    """Two modes: a mixture of restarts beats the best of them by β·log 2, which single precision leaves to 1e-3."""

    def policy() -> None:
        a = numpyro.sample("a", dist.Bernoulli(0.5))
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        bayesrl.reward("same", 20.0 * (a == b))

    def guide() -> None:
        logit = numpyro.param("logit", jnp.array(0.0))
        numpyro.sample("a", dist.Bernoulli(logits=logit))
        numpyro.sample("b", dist.Bernoulli(logits=logit))

    made = bayesrl.fit(KEY, policy, beta=1.0, guide=guide, num_steps=1, num_restarts=2, progress=False)
    fit = Posterior(**{**vars(made), "params": {"logit": jnp.array([-12.0, 12.0])}})
    equal = Posterior(**{**vars(fit), "mixture": np.array([0.5, 0.5])})
    found = compare(KEY, {"best": fit, "both": equal}, num_samples=4096)
    assert abs(found.delta_objective.mean[1] - np.log(2)) < 4.5 * found.delta_objective.se[1] + 1e-3
    assert "both" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
