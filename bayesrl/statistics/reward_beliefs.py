"""Beliefs about rewards: what they share when one joint draw takes the place of a summary of all of them.

A program calls an uncertain reward, which gives one number: a mean, a quantile. Inside `given_draws` the same call
gives the reward of one joint draw instead, so that a whole program can be run under one possible world after another.
"""

import abc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np


class RewardBelief(abc.ABC):
    """What a reward may be, as joint draws of latent numbers of which every reward is a function.

    Attributes:
        origin: the object whose draws it shares with all beliefs that were made from it.
    """

    origin: Any

    @abc.abstractmethod
    def latent_draws(self, rng: np.random.Generator, num_draws: int) -> np.ndarray:
        """Return joint draws, [draws, ...], at most `num_draws` of them."""


_drawn: ContextVar[Mapping[int, Any]] = ContextVar("_drawn", default={})  # noqa: B039  (nobody writes to it)
_called: ContextVar[dict[int, RewardBelief] | None] = ContextVar("_called", default=None)
# JAX keeps what it traced, by function and shapes; with this context also by the draw that it was traced for.
_traced = jax.make_user_context(default_value=None)


def latent_now(belief: RewardBelief) -> Any | None:
    """Return the joint draw that takes the place of the summary in this call of a reward; None if there is none."""
    called = _called.get()
    if called is not None:
        called.setdefault(id(belief.origin), belief)
    return _drawn.get().get(id(belief.origin))


@contextmanager
def given_draws(latents: Mapping[int, Any]) -> Iterator[None]:
    """Let rewards take the values of one joint draw of each belief, by the `id` of its origin."""
    token = _drawn.set(latents)
    try:
        with _traced(object()):
            yield
    finally:
        _drawn.reset(token)


@contextmanager
def recorded_beliefs() -> Iterator[dict[int, RewardBelief]]:
    """Record the beliefs of the rewards that are called inside, by the `id` of their origin."""
    called: dict[int, RewardBelief] = {}
    token = _called.set(called)
    try:
        with _traced(object()):
            yield called
    finally:
        _called.reset(token)
