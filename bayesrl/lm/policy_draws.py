"""Draws of a fitted language model: its completions with their rewards."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.compilation.callbacks import host_errors
from bayesrl.compilation.jit import ClosureJit
from bayesrl.compilation.random_keys import key_data
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.lm.generation import ScoredTexts, generate, max_rows, pad_prompts
from bayesrl.lm.prompted_policy import PLATE, TEXT, PromptedPolicy
from bayesrl.lm.prompts import Completions, Prompts
from bayesrl.lm.rewards.base import Reward, WeightedSum, evaluate
from bayesrl.lm.rewards.text import TextReward
from bayesrl.lm.text_distribution import text_mask
from bayesrl.objectives import ReverseKL
from bayesrl.typing import Params, PRNGKey

_REWARD_BATCH = 512
"""How many completions get their rewards at once."""

_ANY_WIDTH = 2**30
"""A bound on prompt widths that every prompt meets."""


def reward_values(
    rewards: Mapping[str, Reward], prompts: Prompts, index: np.ndarray, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute the rewards of completions by name, [*rows]: text rewards on the host, all others by one program.

    `index` is the prompt that each row answers, [*rows]; `mask` says which of the tokens count, both [*rows, T].
    """
    parts: list[Reward] = []
    for reward in rewards.values():
        for _, part in _weighted_parts(reward):
            # A part that several sums or metrics share is computed once.
            if part not in parts:
                parts.append(part)
    shape, steps = index.shape, tokens.shape[-1]
    rows = index.reshape(-1), tokens.reshape(-1, steps), mask.reshape(-1, steps)
    other = [part for part in parts if not isinstance(part, TextReward)]
    computed = iter(_compiled_values(tuple(other), prompts, *rows) if other else [])
    values = [
        part.on_host(prompts.examples, *rows) if isinstance(part, TextReward) else next(computed) for part in parts
    ]

    def total(reward: Reward) -> np.ndarray:
        terms = [np.float32(weight) * values[parts.index(part)] for weight, part in _weighted_parts(reward)]
        return np.sum(terms, axis=0, dtype=np.float32).reshape(shape)

    return {name: total(reward) for name, reward in rewards.items()}


class RewardedTexts(NamedTuple):
    """Scored completions: which tokens count, [*rows, T], rewards and metrics by name, and their sum, [*rows]."""

    mask: np.ndarray
    rewards: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    total: np.ndarray


def reward_texts(policy: PromptedPolicy, prompts: Prompts, index: np.ndarray, tokens: np.ndarray) -> RewardedTexts:
    """Compute the rewards and metrics of a policy for completions; see `reward_values`."""
    mask = np.asarray(text_mask(tokens, policy.options["eos"]))
    values = reward_values({**policy.rewards, **policy.metrics}, prompts, index, tokens, mask)
    rewards = {name: values[name] for name in policy.rewards}
    total = np.sum(list(rewards.values()), axis=0, dtype=np.float32)
    return RewardedTexts(mask, rewards, {name: values[name] for name in policy.metrics}, total)


def _all_rewards(programs: Programs) -> list[Reward]:
    policy = _writer(programs).policy
    return [*policy.rewards.values(), *policy.metrics.values()]


def _weighted_parts(reward: Reward) -> tuple[tuple[float, Reward], ...]:
    return reward.parts if isinstance(reward, WeightedSum) else ((1.0, reward),)


def _compiled_values(
    rewards: tuple[Reward, ...], prompts: Prompts, index: np.ndarray, tokens: np.ndarray, mask: np.ndarray
) -> list[np.ndarray]:
    parts, run = [], None
    prompt, prompt_mask = pad_prompts(prompts, _ANY_WIDTH)
    with host_errors():
        for first in range(0, max(len(index), 1), _REWARD_BATCH):
            # The last batch repeats its last row, so that all batches share one program.
            rows = np.minimum(np.arange(first, first + _REWARD_BATCH), max(len(index) - 1, 0))
            own = index[rows], prompt[index[rows]], prompt_mask[index[rows]], tokens[rows], mask[rows]
            run = run or _reward_program.prepare((rewards, prompts.examples), *own)
            parts.append(jax.device_get(run(*own)))
    return [np.concatenate(values)[: len(index)] for values in zip(*parts, strict=True)]


@partial(ClosureJit, name="rewards")
def _reward_program(
    static: Any, index: Array, prompt: Array, prompt_mask: Array, tokens: Array, mask: Array
) -> list[Array]:
    rewards, examples = static
    completions = Completions(index, prompt, prompt_mask, tokens, mask, examples)
    return [evaluate(reward, completions).astype(jnp.float32) for reward in rewards]


@dataclass(frozen=True)
class _Reference:
    """The reference in the place of a guide, where there is none."""

    policy: PromptedPolicy

    @property
    def origin(self) -> "_Reference":
        """Itself."""
        return self

    def declare(self) -> Any:
        """Return the reference, which has no parameters here."""
        return self.policy.model


def _writer(programs: Programs) -> Any:
    policy: Any = programs.policy
    return _Reference(policy) if programs.guide is None else programs.guide


class TextDraws:
    """Makes the draws of a `ModelGuide` or of the reference, except those for gradients; see `GuideSampler`."""

    def supports(self, programs: Programs) -> bool:
        """Whether policy and guide are those of this model, without changes."""
        return isinstance(programs.policy, PromptedPolicy)

    def contexts_are_independent(self, programs: Programs) -> bool:
        """Whether no completion's reward can depend on another completion."""
        return all(reward.separate for reward in _all_rewards(programs))

    def source(self, programs: Programs, objective: Any) -> "HostRewardDraws | None":
        """Return a source of a step's draws if rewards are Python functions."""
        parts = [part for reward in _all_rewards(programs) for _, part in _weighted_parts(reward)]
        if not self.supports(programs) or not any(isinstance(part, TextReward) for part in parts):
            return None
        if not isinstance(objective, ReverseKL) or objective.plan is None or objective.plan.enumerated:
            return None
        return HostRewardDraws(objective.plan.num_particles)

    def draw(self, key: PRNGKey, programs: Programs, params: Params, num: int, *, by_fit: bool) -> tuple[Draws, Totals]:
        """Draw [num, ...]; every draw has its own mini-batch."""
        guide = _writer(programs)
        prompts = guide.policy.resolve_prompts(*programs.args)
        size = programs.structure.context_shape[0]
        index = _draw_batches(key, num, len(prompts), size)
        texts = generate(key, guide, params, prompts, index, by_fit=by_fit)
        draws, totals = _scored(guide.policy, prompts, index, texts)
        return (draws._replace(plates={PLATE: index}) if size < len(prompts) else draws), totals

    def score(self, programs: Programs, params: Params, sites: Mapping[str, Any]) -> Totals:
        """Score given completions, [num, n, T]."""
        guide = _writer(programs)
        prompts, given = guide.policy.resolve_prompts(*programs.args), np.asarray(sites[TEXT])
        index = np.broadcast_to(np.arange(given.shape[1]), given.shape[:2])
        # Given texts draw nothing, so any key will do.
        texts = generate(jax.random.key(0), guide, params, prompts, index, given=given)
        return _scored(guide.policy, prompts, index, texts)[1]


PromptedPolicy.sampler = TextDraws()


@dataclass(frozen=True)
class HostRewardDraws:
    """Draws the completions of a step: one program writes them, Python rewards them, and another program updates.

    No program calls Python, so that the compilation cache can store all of them for the next process.
    """

    num_particles: int  # completions per prompt
    one_batch = True

    def __call__(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Return draws of one mini-batch, [num_particles, ...]."""
        guide: Any = programs.guide
        policy, num = guide.policy, self.num_particles
        prompts = policy.resolve_prompts(*programs.args)
        size = programs.structure.context_shape[0]
        # All particles answer one mini-batch, which the update then reads only once.
        index = np.broadcast_to(_draw_batches(key, 1, len(prompts), size), (num, size))
        # A batch of exactly this shape has no empty slots, which is worth up to twice the usual rows.
        together = (size, num) if num * size <= 2 * max_rows(policy, prompts) else None
        texts = generate(key, guide, params, prompts, index, together=together)
        rewarded = reward_texts(policy, prompts, index, texts.tokens)
        log_q = {TEXT: texts.log_q}
        return Draws(
            sites={TEXT: texts.tokens},
            plates={PLATE: index.copy()} if size < len(prompts) else {},
            log_prior={TEXT: texts.log_prior},
            log_q=log_q,
            log_nature={},
            log_likelihood={},
            rewards={name: value[..., None] for name, value in rewarded.rewards.items()},
            metrics=rewarded.metrics,
            scores=log_q,
            guide_metrics={},
            # The guide wrote the texts itself, so q is the behavior too.
            log_behaviour=log_q,
        )


def _draw_batches(key: PRNGKey, num: int, count: int, size: int) -> np.ndarray:
    """Choose the prompts of each draw, [num, size]; the choice does not depend on the number of draws."""
    if size == count:
        return np.broadcast_to(np.arange(count, dtype=np.int32), (num, count))
    # NumPy chooses, because JAX would compile a program for each number of draws.
    seed = np.asarray(key_data(key)).astype(np.uint32).reshape(-1).tolist()
    chosen = [np.random.default_rng([*seed, draw]).choice(count, size, replace=False) for draw in range(num)]
    return np.asarray(chosen, np.int32).reshape(num, size)


def _scored(policy: PromptedPolicy, prompts: Prompts, index: np.ndarray, texts: ScoredTexts) -> tuple[Draws, Totals]:
    log_q, log_prior = (np.asarray(x.sum(-1), np.float32) for x in (texts.log_q, texts.log_prior))
    return with_rewards(policy, prompts, index, texts.tokens, log_q, log_prior)


def with_rewards(
    policy: PromptedPolicy,
    prompts: Prompts,
    index: np.ndarray,
    tokens: np.ndarray,
    log_q: np.ndarray,
    log_prior: np.ndarray,
) -> tuple[Draws, Totals]:
    """Reward completions [num, n, T] with known log-probabilities under their writer and the reference, [num, n]."""
    rewarded = reward_texts(policy, prompts, index, tokens)
    draws = Draws.from_sites({TEXT: tokens})._replace(metrics=rewarded.metrics, rewards=rewarded.rewards)
    return draws, Totals(log_prior, log_q, np.zeros_like(log_q), rewarded.total)
