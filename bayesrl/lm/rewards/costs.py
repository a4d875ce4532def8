"""What rewards cost beside the writing of a text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.jaxprs.dataflow import count_dependent_numbers
from bayesrl.lm.prompts import Completions, Prompts
from bayesrl.lm.rewards.base import Reward, WeightedSum, evaluate
from bayesrl.lm.rewards.text import TextReward


def runs_elsewhere(reward: Reward) -> bool:
    """Whether a reward, or a part of it, is so costly that other processes compute it."""
    parts = reward.parts if isinstance(reward, WeightedSum) else ((1.0, reward),)
    return any(isinstance(p, TextReward) and (p.num_workers > 0 or p.time_limit is not None) for _, p in parts)


def costs_little(policy: Any, prompts: Prompts, rewards: tuple[Reward, ...]) -> bool:
    """Whether to compute rewards for every next token costs no more than to write one."""
    if not rewards or not all(reward.separate for reward in rewards):
        return False

    def value(given: dict[str, Array]) -> Array:
        tokens = given["tokens"][None]
        texts = Completions(
            jnp.zeros(1, jnp.int32), prompts.tokens[:1], prompts.mask[:1], tokens, tokens >= 0, prompts.examples
        )
        return sum((evaluate(reward, texts) for reward in rewards), jnp.zeros(1))

    once = count_dependent_numbers(value, {"tokens": jnp.zeros(policy.options["num_steps"], jnp.int32)})
    weights = sum(np.size(leaf) for leaf in jax.tree.leaves(policy.model))
    # A token takes about one product per weight of the model.
    return once is not None and once * policy.model.config.vocab_size <= weights
