"""Bias of the gradient, for the estimators of other trainers and ours, by listing all groups of draws.

Two problems, small enough for exact sums. *Bandit*: five arms of equal prior probability, β = .1; one context pays
.1, .3, .5, .7, .9 and one pays the last arm alone; groups of 8 draws. *Texts*: up to three letters and an end, 15
texts, β = .2; one context pays the share of a letter and one pays a single text; groups of 3 draws. Policies are tables
of logits. The exact gradient is that of J = E[R] − β·KL(q‖π₀), at logits that are the prior's plus normal numbers of sd
.7.

*Bias* is ‖E[g] − ∇J‖/‖∇J‖, and *cosine* that of the angle between E[g] and ∇J, where E[g] is the sum over all groups,
by their probability. A bias that is all length has the cosine 1. *Noise* is n·tr Var[g]/‖E[g]‖² for groups of n draws:
the draws that make the standard error as long as the mean. *Ends at* is KL(q‖p*), nats, mean of the contexts, where the
flow along E[g] from the prior comes to rest: 0 is the optimum; the prior itself, and the best policy without a KL, are
given below for comparison. For several updates on the same draws, bias and cosine are of the last update's gradient
against ∇J of the policies that it meets, and the flow follows the mean of the whole move.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bayesrl.core.draws import Draws
from bayesrl.objectives import ClippedKL, Objective, ReverseKL, TrajectoryBalance
from bayesrl.svi.problem_setup import set_up
from benchmarks.enumerated_texts import Texts, bandit, flow, short_texts
from benchmarks.results import table, target, write_page
from benchmarks.trainer_losses import (
    ADVANTAGE_LOSSES,
    CLIP,
    KL_LOSSES,
    LENGTH_LOSSES,
    REUSE_LOSSES,
    Group,
    Loss,
)

UPDATES, RATE = 4, 1.0

type GroupLoss = Callable[[Array, Array, Array, Array], Array]
"""From (logits, logits of the policy that drew, numbers of the drawn texts, R of all texts) to a loss in reward units.

What a trainer descends is its gradient in the first argument.
"""

type Rows = dict[str, tuple[Callable[[Texts], GroupLoss], int]]
"""From a name to the maker of a loss, and the number of updates on the same draws."""


@dataclass(frozen=True)
class Measured:
    """What was found for one estimator.

    Attributes:
        bias: ‖E[g] − ∇J‖/‖∇J‖.
        cosine: of the angle between the two.
        noise: n·tr Var[g]/‖E[g]‖².
        rest: KL(q‖p*) where the flow rests, nats.
    """

    bias: float
    cosine: float
    noise: float
    rest: float

    def cells(self) -> list[str]:
        """Format a row."""
        bias = "0" if self.bias < 1e-4 else f"{self.bias:.3f}"
        rest = "0" if self.rest < 1e-4 else f"{self.rest:.4f}"
        return [bias, f"{self.cosine:.4f}", "0" if self.noise < 1e-4 else f"{self.noise:.3g}", rest]


def run() -> str:
    """Measure all rows on both problems, and write the page of the documents too."""
    with jax.enable_x64(True):
        parts, met = _tables()
    text = "\n\n".join([(__doc__ or "").partition("\n\n")[2].strip(), *parts, met])
    write_page("gradient_bias", "\n\n".join(parts))
    return text


def _tables() -> tuple[list[str], str]:
    problems = (bandit(), short_texts())
    parts, ours_fine = [], True
    header = [
        "",
        *(f"{problem.name}: {what}" for problem in problems for what in ("bias", "cosine", "noise", "ends at")),
    ]
    for title, rows in TABLES.items():
        lines = []
        for name, (make, updates) in rows.items():
            found = [measure(problem, make(problem), updates) for problem in problems]
            lines.append([name, *(cell for one in found for cell in one.cells())])
            print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
            if rows is OURS:
                ours_fine &= all(one.bias < 1e-4 and one.rest < 1e-4 for one in found)
        parts += [f"**{title}**", table(header, lines)]
    parts.append(_references(problems))
    words = "ours have no bias on draws of their own policy, and rest at p*, on both problems"
    return parts, target(words, met=ours_fine)


def _references(problems: tuple[Texts, ...]) -> str:
    told = []
    for problem in problems:
        gaps = [problem.gap(jnp.asarray(problem.log_prior), reward) for reward in problem.rewards]
        prior = problem.log_tokens(problem.log_prior).sum(-1)
        tilted = [prior + reward / problem.beta for reward in problem.rewards]
        best = [
            jax.nn.logsumexp(one) - one[reward.argmax()] for one, reward in zip(tilted, problem.rewards, strict=True)
        ]
        told.append(f"{problem.name} {np.mean(gaps):.4f} and {np.mean(best):.4f}")
    return f"KL(q‖p*) of the prior, and of the best text or arm alone, nats: {'; '.join(told)}."


# ---- the rows ------------------------------------------------------------------------------------


def of_trainer(loss: Loss, problem: Texts) -> GroupLoss:
    """Apply the loss of a trainer to texts."""
    log_prior, acted = problem.log_tokens(problem.log_prior), jnp.asarray(problem.acted)

    def of_group(logits: Array, drew: Array, ids: Array, reward: Array) -> Array:
        parts = (part[ids] for part in (problem.log_tokens(logits), problem.log_tokens(drew), log_prior, acted))
        return loss(Group(*parts, reward[ids], problem.beta))

    return of_group


def of_objective(build: Callable[[int], Objective], problem: Texts) -> GroupLoss:
    """Apply one of bayesrl's objectives to texts, in reward units."""
    objective, first = build(problem.num_draws), jnp.asarray(problem.rewards[0])
    setup = set_up(jax.random.key(0), problem.policy, (first,), problem.beta, problem.guide, objective, 1)
    tokens = jnp.asarray(problem.tokens)

    def of_group(logits: Array, drew: Array, ids: Array, reward: Array) -> Array:
        programs = replace(setup.programs, args=(reward,))
        drawn = Draws.from_sites({"token": tokens[ids]})
        behaviour = programs.score({"table": drew}, drawn).scores
        draws = programs.score({"table": logits}, drawn)._replace(log_behaviour=behaviour)
        return problem.beta * setup.objective.surrogate({"table": logits}, draws, programs, problem.beta)[0]

    return of_group


def _trainers(losses: Mapping[str, Loss], updates: int = 1) -> Rows:
    return {name: (partial(of_trainer, loss), updates) for name, loss in losses.items()}


def _ours(objectives: Mapping[str, Callable[[int], Objective]], updates: int = 1) -> Rows:
    return {name: (partial(of_objective, build), updates) for name, build in objectives.items()}


CLIPPED: dict[str, Callable[[int], Objective]] = {
    "`ClippedKL()`": ClippedKL,
    '`ClippedKL(ratio="draw")`': lambda n: ClippedKL(n, ratio="draw"),
    '`ClippedKL(baseline="full")`': lambda n: ClippedKL(n, baseline="full"),
}
OURS = _ours(
    {
        '`ReverseKL(baseline="full")`': lambda n: ReverseKL(n, baseline="full", enumerated=()),
        '`ReverseKL(baseline="to_go")`': lambda n: ReverseKL(n, baseline="to_go", enumerated=()),
        '`ReverseKL(baseline="regression")`': lambda n: ReverseKL(n, enumerated=()),
        **CLIPPED,
        '`TrajectoryBalance(form="variance")`': lambda n: TrajectoryBalance(n, form="variance"),
    }
)
TABLES: dict[str, Rows] = {
    "Where the KL is, and what stands for it (leave-one-out advantages)": _trainers(KL_LOSSES),
    "What rewards become (k1 in the reward, unless said)": _trainers(ADVANTAGE_LOSSES),
    "How tokens are averaged (leave-one-out, k1 in the reward, unless said)": _trainers(LENGTH_LOSSES),
    f"The last of {UPDATES} updates on the same draws, each a step of {RATE:g}·g; ε = {CLIP} where clipped": (
        _trainers(REUSE_LOSSES, UPDATES) | _ours(CLIPPED, UPDATES)
    ),
    "Ours, on draws of the policy itself": OURS,
}


# ---- the measurement -----------------------------------------------------------------------------


def measure(problem: Texts, loss: GroupLoss, updates: int = 1) -> Measured:
    """Compute bias, cosine and noise at one policy, and where the flow from the prior rests."""
    numbers = np.random.default_rng(0)
    rewards = jnp.asarray(problem.rewards)
    points = problem.log_prior + 0.7 * numbers.standard_normal((len(rewards), *problem.log_prior.shape))
    look = jax.jit(moments(problem, loss, updates))
    found = [look(jnp.asarray(point), reward) for point, reward in zip(points, rewards, strict=True)]
    mean, exact, variance, _ = (jnp.stack(part) for part in zip(*found, strict=True))
    rests = [flow(lambda x, reward=reward: look(x, reward).move, problem.log_prior) for reward in rewards]
    gaps = [float(problem.gap(jnp.asarray(rest), reward)) for rest, reward in zip(rests, rewards, strict=True)]
    length, exact_length = (jnp.linalg.norm(part.ravel()) for part in (mean, exact))
    return Measured(
        bias=float(jnp.linalg.norm((mean - exact).ravel()) / exact_length),
        cosine=float((mean * exact).sum() / (length * exact_length)),
        noise=float(problem.num_draws * variance.sum() / length**2),
        rest=float(np.mean(gaps)),
    )


class Moments(NamedTuple):
    """Sums over all groups of draws of one policy in one context.

    Attributes:
        mean: E[g] of the last update, [states, vocabulary].
        exact: E[∇J] of the policies that it meets.
        variance: tr Var[g].
        move: mean move of the logits by all updates, over their number and the rate; E[g] itself for one.
    """

    mean: Array
    exact: Array
    variance: Array
    move: Array


def moments(problem: Texts, loss: GroupLoss, updates: int = 1) -> Callable[[Array, Array], Moments]:
    """Make the function of (logits of the policy that draws, R) that sums over all groups."""
    ids, orders = (jnp.asarray(part) for part in problem.groups())

    def of_group(drew: Array, group: Array, reward: Array) -> tuple[Array, Array, Array]:
        def update(logits: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            gradient = -jax.grad(loss)(logits, drew, group, reward)
            return logits + RATE * gradient, (gradient, jax.grad(problem.objective)(logits, reward))

        logits, (gradients, exact) = lax.scan(update, drew, None, length=updates)
        return gradients[-1], exact[-1], (logits - drew) / (RATE * updates)

    def of_policy(drew: Array, reward: Array) -> Moments:
        weight = jnp.exp(orders + problem.log_tokens(drew).sum(-1)[ids].sum(-1))
        last, exact, move = jax.vmap(of_group, (None, 0, None))(drew, ids, reward)
        mean, meant, moved = (jnp.tensordot(weight, part, 1) for part in (last, exact, move))
        return Moments(mean, meant, weight @ ((last - mean) ** 2).sum((1, 2)), moved)

    return of_policy
