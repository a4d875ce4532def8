"""Particles of texts against enumeration of all texts, in standard errors."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesrl
from bayesrl import lm
from bayesrl.errors import EngineError
from bayesrl.lm import GPT2, GPT2Config

CONFIG = GPT2Config(vocab_size=6, max_length=8, width=16, depth=2, heads=2)
MODEL = GPT2.init(jax.random.key(0), CONFIG)
ONES = lm.rewards.token_reward(lambda tokens, mask: jnp.sum((tokens == 1) & mask, -1))
TWOS = lm.rewards.token_reward(lambda tokens, mask: 0.5 * jnp.sum((tokens == 2) & mask, -1))


def writer(**options: Any) -> Any:
    """Answer three prompts of two lengths by up to four tokens; token 4 ends a text, and 5 pads it."""
    prompts = lm.encode_prompts([[0], [2, 3], [3]], None)
    policy = lm.policy(MODEL, prompts, reward=ONES, metrics={"twos": TWOS}, max_new_tokens=4, **options)
    return replace(policy, options={**policy.options, "eos": 4, "pad": 5})


@pytest.fixture(scope="module")
def truth() -> Any:
    return bayesrl.enumerate_posterior(writer(), beta=0.3)


def agrees(found: Any, truth: Any) -> bool:
    """3 evidences, E[R], KL and a metric within 5 standard errors (Student's t of 15 degrees: 1e-3 false alarms)."""
    pairs = [(found.log_evidence, truth.log_evidence)]
    pairs += [(getattr(found.estimates, name), getattr(truth.estimates, name)) for name in ("reward", "kl")]
    pairs += [(found.estimates.metrics["twos"], truth.estimates.metrics["twos"])]
    return all((np.abs(ours.mean - exact.mean) < 5 * ours.se).all() for ours, exact in pairs)


def test_the_reward_of_a_prefix_is_a_twist(truth: Any) -> None:
    """With it particles are worth several times as many; ended texts wait and count once."""
    found = bayesrl.smc(jax.random.key(0), writer(), beta=0.3, twist="reward", num_particles=128)
    plain = bayesrl.smc(jax.random.key(1), writer(), beta=0.3, num_particles=128)
    assert agrees(found, truth)
    assert agrees(plain, truth)
    assert found.ess.min() > 3 * plain.ess.min()
    tokens = np.asarray(found.sites["text"])
    ended = np.cumsum(tokens == 4, -1) - (tokens == 4) > 0
    assert ((tokens == 5) == ended)[..., 1:].mean() > 0.5  # pads may also be written as tokens
    assert (tokens[ended] == 5).all()


def test_other_twists_and_truncation(truth: Any) -> None:
    """A reward that is not the policy's, as a twist; and a truncated policy against its own enumeration."""
    found = bayesrl.smc(jax.random.key(2), writer(), beta=0.3, twist=0.8 * ONES, num_particles=128)
    assert agrees(found, truth)
    short = writer(top_k=3)
    exact = bayesrl.enumerate_posterior(short, beta=0.3)
    assert agrees(bayesrl.smc(jax.random.key(3), short, beta=0.3, twist="reward", num_particles=128), exact)


def test_a_fit_writes(truth: Any) -> None:
    """Its texts are weighed by π₀/q; the fit is far from p* after 60 steps, and log Z is right all the same."""
    guide = lm.FullParameters()
    posterior = bayesrl.fit(jax.random.key(0), writer(), beta=0.3, num_steps=60, guide=guide, progress=False)
    found = bayesrl.smc(jax.random.key(4), writer(), beta=0.3, twist="reward", proposal=posterior, num_particles=128)
    assert agrees(found, truth)


def test_bad_twists_are_named() -> None:
    with pytest.raises(EngineError, match="programs with a scan"):
        bayesrl.smc(jax.random.key(0), writer(), beta=0.3, twist="exact")
    bad = lm.rewards.token_reward(lambda tokens, mask: jnp.where(mask.sum(-1) == 2, jnp.nan, 0.0))
    with pytest.raises(EngineError, match="twist is nan after step 1 in context 'prompt'"):
        bayesrl.smc(jax.random.key(0), writer(), beta=0.3, twist=bad, num_particles=16, num_replications=2)
