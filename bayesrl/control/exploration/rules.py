"""Exploration rules: how to act on a posterior of action values, in bandits and in environments alike."""

import abc
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Positive, UnitInterval, checked
from bayesrl.compilation.random_keys import split_keys
from bayesrl.control.exploration.beliefs import Belief
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import is_function

# The bracket spans a factor of about 1e7 at most; halved so often, its logarithm is known to 1e-11.
_HALVINGS = 40


class Exploration(abc.ABC):
    """An exploration rule: a function from a key, a belief and the number of steps so far to actions, [...].

    The same rule serves both posteriors: called with a `Belief` over action values, it acts on uncertainty;
    `behave` acts on a fitted policy, for `GymnasiumSource` and `KLControlAgent`.

    Example:
        How often each rule takes the second of two actions, which is better and better known:

        >>> import jax, jax.numpy as jnp
        >>> from bayesrl.control import bayes_ucb, boltzmann, epsilon_greedy, greedy, k_learning, random, thompson
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> belief = NormalBelief(jnp.tile(jnp.array([0.0, 1.0]), (1000, 1)), jnp.array([4.0, 0.01]))
        >>> def share(rule, time=0):
        ...     return round(float(rule(jax.random.key(0), belief, time).mean()), 1)
        >>> share(random()), share(greedy()), share(epsilon_greedy(0.2))  # 1/2, 1, 1 − ε/2
        (0.5, 1.0, 0.9)
        >>> share(boltzmann(0.5)), share(thompson())  # 1 / (1 + exp(−1 / 0.5)), P(action 1 is the best)
        (0.9, 0.7)
        >>> share(bayes_ucb(), time=9), share(k_learning())  # by quantiles of order 10/11; both seek the less certain
        (0.0, 0.4)
    """

    committed: ClassVar[bool] = False
    """Whether one random choice holds for a whole episode."""
    soft: ClassVar[bool] = False
    """Whether models of dynamics should back up the worth of exploration softly."""

    @abc.abstractmethod
    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose, [...] integers."""

    def behave(self, key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
        """Choose an action from a policy q and its prior alone, and return its log-probability too.

        Raises:
            ControlError: the rule needs a posterior of action values, or leaves actions untried.
        """
        raise ControlError(
            f"{type(self).__name__.lower()} explores by a posterior of action values, and a policy has none; use "
            "epsilon_greedy(ε) or prior_mixture(ε), or the agent BayesianAgent(model)"
        )


def _is_rule(value: Any) -> bool:
    # `thompson` without its brackets is a function too, but one that makes a rule.
    makes_one = str(getattr(value, "__module__", "")).startswith(__name__.rpartition(".")[0])
    return isinstance(value, Exploration) or (is_function(value) and not isinstance(value, type) and not makes_one)


type Rule = Annotated[
    Any,
    Requirement(
        "a rule: thompson(), k_learning(), epsilon_greedy(0.1), …, with its brackets, or a function of (key, belief, "
        "step)",
        _is_rule,
        any_type=True,
    ),
]
"""An exploration rule, or your own function in its place."""


@dataclass(frozen=True)
class Random(Exploration):
    """See `random`."""

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        return _anything(key, belief)

    def behave(self, key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
        """Draw from the prior."""
        action = prior.sample(key)
        return action, prior.log_prob(action)


@dataclass(frozen=True)
class EpsilonGreedy(Exploration):
    """See `epsilon_greedy`."""

    epsilon: UnitInterval

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        whether, which, tie = split_keys(key, 3)
        chosen = best_action(tie, belief.mean)
        explore = jax.random.uniform(whether, chosen.shape) < self.epsilon
        return jnp.where(explore, _anything(which, belief), chosen)

    def behave(self, key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
        """Take q's likeliest action; with probability ε, draw from the prior instead."""
        if self.epsilon == 0:
            raise ControlError(
                "epsilon_greedy(0) never tries other actions, so that none can be corrected for; use ε > 0"
            )
        if not fitted.has_enumerate_support or fitted.event_shape:
            raise ControlError(
                f"epsilon_greedy needs finitely many actions, and {type(fitted).__name__} has no likeliest one; "
                "use prior_mixture(ε)"
            )
        which, own = split_keys(key)
        values = fitted.enumerate_support()
        best = values[jnp.argmax(fitted.log_prob(values))]
        action = jnp.where(jax.random.bernoulli(which, self.epsilon), prior.sample(own), best)
        # The density of the mixture: the prior, too, may draw the likeliest action.
        greedy_log_prob = jnp.where(action == best, jnp.log1p(-self.epsilon), -jnp.inf)
        return action, jnp.logaddexp(greedy_log_prob, prior.log_prob(action) + jnp.log(self.epsilon))


@dataclass(frozen=True)
class Boltzmann(Exploration):
    """See `boltzmann`."""

    temperature: Positive

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        return jax.random.categorical(key, belief.mean / self.temperature)


@dataclass(frozen=True)
class Thompson(Exploration):
    """See `thompson`."""

    committed: ClassVar[bool] = True

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        return jnp.argmax(belief.sample(key), -1)

    def behave(self, key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
        """Draw from q: Thompson sampling of a policy that is itself a posterior."""
        action = fitted.sample(key)
        return action, fitted.log_prob(action)


@dataclass(frozen=True)
class BayesUCB(Exploration):
    """See `bayes_ucb`."""

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        # `time` counts from 0, so the docstring's t is time + 1.
        return best_action(key, belief.quantile(1.0 - 1.0 / (jnp.asarray(time) + 2.0)))


@dataclass(frozen=True)
class KLearning(Exploration):
    """See `k_learning`."""

    soft: ClassVar[bool] = True

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        mean, variance = belief.mean, belief.variance
        below = mean - mean.max(-1, keepdims=True)
        tau = _temperature(below, variance)[..., None]
        return jax.random.categorical(key, below / tau + variance / (2 * tau**2))


def best_action(key: PRNGKey, values: Array) -> Array:
    """Take the action of the greatest value, [...]; the argmax of uniform numbers breaks ties at random."""
    best = values == values.max(-1, keepdims=True)
    return jnp.argmax(jnp.where(best, jax.random.uniform(key, values.shape), -1.0), -1)


def _anything(key: PRNGKey, belief: Belief) -> Array:
    """Draw any allowed action, [...]."""
    *runs, actions = belief.mean.shape
    if belief.allowed is None:
        return jax.random.randint(key, tuple(runs), 0, actions)
    return jax.random.categorical(key, jnp.where(belief.allowed, 0.0, -jnp.inf))


def random() -> Exploration:
    """Take all actions with equal probability.

    Example:
        >>> from bayesrl import control
        >>> control.random()
        Random()
    """
    return Random()


def greedy() -> Exploration:
    """Take the action with the greatest expected value; ties are broken at random.

    Example:
        >>> from bayesrl import control
        >>> control.greedy()
        EpsilonGreedy(epsilon=0.0)
    """
    return EpsilonGreedy(0.0)


@checked(ControlError)
def epsilon_greedy(epsilon: UnitInterval) -> Exploration:
    """Take any action with probability ε, else the one with the greatest expected value; ties are broken at random.

    On a fitted policy, take its likeliest action, or with probability ε one from the prior; see `Exploration.behave`.

    Args:
        epsilon: ε, in [0, 1].

    Raises:
        ControlError: ε is outside [0, 1].

    Example:
        >>> from bayesrl import control
        >>> control.epsilon_greedy(0.2)
        EpsilonGreedy(epsilon=0.2)
    """
    return EpsilonGreedy(epsilon)


@checked(ControlError)
def boltzmann(temperature: Positive) -> Exploration:
    """Take actions with probability ∝ exp(expected value / temperature).

    Uncertainty does not count: two actions with the same expected value are equally likely, however often each has
    been tried.

    Args:
        temperature: reward units per nat, above 0.

    Raises:
        ControlError: the temperature is not above 0.

    Example:
        >>> from bayesrl import control
        >>> control.boltzmann(0.5)
        Boltzmann(temperature=0.5)
    """
    return Boltzmann(temperature)


def thompson() -> Exploration:
    """Draw the values from the posterior, and take the action that is best in this draw; one draw per episode.

    Example:
        >>> from bayesrl import control
        >>> control.thompson()
        Thompson()

    References:
        Thompson (1933), "On the likelihood that one unknown probability exceeds another". Whole episodes (PSRL):
        Osband, Russo & Van Roy (2013), "(More) efficient reinforcement learning via posterior sampling".
    """
    return Thompson()


def bayes_ucb() -> Exploration:
    """Take the action whose quantile of order 1 − 1/(t + 1) is greatest at step t = 1, 2, ….

    In environments, t is the number of the episode.

    Example:
        >>> from bayesrl import control
        >>> control.bayes_ucb()
        BayesUCB()

    References:
        Kaufmann, Cappé & Garivier (2012), "On Bayesian upper confidence bounds for bandit problems", algorithm 1
        with c = 0.
    """
    return BayesUCB()


def k_learning() -> Exploration:
    """Take actions with probability ∝ exp(K(a)/τ), where K(a) = μ + σ²/2τ counts the worth of exploration.

    The cumulants of the posterior, τ·log E exp(value/τ), are bounded by those of a Normal with its `variance`, and
    serve as the rewards of a KL-regularised problem. At each step its temperature τ minimises τ·log Σ_a exp(K(a)/τ),
    an upper bound on E[max value]. With a model of the dynamics, K comes from soft backups with the same temperature
    at all steps; see `TabularModel.cumulants`.

    Example:
        >>> from bayesrl import control
        >>> control.k_learning()
        KLearning()

    References:
        O'Donoghue, Osband & Ionescu (2020), "Making sense of reinforcement learning and probabilistic inference",
        section 3.2; O'Donoghue (2021), "Variational Bayesian reinforcement learning with regret bounds".
    """
    return KLearning()


def _temperature(below: Array, variance: Array) -> Array:
    """Minimise f(τ) = τ·log Σ exp(μ/τ + σ²/2τ²), whose slope changes sign once, by bisection of f′, [...].

    Args:
        below: μ minus its maximum, [..., actions]; −inf for actions that are not allowed.
        variance: σ², [..., actions].
    """
    farthest = -jnp.where(below > -jnp.inf, below, 0.0).min(-1)
    # Without uncertainty the minimiser is 0; a scale that is small beside the differences stands in for it.
    scale = jnp.maximum(jnp.sqrt(variance.max(-1)), 1e-3 * farthest + 1e-12)

    def rising(tau: Array) -> Array:
        scores = below / tau[..., None] + variance / (2 * tau[..., None] ** 2)
        probs = jax.nn.softmax(scores, -1)
        # f′(τ) = log Σ exp(s) − Σ p·(μ/τ + σ²/τ²), with scores s and p = softmax(s); 0·(−inf) would be nan.
        slopes = jnp.where(probs > 0, scores + variance / (2 * tau[..., None] ** 2), 0.0)
        return jax.nn.logsumexp(scores, -1) - (probs * slopes).sum(-1) > 0

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)  # geometric: the bracket spans orders of magnitude
        above = rising(middle)
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (1e-3 * scale, 1e3 * scale + 10 * farthest))
    return jnp.sqrt(low * high)


@checked(ControlError)
def exploration_from_name(text: str) -> Exploration:
    """Make a rule from its name, with its number after a colon: `thompson`, `epsilon_greedy:0.1`.

    Raises:
        ControlError: there is no such rule; or its number is missing, not wanted or not a number.
    """
    plain: tuple[Any, ...] = (random, greedy, thompson, bayes_ucb, k_learning)
    numbered: tuple[Any, ...] = (epsilon_greedy, boltzmann)
    name, colon, number = text.partition(":")
    rule = next((rule for rule in (numbered if colon else plain) if rule.__name__ == name), None)
    if rule is None:
        known = ", ".join([*(one.__name__ for one in plain), *(f"{one.__name__}:0.1" for one in numbered)])
        raise ControlError(f"there is no exploration rule {text!r}; choose from {known}")
    try:
        numbers = [float(number)] if colon else []
    except ValueError as error:
        raise ControlError(f"exploration {text!r}: {number!r} is not a number; write {name}:0.1, say") from error
    made: Exploration = rule(*numbers)
    return made
