"""Random preference bandits: what intervals of gold cover, what pessimism earns, and where sweeps turn.

Bandits of 20 to 200 items with 50 to 2,000 comparisons (both log-uniform). Gold scores are N(0, 1), the prior of the
model; π₀ is a softmax of N(0, 1), both items of a comparison are drawn from it, and Bradley and Terry answer. The
posterior of the scores is exact but for its number of draws: 1,000 of Gibbs sampling with Pólya–Gamma variables.
Policies are tilts of π₀ in closed form at each β of a sweep by factors of 2: by the posterior mean, by pessimism
(μ − s²/2β, with the moments of the posterior, of differences from π₀'s mean reward) and by the maximum-likelihood point
(with a weak prior of sd 10, or items that never lost would have no score). Gains are over π₀; errors are of paired
differences.

*What holds by theorem.* Gold is a draw of the prior, so that given the comparisons it is a draw of the posterior, and
E[gold of q] = E_q[μ] for every policy that the comparisons decide. The tilt by μ is therefore the best of all policies
in E[gold] − β·KL at its β, and in E[gold] at its KL. Pessimism and the ML point can only have more gold at the same β
where they spend more KL, and as β goes to 0 the tilt by μ takes argmax μ, which no policy beats.

*Where the prior is not known*, the posterior under the weak prior (Laplace's approximation at the ML point) is all
there is. Its pessimism is compared with the ML point itself: −β·log E e^{−r/β} at the β of the fit, and mean − sd.

*The turning point* of a sweep is the β at which measured gold is greatest, if it is less at the end. It is one draw:
even a perfect posterior knows it only up to P(turn | comparisons). "Best possible" is the probability under
the posterior of the best three neighbouring β, given that the sweep turns: no prediction hits more often on average.
"Most probable" predicts the middle one of them.
"""

import sys
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import brentq
from scipy.special import expit, logsumexp

from bayesrl import rewards
from bayesrl.diagnostics.drawn_rewards import DrawnRewards
from bayesrl.diagnostics.proxy_gains import Overoptimisation, likely_turn_of
from bayesrl.diagnostics.proxy_trust import gains_of_table
from bayesrl.preferences.engines.gibbs_sampling import polya_gamma
from benchmarks.results import table, target

NUM_BANDITS = 500
CHAINS, WARMUP, KEPT = 4, 100, 250
BETA = 4.0 * 0.5 ** np.arange(9)
ML_PRECISION = 0.01
POLICIES = ("mean", "pessimistic", "ML point")
WEAK = ("pessimistic", "mean − sd")
"""Attitudes to a posterior under the weak prior, beside its ML point."""
LOW = 0.3
"""Below this β the pessimistic policy is asked to earn more."""


class Bandit(NamedTuple):
    """A bandit with comparisons of its items."""

    gold: np.ndarray  # [items]
    log_prior: np.ndarray  # [items]
    first: np.ndarray  # [comparisons]
    second: np.ndarray
    won: np.ndarray  # whether the first did


def draw_bandit(rng: np.random.Generator) -> Bandit:
    """Draw a bandit, and let gold judge pairs that π₀ draws."""
    items, pairs = (int(np.exp(rng.uniform(*np.log(ends)))) for ends in ((20, 200), (50, 2000)))
    gold, logits = rng.normal(size=(2, items))
    log_prior = logits - logsumexp(logits)
    first, second = rng.choice(items, size=(2, pairs), p=np.exp(log_prior))
    while (same := first == second).any():
        second[same] = rng.choice(items, size=same.sum(), p=np.exp(log_prior))
    return Bandit(gold, log_prior, first, second, rng.random(pairs) < expit(gold[first] - gold[second]))


def laplacian(bandit: Bandit, weights: np.ndarray, precision: float) -> np.ndarray:
    """Return Σ w (eᵢ − eⱼ)(eᵢ − eⱼ)ᵀ + precision·I, [items, items]."""
    items, i, j = len(bandit.gold), bandit.first, bandit.second
    cells = np.concatenate([i * items + i, j * items + j, i * items + j, j * items + i])
    flat = np.bincount(cells, np.concatenate([weights, weights, -weights, -weights]), items**2)
    return flat.reshape(items, items) + precision * np.eye(items)


def slope(bandit: Bandit, errors: np.ndarray) -> np.ndarray:
    """Return Σ error·(eᵢ − eⱼ), [items]."""
    items = len(bandit.gold)
    return np.bincount(bandit.first, errors, items) - np.bincount(bandit.second, errors, items)


def posterior_draws(rng: np.random.Generator, bandit: Bandit) -> np.ndarray:
    """Draw from the posterior of the scores by Gibbs sampling, [draws, items]."""
    items = len(bandit.gold)
    shift = slope(bandit, bandit.won - 0.5)
    scores, kept = rng.normal(size=(CHAINS, items)), []
    for step in range(WARMUP + KEPT):
        omega = polya_gamma(rng, scores[:, bandit.first] - scores[:, bandit.second])
        roots = np.linalg.cholesky(np.stack([laplacian(bandit, weights, 1.0) for weights in omega]))
        noise = rng.normal(size=scores.shape)
        scores = np.stack([_normal(root, shift, own) for root, own in zip(roots, noise, strict=True)])
        if step >= WARMUP:
            kept.append(scores)
    return np.concatenate(kept)


def _normal(root: np.ndarray, shift: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return a draw of N(P⁻¹ shift, P⁻¹), with P = root·rootᵀ."""
    half = solve_triangular(root, shift, lower=True) + noise
    return np.asarray(solve_triangular(root, half, lower=True, trans="T"))


def mode(bandit: Bandit, precision: float) -> np.ndarray:
    """Find the scores of greatest posterior density under a prior of this precision, by Newton's method."""
    scores = np.zeros(len(bandit.gold))
    for _ in range(200):
        chance = expit(scores[bandit.first] - scores[bandit.second])
        gradient = slope(bandit, bandit.won - chance) - precision * scores
        step = np.linalg.solve(laplacian(bandit, chance * (1 - chance), precision), gradient)
        scores = scores + step * min(1.0, 3.0 / np.abs(step).max())
        if np.abs(step).max() < 1e-9:
            break
    return scores


def tilt(log_prior: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """Return log p* ∝ π₀·e^{r/β}."""
    log_p = log_prior + reward / beta
    return log_p - logsumexp(log_p)


def kl(log_q: np.ndarray, log_prior: np.ndarray) -> float:
    """Return KL(q‖π₀), nats."""
    return float(np.exp(log_q) @ (log_q - log_prior))


def at_kl(log_prior: np.ndarray, reward: np.ndarray, wanted: float) -> np.ndarray:
    """Return the tilt by a reward whose KL is `wanted`, or the last below where the greatest item is not enough."""

    def over(log_beta: float) -> float:
        return kl(tilt(log_prior, reward, np.exp(log_beta)), log_prior) - wanted

    ends = (-9.0, 9.0)
    root = ends[0] if over(ends[0]) < 0 else ends[1] if over(ends[1]) > 0 else brentq(over, *ends)
    return tilt(log_prior, reward, np.exp(root))


class Found(NamedTuple):
    """What one bandit showed; arrays are [policies, β] in the order of BETA."""

    gain: np.ndarray
    kl: np.ndarray
    same_kl: np.ndarray  # gain of the tilt by the mean at the KL of each policy
    covered: np.ndarray  # whether the 90% interval of E_q[r] holds E_q[gold]
    predicted: np.ndarray
    said: np.ndarray  # what the policy's own point reward says of its gain
    weak: np.ndarray  # gain of attitudes to the posterior under a weak prior, [attitudes, β]
    turning: dict[str, tuple[float, ...]]  # see `turning_of`


def examine(rng: np.random.Generator) -> Found:
    """Fit all policies to one bandit, and compare what is predicted with gold."""
    bandit = draw_bandit(rng)
    draws, log_prior = posterior_draws(rng, bandit), bandit.log_prior
    mean, covariance = draws.mean(0), np.cov(draws.T)
    points = {"mean": mean, "ML point": mode(bandit, ML_PRECISION)}
    prior, found, turning = np.exp(log_prior), [], {}
    for name in POLICIES:
        by_beta = [points[name]] * len(BETA) if name in points else pessimistic(mean, covariance, prior)
        laws = [tilt(log_prior, reward, beta) for reward, beta in zip(by_beta, BETA, strict=True)]
        # The same posterior and tables as `overoptimisation` would make of a program.
        rows = DrawnRewards(by_beta[-1][:, None], draws.T[..., None], bandit.gold[:, None])
        gains = gains_of_table(BETA, log_prior[:, None], [law[:, None] for law in laws], rows)
        policies = np.exp(laws)
        ends = np.quantile(draws @ policies.T, [0.05, 0.95], axis=0)
        gold = policies @ bandit.gold
        found.append(
            (
                gold - prior @ bandit.gold,
                [kl(law, log_prior) for law in laws],
                [
                    np.exp(at_kl(log_prior, mean, kl(law, log_prior))) @ bandit.gold - prior @ bandit.gold
                    for law in laws
                ],
                (ends[0] <= gold) & (gold <= ends[1]),
                policies @ mean - prior @ mean,
                [policy @ reward - prior @ reward for policy, reward in zip(policies, by_beta, strict=True)],
            )
        )
        turning[name] = turning_of(gains, (draws @ (policies - prior).T).T)
    parts = [np.asarray(part) for part in zip(*found, strict=True)]
    return Found(*parts, weak_gains(bandit, points["ML point"]), turning)


def weak_gains(bandit: Bandit, scores: np.ndarray) -> np.ndarray:
    """Return the gains of attitudes to Laplace's approximation at the ML point, [attitudes, β]."""
    chance = expit(scores[bandit.first] - scores[bandit.second])
    covariance = np.linalg.inv(laplacian(bandit, chance * (1 - chance), ML_PRECISION))
    prior = np.exp(bandit.log_prior)
    wary = rewards.uncertain((scores, covariance), attitude="sd_penalty", reference=prior).values
    found = []
    for beta, own in zip(BETA, pessimistic(scores, covariance, prior), strict=True):
        policies = [np.exp(tilt(bandit.log_prior, reward, beta)) for reward in (own, wary)]
        found.append([(policy - prior) @ bandit.gold for policy in policies])
    return np.asarray(found).T


def pessimistic(mean: np.ndarray, covariance: np.ndarray, prior: np.ndarray) -> list[np.ndarray]:
    """Return the pessimistic rewards of a normal posterior at each β, relative to π₀."""
    first = rewards.uncertain((mean, covariance), attitude="pessimistic", beta=1.0, reference=prior)
    # Of one belief, whose covariance is factored once.
    return [replace(first, attitude=first.attitude._replace(beta=float(beta))).values for beta in BETA]


def turning_of(gains: Overoptimisation, drawn: np.ndarray) -> tuple[float, ...]:
    """Find where measured gold turns (or −1), where it was predicted to, and how well that can be known.

    Predictions are of the lower end, of the posterior mean, and the most probable; then the probability of the best
    three neighbours, and that the sweep turns at all.

    Args:
        gains: in the order of KL, which is that of BETA if no policy turned back.
        drawn: gains under each draw, [β, draws].
    """
    assert gains.gold is not None
    place = {float(beta): at for at, beta in enumerate(BETA)}
    order = np.array([place[float(beta)] for beta in gains.strength])
    last = len(BETA) - 1
    measured, lower, mean = (int(part.argmax()) for part in (gains.gold.mean, gains.lower, gains.predicted.mean))
    turn = likely_turn_of(drawn[order])
    return (measured if measured < last else -1), lower, mean, *turn


# ---- the tables ------------------------------------------------------------------------------


def run() -> str:
    """Examine all bandits."""
    rng = np.random.default_rng(0)
    found = []
    for at in range(NUM_BANDITS):
        found.append(examine(rng))
        if at % 50 == 49:
            print(f"{at + 1} bandits", file=sys.stderr, flush=True)
    return "\n\n".join(
        [(__doc__ or "").partition("\n\n")[2].strip(), *covered(found), *earned(found), *weakly(found), *turned(found)]
    )


def stacked(found: list[Found], name: str) -> np.ndarray:
    """Return one part of all bandits, [bandits, policies, β]."""
    return np.stack([getattr(one, name) for one in found])


def covered(found: list[Found]) -> list[str]:
    """Tell how often 90% intervals hold the gold reward of the policy."""
    hits, said = stacked(found, "covered"), stacked(found, "said") - stacked(found, "gain")
    rows = [
        [f"{beta:.3g}", *(f"{share:.1%}" for share in hits[:, :, at].mean(0)), *map(measure, said[:, :, at].T)]
        for at, beta in enumerate(BETA)
    ]
    header = ["β", *(f"covered, {name}" for name in POLICIES), *(f"own reward − gold, {name}" for name in POLICIES)]
    overall = hits.mean((0, 2))
    words = [
        target(
            "90% intervals of the gold reward of the fitted policy cover 87–93%, over all β",
            met=bool(((overall >= 0.87) & (overall <= 0.93)).all()),
            why_not=f"they cover {', '.join(f'{share:.1%}' for share in overall)}",
        )
    ]
    return [table(header, rows), f"Over all β: {', '.join(f'{share:.1%}' for share in overall)}.", *words]


def earned(found: list[Found]) -> list[str]:
    """Compare gold at the same β, at the same KL, and J."""
    gain, spent, same = (stacked(found, name) for name in ("gain", "kl", "same_kl"))
    objective = gain - BETA * spent
    rows, better = [], {"mean": [], "ML point": []}  # type: ignore[var-annotated]
    for at, beta in enumerate(BETA):
        mean, wary, point = gain[:, :, at].T
        rows.append(
            [
                f"{beta:.3g}",
                *(f"{value:.2f}" for value in spent[:, :, at].mean(0)),
                measure(mean),
                measure(wary - mean),
                measure(wary - point),
                measure(wary - same[:, 1, at]),
                measure(point - same[:, 2, at]),
                measure(objective[:, 1, at] - objective[:, 0, at]),
            ]
        )
        if beta < LOW:
            better["mean"].append(surely(wary - mean))
            better["ML point"].append(surely(wary - point))
    header = [
        "β",
        *(f"KL, {name}" for name in POLICIES),
        "gold, mean",
        "pessimistic − mean",
        "pessimistic − ML",
        "the same at equal KL: pessimistic − mean",
        "ML − mean",
        "J: pessimistic − mean",
    ]
    words = [
        target(
            f"pessimism earns more gold than the {name} at every β under {LOW}",
            met=all(sure > 0 for sure in better[name]),
            why_not=_why(better[name]),
        )
        for name in better
    ]
    return [table(header, rows), *words]


def weakly(found: list[Found]) -> list[str]:
    """Compare attitudes to a posterior under a weak prior with its ML point."""
    point, weak = stacked(found, "gain")[:, POLICIES.index("ML point")], stacked(found, "weak")
    rows, better = [], []
    for at, beta in enumerate(BETA):
        own, others = point[:, at], weak[:, :, at].T
        worse = [f"{(gain < 0).mean():.1%}" for gain in (own, *others)]
        rows.append([f"{beta:.3g}", measure(own), *(measure(other - own) for other in others), *worse])
        if beta < LOW:
            better.append([surely(other - own) for other in others])
    header = ["β", "gold, ML point", *(f"{name} − ML point" for name in WEAK)]
    header += [f"worse than π₀: {name}" for name in ("ML point", *WEAK)]
    words = [
        target(
            f"under the weak prior, {name} earns more gold than the ML point at every β under {LOW}",
            met=all(one > 0 for one in sure),
            why_not=_why(list(sure)),
        )
        for name, sure in zip(WEAK, zip(*better, strict=True), strict=True)
    ]
    return [table(header, rows), *words]


def _why(sure: list[int]) -> str:
    told = {1: "more", 0: "no difference beyond 2 standard errors", -1: "less"}
    low = [beta for beta in BETA if beta < LOW]
    return "; ".join(f"{told[one]} at β = {beta:.3g}" for one, beta in zip(sure, low, strict=True))


def turned(found: list[Found]) -> list[str]:
    """Tell how near predicted turning points are to measured ones."""
    rows, rates = [], {}
    for name in POLICIES:
        each = np.asarray([one.turning[name] for one in found])
        there = each[:, 0] >= 0
        measured, *predicted, chance, _ = each[there].T
        hits = [float((np.abs(measured - other) <= 1).mean()) for other in predicted]
        rates[name] = hits[0]
        average = [stacked(found, part)[:, POLICIES.index(name)].mean(0).argmax() for part in ("gain", "predicted")]
        rows.append(
            [
                name,
                f"{there.mean():.1%}",
                f"{each[:, -1].mean():.1%}",
                *(f"{hit:.1%}" for hit in hits),
                f"{chance.mean():.1%}",
                " and ".join(f"{BETA[at]:.3g}" for at in average),
            ]
        )
    header = [
        "policy",
        "sweeps that turn",
        "predicted share",
        "within one step: lower end",
        "predicted mean",
        "most probable",
        "best possible",
        "β of the greatest average gold, and predicted",
    ]
    words = target(
        "the predicted turning point (of the lower end) is within one step of the measured one in 90% of the sweeps "
        "that turn",
        met=min(rates.values()) >= 0.9,
        why_not="; ".join(f"{name}: {rate:.0%}" for name, rate in rates.items()),
    )
    return [table(header, rows), words]


def measure(values: np.ndarray) -> str:
    """Write a mean with its standard error over bandits."""
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def surely(values: np.ndarray) -> int:
    """Return the sign of a mean that is beyond two standard errors, else 0."""
    z: Any = values.mean() / (values.std(ddof=1) / len(values) ** 0.5)
    return int(np.sign(z)) if abs(z) > 2 else 0
