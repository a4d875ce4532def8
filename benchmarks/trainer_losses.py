"""The losses of trainers of language models, each in a line or two, as functions of a group of draws of one prompt.

With ρ = log q − log π₀ of a token, Schulman's approximations of KL(q‖π₀) are k1 = ρ, k2 = ρ²/2 and k3 = e^−ρ − 1 + ρ.
All three have a mean near the KL; their gradients are another matter, and `gradient_bias` measures them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

CLIP = 0.2
"""ε of the clipped ratios."""
LEAST_SD = 1e-4
"""Added to a standard deviation before it divides."""

type Loss = Callable[["Group"], Array]
"""From a group of draws to a scalar, in reward units, whose gradient a trainer descends."""


class Group(NamedTuple):
    """Draws of one prompt: log-probabilities of the tokens, [draws, tokens], and a reward for each draw.

    Attributes:
        log_q: of the policy in training; the only part that carries gradients.
        log_old: of the policy that drew.
        log_prior: of the reference.
        acted: whether the position has a token.
        reward: R, [draws].
        beta: β.
    """

    log_q: Array
    log_old: Array
    log_prior: Array
    acted: Array
    reward: Array
    beta: Any


# ---- approximations of the KL, by token ----------------------------------------------------------


def k1(ratio: Array) -> Array:
    return ratio


def k2(ratio: Array) -> Array:
    return 0.5 * ratio**2


def k3(ratio: Array) -> Array:
    return jnp.expm1(-ratio) + ratio


# ---- advantages of the draws of a group ------------------------------------------------------------


def as_it_is(reward: Array) -> Array:
    return reward


def leave_one_out(reward: Array) -> Array:
    return (reward - reward.mean()) * len(reward) / (len(reward) - 1)


def minus_mean(reward: Array) -> Array:
    return reward - reward.mean()


def mean_and_sd(reward: Array) -> Array:
    """Divide by the standard deviation too; the root of 0 has no gradient, but rewards carry none."""
    return (reward - reward.mean()) / (reward.std(ddof=1) + LEAST_SD)


# ---- means over tokens and draws ---------------------------------------------------------------------


def sum_of_tokens(terms: Array, acted: Array) -> Array:
    return jnp.where(acted, terms, 0.0).sum(-1).mean()


def mean_of_each_text(terms: Array, acted: Array) -> Array:
    return (jnp.where(acted, terms, 0.0).sum(-1) / acted.sum(-1)).mean()


def mean_of_all_tokens(terms: Array, acted: Array) -> Array:
    return jnp.where(acted, terms, 0.0).sum() / acted.sum()


# ---- losses ----------------------------------------------------------------------------------------


def policy_loss(
    group: Group,
    *,
    reward_kl: Callable[[Array], Array] | None = k1,
    loss_kl: Callable[[Array], Array] | None = None,
    times_ratio: bool = False,
    advantage: Callable[[Array], Array] = leave_one_out,
    average: Callable[[Array, Array], Array] = sum_of_tokens,
    ratio: str = "token",
    clip: float = jnp.inf,
) -> Array:
    """Compute the loss of PPO, RLOO or GRPO, by its settings.

    Args:
        group: the draws.
        reward_kl: what is taken from the reward, β times its sum over tokens, with log q of when the draws were made.
        loss_kl: what is added to the loss, β times, with gradients through it.
        times_ratio: whether `loss_kl` is multiplied by q/q_old, with gradients through that as well.
        advantage: how rewards become advantages.
        average: over tokens and draws.
        ratio: of a `token`, or of the whole `text`.
        clip: ε.
    """
    reward = group.reward
    if reward_kl is not None:
        told = jnp.where(group.acted, reward_kl(group.log_old - group.log_prior), 0.0)
        reward = reward - group.beta * told.sum(-1)
    advantages = lax.stop_gradient(advantage(reward))[:, None]
    moved = group.log_q - group.log_old
    if ratio == "text":
        moved = jnp.where(group.acted, moved, 0.0).sum(-1, keepdims=True)
    weight = jnp.exp(moved)
    gain = jnp.minimum(weight * advantages, jnp.clip(weight, 1 - clip, 1 + clip) * advantages)
    if ratio == "text":
        return -gain.mean()
    terms = -gain
    if loss_kl is not None:
        own = loss_kl(group.log_q - group.log_prior)
        terms = terms + group.beta * own * (weight if times_ratio else 1.0)
    return average(terms, group.acted)


def whole_k2(group: Group) -> Array:
    """Add k2 of the whole text to the loss, instead of its sum over tokens."""
    ratio = jnp.where(group.acted, group.log_q - group.log_prior, 0.0).sum(-1)
    return policy_loss(group, reward_kl=None) + group.beta * k2(ratio).mean()


def scaled_first(group: Group) -> Array:
    """Make advantages of R alone, and take k1 from them."""
    return policy_loss(group._replace(reward=mean_and_sd(group.reward)), advantage=as_it_is)


KL_LOSSES: dict[str, Loss] = {
    "k1 in the reward": policy_loss,
    "k2 in the reward": partial(policy_loss, reward_kl=k2),
    "k3 in the reward": partial(policy_loss, reward_kl=k3),
    "k1 in the loss": partial(policy_loss, reward_kl=None, loss_kl=k1),
    "k2 in the loss": partial(policy_loss, reward_kl=None, loss_kl=k2),
    "k2 in the loss, of the whole text": whole_k2,
    "k3 in the loss": partial(policy_loss, reward_kl=None, loss_kl=k3),
    "k3 in the loss, times q/q_old": partial(policy_loss, reward_kl=None, loss_kl=k3, times_ratio=True),
}
"""Where the KL is and what stands for it; leave-one-out advantages, tokens summed."""

ADVANTAGE_LOSSES: dict[str, Loss] = {
    "no baseline": partial(policy_loss, advantage=as_it_is),
    "leave-one-out (RLOO)": policy_loss,
    "minus the mean of the group": partial(policy_loss, advantage=minus_mean),
    "minus the mean, divided by the sd": partial(policy_loss, advantage=mean_and_sd),
    "the same of R alone, then k1 in the reward": scaled_first,
    "the same of R alone, k3 in the loss (GRPO)": partial(
        policy_loss, reward_kl=None, loss_kl=k3, advantage=mean_and_sd
    ),
}
"""What rewards become; k1 in the reward, if nothing else is said, and tokens summed."""

LENGTH_LOSSES: dict[str, Loss] = {
    "sum of tokens, mean of texts": policy_loss,
    "mean of tokens, mean of texts": partial(policy_loss, average=mean_of_each_text),
    "mean of all tokens of the group": partial(policy_loss, average=mean_of_all_tokens),
    "GRPO with mean of tokens, mean of texts": partial(
        policy_loss, reward_kl=None, loss_kl=k3, advantage=mean_and_sd, average=mean_of_each_text
    ),
    "GRPO with k3 times q/q_old, mean of all tokens": partial(
        policy_loss,
        reward_kl=None,
        loss_kl=k3,
        times_ratio=True,
        advantage=mean_and_sd,
        average=mean_of_all_tokens,
    ),
}
"""How tokens are averaged; the first three have leave-one-out advantages and k1 in the reward."""

REUSE_LOSSES: dict[str, Loss] = {
    "ratios of tokens": policy_loss,
    "ratios of tokens, clipped (PPO)": partial(policy_loss, clip=CLIP),
    "ratios of whole texts": partial(policy_loss, ratio="text"),
    "ratios of whole texts, clipped": partial(policy_loss, ratio="text", clip=CLIP),
}
"""How draws serve several updates; leave-one-out advantages, k1 in the reward."""
