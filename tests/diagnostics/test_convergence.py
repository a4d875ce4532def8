"""How far a run still had to go, and what is advised to fits that were made wrong in each way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import bayesrl
from bayesrl.diagnostics.checks import convergence_check
from bayesrl.diagnostics.convergence import TrainingTrend, estimate_trend, suggest_remedy

KEY = jax.random.key(0)
STEPS = np.arange(20, 2001, 20)
COSINE = {"optimizer": "default", "num_steps": 2000}
CONSTANT = {"optimizer": "given", "num_steps": 2000}


def way(settings: dict[str, Any]) -> np.ndarray:
    """How much learning rate has been spent, as a share of all of it."""
    share = STEPS / 2000
    return share + np.sin(np.pi * share) / np.pi if settings is COSINE else share


@pytest.mark.parametrize("settings", [COSINE, CONSTANT], ids=["cosine", "constant"])
@pytest.mark.parametrize("pace", [1.0, 1.5, 2.5, 4.0])
def test_an_exponential_approach_is_extrapolated_to_what_is_left(settings: dict[str, Any], pace: float) -> None:
    """J = 1 − exp(−pace · way): between exp(−pace), left at the end, and three times that, left a quarter before."""
    rises = 1 - np.exp(-pace * way(settings))
    left = estimate_trend(rises[:, None], STEPS, settings).left
    assert 0.5 * np.exp(-pace) < left < 3 * np.exp(-pace)


def test_a_plateau_of_the_rate_is_no_convergence() -> None:
    """J that rises with the rate spent levels off in steps, and not on its way."""
    rises = 0.3 * way(COSINE)
    assert abs(rises[-1] - rises[-10]) < 0.01
    found = convergence_check(estimate_trend(rises[:, None], STEPS, COSINE), 1.0)
    assert found.outcome == "warn"
    assert found.value > found.threshold
    assert "num_steps=" in found.explanation


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_rise(seed: int) -> None:
    """Beyond three standard errors of two means: once in 700 for each seed, were there no other chance."""
    noise = 0.1 * np.random.default_rng(seed).normal(size=(100, 1))
    found = convergence_check(estimate_trend(noise, STEPS, COSINE), 1.0)
    assert (found.outcome, found.value) == ("pass", 0.0)


def test_falls_short_runs_and_runs_without_numbers() -> None:
    fell = convergence_check(estimate_trend(-way(COSINE)[:, None], STEPS, COSINE), 1.0)
    assert fell.outcome == "warn"
    assert "lower the learning rate" in fell.explanation
    assert convergence_check(estimate_trend(np.ones((4, 1)), STEPS[:4], CONSTANT), 1.0).outcome == "unknown"
    assert convergence_check(None, 1.0).outcome == "fail"
    cooled = CONSTANT | {"start_beta": 1.0}
    rises = np.where(STEPS <= 1000, STEPS / 1000, 1.0)[:, None]
    assert convergence_check(estimate_trend(rises, STEPS, cooled), 1.0).outcome == "pass", "J rose while β fell"


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(10)))
    bayesrl.reward("payoff", jnp.linspace(0, 1, 10)[arm])


def table() -> None:
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("table", jnp.zeros(10))))


def one_number() -> None:
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("one", jnp.zeros(())) * (jnp.arange(10) % 2)))


def some_arms() -> None:
    """Never draws the two best arms."""
    barred = jnp.where(jnp.arange(10) < 8, 0.0, -1e9)
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("table", jnp.zeros(10)) + barred))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 40, "learning_rate": 0.01}, "fit longer"),
        ({"num_steps": 400, "learning_rate": 0.001}, "raise the rate"),
        ({"num_steps": 400, "optimizer": optax.sgd(0.002)}, "fit longer"),
        ({"num_steps": 400, "learning_rate": 100.0}, "lower"),
        ({"num_steps": 400, "guide": one_number}, "a richer guide"),
        ({"num_steps": 400, "guide": some_arms}, "a guide that reaches all of the policy's support"),
    ],
    ids=["few steps", "low rate", "another optimiser", "high rate", "poor guide", "a part of the support"],
)
def test_advice_names_what_would_help(options: dict[str, Any], words: str) -> None:
    posterior = bayesrl.fit(KEY, bandit, beta=0.1, progress=False, **({"guide": table} | options))
    found = bayesrl.diagnose(KEY, posterior)
    assert found.verdict == "fail"
    assert words in found["gap"].explanation
    for check in found.checks:
        side = check.value >= check.threshold if check.least else check.value <= check.threshold
        if np.isfinite(check.value):
            assert side == (check.outcome == "pass"), check


@pytest.mark.parametrize(
    ("trend", "options", "words"),
    [
        (TrainingTrend(0.0, 0.0, 0.0, 0.01), {}, "raise the rate"),
        (TrainingTrend(0.0, 0.0, 0.6, 0.5), {}, "lower the rate"),
        (TrainingTrend(0.1, 0.0, 0.0, 0.5), {}, "fit longer"),
        (TrainingTrend(0.0, 0.0, 0.0, 0.5), {"collapsed": True}, "collapsed to single actions"),
        (TrainingTrend(0.0, 0.0, 0.0, 0.5), {"coverage": "a mode is dropped."}, "a mode is dropped"),
        (TrainingTrend(0.0, 0.0, 0.0, 0.5), {}, "had levelled off, so choose a richer guide"),
        (TrainingTrend(np.nan, np.nan, 0.0), {}, "fit longer"),
        (None, {}, "fit longer"),
    ],
)
def test_a_remedy_is_of_what_the_run_did(trend: TrainingTrend | None, options: dict[str, Any], words: str) -> None:
    assert words in suggest_remedy(trend, 1.0, restarts=1, **options)


def test_the_rate_of_a_guide_written_by_hand_suits_its_units() -> None:
    """Parameters that count a thirtieth or thirty times; the least of the rates alone leaves 80% of the first."""
    optimum = float(bayesrl.enumerate_posterior(bandit, beta=0.1).optimum)
    for unit in (1 / 30, 1.0, 30.0):

        def guide(unit: float = unit) -> None:
            numpyro.sample("arm", dist.Categorical(logits=unit * numpyro.param("table", jnp.zeros(10))))

        posterior = bayesrl.fit(KEY, bandit, beta=0.1, guide=guide, progress=False)
        reached = float(posterior.estimate(KEY, 2000).objective.mean[0])
        assert optimum - reached < 0.01 * (optimum - 0.5), f"in units of {unit:.3g}"
