"""Problems so small that all texts, and all groups of draws of them, can be listed."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy.integrate import solve_ivp

import bayesrl

LATEST, SLOWEST, LARGEST = 1e5, 1e-8, 100.0
"""When a flow ends: at this time, this speed, or this distance between two logits; rewards are of order 1."""


class Texts(NamedTuple):
    """All texts of a tabular policy over prefixes, in several contexts that differ in the reward.

    Attributes:
        name: of the problem.
        tokens: [texts, positions].
        states: number of the prefix before each token, [texts, positions].
        acted: whether there is a token, [texts, positions].
        after: the number of the prefix that a token leads to, [states, vocabulary]; −1 − text if the text ends.
        log_prior: log π₀ of tokens, [states, vocabulary].
        rewards: R, [contexts, texts].
        beta: β.
        num_draws: draws of a group.
    """

    name: str
    tokens: np.ndarray
    states: np.ndarray
    acted: np.ndarray
    after: np.ndarray
    log_prior: np.ndarray
    rewards: np.ndarray
    beta: float
    num_draws: int

    def log_tokens(self, table: Array) -> Array:
        """Compute log q of each token under logits [states, vocabulary]: [texts, positions], 0 where there is none."""
        scores = jax.nn.log_softmax(table)[self.states, self.tokens]
        return jnp.where(self.acted, scores, 0.0)

    def objective(self, table: Array, reward: Array) -> Array:
        """Compute J = E[R] − β·KL of one context exactly."""
        log_q, log_prior = self.log_tokens(table).sum(-1), self.log_tokens(self.log_prior).sum(-1)
        return jnp.exp(log_q) @ (reward - self.beta * (log_q - log_prior))

    def gap(self, table: Array, reward: Array) -> Array:
        """Compute KL(q‖p*) of one context exactly, nats."""
        tilted = self.log_tokens(self.log_prior).sum(-1) + reward / self.beta
        return jax.nn.logsumexp(tilted) - self.objective(table, reward) / self.beta

    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """List all groups of draws without their order, [groups, draws], and the log of the number of orders.

        This is enough for estimators that treat all draws of a group alike.
        """
        found = np.array(list(itertools.combinations_with_replacement(range(len(self.tokens)), self.num_draws)))
        counts = (found[:, :, None] == np.arange(len(self.tokens))).sum(1)
        orders = math.lgamma(self.num_draws + 1) - np.vectorize(math.lgamma)(counts + 1.0).sum(-1)
        return found, orders

    def policy(self, reward: Array) -> None:
        """Run the policy as a program of bayesrl."""
        self.walk(jnp.asarray(self.log_prior), reward)

    def guide(self, reward: Array) -> None:
        """Run the guide, whose parameters are the logits [states, vocabulary]."""
        self.walk(numpyro.param("table", jnp.asarray(self.log_prior)), reward)

    def walk(self, table: Array, reward: Array) -> None:
        """Draw a text with these logits, and collect its reward at the end."""
        after = jnp.asarray(self.after)

        def step(state: Array, _: None) -> tuple[Array, None]:
            writing = state >= 0
            with handlers.mask(mask=writing):
                token = numpyro.sample("token", dist.Categorical(logits=table[jnp.maximum(state, 0)]))
            return jnp.where(writing, after[jnp.maximum(state, 0), token], state), None

        end, _ = scan(step, jnp.asarray(0), None, length=self.tokens.shape[1])
        bayesrl.reward("score", reward[-1 - end])


def bandit() -> Texts:
    """Make README's five-armed bandit, and the same arms where only one of them pays."""
    rewards = np.array([[0.1, 0.3, 0.5, 0.7, 0.9], [0.0, 0.0, 0.0, 0.0, 1.0]])
    arms = np.arange(5)[:, None]
    ones = np.ones_like(arms, bool)
    return Texts("bandit", arms, 0 * arms, ones, -1 - arms.T, np.full((1, 5), -math.log(5)), rewards, 0.1, 8)


def short_texts() -> Texts:
    """Make the texts of up to three letters, a or b, in two contexts: one pays the letters a, one the text `b` alone.

    Tokens are a, b and the end, with prior probabilities .35, .35, .3; a text of three letters ends by itself.
    """
    letters, most, end = 2, 3, 2
    prefixes = [prefix for size in range(most) for prefix in itertools.product(range(letters), repeat=size)]
    texts = [(*prefix, end) for prefix in prefixes] + list(itertools.product(range(letters), repeat=most))
    after = np.zeros((len(prefixes), letters + 1), int)
    for state, prefix in enumerate(prefixes):
        for token in range(letters + 1):
            text = (*prefix, token)
            after[state, token] = -1 - texts.index(text) if text in texts else prefixes.index(text)
    tokens, states = np.zeros((2, len(texts), most), int)
    acted = np.zeros((len(texts), most), bool)
    for i, text in enumerate(texts):
        for t, token in enumerate(text):
            tokens[i, t], states[i, t], acted[i, t] = token, prefixes.index(text[:t]), True
    rewards = np.array([[text.count(0) / most for text in texts], [float(text == (1, end)) for text in texts]])
    log_prior = np.broadcast_to(np.log([0.35, 0.35, 0.3]), after.shape)
    return Texts("texts", tokens, states, acted, after, log_prior, rewards, 0.2, 3)


def flow(velocity: Callable[[Array], Array], start: np.ndarray) -> np.ndarray:
    """Follow dx/dt = velocity(x) until it rests, or as good as that where the logits grow without end."""

    def fast(_: float, x: np.ndarray) -> np.ndarray:
        return np.asarray(velocity(x.reshape(start.shape))).ravel()

    def speed(time: float, x: np.ndarray) -> float:
        return float(np.linalg.norm(fast(time, x))) - SLOWEST

    def chance(_: float, x: np.ndarray) -> float:
        logits = x.reshape(start.shape)
        return float((logits - logits.max(-1, keepdims=True)).min()) + LARGEST

    speed.terminal = chance.terminal = True  # type: ignore[attr-defined]
    # Rates of different directions differ by powers of ten, which an explicit method would follow step by step.
    ends = (speed, chance)
    found = solve_ivp(fast, (0.0, LATEST), start.ravel(), method="BDF", events=ends, rtol=1e-5, atol=1e-7)
    if not found.success:
        raise RuntimeError(f"the flow stopped at time {found.t[-1]:.3g}: {found.message}")
    return found.y[:, -1].reshape(start.shape)
