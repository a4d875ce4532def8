"""A shared problem of language models: GPT-2 of 2 layers × 128, 98 tokens, completions of 16, vowels / 4 as reward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayesrl import lm
from bayesrl.lm import rewards
from bayesrl.lm.prompted_policy import PromptedPolicy
from bayesrl.lm.transformers.base import CausalLM

VOCABULARY, LENGTH, COMPLETIONS = 98, 16, 64
BEGIN = 97
"""The prompt: one token."""

BETA = 0.1
CONFIG = lm.GPT2Config(vocab_size=VOCABULARY, max_length=32, width=128, depth=2, heads=4)
VOWELS = np.array([index < 95 and chr(32 + index) in "aeiou" for index in range(VOCABULARY)])


def vowels(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Count the vowels, divided by four."""
    return (jnp.asarray(VOWELS)[tokens] & mask).sum() / 4


def policy_of(model: CausalLM) -> PromptedPolicy:
    """Make the policy: one prompt of one token."""
    prompt = np.full((1, 1), BEGIN, np.int32)
    return lm.policy(model, prompt, reward=rewards.token_reward(vowels), max_new_tokens=LENGTH)


def objective_of(key: jax.Array, posterior: Any, num_samples: int = 4096) -> tuple[float, float]:
    """Estimate J of a fit from fresh samples, with its standard error."""
    told = posterior.estimate(key, num_samples).objective
    return float(np.ravel(told.mean)[0]), float(np.ravel(told.se)[0])
