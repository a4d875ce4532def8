"""Optimal play of Bernoulli bandits, by dynamic programming: Gittins indices, and Bayes-optimal regret."""

from typing import Annotated

import numpy as np

from bayesrl.arguments import Positive, checked, integer_range, real_range
from bayesrl.errors import ControlError

_TAIL = 1e-6
# They narrow a bracket of width 1 to 1e-12.
_BISECTIONS = 40


@checked(ControlError)
def gittins_index(a: Positive = 1.0, b: Positive = 1.0, *, discount: Annotated[float, real_range(0, 0.999)]) -> float:
    """Compute the Gittins index of an arm that pays 0 or 1 with probability Beta(a, b).

    The index is the sure reward per step, λ, that is worth as much as the arm with the right to retire to λ later:

        V(a, b) = max(λ/(1 − γ), p + γ·(p·V(a+1, b) + (1 − p)·V(a, b+1))),  p = a/(a + b),

    Bisection finds λ. After N observations, where γᴺ < 1e-6·(1 − γ), the arm counts as known.

    Args:
        a: parameter of the Beta, above 0.
        b: parameter of the Beta, above 0.
        discount: γ, in [0, .999].

    Raises:
        ControlError: a number is out of range.

    Example:
        >>> from bayesrl.control.bandits import gittins_index
        >>> round(gittins_index(1, 1, discount=0.9), 4)
        0.7029

    References:
        Gittins, Glazebrook & Weber (2011), "Multi-armed Bandit Allocation Indices", section 8.4.
    """
    if discount == 0:
        return float(a / (a + b))
    # A reward is at most 1, so all steps after the N-th are worth at most γᴺ/(1 − γ) ≤ 1e-6.
    steps = int(np.ceil(np.log(_TAIL * (1 - discount)) / np.log(discount)))
    # Who never retires earns the mean in each step, so the index is no less.
    low, high = float(a / (a + b)), 1.0
    for _ in range(_BISECTIONS):
        rate = (low + high) / 2
        if _worth(a, b, discount, rate, steps) > rate / (1 - discount):
            low = rate
        else:
            high = rate
    return (low + high) / 2


def _worth(a: float, b: float, discount: float, rate: float, steps: int) -> float:
    """Compute the value of one pull and optimal play after it, if retiring pays `rate` per step."""
    retired = rate / (1 - discount)
    successes = np.arange(steps + 1.0)
    # At the end of the table, the arm counts as known: it pays its mean for ever.
    value = np.maximum((a + successes) / (a + b + steps) / (1 - discount), retired)
    for done in reversed(range(steps)):
        p = (a + np.arange(done + 1.0)) / (a + b + done)
        pulled = p + discount * (p * value[1 : done + 2] + (1 - p) * value[: done + 1])
        if done == 0:  # the first pull is not optional
            return float(pulled[0])
        value = np.maximum(pulled, retired)
    return retired


@checked(ControlError)
def bayes_optimal_regret(
    horizon: Annotated[int, integer_range(1, 200)], *, a: Positive = 1.0, b: Positive = 1.0
) -> float:
    """Compute the least Bayes regret that any rule can have on two Bernoulli arms, both a priori Beta(a, b).

    Backward induction runs over all counts of successes and failures; the work grows as horizon⁴/24.

    Args:
        horizon: number of steps, at most 200.
        a: parameter of the Beta, above 0; a whole number.
        b: parameter of the Beta, above 0; a whole number.

    Returns:
        horizon · E[max of both probabilities] − the greatest expected sum of rewards, reward units.

    Raises:
        ControlError: a number is out of range.

    Example:
        >>> from bayesrl.control.bandits import bayes_optimal_regret
        >>> round(bayes_optimal_regret(10), 5)
        0.64488

    References:
        Berry & Fristedt (1985), "Bandit Problems: Sequential Allocation of Experiments", chapter 2.
    """
    # value[s, f, t]: s successes and f failures of the first arm, t successes of the second.
    value = np.zeros((horizon + 2,) * 3)
    for done in reversed(range(horizon)):
        s, f, t = np.ogrid[: done + 1, : done + 1, : done + 1]
        # Where s + f + t is more than `done` there is no such state; 0 keeps its probability a number.
        failed = np.maximum(done - s - f - t, 0)
        first, second = (a + s) / (a + b + s + f), (b + failed) / (a + b + t + failed)
        old = value[: done + 2, : done + 2, : done + 2]
        one = first * (1 + old[1:, :-1, :-1]) + (1 - first) * old[:-1, 1:, :-1]
        # Failures of the second arm have no axis: they are what `done` leaves over.
        other = (1 - second) * (1 + old[:-1, :-1, 1:]) + second * old[:-1, :-1, :-1]
        value = np.zeros((horizon + 2,) * 3)
        value[: done + 1, : done + 1, : done + 1] = np.maximum(one, other)
    return horizon * _expected_best(a, b) - float(value[0, 0, 0])


def _expected_best(a: float, b: float) -> float:
    """Compute E[max] of two independent Beta(a, b) as ∫ (1 − F(x)²) dx."""
    from scipy.integrate import quad
    from scipy.special import betainc

    return float(quad(lambda x: 1.0 - betainc(a, b, x) ** 2, 0.0, 1.0, epsabs=1e-12)[0])
