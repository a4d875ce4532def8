"""Powers of a policy against normalised powers of its probabilities, and of a normal density."""

import itertools
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
from bayesrl.errors import PolicyError

PROBS = np.array([0.5, 0.3, 0.2, 0.0])
STEPS = jnp.array([[0.7, 0.3], [0.2, 0.8]])


def word() -> None:
    numpyro.sample("x", dist.Categorical(probs=jnp.asarray(PROBS)))


def chain() -> None:
    def step(state: Any, _: Any) -> tuple[Any, None]:
        state = numpyro.sample("x", dist.Categorical(probs=STEPS[state]))
        bayesrl.reward("ones", 1.0 * state)
        return state, None

    scan(step, 0, jnp.arange(3))


@pytest.mark.parametrize("alpha", [0.5, 1.5, 4.0])
def test_categorical(alpha: float) -> None:
    policy = bayesrl.power(word, alpha)
    exact = bayesrl.enumerate_posterior(policy, beta=policy.beta)
    powers = PROBS**alpha
    np.testing.assert_allclose(np.exp(exact.log_weights), powers / powers.sum(), atol=1e-6)
    assert exact.log_evidence is not None
    assert abs(exact.log_evidence.mean - np.log(powers.sum())) < 1e-6


def test_particles_move_over_what_is_impossible() -> None:
    """Gibbs moves try every value; log Z within 5 standard errors (2e-4 false alarms)."""
    policy = bayesrl.power(word, 0.5)
    found = bayesrl.smc(jax.random.key(0), policy, beta=policy.beta, num_particles=64, moves=["gibbs"])
    assert found.log_evidence is not None
    assert abs(found.log_evidence.mean - np.log((PROBS**0.5).sum())) < 5 * found.log_evidence.se + 1e-5
    assert (np.asarray(found.sites["x"])[np.exp(found.log_weights) > 0] != 3).all()


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_a_fit_where_a_value_is_impossible(alpha: float) -> None:
    policy = bayesrl.power(word, alpha)
    fit = bayesrl.fit(jax.random.key(0), policy, beta=policy.beta, num_steps=300, progress=False)
    evidence = bayesrl.evidence(jax.random.key(1), fit)
    assert abs(evidence.objective.mean - policy.beta * np.log((PROBS**alpha).sum())) < 1e-4


def test_a_chain_whose_own_reward_becomes_a_metric() -> None:
    policy = bayesrl.power(chain, 3.0)
    exact = bayesrl.enumerate_posterior(policy, beta=policy.beta)
    steps, powers, ones = np.asarray(STEPS), [], []
    for path in itertools.product([0, 1], repeat=3):
        powers.append(np.prod([steps[a, b] for a, b in itertools.pairwise((0, *path))]) ** 3)
        ones.append(sum(path) / 3)  # metrics along a scan are averaged
    assert exact.log_evidence is not None
    assert abs(exact.log_evidence.mean - np.log(sum(powers))) < 1e-5
    assert abs(exact.estimates.metrics["ones"].mean - np.average(ones, weights=powers)) < 1e-5


def test_plates_keep_contexts_and_sum_what_is_inside() -> None:
    def plates() -> None:
        with numpyro.plate("context", 2):
            numpyro.sample("a", dist.Categorical(probs=jnp.array([[0.5, 0.5], [0.9, 0.1]])))
            numpyro.sample("b", dist.Bernoulli(jnp.array([0.3, 0.6])))

    policy = bayesrl.power(plates, 2.0)
    exact = bayesrl.enumerate_posterior(policy, beta=policy.beta)
    truth = [np.log(0.5) + np.log(0.3**2 + 0.7**2), np.log(0.82) + np.log(0.52)]
    assert exact.log_evidence is not None
    np.testing.assert_allclose(exact.log_evidence.mean, truth, atol=1e-6)

    def batched() -> None:  # without a plate, elements are one problem
        numpyro.sample("a", dist.Bernoulli(jnp.array([0.3, 0.6])))

    joint = bayesrl.enumerate_posterior(bayesrl.power(batched, 2.0), beta=1.0)
    assert joint.log_evidence is not None
    assert abs(joint.log_evidence.mean - np.log(0.58) - np.log(0.52)) < 1e-6


@pytest.mark.parametrize("alpha", [0.8, 4.0])
def test_a_normal_narrows(alpha: float) -> None:
    """N(0, 1)ᵅ is N(0, 1/α), and log Z = −½ log α + (1 − α)/2·log 2π: 4.5 standard errors, 1e-5 false alarms."""

    def normal() -> None:
        numpyro.sample("x", dist.Normal(0.0, 1.0))

    policy = bayesrl.power(normal, alpha)
    found = bayesrl.importance(jax.random.key(0), policy, beta=policy.beta, num_samples=20_000)
    assert found.log_evidence is not None
    truth = -0.5 * np.log(alpha) + 0.5 * (1 - alpha) * np.log(2 * np.pi)
    assert abs(found.log_evidence.mean - truth) < 4.5 * found.log_evidence.se
    fit = bayesrl.fit(jax.random.key(1), policy, beta=policy.beta, num_steps=600, progress=False)
    width = np.std(np.asarray(fit.sample(jax.random.key(2), 4000)["x"]))
    # The standard error of a normal's width is width/√8000; 5 of them (6e-7), and 1% for a short fit.
    assert abs(width * np.sqrt(alpha) - 1) < 5 / np.sqrt(8000) + 0.01


def test_a_density_that_is_nan_is_not_hidden() -> None:
    def broken() -> None:
        numpyro.sample("x", dist.Normal(0.0, jnp.log(-jnp.ones(()))))

    with pytest.raises(PolicyError, match="'x_log_prob' returned nan or inf"):
        bayesrl.importance(jax.random.key(0), bayesrl.power(broken, 0.5), beta=2.0, num_samples=10)


def windy() -> None:
    bayesrl.environment("wind", dist.Bernoulli(0.5), observable=True)
    numpyro.sample("x", dist.Bernoulli(0.5))


def observed() -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal()), 1.0), obs=1.0)


@pytest.mark.parametrize("alpha", [0, -2.0, 1, 1.0, float("nan"), float("inf"), "2"])
def test_alpha(alpha: Any) -> None:
    with pytest.raises(PolicyError, match=r"alpha=.*; use a number above 0 other than 1"):
        bayesrl.power(word, alpha)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (windy, "environment site 'wind', which is nature's"),
        (observed, "'y' is observed"),
        (bayesrl.power(word, 2.0), "the product of both alphas"),
    ],
)
def test_programs_without_a_power(policy: Callable[[], None], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        bayesrl.enumerate_posterior(bayesrl.power(policy, 2.0), beta=1.0)
