"""Draws of a policy, with all the scores that objectives and estimates read."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Draws(NamedTuple):
    """Draws with their scores; every array starts with the axes of the draws, [*draws, ...].

    Scores are keyed by site, per context and per time step: [*draws, *contexts, T], with T = 1 outside scans.

    Attributes:
        sites: values of action and environment sites, [*draws, ...].
        plates: indices of the subsampled plates.
        log_prior: log π₀ of the action sites, nats.
        log_q: log q of the action sites under the guide that drew or rescored them, nats.
        log_nature: log p of the environment sites, nats.
        log_likelihood: log p of the observed sites, nats.
        rewards: rewards, reward units (nats if the policy is under `tilt`).
        metrics: values of deterministic sites.
        scores: `log_q` without the factors of `numpyro.handlers.scale`; a score-function gradient
            differentiates these.
        guide_metrics: values of the deterministic sites that only the guide has, such as a critic's.
        log_behaviour: like `scores`, but under the policy that really drew the actions; equal to `scores` if the
            guide drew them.
        log_ratio: log π₀ − log q, for the action sites where a direct form is more accurate than the difference.
        doubt: a bound on the single-precision error of log π₀ − log q, nats, for the sites whose densities are
            sums of huge terms.
    """

    sites: dict[str, Any]
    plates: dict[str, Any]
    log_prior: dict[str, Array]
    log_q: dict[str, Array]
    log_nature: dict[str, Array]
    log_likelihood: dict[str, Array]
    rewards: dict[str, Any]
    metrics: dict[str, Any]
    scores: dict[str, Array]
    guide_metrics: dict[str, Array]
    log_behaviour: dict[str, Array]
    log_ratio: dict[str, Array] = {}  # noqa: RUF012  (never changed)
    doubt: dict[str, Array] = {}  # noqa: RUF012

    @classmethod
    def from_sites(cls, sites: Mapping[str, Any]) -> "Draws":
        """Make draws from values of sites that nothing has scored yet."""
        return cls(dict(sites), {}, {}, {}, {}, {}, {}, {}, {}, {}, {})

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays under names of their own, for a file."""
        parts = self._asdict().items()
        return {f"{part}/{name}": np.asarray(value) for part, values in parts for name, value in values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "Draws":
        """Make draws from what `as_arrays` returned; skip other names."""
        parts: dict[str, dict[str, Any]] = {part: {} for part in cls._fields}
        for path, array in arrays.items():
            part, _, name = path.partition("/")
            if part in parts:
                parts[part][name] = array
        return cls(**parts)

    def totals(self, shape: tuple[int, ...]) -> "Totals":
        """Sum scores over sites and time, to `shape`, which is [*draws, *contexts]."""
        return Totals(
            total(self.log_prior, shape),
            total(self.log_q, shape),
            total(self.log_likelihood, shape),
            total(self.rewards, shape),
            log_ratio=total(self.ratios, shape) if self.log_ratio else None,
            doubt=total(self.doubt, shape) if self.doubt else None,
        )

    def of_sites(self, names: Iterable[str]) -> "Draws":
        """Return the same draws with the values and scores of these sites only."""
        wanted = frozenset(names)
        return Draws(*({k: v for k, v in part.items() if k in wanted} for part in self))

    @property
    def ratios(self) -> dict[str, Array]:
        """Log π₀ − log q of the action sites, [*draws, *contexts, T], nats."""
        return {name: self.log_prior[name] - log_q for name, log_q in self.log_q.items()} | self.log_ratio

    def scored(self, log_q: dict[str, Array]) -> "Draws":
        """Return the same draws with another log q, and drop the ratios, which belong to the old one."""
        return self._replace(log_q=log_q, log_ratio={}, doubt={})


class Totals(NamedTuple):
    """Scores summed over sites and time, [*draws, *contexts]: JAX arrays, or NumPy arrays on the host."""

    log_prior: Any
    log_q: Any
    log_likelihood: Any
    reward: Any
    log_ratio: Any = None
    doubt: Any = None

    @property
    def ratio(self) -> Any:
        """Log π₀ − log q, nats: the direct form if there is one, else the difference of the two."""
        return self.log_prior - self.log_q if self.log_ratio is None else self.log_ratio

    def log_weight(self, beta: Any) -> Any:
        """W = R/β + log p(y|x) + log π₀ − log q, nats: at the optimum constant, and equal to log Z (+ log p(y))."""
        return self.reward / beta + self.log_likelihood + self.ratio

    def under(self, log_q: Any, ratio: Any = None) -> "Totals":
        """Return the scores of the same draws with another log q."""
        return self._replace(log_q=log_q, log_ratio=ratio, doubt=None)


def total(scores: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """Sum per-site scores [..., T] over sites and time, to `shape`."""
    result = jnp.zeros(shape)
    for score in scores.values():
        result = result + score.sum(-1)
    return result
