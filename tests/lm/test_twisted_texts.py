"""Learned twists of texts against enumeration of all texts."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesrl
from bayesrl import lm
from bayesrl.errors import EngineError, GuideError, LanguageModelError
from bayesrl.lm import GPT2, GPT2Config
from bayesrl.objectives import ContrastiveTwist, SoftValueRegression

CONFIG = GPT2Config(vocab_size=6, max_length=8, width=16, depth=1, heads=2, initializer_range=0.3)
MODEL = GPT2.init(jax.random.key(0), CONFIG)
BETA = 0.5


def count(tokens: Any, mask: Any) -> Any:
    """Ones, but only of texts that do not end in one."""
    return jnp.sum((tokens == 1) & mask, -1) * (tokens[-1] != 1)


def writer(**options: Any) -> Any:
    """Answer two prompts by up to four tokens; token 4 ends a text, and 5 pads it."""
    prompts = lm.encode_prompts([[0], [2, 3]], None)
    policy = lm.policy(MODEL, prompts, reward=lm.rewards.token_reward(count), max_new_tokens=4, **options)
    return replace(policy, options={**policy.options, "eos": 4, "pad": 5})


def divergences(posterior: Any, exact: Any) -> tuple[np.ndarray, np.ndarray]:
    """KL(q‖p*) and KL(p*‖q) by enumeration, [prompts], nats."""
    log_p = np.asarray(exact.log_weights, float)
    log_p = log_p - np.logaddexp.reduce(log_p, 0)
    log_q = np.asarray(posterior.log_prob({"text": exact.sites["text"]})[0], float)
    np.testing.assert_allclose(np.exp(log_q).sum(0), 1.0, rtol=1e-5)
    # Truncation excludes the same texts from both.
    possible = log_p > -np.inf
    np.testing.assert_array_equal(possible, log_q > -np.inf)
    apart = np.where(possible, log_q, 0.0) - np.where(possible, log_p, 0.0)
    return (np.exp(log_q) * apart).sum(0), -(np.exp(log_p) * apart).sum(0)


@pytest.fixture(scope="module")
def exact() -> Any:
    return bayesrl.enumerate_posterior(writer(temperature=0.8, top_k=5), beta=BETA)


@pytest.fixture(scope="module")
def twist() -> Any:
    options = {"objective": ContrastiveTwist(128), "num_steps": 400, "progress": False}
    return bayesrl.fit_twist(jax.random.key(0), writer(temperature=0.8, top_k=5), beta=BETA, **options)


def test_the_proposal_reaches_the_posterior(exact: Any, twist: Any) -> None:
    """With a head alone both divergences are below .05 nats (measured .01); those of the prior are over 1."""
    reverse, forward = divergences(twist, exact)
    assert (reverse < 0.05).all()
    assert (forward < 0.05).all()
    assert (exact.estimates.kl.mean > 1).all()


def test_particles_under_the_twist(exact: Any, twist: Any) -> None:
    """log Z within 5 standard errors (1.6e-4 for each prompt); nearly every particle is worth one."""
    policy = writer(temperature=0.8, top_k=5)
    found = bayesrl.smc(jax.random.key(1), policy, beta=BETA, twist=twist, num_particles=64)
    plain = bayesrl.smc(jax.random.key(1), policy, beta=BETA, num_particles=64)
    assert (np.abs(found.log_evidence.mean - exact.log_evidence.mean) < 5 * found.log_evidence.se + 1e-5).all()
    assert (found.ess > 0.8 * 64 * 16).all()
    assert (found.ess > 3 * plain.ess).all()
    evidence = bayesrl.evidence(jax.random.key(2), twist, method="smc", twist=twist, num_samples=1024)
    assert float(evidence.log_evidence.conservative_lower) <= float(exact.log_evidence.mean.mean()) + 1e-3
    assert abs(float(evidence.log_evidence.mean) - float(exact.log_evidence.mean.mean())) < 0.1


def test_what_is_trained_below_the_head(exact: Any) -> None:
    """Low-rank paths: by regression the loss falls, and all numbers of the path move."""
    options = {"guide": lm.LoRA(rank=2), "objective": SoftValueRegression(32), "num_steps": 80, "progress": False}
    fitted = bayesrl.fit_twist(jax.random.key(0), writer(temperature=0.8, top_k=5), beta=BETA, **options)
    assert fitted.history["loss"][-1] < 0.6 * fitted.history["loss"][0]
    assert any(name.endswith(".up") and np.abs(value).max() > 0 for name, value in fitted.params.items())
    reverse, _ = divergences(fitted, exact)
    assert (reverse < 0.5 * exact.estimates.kl.mean).all()


def test_bad_input_is_named(twist: Any) -> None:
    key = jax.random.key(0)
    with pytest.raises(EngineError, match="proposes every token itself"):
        bayesrl.smc(key, writer(), beta=BETA, twist=twist, proposal=twist)
    with pytest.raises(GuideError, match="trains no language model"):
        bayesrl.fit_twist(key, writer(), beta=BETA, guide=bayesrl.guides.AutoTilt())
    other = GPT2.init(key, GPT2Config(vocab_size=7, max_length=8, width=16, depth=1, heads=2))
    foreign = lm.policy(other, [[0]], reward=lm.rewards.length(), max_new_tokens=4)
    with pytest.raises(EngineError, match="6 tokens, and this one has 7"):
        bayesrl.smc(key, foreign, beta=BETA, twist=twist)
    with pytest.raises(LanguageModelError, match="a twist has no checkpoint"):
        lm.finetuned(twist)
