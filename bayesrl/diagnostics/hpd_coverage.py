"""`coverage`: whether a tilted fit's likeliest regions hold as many exact draws of p* as they should."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

from bayesrl.argument_types import Requirement
from bayesrl.arguments import Level, Untraced, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.core.structure import Structure
from bayesrl.diagnostics.checks import Outcome
from bayesrl.diagnostics.comparison import unlike_sites
from bayesrl.diagnostics.diagnosed_fit import full_data_fit
from bayesrl.display.formatting import format_beta, format_estimate, format_percent, pluralize
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.weighted_draws import WeightedDraws, numpy_generator, refuse_other_regularizer
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Estimate
from bayesrl.statistics.regularizer_names import regularizer_of, regularizer_symbol
from bayesrl.typing import Numbers, PRNGKey

_FALSE_ALARM = 0.01
"""Chance of an alarm over all β and levels if the fit is p*."""

_NEGLIGIBLE = 0.02
"""A share may miss its level by this much, beyond its error, without remark."""

_FINEST = 1e-4
_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, repr=False)
class Coverage(Displayable):
    """How many exact draws of p* lie in the fit's regions of highest probability.

    Attributes:
        beta: temperatures, [*beta], reward units per nat; None without rewards.
        levels: probability of each region under the fit, [level].
        share: share of exact draws inside, with standard error, [*beta, level]; mean over contexts.
        error: standard error that `share` would have if the fit were p*, [*beta, level].
        num_samples: number of draws from p*, and as many from the fit, at each β.
        regularizer: symbol of what keeps p* near the prior, such as KL or χ².

    Example:
        >>> import jax.numpy as jnp, numpy as np, bayesrl
        >>> from bayesrl.diagnostics.hpd_coverage import Coverage
        >>> share = bayesrl.Estimate(jnp.array([0.31, 0.52]), jnp.array([0.01, 0.01]))
        >>> found = Coverage(None, np.array([0.5, 0.9]), share, np.array([0.01, 0.01]), 4096)
        >>> found.verdict, found.explanation[:40]
        ('fail', "The fit's 90% region holds 52% of p*; it")
    """

    beta: np.ndarray | None
    levels: np.ndarray
    share: Estimate
    error: np.ndarray
    num_samples: int
    regularizer: str = "KL"

    @property
    def outcomes(self) -> np.ndarray:
        """Fail if a region holds too little, warn if too much, pass within error, [*beta, level]."""
        apart = np.asarray(self.share.mean) - self.levels
        limit = float(ndtri(1 - _FALSE_ALARM / (2 * apart.size))) * self.error + _NEGLIGIBLE
        return np.where(apart < -limit, "fail", np.where(apart > limit, "warn", "pass"))

    @property
    def verdict(self) -> Outcome:
        """Fail if any region holds too little, else warn if any holds too much."""
        outcomes: Sequence[Outcome] = ("fail", "warn")
        return next((outcome for outcome in outcomes if (self.outcomes == outcome).any()), "pass")

    @property
    def explanation(self) -> str:
        """What the worst region shows, and what to do."""
        if self.verdict == "pass":
            return f"The fit's regions hold as much of {self._target} as they should."
        apart = np.asarray(self.share.mean) - self.levels
        wrong = np.where(self.outcomes == self.verdict, np.abs(apart), -1.0)
        worst = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        where = "" if self.beta is None else f" at β = {float(self.beta[worst[:-1]]):.3g}"
        share, level = float(np.asarray(self.share.mean)[worst]), float(self.levels[worst[-1]])
        how = (
            "it is too narrow, or has dropped a mode: use more restarts and select('mixture')"
            + (", or ForwardKL()" if self.regularizer == "KL" else "")
            if self.verdict == "fail"
            else "it is too wide: fit longer, or choose a richer guide"
        )
        return (
            f"The fit's {format_percent(level)} region holds {format_percent(share)} of {self._target}{where}; {how}."
        )

    @property
    def _target(self) -> str:
        return "p*" if self.regularizer == "KL" else f"p*, the optimum with {self.regularizer} in the place of KL,"

    def table(self) -> Table:
        """One row per temperature, with the share in each level's region."""
        betas = [None] if self.beta is None else [float(b) for b in np.atleast_1d(self.beta)]
        mean, se = (np.reshape(np.asarray(part), (len(betas), -1)) for part in self.share)
        rows = [
            (
                format_beta(beta),
                *(format_estimate(Estimate(jnp.asarray(m), jnp.asarray(s))) for m, s in zip(*pair, strict=True)),
            )
            for beta, *pair in zip(betas, mean, se, strict=True)
        ]
        return Table(("β", *(f"in {100 * level:g}%" for level in self.levels)), rows)

    def _blocks(self) -> Sequence[DisplayBlock]:
        drawn = pluralize(self.num_samples, "exact draw")
        legend = f"(share of {drawn} in the fit's region of that probability; ± standard error)"
        return (Line(self.explanation, self.verdict), self.table(), Line(legend))


@checked(EngineError, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def coverage(
    key: PRNGKey,
    posterior: Posterior,
    target: WeightedDraws,
    *,
    levels: Annotated[Sequence[Level], Requirement("some levels, such as (0.5, 0.9)", bool)] = (0.5, 0.8, 0.95),
    num_samples: Annotated[int, integer_range(100)] = 4096,
) -> Coverage:
    """Count the exact draws of p* that lie in the fit's regions of highest probability.

    The region of level α is {x : log q(x) ≥ c}, where c makes q put probability α there. If several values
    tie at c, a lottery admits just enough of them for q's share to be exactly α. For draws x ~ p*

        share(α) = P_p*[u(x) ≤ α],   u(x) = P_q[log q(X) > log q(x)] + V·P_q[log q(X) = log q(x)],

    where V is uniform on (0, 1). The share is α if q = p*, per context. A fit that collapsed or dropped a
    mode covers too little; a fit around the same place but wider than p* covers too much. A fit that is
    flat where p* lies covers every level by chance alone; look at its gap, which reveals that.

    Args:
        key: consumed whole.
        posterior: the fit. For each β the best restart is used, or the mixture if you selected one.
        target: exact draws of p* at the same β, from `enumerate_posterior` or `rejection`; with the regulariser of
            the fit.
        levels: probabilities α of the regions, between 0 and 1.
        num_samples: number of draws from p*, and as many from the fit, at each β.

    Returns:
        `Coverage`. If q = p*, its verdict differs from `pass` in less than 1% of cases.

    Raises:
        EngineError: the target's draws are not exact or tilt nature, or `levels` or `num_samples` are out
            of range.
        PolicyError: the target has other β, other contexts or another policy; or the posterior was loaded without
            its policy.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> posterior = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=500, progress=False)
        >>> bayesrl.coverage(jax.random.key(1), posterior, bayesrl.enumerate_posterior(bandit, beta=1.0)).verdict
        'pass'

    References:
        Hyndman (1996), "Computing and graphing highest density regions", section 2; Cook, Gelman &
        Rubin (2006), "Validation of software for Bayesian models using posterior quantiles".
    """
    fit = full_data_fit(posterior)
    structure = fit._programs_for().structure
    betas = _matched(fit, structure, target)
    exact_key, fit_key, tie_key = split_keys(key, 3)
    rng, ranks = numpy_generator(tie_key), []
    for i, beta in enumerate(betas):
        one, exact = (fit, target) if beta is None else (fit.select(beta=beta), target.select(beta))
        assert exact is not None
        draws = exact.resample(fold_in(exact_key, i), num_samples)
        ranks.append(_ranks(fold_in(fit_key, i), rng, one, draws, num_samples))
    alphas = np.asarray(levels, float)
    inside = np.stack([[(u <= level).mean(1) for level in alphas] for u in ranks])  # [lane, level, draw]
    shape = (*np.shape(fit.beta if fit.beta is not None else 1.0), len(alphas))
    # The fit's draws define the regions, which adds their noise; rejection's draws repeat, which adds theirs.
    worth = 2 / num_samples + (0.0 if target.ess is None else 1 / max(float(np.min(target.ess)), 1.0))
    contexts = max(math.prod(structure.context_shape), 1)
    mean, se = inside.mean(-1), np.sqrt(inside.var(-1, ddof=1) * worth)
    error = np.broadcast_to(np.sqrt(alphas * (1 - alphas) / contexts * worth), shape)
    share = Estimate(jnp.asarray(mean.reshape(shape)), jnp.asarray(se.reshape(shape)))
    own = None if fit.beta is None else np.asarray(fit.beta, float)
    return Coverage(own, alphas, share, error, num_samples, regularizer_symbol(*regularizer_of(fit.settings)))


def _matched(fit: Posterior, structure: Structure, target: WeightedDraws) -> list[float | None]:
    """Return each β of the fit; refuse targets that do not hold exact draws of p* at all of them."""
    refuse_other_regularizer(target, "the fit has", *regularizer_of(fit.settings))
    if target.ess is not None and target.num_accepted is None:
        raise EngineError(
            "the target holds weighted draws, which are not draws of p*; use enumerate_posterior or rejection"
        )
    nature = structure.names("environment")
    if nature and target.log_evidence is not None:
        raise EngineError(
            f"the target tilts environment site {nature[0]!r}, which is nature's and no policy can; "
            "use enumerate_posterior, whose optimum is that of control"
        )
    ours, theirs = structure.context_shape, target.structure.context_shape
    if ours != theirs:
        raise PolicyError(f"the fit has contexts {ours}, the target {theirs}; give both the same arguments")
    difference = unlike_sites(structure, target.structure)
    if difference:
        raise PolicyError(
            f"fit and target are of different policies: {difference}; make the target of the policy that was fitted"
        )
    if fit.beta is None or target.beta is None:
        if fit.beta is not None or target.beta is not None:
            raise PolicyError(f"the fit has beta={fit.beta}, the target beta={target.beta}; give both the same")
        return [None]
    given = np.reshape(target.beta, -1)
    betas = np.reshape(np.asarray(fit.beta, float), -1)
    for beta in betas:
        if not np.isclose(given, beta, rtol=1e-4).any():
            raise PolicyError(f"the target has no draws at β = {beta:.6g}; it has {', '.join(f'{b:g}' for b in given)}")
    return [float(beta) for beta in betas]


def _ranks(
    key: PRNGKey, rng: np.random.Generator, one: Posterior, exact: dict[str, Numbers], num_samples: int
) -> np.ndarray:
    """Return u of each exact draw, [draw, contexts]: uniform if the fit drew them."""
    own: dict[str, Any] = {name: value[0] for name, value in one.sample(key, num_samples).items() if name in exact}
    # One call scores both, so that equal draws score equally to the last bit.
    both = {name: jnp.concatenate([jnp.asarray(own[name], value.dtype), value]) for name, value in exact.items()}
    score = np.asarray(one.log_prob(both), float)[0].reshape(2 * num_samples, -1)
    score = np.where(np.isfinite(score), score, -1e30)
    finest = max(_FINEST, 4 * _EPS * float(np.abs(score[score > -1e30]).max(initial=0.0)))
    # Round before ranking: scores that differ by rounding alone are ties.
    score = np.round(score / finest)
    result = np.empty((num_samples, score.shape[1]))
    for c in range(score.shape[1]):
        ascending = np.sort(score[:num_samples, c])
        below = np.searchsorted(ascending, score[num_samples:, c], side="left")
        up_to = np.searchsorted(ascending, score[num_samples:, c], side="right")
        # A random place among ties makes u uniform if the draws are alike.
        tied = rng.integers(0, up_to - below, endpoint=True)
        result[:, c] = (num_samples - up_to + tied + rng.random(num_samples)) / (num_samples + 1)
    return result
