"""The evidence of a fit without a search for its optimum: against truths written out by hand."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array

import bayesrl
from bayesrl.diagnostics.diagnosed_fit import full_data_fit
from bayesrl.diagnostics.evidence import bounds
from bayesrl.diagnostics.evidence.bounds import evaluate_fit
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.errors import PolicyError
from bayesrl.exact.enumeration import enumerate_target
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Interval
from tests import handmade


def fit(policy: object, *args: object, beta: object = 1.0, steps: int = 300, restarts: int = 1) -> Posterior:
    return bayesrl.fit(
        jax.random.key(0), policy, *args, beta=beta, num_steps=steps, num_restarts=restarts, progress=False
    )


def digits(labels: Array) -> None:
    with numpyro.plate("image", len(labels), subsample_size=min(3, len(labels))) as i:
        guess = numpyro.sample("guess", dist.Categorical(logits=jnp.zeros((1, 4))))
        right = 1.0 * (guess == labels[i])
        bayesrl.reward("right", right)
        numpyro.deterministic("accuracy", right)


def test_contexts_held_out_and_round_trip() -> None:
    posterior = fit(digits, jnp.arange(8) % 4, beta=jnp.array([0.5, 1.0]), restarts=2)
    found = evaluate_fit(jax.random.key(1), posterior)
    assert (found.num_contexts, found.caveat) == (8, "")
    for row, beta in zip(found.rows, (0.5, 1.0), strict=True):
        optimum = beta * np.log((np.exp(1 / beta) + 3) / 4)
        assert float(row.optimum.mean) == pytest.approx(optimum, rel=1e-5)
        assert row.log_evidence is not None
        assert float(row.log_evidence.mean) == pytest.approx(optimum / beta, rel=1e-5)
        assert row.prior_objective is not None
        assert float(row.prior_objective.mean) == pytest.approx(0.25, rel=1e-5)
        assert row.gap is not None
        assert row.relative_gap is not None
        assert float(row.relative_gap.mean) == pytest.approx(float(row.gap.mean) / (optimum - 0.25), rel=1e-4)
        assert row.objective.se == 0
        # The metric is drawn, and the reward is its exact mean: 5 standard errors, one false alarm in 10⁶.
        accuracy = row.metrics["accuracy"]
        assert abs(accuracy.mean - row.reward.mean) < 5 * accuracy.se + 1e-6
    held_out = evaluate_fit(jax.random.key(1), posterior, jnp.array([3, 3, 1, 0, 2, 2, 2, 2]))
    assert held_out.num_contexts == 8
    assert held_out.optimum.mean[0] == found.optimum.mean[0]
    assert held_out.gap is not None
    assert found.gap is not None
    assert held_out.gap.mean[0] > found.gap.mean[0]
    again = Evidence.from_json(json.loads(json.dumps(found.to_json())))
    assert str(again) == str(found)
    assert again.to_json() == found.to_json()


def test_p_is_enumerated_once_for_all_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fit(digits, jnp.arange(8) % 4, beta=jnp.array([0.5, 1.0]))
    calls = []

    def count(*args: Any) -> Any:
        calls.append(args)
        return enumerate_target(*args)

    monkeypatch.setattr(bounds, "enumerate_target", count)
    found = bayesrl.evidence(jax.random.key(1), posterior)
    assert len(calls) == 1
    assert found.target is not None
    assert found.target.optimum is not None
    np.testing.assert_allclose(found.target.optimum.mean(1), found.optimum.mean)


def test_nature_has_an_optimum_but_no_evidence() -> None:
    def umbrella() -> None:
        rain = bayesrl.environment("rain", dist.Bernoulli(0.3), observable=True)
        take = numpyro.sample("take", dist.Bernoulli(0.5))
        bayesrl.reward("dry", 1.0 * (take == rain))

    found = evaluate_fit(jax.random.key(1), fit(umbrella, beta=0.5))
    assert float(found.optimum.mean) == pytest.approx(0.5 * np.log((np.exp(2.0) + 1) / 2), rel=1e-5)
    assert found.log_evidence is None
    assert found.relative_gap is not None
    assert abs(float(found.relative_gap.mean)) < 0.01


def test_what_cannot_be_enumerated_says_why() -> None:
    def program() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        bayesrl.reward("near", -0.5 * (x - 1.0) ** 2)

    posterior = fit(program)
    found = evaluate_fit(jax.random.key(1), posterior)
    assert found.method == "draws"
    assert np.isnan(found.optimum.mean)
    assert found.gap is None
    assert found.relative_gap is None
    assert "continuous support" in found.caveat
    assert "continuous support" in found.explanation
    optimum = -0.25 - 0.5 * np.log(2)  # β = 1: E over Normal(0, 1) of exp(−(x − 1)²/2) = exp(−1/4)/√2
    known = bayesrl.evidence(jax.random.key(1), posterior, optimum=lambda beta: beta * optimum)
    assert known.caveat == ""
    assert known.gap is not None
    assert abs(float(known.gap.mean)) < 1e-4


def test_observed_data_without_rewards() -> None:
    def program(y: Array) -> None:
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=y)

    y = jnp.asarray(0.8)
    found = evaluate_fit(jax.random.key(1), fit(program, y, beta=None))
    truth = np.log(0.5 * np.exp(-0.32) + 0.5 * np.exp(-0.02)) - 0.5 * np.log(2 * np.pi)
    assert found.beta is None
    assert float(found.optimum.mean) == pytest.approx(truth, rel=1e-5)
    assert found.gap is not None
    assert abs(float(found.gap.mean)) < 1e-4


def test_a_loaded_posterior_is_refused() -> None:
    posterior = fit(digits, jnp.arange(4), steps=2)
    assert full_data_fit(posterior).programs is not None
    with pytest.raises(PolicyError, match="without its policy"):
        evaluate_fit(jax.random.key(1), replace(posterior, programs=None))


@pytest.mark.parametrize(
    "change",
    [
        {"method": "guess"},
        {"objective": {"mean": 1.0}},
        {"optimum": None},
        {"gap": {part: [1.0, 2.0] for part in Interval._fields}},
        {"khat": "much"},
        {"metrics": [1.0]},
    ],
)
def test_an_evidence_is_not_read_from_something_else(change: dict[str, Any]) -> None:
    whole = handmade.evidence().to_json()
    Evidence.from_json(whole)
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Evidence.from_json(whole | change)
