"""Exploration rules: how to act on a posterior of action values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bayesrl.control.bandits.beliefs import Belief
from bayesrl.core.draws import is_count
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey

type Exploration = Callable[[PRNGKey, Belief, Array], Array]
"""From a key, a belief and the number of steps taken so far to an action each, [...], integers."""

_HALVINGS = 40


def random() -> Exploration:
    """Take any action, all alike."""

    def rule(key: PRNGKey, belief: Belief, time: Array) -> Array:
        *runs, actions = belief.mean.shape
        return jax.random.randint(key, tuple(runs), 0, actions)

    return rule


def greedy() -> Exploration:
    """Take the action whose expected value is greatest, ties broken at random."""
    return epsilon_greedy(0.0)


def epsilon_greedy(epsilon: float) -> Exploration:
    """Take any action with probability ε, else the one whose expected value is greatest, ties broken at random.

    Args:
        epsilon: ε, in [0, 1].

    Raises:
        ControlError: ε is outside [0, 1].
    """
    if not 0 <= epsilon <= 1:
        raise ControlError(f"epsilon={epsilon!r} is outside [0, 1]")

    def rule(key: PRNGKey, belief: Belief, time: Array) -> Array:
        whether, which, tie = jax.random.split(key, 3)
        mean = belief.mean
        best = mean == mean.max(-1, keepdims=True)
        chosen = jnp.argmax(jnp.where(best, jax.random.uniform(tie, mean.shape), -1.0), -1)
        anything = jax.random.randint(which, chosen.shape, 0, mean.shape[-1])
        return jnp.where(jax.random.uniform(whether, chosen.shape) < epsilon, anything, chosen)

    return rule


def boltzmann(temperature: float) -> Exploration:
    """Take actions with probability ∝ exp(expected value / temperature).

    This knows nothing of what is unknown: two actions of the same expected value are taken alike, however often
    each has been tried.

    Args:
        temperature: reward units per nat, above 0.

    Raises:
        ControlError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ControlError(f"temperature={temperature!r}; use a number of reward units per nat above 0")

    def rule(key: PRNGKey, belief: Belief, time: Array) -> Array:
        return jax.random.categorical(key, belief.mean / temperature)

    return rule


def thompson() -> Exploration:
    """Draw the values from the posterior, and take the action that is best in this draw.

    References:
        Thompson (1933), "On the likelihood that one unknown probability exceeds another".
    """

    def rule(key: PRNGKey, belief: Belief, time: Array) -> Array:
        return jnp.argmax(belief.draw(key), -1)

    return rule


def bayes_ucb() -> Exploration:
    """Take the action whose quantile of order 1 − 1/(t + 1) is greatest, t being the number of the step from 1 on.

    References:
        Kaufmann, Cappé & Garivier (2012), "On Bayesian upper confidence bounds for bandit problems", algorithm 1
        with c = 0.
    """

    def rule(key: PRNGKey, belief: Belief, time: Array) -> Array:
        bound = belief.quantile(1.0 - 1.0 / (time + 2.0))
        tie = jax.random.uniform(key, bound.shape)
        return jnp.argmax(jnp.where(bound == bound.max(-1, keepdims=True), tie, -1.0), -1)

    return rule


def k_learning() -> Exploration:
    """Take actions with probability ∝ exp(K(a)/τ), where K(a) = μ + σ²/2τ is what exploration is worth.

    The cumulants τ·log E exp(value/τ) of the posterior, bounded by those of a Normal of its `variance`, are the
    rewards of a KL-regularised problem whose temperature is chosen, at each step, as the minimiser of
    τ·log Σ_a exp(K(a)/τ), an upper bound on E[max value].

    References:
        O'Donoghue, Osband & Ionescu (2020), "Making sense of reinforcement learning and probabilistic inference",
        section 3.2; O'Donoghue (2021), "Variational Bayesian reinforcement learning with regret bounds".
    """

    def rule(key: PRNGKey, belief: Belief, time: Array) -> Array:
        mean, variance = belief.mean, belief.variance
        tau = _temperature(mean, variance)[..., None]
        return jax.random.categorical(key, mean / tau + variance / (2 * tau**2))

    return rule


def _temperature(mean: Array, variance: Array) -> Array:
    """Minimise f(τ) = τ·log Σ exp(μ/τ + σ²/2τ²), which whose slope changes sign once, by bisection of f′, [...]."""
    scale = jnp.sqrt(variance.max(-1))
    below = mean - mean.max(-1, keepdims=True)

    def rising(tau: Array) -> Array:
        scores = below / tau[..., None] + variance / (2 * tau[..., None] ** 2)
        probs = jax.nn.softmax(scores, -1)
        slope = jax.nn.logsumexp(scores, -1) - (probs * (scores + variance / (2 * tau[..., None] ** 2))).sum(-1)
        return slope > 0

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        above = rising(middle)
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (1e-3 * scale, 1e3 * scale - 10 * below.min(-1)))
    return jnp.sqrt(low * high)


class Decision(NamedTuple):
    """What a belief says of a choice between actions.

    Attributes:
        optimal: P(action is the best), [..., actions].
        regret: expected loss of taking each action rather than the best, reward units, [..., actions].
        interval: quantiles of order .025 and .975 of that loss, [..., actions, 2].
    """

    optimal: Array
    regret: Array
    interval: Array


def decide_between(key: PRNGKey, belief: Belief, *, num_samples: int = 4000) -> Decision:
    """Tell which action is the best, how surely, and what a wrong choice may cost.

    Args:
        key: consumed whole.
        belief: over the values of the actions.
        num_samples: draws; the standard error of a probability is at most .5 / √num_samples.

    Returns:
        `Decision`.

    Raises:
        ControlError: num_samples is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl.control.bandits import BetaBelief, decide_between
        >>> belief = BetaBelief(jnp.array([30.0, 12.0]), jnp.array([12.0, 30.0]))
        >>> bool(decide_between(jax.random.key(0), belief).optimal[0] > 0.99)
        True
    """
    if not is_count(num_samples, least=1):
        raise ControlError(f"num_samples={num_samples!r}; use an integer of at least 1")
    values = jax.lax.map(belief.draw, jax.random.split(key, num_samples))
    loss = values.max(-1, keepdims=True) - values
    probs = jax.nn.one_hot(values.argmax(-1), values.shape[-1]).mean(0)
    ends = jnp.quantile(loss, jnp.array([0.025, 0.975]), axis=0)
    return Decision(probs, loss.mean(0), jnp.moveaxis(ends, 0, -1))
