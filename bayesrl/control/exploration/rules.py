"""Exploration rules: how to act on a posterior of action values, in bandits and in environments alike."""

import abc
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from bayesrl.annotations import Requirement
from bayesrl.arguments import Count, MemoryNeed, Positive, UnitInterval, checked
from bayesrl.compilation.keys import split, split_keys
from bayesrl.control.exploration.beliefs import Belief
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey
from bayesrl.values import is_function

_HALVINGS = 40


class Exploration(abc.ABC):
    """An exploration rule: from a key, a belief and the number of steps taken so far to an action each, [...].

    The same rule serves both posteriors: called with a `Belief` over action values it acts on what is not known,
    and `behave` acts on a fitted policy, which is how `GymnasiumSource` and `KLControlAgent` ask it.
    """

    committed: ClassVar[bool] = False
    """Whether one random choice holds for a whole episode."""
    soft: ClassVar[bool] = False
    """Whether it asks models of dynamics for soft backups of what exploration is worth."""

    @abc.abstractmethod
    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose, [...] integers."""

    def behave(self, key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
        """Choose an action where a policy q and its prior are all that is known, and give its log-probability.

        Raises:
            ControlError: the rule needs a posterior of action values, or leaves actions untried.
        """
        raise ControlError(
            f"{type(self).__name__.lower()} explores by a posterior of action values, and a policy has none; use "
            "epsilon_greedy(ε) or prior_mixture(ε), or the agent BayesianAgent(model)"
        )


def _is_rule(value: Any) -> bool:
    makes_one = getattr(value, "__module__", "") == __name__
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
"""An exploration rule, or a function of yours in its place."""


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


@checked(ControlError)
@dataclass(frozen=True)
class EpsilonGreedy(Exploration):
    """See `epsilon_greedy`."""

    epsilon: UnitInterval

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        whether, which, tie = split_keys(key, 3)
        mean = belief.mean
        best = mean == mean.max(-1, keepdims=True)
        chosen = jnp.argmax(jnp.where(best, jax.random.uniform(tie, mean.shape), -1.0), -1)
        explore = jax.random.uniform(whether, chosen.shape) < self.epsilon
        return jnp.where(explore, _anything(which, belief), chosen)

    def behave(self, key: PRNGKey, fitted: dist.Distribution, prior: dist.Distribution) -> tuple[Array, Array]:
        """Take q's likeliest action, and in a share of the steps draw from the prior."""
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
        greedy_log_prob = jnp.where(action == best, jnp.log1p(-self.epsilon), -jnp.inf)
        return action, jnp.logaddexp(greedy_log_prob, prior.log_prob(action) + jnp.log(self.epsilon))


@checked(ControlError)
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
        """Draw from q: a policy that is itself a posterior is played by drawing from it."""
        action = fitted.sample(key)
        return action, fitted.log_prob(action)


@dataclass(frozen=True)
class BayesUCB(Exploration):
    """See `bayes_ucb`."""

    def __call__(self, key: PRNGKey, belief: Belief, time: Any) -> Array:
        """Choose; see `Exploration`."""
        bound = belief.quantile(1.0 - 1.0 / (jnp.asarray(time) + 2.0))
        tie = jax.random.uniform(key, bound.shape)
        return jnp.argmax(jnp.where(bound == bound.max(-1, keepdims=True), tie, -1.0), -1)


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


def _anything(key: PRNGKey, belief: Belief) -> Array:
    """Draw any action that is allowed, [...]."""
    *runs, actions = belief.mean.shape
    if belief.allowed is None:
        return jax.random.randint(key, tuple(runs), 0, actions)
    return jax.random.categorical(key, jnp.where(belief.allowed, 0.0, -jnp.inf))


def random() -> Exploration:
    """Take any action, all alike.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> mean, variance = jnp.array([0.0, 1.0]), jnp.array([4.0, 0.01])
        >>> belief = NormalBelief(jnp.tile(mean, (1000, 1)), jnp.tile(variance, (1000, 1)))
        >>> actions = control.random()(jax.random.key(0), belief, 0)
        >>> round(float((actions == 1).mean()), 1)
        0.5
    """
    return Random()


def greedy() -> Exploration:
    """Take the action whose expected value is greatest, ties broken at random.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> mean, variance = jnp.array([0.0, 1.0]), jnp.array([4.0, 0.01])
        >>> belief = NormalBelief(jnp.tile(mean, (1000, 1)), jnp.tile(variance, (1000, 1)))
        >>> actions = control.greedy()(jax.random.key(0), belief, 0)
        >>> round(float((actions == 1).mean()), 1)
        1.0
    """
    return EpsilonGreedy(0.0)


@checked(ControlError)
def epsilon_greedy(epsilon: UnitInterval) -> Exploration:
    """Take any action with probability ε, else the one whose expected value is greatest, ties broken at random.

    On a fitted policy, by `Exploration.behave`: its likeliest action, and with probability ε one from the prior.

    Args:
        epsilon: ε, in [0, 1].

    Raises:
        ControlError: ε is outside [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> mean, variance = jnp.array([0.0, 1.0]), jnp.array([4.0, 0.01])
        >>> belief = NormalBelief(jnp.tile(mean, (1000, 1)), jnp.tile(variance, (1000, 1)))
        >>> actions = control.epsilon_greedy(0.2)(jax.random.key(0), belief, 0)
        >>> round(float((actions == 1).mean()), 1)  # 1 − ε/2
        0.9
    """
    return EpsilonGreedy(epsilon)


@checked(ControlError)
def boltzmann(temperature: Positive) -> Exploration:
    """Take actions with probability ∝ exp(expected value / temperature).

    This knows nothing of what is unknown: two actions of the same expected value are taken alike, however often
    each has been tried.

    Args:
        temperature: reward units per nat, above 0.

    Raises:
        ControlError: the temperature is not above 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> mean, variance = jnp.array([0.0, 1.0]), jnp.array([4.0, 0.01])
        >>> belief = NormalBelief(jnp.tile(mean, (1000, 1)), jnp.tile(variance, (1000, 1)))
        >>> actions = control.boltzmann(0.5)(jax.random.key(0), belief, 0)
        >>> round(float((actions == 1).mean()), 1)  # 1 / (1 + exp(−1 / 0.5))
        0.9
    """
    return Boltzmann(temperature)


def thompson() -> Exploration:
    """Draw the values from the posterior, and take the action that is best in this draw; one draw an episode.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> mean, variance = jnp.array([0.0, 1.0]), jnp.array([4.0, 0.01])
        >>> belief = NormalBelief(jnp.tile(mean, (1000, 1)), jnp.tile(variance, (1000, 1)))
        >>> actions = control.thompson()(jax.random.key(0), belief, 0)
        >>> round(float((actions == 1).mean()), 1)  # P(action 1 is the best)
        0.7

    References:
        Thompson (1933), "On the likelihood that one unknown probability exceeds another"; Osband, Russo & Van Roy
        (2013), "(More) efficient reinforcement learning via posterior sampling", for whole episodes (PSRL).
    """
    return Thompson()


def bayes_ucb() -> Exploration:
    """Take the action whose quantile of order 1 − 1/(t + 1) is greatest, t being the number of the step from 1 on.

    In environments t is the number of the episode.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> mean, variance = jnp.array([0.0, 1.0]), jnp.array([4.0, 0.01])
        >>> belief = NormalBelief(jnp.tile(mean, (1000, 1)), jnp.tile(variance, (1000, 1)))
        >>> for time in (0, 9):  # by the median, then by the quantile of order 10/11
        ...     print(float(control.bayes_ucb()(jax.random.key(0), belief, time).mean()))
        1.0
        0.0

    References:
        Kaufmann, Cappé & Garivier (2012), "On Bayesian upper confidence bounds for bandit problems", algorithm 1
        with c = 0.
    """
    return BayesUCB()


def k_learning() -> Exploration:
    """Take actions with probability ∝ exp(K(a)/τ), where K(a) = μ + σ²/2τ is what exploration is worth.

    The cumulants τ·log E exp(value/τ) of the posterior, bounded by those of a Normal of its `variance`, are the
    rewards of a KL-regularised problem whose temperature is chosen, at each step, as the minimiser of
    τ·log Σ_a exp(K(a)/τ), an upper bound on E[max value]. Where a model of the dynamics is learned, K comes from soft
    backups with the same temperature at all steps; see `TabularModel.cumulants`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl import control
        >>> from bayesrl.control.exploration.beliefs import NormalBelief
        >>> mean, variance = jnp.array([0.0, 1.0]), jnp.array([4.0, 0.01])
        >>> belief = NormalBelief(jnp.tile(mean, (1000, 1)), jnp.tile(variance, (1000, 1)))
        >>> actions = control.k_learning()(jax.random.key(0), belief, 0)
        >>> round(float((actions == 1).mean()), 1)  # the less certain action is tried more often
        0.4

    References:
        O'Donoghue, Osband & Ionescu (2020), "Making sense of reinforcement learning and probabilistic inference",
        section 3.2; O'Donoghue (2021), "Variational Bayesian reinforcement learning with regret bounds".
    """
    return KLearning()


def _temperature(below: Array, variance: Array) -> Array:
    """Minimise f(τ) = τ·log Σ exp(μ/τ + σ²/2τ²), whose slope changes sign once, by bisection of f′, [...].

    Args:
        below: μ less the greatest of them, [..., actions]; −inf for actions that are not allowed.
        variance: σ², [..., actions].
    """
    farthest = -jnp.where(below > -jnp.inf, below, 0.0).min(-1)
    # Where nothing is unknown the minimiser is 0, in whose stead stands what is small beside the differences.
    scale = jnp.maximum(jnp.sqrt(variance.max(-1)), 1e-3 * farthest + 1e-12)

    def rising(tau: Array) -> Array:
        scores = below / tau[..., None] + variance / (2 * tau[..., None] ** 2)
        probs = jax.nn.softmax(scores, -1)
        slopes = jnp.where(probs > 0, scores + variance / (2 * tau[..., None] ** 2), 0.0)
        return jax.nn.logsumexp(scores, -1) - (probs * slopes).sum(-1) > 0

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        above = rising(middle)
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (1e-3 * scale, 1e3 * scale + 10 * farthest))
    return jnp.sqrt(low * high)


@checked(ControlError)
def exploration_from_name(text: str) -> Exploration:
    """Make a rule from its name, with its number behind a colon: `thompson`, `epsilon_greedy:0.1`.

    Raises:
        ControlError: there is no such rule, or its number is missing, superfluous or none.
    """
    makers: dict[str, Any] = {
        "random": random,
        "greedy": greedy,
        "thompson": thompson,
        "bayes_ucb": bayes_ucb,
        "k_learning": k_learning,
    }
    numbered: dict[str, Any] = {"epsilon_greedy": epsilon_greedy, "boltzmann": boltzmann}
    name, colon, number = str(text).partition(":")
    if name in makers and not colon:
        rule: Exploration = makers[name]()
    elif name in numbered and colon:
        try:
            given = float(number)
        except ValueError as error:
            raise ControlError(f"exploration {text!r}: {number!r} is no number; write {name}:0.1, say") from error
        rule = numbered[name](given)
    else:
        known = ", ".join([*makers, *(f"{one}:0.1" for one in numbered)])
        raise ControlError(f"there is no exploration rule {text!r}; choose from {known}")
    return rule


def _num_values(belief: Any) -> int:
    return max(min((np.size(leaf) for leaf in jax.tree.leaves(belief)), default=1), 1)


class Decision(NamedTuple):
    """What draws of action values say about a choice between the actions.

    Attributes:
        p_optimal: P(action is the best), [..., actions].
        regret: expected loss of taking each action rather than the best, reward units, [..., actions].
        interval: quantiles of order .025 and .975 of that loss, [..., actions, 2].
    """

    p_optimal: Any
    regret: Any
    interval: Any

    @classmethod
    def from_samples(cls, values: Any, allowed: Any = None) -> "Decision":
        """Compare the actions in each draw, [samples, ..., actions]; arrays of NumPy give arrays of NumPy.

        Args:
            values: draws of the action values, reward units.
            allowed: [..., actions]; the other actions are never the best, and their loss is nan. By default all are.
        """
        xp = values.__array_namespace__()
        allowed = xp.ones((), bool) if allowed is None else allowed
        among = xp.where(allowed, values, -xp.inf)
        loss = xp.where(allowed, among.max(-1, keepdims=True) - values, xp.nan)
        best = among.argmax(-1)[..., None] == xp.arange(values.shape[-1])
        ends = xp.quantile(loss, xp.asarray([0.025, 0.975]), axis=0)
        return cls(best.mean(0), loss.mean(0), xp.moveaxis(ends, 0, -1))


@checked(
    ControlError,
    MemoryNeed(
        lambda given: 12.0 * given["num_samples"] * _num_values(given["belief"]), ("num_samples",), "ask for fewer"
    ),
)
def best_action_probabilities(key: PRNGKey, belief: Belief, *, num_samples: Count = 4000) -> Decision:
    """Tell which action is the best, how surely, and what a wrong choice may cost.

    Args:
        key: consumed whole.
        belief: over the values of the actions.
        num_samples: draws; the standard error of a probability is at most .5 / √num_samples.

    Returns:
        `Decision`.

    Raises:
        ControlError: num_samples is below 1; the belief is none, or has draws that are not finite, as a Beta with
            a or b below 1 has.
        EngineError: the key is none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl.control.exploration.beliefs import BetaBelief
        >>> from bayesrl.control.exploration.rules import best_action_probabilities
        >>> belief = BetaBelief(jnp.array([30.0, 12.0]), jnp.array([12.0, 30.0]))
        >>> bool(best_action_probabilities(jax.random.key(0), belief).p_optimal[0] > 0.99)
        True
    """
    _check_belief(key, belief)
    values = jax.lax.map(belief.sample, split(key, num_samples))
    if not isinstance(values, jax.core.Tracer) and not bool(jnp.isfinite(values).all()):
        raise ControlError(
            f"draws of {belief!r} are not finite; use finite numbers, variances of at least 0, and a and b of at "
            "least 1 for a Beta"
        )
    return Decision.from_samples(values)


def _check_belief(key: PRNGKey, belief: Any) -> None:
    """Refuse what gives no draws [..., actions]."""
    try:
        shape = jax.eval_shape(belief.sample, key).shape
    except (TypeError, ValueError) as error:
        raise ControlError(
            f"{belief!r} cannot be drawn from: {error}; pass arrays [..., actions] of one shape"
        ) from error
    if not shape:
        raise ControlError(f"{belief!r} is of a single value; pass arrays [..., actions]")
