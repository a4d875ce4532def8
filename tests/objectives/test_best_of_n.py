"""Distillation of the best of n: its gradient against the exact one, and its fit against the exact law."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from refused_programs import observed, windy

import bayesrl
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import ObjectiveError
from bayesrl.objectives import BestOfN

KEY = jax.random.key(0)
PRIOR = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
PAYOFF = jnp.array([[0.0, 1.0, 1.0, 0.5], [0.0, -1.0, 2.0, 1.0]])


def arms() -> None:
    with numpyro.plate("context", 2):
        arm = numpyro.sample("arm", dist.Categorical(probs=PRIOR))
        bayesrl.reward("payoff", jnp.take_along_axis(PAYOFF, arm[..., None], -1)[..., 0])


def guide() -> None:
    logits = numpyro.param("logits", jnp.zeros((2, 4)))
    with numpyro.plate("context", 2):
        numpyro.sample("arm", dist.Categorical(logits=logits))


def law(n: int) -> np.ndarray:
    found = bayesrl.best_of(KEY, arms, n=n, num_samples=1)
    assert found.log_probs is not None
    return np.exp(found.log_probs).T


@pytest.mark.parametrize("num_particles", [4, 32])
def test_gradient_is_unbiased(num_particles: int) -> None:
    """8 partial derivatives within 4.5 standard errors of 20,000 gradients: 6e-5 false alarms; 4 is the least of draws.

    And its estimate of J of the guide is close with 32.
    """
    objective = BestOfN(4, num_particles)
    programs = Programs(arms, guide, inspect(KEY, arms), (), {})
    params = {"logits": jnp.log(PRIOR) + jnp.array([[0.5, -0.5, 0.3, 0.0], [0.0, 0.4, 0.8, -0.2]])}
    exact_law = jnp.asarray(law(4))

    def exact(params: dict[str, Array]) -> Array:
        log_q = jax.nn.log_softmax(params["logits"])
        return (exact_law * (jnp.log(exact_law) - log_q)).sum(-1).mean()

    def one(key: Array) -> Any:
        loss = lambda p: objective.evaluate(key, p, programs, 0.5)[0]  # noqa: E731
        return jax.grad(loss)(params)["logits"]

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 20_000)), float)
    truth = np.asarray(jax.grad(exact)(params)["logits"])
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - truth) < 4.5 * error + 1e-6).all()
    assert error.max() < 0.1 * np.abs(truth).max()


def test_a_fit_becomes_the_law() -> None:
    """Within 3% in probability, of which draws have .35% as standard error, from a start more than 20% away."""
    posterior = bayesrl.fit(KEY, arms, beta=0.5, objective=BestOfN(4, 512), num_steps=800, progress=False)
    arms_drawn = np.asarray(posterior.sample(jax.random.key(1), 20_000)["arm"]).reshape(-1, 2)
    q = np.stack([np.bincount(arm, minlength=4) for arm in arms_drawn.T]) / len(arms_drawn)
    assert np.abs(law(4) - np.asarray(PRIOR)).max() > 0.2
    assert np.abs(q - law(4)).max() < 0.03


def unrewarded() -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal()), 1.0), obs=1.0)


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    for policy, beta, message in (
        (windy, 1.0, "'wind', which is nature's"),
        (observed, 1.0, "'y' is observed"),
        (unrewarded, None, "'y' is observed"),
    ):
        with pytest.raises(ObjectiveError, match=message):
            bayesrl.fit(KEY, policy, beta=beta, objective=BestOfN(2), num_steps=1, progress=False)
    with pytest.raises(ObjectiveError, match="num_particles=4, from which no 8 can be drawn"):
        BestOfN(8, 4)
    for bad in (0, -3, 2.5):
        with pytest.raises(ObjectiveError, match=r"n=.*; use a whole number of at least 1"):
            BestOfN(bad)  # type: ignore[arg-type]
