"""Draws of a policy with everything that an objective or an estimate needs to know of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class Draws(NamedTuple):
    """Draws with their scores; every array has the leading axes of the draws, [*draws, ...].

    Scores are per context and per time step, [*draws, *contexts, T], with T = 1 outside scans. They
    are keyed by site.

    Attributes:
        sites: values of action and environment sites, [*draws, ...].
        plates: indices of the subsampled plates.
        log_prior: log π₀ of the action sites, nats.
        log_q: log q of the action sites when drawn, nats.
        log_nature: log p of the environment sites, nats.
        log_likelihood: log p of the observed sites, nats.
        rewards: rewards, reward units (nats where the policy stands under `tilt`).
        metrics: values of deterministic sites.
        scores: log q of the action sites as `log_q`, but whatever `numpyro.handlers.scale` makes of them:
            what a score-function gradient differentiates.
        guide_metrics: values of the deterministic sites that the guide alone has, such as a critic's.
        log_behaviour: as `scores`, under what really drew the actions; `scores` itself where the guide did.
        log_ratio: log π₀ − log q of the action sites of which it is known better than by the difference of both.
        doubt: how much single precision may be off by in log π₀ − log q, nats, of the sites whose densities are
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
        """Hold values of sites that nothing has scored yet."""
        return cls(dict(sites), {}, {}, {}, {}, {}, {}, {}, {}, {}, {})

    def totals(self, shape: tuple[int, ...]) -> "Totals":
        """Sum scores over sites and time to `shape`, which is [*draws, *contexts]."""
        return Totals(
            total(self.log_prior, shape),
            total(self.log_q, shape),
            total(self.log_likelihood, shape),
            total(self.rewards, shape),
            log_ratio=total(self.ratios, shape) if self.log_ratio else None,
            doubt=total(self.doubt, shape) if self.doubt else None,
        )

    @property
    def ratios(self) -> dict[str, Array]:
        """Log π₀ − log q of the action sites, [*draws, *contexts, T], nats."""
        return {name: self.log_prior[name] - log_q for name, log_q in self.log_q.items()} | self.log_ratio

    def scored(self, log_q: dict[str, Array]) -> "Draws":
        """Give the same draws under another policy: what was known of ratios to the one before is forgotten."""
        return self._replace(log_q=log_q, log_ratio={}, doubt={})


class Totals(NamedTuple):
    """Scores summed over sites and time, [*draws, *contexts]: JAX's arrays, or NumPy's on the host."""

    log_prior: Any
    log_q: Any
    log_likelihood: Any
    reward: Any
    log_ratio: Any = None
    doubt: Any = None

    @property
    def ratio(self) -> Any:
        """Log π₀ − log q, nats: better than the difference of both where it is known better."""
        return self.log_prior - self.log_q if self.log_ratio is None else self.log_ratio

    def log_weight(self, beta: Any) -> Any:
        """W = R/β + log p(y|x) + log π₀ − log q, nats: constant and equal to log Z (+ log p(y)) at the optimum."""
        return self.reward / beta + self.log_likelihood + self.ratio

    def under(self, log_q: Any, ratio: Any = None) -> "Totals":
        """Give the scores of the same draws under another policy."""
        return self._replace(log_q=log_q, log_ratio=ratio, doubt=None)


def total(scores: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """Sum per-site scores [..., T] over sites and time, to `shape`."""
    result = jnp.zeros(shape)
    for score in scores.values():
        result = result + score.sum(-1)
    return result
