"""Attitudes to a reward that is not known: the number that takes the place of its distribution."""

from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import ndtri

from bayesrl.diagnostics.tail_behaviour import pareto_shape

type AttitudeName = Literal["neutral", "optimistic", "pessimistic", "quantile", "worst", "sd_penalty"]

EXPONENTIAL = ("optimistic", "pessimistic")
MAX_SHARE, MAX_KHAT = 0.5, 0.7
"""Draws do not tell E e^{r/β} where one of them carries more than this share of it, or its tail is of greater shape."""
_LOOKED_AT = 64


class Attitude(NamedTuple):
    """How to judge a reward r that is not known.

    Attributes:
        name: neutral E[r]; optimistic β·log E e^{r/β}; pessimistic −β·log E e^{−r/β}; quantile; worst; sd_penalty
            E[r] − sds·sd[r].
        beta: reward units per nat, of the exponential attitudes.
        level: of the quantile.
        sds: number of standard deviations to subtract.
    """

    name: AttitudeName
    beta: float | None
    level: float
    sds: float

    @property
    def sign(self) -> float:
        """1 for optimism, −1 for pessimism."""
        return 1.0 if self.name == "optimistic" else -1.0

    def of_normal(self, mean: Any, variance: Any) -> Any:
        """Return the value for N(mean, variance), in whatever library they are; "worst" has none."""
        if self.name in EXPONENTIAL:
            assert self.beta is not None
            return mean + self.sign * variance / (2 * self.beta)
        if self.name == "neutral":
            return mean
        return mean + float(ndtri(self.level) if self.name == "quantile" else -self.sds) * variance**0.5

    def of_draws(self, draws: Any, library: Any, *, exact: bool) -> Any:
        """Return the value for draws, [draws, ...], which are all there is (`exact`) or a sample of more.

        Of a sample the exponential attitudes are corrected by the jackknife: log of a mean of K draws is too low by
        about Var/(2K·mean²), which leaves an error of order 1/K². Where one draw carries more than half of the mean the
        value is nan.
        """
        if self.name == "neutral":
            return draws.mean(0)
        if self.name == "worst":
            return draws.min(0)
        if self.name == "quantile":
            return library.quantile(draws, self.level, axis=0)
        num = draws.shape[0]
        if self.name == "sd_penalty":
            return draws.mean(0) - self.sds * draws.std(0, ddof=0 if exact or num == 1 else 1)
        assert self.beta is not None
        scaled = self.sign * draws / self.beta
        top = scaled.max(0)
        weights = library.exp(scaled - top)
        log_mean = library.log(weights.mean(0)) + top
        if not exact and num > 1:
            share = weights / weights.sum(0)
            safe = library.minimum(share, MAX_SHARE)
            correction = (num - 1) * (library.log1p(-safe).mean(0) + np.log(num / (num - 1)))
            log_mean = library.where(share.max(0) > MAX_SHARE, np.nan, log_mean - correction)
        return self.sign * self.beta * log_mean

    def untold(self, draws: np.ndarray) -> tuple[int, float, float] | None:
        """Find where draws [draws, items] do not tell an exponential attitude: item, share of the largest, k̂."""
        if self.name not in EXPONENTIAL:
            return None
        assert self.beta is not None
        scaled = self.sign * draws / self.beta
        share = np.exp(scaled.max(0) - np.logaddexp.reduce(scaled, axis=0))
        # k̂ only where the largest weights are.
        for at in np.argsort(-share, kind="stable")[:_LOOKED_AT]:
            khat = pareto_shape(scaled[:, at])
            if share[at] > MAX_SHARE or khat > MAX_KHAT:
                return int(at), float(share[at]), khat
        return None

    def __str__(self) -> str:
        told = {"quantile": f"quantile {self.level:g}", "sd_penalty": f"mean − {self.sds:g} sd"}
        return told.get(self.name, self.name) + (f" at β = {self.beta:g}" if self.name in EXPONENTIAL else "")
