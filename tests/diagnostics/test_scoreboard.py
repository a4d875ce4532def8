"""Scores of a fit: against truths written out by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array

import bayesrl
from bayesrl.diagnostics.scoreboard import over_all_data, score
from bayesrl.diagnostics.scores import Scoreboard, from_json, to_json
from bayesrl.errors import PolicyError
from bayesrl.posterior.posterior import Posterior


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
    board = score(jax.random.key(1), posterior)
    assert board.contexts == 8
    assert board.note == ""
    for row, beta in zip(board.rows, (0.5, 1.0), strict=True):
        optimum = beta * np.log((np.exp(1 / beta) + 3) / 4)
        assert row.optimum == pytest.approx(optimum, rel=1e-5)
        assert row.log_evidence == pytest.approx(optimum / beta, rel=1e-5)
        assert row.start is not None
        assert row.start.mean == pytest.approx(0.25, rel=1e-5)
        assert row.gap is not None
        assert row.share == pytest.approx(float(row.gap.mean) / (optimum - 0.25), rel=1e-4)
        assert row.estimates.objective.se == 0
        # The metric is drawn, and the reward is its exact mean: 5 standard errors, one false alarm in 10⁶.
        accuracy = row.estimates.metrics["accuracy"]
        assert abs(accuracy.mean - row.estimates.reward.mean) < 5 * accuracy.se + 1e-6
    held_out = score(jax.random.key(1), posterior, jnp.array([3, 3, 1, 0, 2, 2, 2, 2]))
    assert held_out.contexts == 8
    assert held_out.rows[0].optimum == board.rows[0].optimum
    assert float(held_out.rows[0].gap.mean) > float(board.rows[0].gap.mean)
    again = from_json(json.loads(json.dumps(to_json(board))))
    assert again == Scoreboard(board.rows, board.contexts, None, board.note)


def test_nature_has_an_optimum_but_no_evidence() -> None:
    def umbrella() -> None:
        rain = bayesrl.environment("rain", dist.Bernoulli(0.3), observable=True)
        take = numpyro.sample("take", dist.Bernoulli(0.5))
        bayesrl.reward("dry", 1.0 * (take == rain))

    row = score(jax.random.key(1), fit(umbrella, beta=0.5)).rows[0]
    assert row.optimum == pytest.approx(0.5 * np.log((np.exp(2.0) + 1) / 2), rel=1e-5)
    assert row.log_evidence is None
    assert row.share is not None
    assert abs(row.share) < 0.01


def test_what_cannot_be_enumerated_says_why() -> None:
    def program() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        bayesrl.reward("near", -0.5 * (x - 1.0) ** 2)

    posterior = fit(program)
    board = score(jax.random.key(1), posterior)
    assert board.rows[0].optimum is None
    assert board.rows[0].gap is None
    assert board.rows[0].share is None
    assert "continuous support" in board.note
    optimum = -0.25 - 0.5 * np.log(2)  # β = 1: E over Normal(0, 1) of exp(−(x − 1)²/2) = exp(−1/4)/√2
    known = score(jax.random.key(1), posterior, exact=lambda beta: beta * optimum)
    assert known.note == ""
    assert known.rows[0].gap is not None
    assert abs(float(known.rows[0].gap.mean)) < 1e-4


def test_observed_data_without_rewards() -> None:
    def program(y: Array) -> None:
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=y)

    y = jnp.asarray(0.8)
    row = score(jax.random.key(1), fit(program, y, beta=None)).rows[0]
    truth = np.log(0.5 * np.exp(-0.32) + 0.5 * np.exp(-0.02)) - 0.5 * np.log(2 * np.pi)
    assert row.beta is None
    assert row.optimum == pytest.approx(truth, rel=1e-5)
    assert row.gap is not None
    assert abs(float(row.gap.mean)) < 1e-4


def test_a_loaded_posterior_is_refused() -> None:
    posterior = fit(digits, jnp.arange(4), steps=2)
    assert over_all_data(posterior).programs is not None
    from dataclasses import replace

    with pytest.raises(PolicyError, match="without its policy"):
        score(jax.random.key(1), replace(posterior, programs=None))
