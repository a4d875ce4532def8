"""Numbers with error bars: the types in which engines, fits and diagnostics report expectations."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # run folders can be displayed without JAX
    from bayesrl.typing import Numbers


class Estimate(NamedTuple):
    """A mean and its standard error, both [*beta, ...]; the error is 0 if the mean is exact, nan if it is unknown.

    Example:
        >>> import bayesrl, numpy as np
        >>> rewards = np.array([1.0, 0.0, 1.0, 1.0])
        >>> estimate = bayesrl.Estimate(rewards.mean(), rewards.std(ddof=1) / np.sqrt(4))
        >>> float(estimate.mean), float(estimate.se)
        (0.75, 0.25)
    """

    mean: "Numbers"
    se: "Numbers"


def mean_of_draws(values: np.ndarray) -> Estimate:
    """Average independent draws, [draws, ...]; one draw alone has no standard error, which is nan."""
    num = len(values)
    se = np.std(values, 0, ddof=1) / math.sqrt(num) if num > 1 else np.full(np.shape(values)[1:], np.nan)
    return Estimate(np.asarray(np.mean(values, 0)), np.asarray(se))


class Estimates(NamedTuple):
    """Expectations under one distribution over actions, averaged over contexts, [*beta, ...].

    Attributes:
        objective: J = E[R] − β·KL, reward units (the ELBO, nats, without rewards); E[R] − β·`divergence`, if that
            is not None.
        reward: E[R], reward units.
        kl: KL to the prior policy, nats.
        metrics: means of the deterministic sites, by name, each in its own units.
        log_marginal: log p(y), nats, if a fit has data beside rewards; π₀ then means p(x|y) in J and KL.
            nan if it is unknown, which makes J and KL nan too; None in all other cases.
        divergence: D_f(q‖π₀), if another regulariser takes the place of KL; see `enumerate_posterior`.
    """

    objective: Estimate
    reward: Estimate
    kl: Estimate
    metrics: dict[str, Estimate]
    log_marginal: Estimate | None = None
    divergence: Estimate | None = None


class Interval(NamedTuple):
    """An estimate with two 95% intervals, each a NumPy array [*beta], in double precision.

    Attributes:
        mean: the estimate.
        se: its standard error; 0 if the mean is exact.
        lower: left end of the calibrated interval, which uses the standard error; nan if the draws do not
            support that.
        upper: right end of the calibrated interval.
        conservative_lower: left end of the conservative interval, which holds without a standard error; −inf if
            nothing is known.
        conservative_upper: right end of the conservative interval; inf if nothing is known.

    Example:
        >>> import bayesrl, numpy as np
        >>> interval = bayesrl.Interval.normal(np.array([1.3]), np.array([0.1]))
        >>> interval.lower.round(3).tolist(), interval.upper.round(3).tolist()
        ([1.104], [1.496])
    """

    mean: np.ndarray
    se: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    conservative_lower: np.ndarray
    conservative_upper: np.ndarray

    @classmethod
    def exact(cls, value: Any) -> "Interval":
        """Make the interval of a number that is known exactly."""
        number = np.asarray(value, float)
        return cls(number, np.zeros_like(number), number, number, number, number)

    @classmethod
    def normal(cls, mean: Any, se: Any, conservative: float = 1.96) -> "Interval":
        """Make the interval of an estimate whose error is normal.

        Args:
            mean: the estimate.
            se: its standard error.
            conservative: half-width of the conservative interval in standard errors.
        """
        mean, se = np.asarray(mean, float), np.asarray(se, float)
        return cls(mean, se, mean - 1.96 * se, mean + 1.96 * se, mean - conservative * se, mean + conservative * se)

    @classmethod
    def between(cls, lower: Any, upper: Any) -> "Interval":
        """Make the interval of a number with only conservative ends."""
        low, high = np.asarray(lower, float), np.asarray(upper, float)
        nothing = np.full_like(low, np.nan)
        return cls(nothing, nothing, nothing, nothing, low, high)

    def __mul__(self, factor: Any) -> "Interval":
        """Multiply by a positive factor, [*beta]."""
        return Interval(*(part * np.asarray(factor, float) for part in self))


class InfluenceEstimate(NamedTuple):
    """An estimate per context, [contexts], and how much each draw moves it, [draws, contexts].

    The standard deviation of an influence function over √N is the delta method's standard error. Averaging the
    influence over contexts keeps their correlation, since contexts share draws.
    """

    mean: np.ndarray
    influence: np.ndarray

    def plus(self, other: "InfluenceEstimate", factor: float = 1.0) -> "InfluenceEstimate":
        """Add a multiple of another estimate from the same draws."""
        return InfluenceEstimate(self.mean + factor * other.mean, self.influence + factor * other.influence)

    def times(self, factor: float) -> "InfluenceEstimate":
        """Multiply by a number."""
        return InfluenceEstimate(factor * self.mean, factor * self.influence)

    @property
    def se(self) -> np.ndarray:
        """Standard error of independent draws, [contexts]."""
        return np.asarray(self.influence.std(0, ddof=1) / math.sqrt(len(self.influence)))

    def over_contexts(self) -> "InfluenceEstimate":
        """Average over contexts."""
        return InfluenceEstimate(np.asarray(self.mean.mean()), self.influence.mean(-1))
