"""`frontier`: reward against KL over an array of β, and whether it behaves as every optimum does."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from scipy.special import ndtri

from bayesrl.arguments import CountOrZero, Untraced, UnusedOption, checked, integer_range
from bayesrl.compilation.jit import trace_cache
from bayesrl.compilation.random_keys import fold_in, split_keys
from bayesrl.diagnostics.checks import Check, Outcome, checks_listing
from bayesrl.diagnostics.diagnosed_fit import full_data_fit
from bayesrl.diagnostics.evidence.bounds import RequestedMethod
from bayesrl.diagnostics.evidence.bounds import evidence as bracketed
from bayesrl.diagnostics.evidence.by_enumeration import MAX_COUNT
from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.display.formatting import estimate_at, format_estimate
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import EngineError, PolicyError
from bayesrl.posterior.posterior import Posterior
from bayesrl.statistics.estimates import Interval
from bayesrl.statistics.regularizer_names import distils, regularizer_of
from bayesrl.typing import PRNGKey

_FALSE_ALARM = 0.01
"""Chance that a true frontier fails any check, over all neighbours together."""

_NEGLIGIBLE, _SMALL = 1e-3, 1e-2
"""Shares of the sweep's range: a violation below the first passes, one below the second only warns."""

_EPS = float(np.finfo(np.float32).eps)
_APART = 4.0
_CELLS = 2**23
_MARGIN = float(ndtri(0.975))


@checked(EngineError)
@dataclass(frozen=True, repr=False)
class Frontier(Displayable):
    """Reward against KL over an array of β, and whether it behaves as every optimum does.

    Attributes:
        beta: temperatures, ascending, reward units per nat, [beta].
        evidence: evidence about the fit at these β.
        checks: `dJ*/dβ = −KL`, `J* non-increasing`, `J* convex`, `E[R] non-increasing`,
            `KL non-increasing`, `E[R] concave in KL`; they pass within error. With another regulariser its symbol
            takes the place of KL.
        gold: the gold metric at each β, or None.
        turning_point: β of the greatest gold while the proxy still rises; None if gold does not turn down.
    """

    beta: np.ndarray
    evidence: Evidence
    checks: tuple[Check, ...]
    gold: Interval | None
    turning_point: float | None

    def table(self) -> Table:
        """One row per temperature, with the gold metric if there is one."""
        listing = self.evidence.table()
        if self.gold is None:
            return listing
        gold = [format_estimate(estimate_at(self.gold, i)) for i in range(len(listing.rows))]
        rows = [(*row, cell) for row, cell in zip(listing.rows, gold, strict=True)]
        return Table((*listing.headings, "gold"), rows)

    def _blocks(self) -> Sequence[DisplayBlock]:
        turn = [] if self.turning_point is None else [Line(f"Gold is greatest at β = {self.turning_point:.3g}.")]
        legend = Line(f"({self.evidence.legend})")
        return (self.table(), legend, checks_listing(self.checks), *turn)


def _made_already(given: Mapping[str, Any]) -> bool:
    return given["evidence"] is not None


_SETTLED = (
    *(UnusedOption(name, _made_already, "evidence= is given") for name in ("method", "reward_bound", "max_count")),
    UnusedOption("num_samples", lambda given: _made_already(given) and given["gold"] is None, "evidence= is given"),
)


@checked(EngineError, *_SETTLED, Untraced("call it outside: it compiles its own programs"))
@trace_cache()
def frontier(
    key: PRNGKey,
    posterior: Posterior,
    *,
    gold: str | None = None,
    evidence: Evidence | None = None,
    num_samples: Annotated[int, integer_range(256)] = 2**15,
    method: RequestedMethod = "auto",
    reward_bound: float | None = None,
    max_count: CountOrZero = MAX_COUNT,
) -> Frontier:
    """Compare reward with KL over β, and ask whether the curve looks like one of optima.

    J*(β) = max_q E_q[R] − β·KL(q‖π₀) is a maximum of straight lines in β. So it is convex and
    non-increasing, dJ*/dβ = −KL(p*‖π₀), E[R] and KL are non-increasing, and E[R] is concave in KL. A
    sweep that breaks this has not converged at some β; a sweep that obeys it may still be limited by
    its family. The check of the derivative needs no step size: between neighbours β < β′

        −KL(β) ≤ (J(β′) − J(β)) / (β′ − β) ≤ −KL(β′),

    that is, at its own temperature no fit loses to the fit at a neighbouring one. All of this holds for any other
    divergence in the place of KL, and for fits with another regulariser it does take its place.

    Args:
        key: consumed whole.
        posterior: fitted at an array of β, in any order. For each β the best restart is used, or the
            mixture if you selected one.
        gold: name of a deterministic site: the true goal that the reward stands for, in its own units.
        evidence: evidence about this posterior, if you already have it.
        num_samples: greatest number of draws at each β.
        method: as in `evidence`.
        reward_bound: as in `evidence`, reward units.
        max_count: as in `evidence`.

    Returns:
        `Frontier`, β ascending. `turning_point` is the β of the greatest gold, provided that at some smaller
        β gold is lower and the reward higher, both significantly.

    Raises:
        PolicyError: there is only one β, or one occurs twice; gold is not a deterministic site; the evidence
            has other β; the fit distils the best of n; or the posterior was loaded without its policy.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> sweep = bayesrl.fit(
        ...     jax.random.key(0), bandit, beta=jnp.array([2.0, 1.0, 0.5]), num_steps=500, progress=False
        ... )
        >>> found = bayesrl.frontier(jax.random.key(1), sweep)
        >>> found.beta.tolist(), {check.outcome for check in found.checks}
        ([0.5, 1.0, 2.0], {'pass'})

    References:
        Boyd & Vandenberghe (2004), "Convex Optimization", sections 3.2.3 and 5.6.3, for maxima of
        lines and their slopes; Gao, Schulman & Hilton (2023), "Scaling laws for reward model
        overoptimization", for gold beside proxy.
    """
    if "best_of_n" in posterior.settings:
        raise PolicyError(f"{distils(posterior.settings['best_of_n'])} That law is the same at every β: no frontier")
    betas, programs = _sweep_of(posterior), full_data_fit(posterior)._programs_for()
    metrics = programs.structure.names("metric")
    if gold is not None and gold not in metrics:
        known = ", ".join(map(repr, metrics)) or "none"
        raise PolicyError(f"gold={gold!r} is not a deterministic site of the policy; it has {known}")
    own_key, gold_key = split_keys(key)
    if evidence is None:
        evidence = bracketed(
            own_key,
            posterior,
            method=method,
            reward_bound=reward_bound,
            num_samples=num_samples,
            max_count=max_count,
        )
    else:
        _check_evidence(evidence, betas, posterior)
    order = np.argsort(betas)
    found = evidence[order]
    price = found.kl if found.divergence is None else found.divergence
    checks = frontier_checks(betas[order], found.objective, found.reward, price, found.symbol)
    metric = None if gold is None else _metric(gold_key, posterior, gold, betas[order], num_samples)
    turn = None if metric is None else turning_point(betas[order], metric, found.reward)
    return Frontier(betas[order], found, checks, metric, turn)


def _check_evidence(evidence: Evidence, betas: np.ndarray, posterior: Posterior) -> None:
    """Refuse evidence about another fit."""
    told, own = (evidence.regularizer, evidence.alpha), regularizer_of(posterior.settings)
    if told != own:
        raise PolicyError(
            f"evidence is of a fit with regularizer={told[0]!r}, the posterior has regularizer={own[0]!r}; "
            "pass evidence of this fit"
        )
    if evidence.beta is None or np.shape(evidence.beta) != betas.shape or not np.allclose(evidence.beta, betas):
        raise PolicyError(
            f"evidence is of β = {evidence.beta}, the posterior of β = {betas}; pass evidence of this fit"
        )


def _sweep_of(posterior: Posterior) -> np.ndarray:
    """Return the temperatures, [beta], in the order of the fit."""
    if posterior.beta is None or np.size(posterior.beta) < 2:
        given = "no β" if posterior.beta is None else f"β = {float(np.reshape(posterior.beta, -1)[0]):.3g} alone"
        raise PolicyError(
            f"this posterior has {given}, and a frontier needs at least two; "
            "fit an array, such as beta=jnp.geomspace(0.1, 10.0, 8)"
        )
    betas = np.asarray(posterior.beta, float)
    ascending = np.sort(betas)
    same = ascending[1:] <= ascending[:-1] * (1 + 1e-6)
    if same.any():
        raise PolicyError(f"β = {ascending[1:][same][0]:.6g} was fitted twice; fit each temperature once")
    return betas


def _metric(key: PRNGKey, posterior: Posterior, name: str, betas: np.ndarray, num_samples: int) -> Interval:
    """Estimate a deterministic site at each β from fresh draws, one β after another to spare memory."""
    whole = full_data_fit(posterior)
    num = max(256, min(num_samples, _CELLS // max(whole._programs_for().structure.num_contexts, 1)))
    found = []
    for i, beta in enumerate(betas):
        estimate = whole.select(beta=float(beta)).estimate(fold_in(key, i), num).metrics[name]
        found.append([float(np.mean(part)) for part in estimate])
    mean, se = np.asarray(found).T
    # Nothing bounds a metric, so there is no limit without its standard error.
    return Interval.normal(mean, se, math.inf)


def turning_point(beta: np.ndarray, gold: Interval, reward: Interval) -> float | None:
    """Find the β (ascending) of the greatest gold, if at a smaller β gold is lower and E[R] higher, beyond error."""
    top, num = int(np.argmax(gold.mean)), len(beta)
    z = float(ndtri(1 - _FALSE_ALARM / (num * (num - 1))))
    # Bonferroni over both tests of every pair of β, as the place of the maximum is not fixed beforehand.

    def beyond(quantity: Interval, sign: float) -> np.ndarray:
        rise = sign * (quantity.mean[:top] - quantity.mean[top])
        error = z * np.hypot(quantity.se[:top], quantity.se[top]) + 16 * _EPS * float(np.abs(quantity.mean).max())
        return np.asarray(rise > error)

    return float(beta[top]) if (beyond(gold, -1.0) & beyond(reward, 1.0)).any() else None


# ---- what any optimum obeys ------------------------------------------------------------------


class _Broken(NamedTuple):
    """How far an inequality is broken, [places]; its error; the smaller index of β at each place."""

    amount: np.ndarray
    se: np.ndarray
    place: np.ndarray


def frontier_checks(
    beta: np.ndarray, objective: Interval, reward: Interval, kl: Interval, price: str = "KL"
) -> tuple[Check, ...]:
    """Ask of each pair and triple of neighbours, in ascending order, whether optima could look like this.

    `kl` is KL, or the divergence that takes its place in J and whose symbol is `price`.

    A check's value is how far the worst neighbours break it, below 0 if none do, in reward units
    (nats for KL). It passes within error: z·se, with z such that a true frontier fails any
    check with probability 1% at most (Bonferroni), plus 0.1% of the range of the sweep, which no
    finite fit escapes. Up to 1% of the range is a warning, beyond that a failure.
    """
    sweep = _Sweep(beta, objective, reward, kl)
    num = len(beta)
    # Two tests of slope and three of monotonicity per pair of neighbours, two of curvature per triple.
    z = float(ndtri(1 - _FALSE_ALARM / (5 * (num - 1) + 2 * max(num - 2, 0))))
    size = float(np.max(np.abs([reward.mean, objective.mean, beta * kl.mean])))
    in_reward = (float(np.ptp(reward.mean)), 16 * _EPS * size)
    in_nats = (float(np.ptp(kl.mean)), 16 * _EPS * float(np.abs(kl.mean).max()))
    rises = "{what} rises by {amount} from β = {at} to {next}"
    bends = "{what} by {amount} at β = {at}"
    questions = [
        (f"dJ*/dβ = −{price}", sweep.slope(), in_reward, _BEATEN, "", f"J* is a maximum of lines E_q[R] − β·{price}"),
        ("J* non-increasing", sweep.rising(objective), in_reward, rises, "J", f"dJ*/dβ = −{price} ≤ 0"),
        ("J* convex", sweep.bent_down(), in_reward, bends, "J bends down", "J* is a maximum of lines in β"),
        ("E[R] non-increasing", sweep.rising(reward), in_reward, rises, "E[R]", f"d E[R]/dβ = β·d{price}/dβ ≤ 0"),
        (f"{price} non-increasing", sweep.rising(kl), in_nats, rises, price, f"{price} = −dJ*/dβ, and J* is convex"),
        (
            f"E[R] concave in {price}",
            sweep.hollow(),
            in_reward,
            bends,
            _HOLLOW,
            f"dE[R]/d{price} = β, which falls as it rises",
        ),
    ]
    checks = []
    for name, broken, (span, rounding), words, what, reference in questions:
        if len(broken.amount) == 0 or not np.isfinite(broken.amount).all():
            checks.append(Check(name, math.nan, _NEGLIGIBLE * span, "unknown", _TOO_FEW, reference))
            continue
        allowed = z * broken.se + _NEGLIGIBLE * span + rounding
        with np.errstate(divide="ignore", invalid="ignore"):
            # Errors differ from place to place, so the worst is that which most exceeds its own allowance.
            worst = int(np.argmax(np.nan_to_num(broken.amount / allowed, nan=0.0)))
        value, limit, place = float(broken.amount[worst]), float(allowed[worst]), int(broken.place[worst])
        outcome: Outcome = "pass" if value <= limit else "warn" if value <= limit + _SMALL * span else "fail"
        explanation = "no neighbouring β break it beyond error."
        if outcome != "pass":
            at, following = (f"{beta[min(i, num - 1)]:.3g}" for i in (place, place + 1))
            where = words.format(what=what, amount=f"{value:.3g}", at=at, next=following)
            explanation = f"{where}: fit longer there, or use more restarts."
        checks.append(Check(name, value, limit, outcome, explanation, reference))
    return tuple(checks)


_BEATEN = "at β = {at} the policy of a neighbouring β scores {amount} more than its own"
_HOLLOW = "E[R] lies under the chord of its neighbours"
_TOO_FEW = "the β are too few, too close or too noisy to tell: fit more of them, or take more draws."


class _Sweep:
    """J, E[R] and KL by ascending β; the draws at different β are independent."""

    def __init__(self, beta: np.ndarray, objective: Interval, reward: Interval, kl: Interval) -> None:
        self.beta, self.objective, self.reward, self.kl = beta, objective, reward, kl

    def _error_at(self, index: Any, temperature: np.ndarray) -> np.ndarray:
        """Bound the standard error of E[R] − β′·KL = J − (β′ − β)·KL, whatever the correlation of J and KL."""
        apart = np.abs(temperature - self.beta[index])
        return np.asarray(self.objective.se[index] + apart * self.kl.se[index])

    def slope(self) -> _Broken:
        """How far a neighbour's policy beats a fit at the fit's own temperature; neighbours above, then below."""
        num = len(self.beta)
        own = np.concatenate([np.arange(num - 1), np.arange(1, num)])
        other = np.concatenate([np.arange(1, num), np.arange(num - 1)])
        beta = self.beta[own]
        amount = self.reward.mean[other] - beta * self.kl.mean[other] - self.objective.mean[own]
        return _Broken(amount, np.hypot(self._error_at(other, beta), self.objective.se[own]), own)

    def rising(self, quantity: Interval) -> _Broken:
        """How far a quantity rises with β."""
        rise = quantity.mean[1:] - quantity.mean[:-1]
        return _Broken(rise, np.hypot(quantity.se[1:], quantity.se[:-1]), np.arange(len(rise)))

    def bent_down(self) -> _Broken:
        """How far J lies above the chord of its neighbours, over β."""
        beta, mean, se = self.beta, self.objective.mean, self.objective.se
        left = (beta[2:] - beta[1:-1]) / (beta[2:] - beta[:-2])
        amount = mean[1:-1] - left * mean[:-2] - (1 - left) * mean[2:]
        error = np.sqrt(se[1:-1] ** 2 + (left * se[:-2]) ** 2 + ((1 - left) * se[2:]) ** 2)
        return _Broken(amount, error, np.arange(1, len(beta) - 1))

    def hollow(self) -> _Broken:
        """How far E[R] lies under the chord of its neighbours, over KL; only where KLs differ beyond error."""
        kl, reward = self.kl.mean, self.reward.mean
        apart = kl[:-1] - kl[1:] - _APART * np.hypot(self.kl.se[:-1], self.kl.se[1:])
        # Where KLs hardly differ, the slope of the chord would be noise divided by noise.
        clear = apart > 16 * _EPS * float(np.abs(kl).max())
        at = 1 + np.flatnonzero(clear[:-1] & clear[1:])
        steep = (reward[at - 1] - reward[at + 1]) / (kl[at - 1] - kl[at + 1])
        left = (kl[at] - kl[at + 1]) / (kl[at - 1] - kl[at + 1])
        amount = reward[at + 1] + steep * (kl[at] - kl[at + 1]) - reward[at]
        # To first order the error is that of E[R] − s·KL at the three points, where s is the slope of the chord.
        parts = (left * self._error_at(at - 1, steep), (1 - left) * self._error_at(at + 1, steep))
        error = np.sqrt(parts[0] ** 2 + parts[1] ** 2 + self._error_at(at, steep) ** 2)
        return _Broken(amount, error, at)
