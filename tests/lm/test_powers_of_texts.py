"""The power of a language model: a tiny one is fitted to its exact optimum, and its own reward is reported."""

import jax
import jax.numpy as jnp
import numpy as np

import bayesrl
from bayesrl import lm


def test_a_model_becomes_its_power() -> None:
    """J within 4.5 standard errors (7e-6 false alarms) and 2% of the way that it has to go."""
    model = lm.GPT2.init(jax.random.key(0), lm.GPT2Config(vocab_size=3, max_length=4, width=8, depth=1, heads=2))
    ones = lm.rewards.token_reward(lambda tokens, mask: jnp.sum(tokens == 1))
    writer = lm.policy(model, jnp.array([[0], [2]]), reward=ones, max_new_tokens=2)
    log_p = bayesrl.best_of(jax.random.key(0), writer, n=1, num_samples=1).log_probs
    assert log_p is not None
    power = bayesrl.power(writer, 8.0)
    fit = bayesrl.fit(
        jax.random.key(1), power, beta=power.beta, guide=lm.FullParameters(), num_steps=200, progress=False
    )
    found = fit.estimate(jax.random.key(2), 2000)
    optimum = np.log(np.exp(8 * log_p).sum(0)).mean() / 7  # β·log Z with log Z = log Σ p⁸
    start = (np.exp(log_p) * log_p).sum(0).mean()
    assert start < optimum
    error = 4.5 * found.objective.se[0] + 0.02 * (optimum - start)
    assert abs(found.objective.mean[0] - optimum) < error
    assert "reward" in found.metrics
