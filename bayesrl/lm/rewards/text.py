"""Rewards that read text: ordinary Python, run on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.errors import LanguageModelError
from bayesrl.lm.completions import Completions, Examples
from bayesrl.lm.rewards.base import Reward


@dataclass(frozen=True)
class TextReward(Reward):
    """A Python function of the text of one completion; see `on_text`."""

    fn: Callable[..., Any]

    def __call__(self, completions: Completions) -> Array:
        """Give the function's value for each completion, [...]."""
        examples = completions.examples

        def on_host(index: Any, tokens: Any, real: Any) -> np.ndarray:
            texts = decoded(examples, np.asarray(tokens), np.asarray(real))
            return np.asarray([self.fn(text) for text in texts], np.float32).reshape(np.shape(index))

        shape = jax.ShapeDtypeStruct(completions.index.shape, jnp.float32)
        given = (completions.index, completions.tokens, completions.real)
        result: Array = jax.pure_callback(on_host, shape, *given, vmap_method="broadcast_all")
        return result


def decoded(examples: Examples, tokens: np.ndarray, real: np.ndarray) -> list[str]:
    """Decode completions [..., T] of which only what is real counts, in order."""
    if examples.tokenizer is None:
        raise LanguageModelError(
            "a reward reads text, and the prompts were given as tokens; pass a tokenizer and texts"
        )
    rows = [
        row[kept]
        for row, kept in zip(tokens.reshape(-1, tokens.shape[-1]), real.reshape(-1, real.shape[-1]), strict=True)
    ]
    return examples.tokenizer.decode(rows)


def on_text(fn: Callable[..., Any]) -> TextReward:
    """Make a reward of a Python function of the text."""
    return TextReward(fn)


def as_reward(reward: Any) -> Reward:
    """Take a reward as it is, and a function as one of the text."""
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        return on_text(reward)
    raise LanguageModelError(f"reward={reward!r} is no reward; pass a function of the text, or rewards.on_tokens(fn)")
