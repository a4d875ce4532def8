"""Distillation of the best of n: its gradient against the exact one, and its fit against the exact law."""

import html
from pathlib import Path
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
from bayesrl.errors import EngineError, ObjectiveError, PolicyError
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


@pytest.fixture(scope="module")
def fitted() -> bayesrl.Posterior:
    objective = BestOfN(4, 512)
    return bayesrl.fit(KEY, arms, beta=0.5, objective=objective, num_steps=800, num_restarts=2, progress=False)


def test_a_fit_becomes_the_law(fitted: bayesrl.Posterior) -> None:
    """Within 3% in probability, of which draws have .35% as standard error, from a start more than 20% away."""
    arms_drawn = np.asarray(fitted.sample(jax.random.key(1), 20_000)["arm"])[0]
    q = np.stack([np.bincount(arm, minlength=4) for arm in arms_drawn.T]) / len(arms_drawn)
    assert np.abs(law(4) - np.asarray(PRIOR)).max() > 0.2
    assert np.abs(q - law(4)).max() < 0.03


def test_evidence_is_of_the_law(fitted: bayesrl.Posterior, tmp_path: Path) -> None:
    """KL both ways by sums and by draws, within 5 errors (1e-6 false alarms); nothing is told of p*."""
    best = fitted.select(restart="best")
    q = np.exp(np.asarray(best.log_prob({"arm": jnp.arange(4)[:, None] * jnp.ones(2, int)}), float))[0].T
    target, prior = law(4), np.asarray(PRIOR)
    reverse, forward = ((a * np.log(a / b)).sum(-1).mean() for a, b in ((q, target), (target, q)))
    distance = (target * np.log(target / prior)).sum(-1).mean()
    found = bayesrl.evidence(KEY, fitted)
    assert found.gap is not None
    assert found.kl_forward is not None
    assert found.relative_gap is not None
    assert found.best_of == 4
    np.testing.assert_allclose(found.gap.mean, 0.5 * reverse, atol=1e-6)
    np.testing.assert_allclose(found.kl_forward.mean, forward, atol=1e-6)
    np.testing.assert_allclose(found.relative_gap.mean, reverse / distance, atol=1e-5)
    np.testing.assert_allclose(found.reward.mean, (q * np.asarray(PAYOFF)).sum(-1).mean(), atol=1e-5)
    assert found.target is not None
    np.testing.assert_allclose(np.exp(found.target.log_weights).T, target, atol=1e-6)
    np.testing.assert_allclose(found.target.estimates.kl.mean, distance, atol=1e-6)
    drawn = bayesrl.evidence(KEY, fitted, max_count=0, num_samples=2**14)
    for told, truth in ((drawn.kl_reverse, reverse), (drawn.kl_forward, forward)):
        assert told is not None
        assert abs(told.mean - truth) <= 5 * told.se + 1e-4
    shown = bayesrl.diagnose(KEY, fitted)
    assert shown.verdict == "pass"
    assert "distils the best of n = 4" in shown.explanation
    page = bayesrl.write_report(KEY, tmp_path / "report.html", fitted, diagnoses={"fit": shown})
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert "its optimum is their law pₙ and not p*" in text
    assert "The best of 4 draws of the prior earns" in text
    assert "J* the best that any policy can reach" not in text
    assert "log Z" not in text
    assert "distils the best of 4" in str(fitted)
    for options in ({"method": "smc"}, {"optimum": lambda beta: 1.0}):
        with pytest.raises(EngineError, match=r"is of p.*distils the best of n = 4"):
            bayesrl.evidence(KEY, fitted, **options)


def test_engines_are_not_compared_on_it(fitted: bayesrl.Posterior) -> None:
    with pytest.raises(PolicyError, match=r"engines draw from p\*.*distils the best of n = 4"):
        bayesrl.compare_engines(KEY, fitted)


def test_a_law_has_no_frontier() -> None:
    sweep = bayesrl.fit(KEY, arms, beta=jnp.array([0.5, 1.0]), objective=BestOfN(2), num_steps=2, progress=False)
    with pytest.raises(PolicyError, match="the same at every β: no frontier"):
        bayesrl.frontier(KEY, sweep)
    assert bayesrl.diagnose(KEY, sweep).verdict == "fail"


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
