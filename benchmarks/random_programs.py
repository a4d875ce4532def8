"""Random finite programs with everything known about them, as the truth to measure certainty against.

A shape (which sites, what they read, which are nature's) is compiled once. The numbers in its tables
are arguments, so thousands of programs cost as much compilation as their few shapes.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from scipy.special import logsumexp

import bayesrl

MAX_ASSIGNMENTS = 1500


class SiteShape(NamedTuple):
    """One site of a shape: its kind (`action`, `seen` or `hidden` nature), size, and what it reads."""

    name: str
    kind: str
    size: int
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A program whose numbers are arguments: `program(logits, rewards)`.

    Attributes:
        sites: in program order.
        contexts: elements of its plate; 0 without a plate.
        program: the policy.
    """

    sites: tuple[SiteShape, ...]
    contexts: int
    program: Callable[..., None] = field(compare=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the sites' supports."""
        return tuple(site.size for site in self.sites)

    @property
    def has_nature(self) -> bool:
        """Whether any site is nature's."""
        return any(site.kind != "action" for site in self.sites)

    def numbers(self, rng: np.random.Generator) -> tuple[dict[str, Array], Array]:
        """Draw the numbers of one program: logits from N(0, 1), rewards from U(0, 1)."""
        lead = (max(self.contexts, 1),)
        logits = {
            site.name: jnp.asarray(
                rng.normal(size=(*lead, *(self.sites[p].size for p in site.parents), site.size)), jnp.float32
            )
            for site in self.sites
        }
        return logits, jnp.asarray(rng.uniform(size=(*lead, *self.sizes)), jnp.float32)


def make_shape(rng: np.random.Generator, *, nature: bool) -> Shape:
    """Draw a shape of 2 to 5 sites with supports of 2 to 5 values."""
    while True:
        sites = _sites(rng, int(rng.integers(2, 6)), nature=nature)
        actions = [site for site in sites if site.kind == "action"]
        if actions and (len(actions) < len(sites)) == nature and np.prod([s.size for s in sites]) <= MAX_ASSIGNMENTS:
            break
    contexts = int(rng.choice([0, 0, 3]))

    def program(logits: dict[str, Array], rewards: Array) -> None:
        if contexts:
            with numpyro.plate("context", contexts):
                _draw_all(sites, logits, rewards, (jnp.arange(contexts),))
        else:
            _draw_all(sites, logits, rewards, (0,))

    return Shape(tuple(sites), contexts, program)


def _sites(rng: np.random.Generator, count: int, *, nature: bool) -> list[SiteShape]:
    sites: list[SiteShape] = []
    for i in range(count):
        kind = str(rng.choice(["action", "action", "seen", "hidden"])) if nature else "action"
        visible = [j for j in range(i) if sites[j].kind != "hidden" or kind != "action"]
        parents = tuple(j for j in visible if rng.random() < 0.7)
        sites.append(SiteShape(f"x{i}", kind, int(rng.integers(2, 6)), parents))
    return sites


def _draw_all(sites: list[SiteShape], logits: dict[str, Array], rewards: Array, lead: tuple[Any, ...]) -> None:
    values: list[Array] = []
    for site in sites:
        chosen = dist.Categorical(logits=logits[site.name][(*lead, *(values[p] for p in site.parents))])
        if site.kind == "action":
            values.append(numpyro.sample(site.name, chosen))
        else:
            values.append(bayesrl.environment(site.name, chosen, observable=site.kind == "seen"))
    bayesrl.reward("r", rewards[(*lead, *values)])


class Truth(NamedTuple):
    """The truth about a program and a guide, averaged over contexts; nats and reward units."""

    optimum: float
    objective: float
    reward: float
    kl: float
    log_evidence: float
    kl_reverse: float
    kl_forward: float
    prior_objective: float
    missed_mass: float


def all_assignments(shape: Shape) -> dict[str, Array]:
    """List every assignment, {site: [assignments, *plate]}, the same in all contexts."""
    grid = np.asarray(list(itertools.product(*(range(size) for size in shape.sizes))))
    lead = (shape.contexts,) if shape.contexts else ()
    return {
        site.name: jnp.asarray(np.broadcast_to(grid[:, i].reshape(-1, *(1,) * len(lead)), (len(grid), *lead)))
        for i, site in enumerate(shape.sites)
    }


def truth(shape: Shape, numbers: tuple[dict[str, Array], Array], log_q: np.ndarray, beta: float) -> Truth:
    """Sum over all assignments in double precision.

    Args:
        shape: shape of the program.
        numbers: its logits and rewards.
        log_q: log-probability of the action sites under the guide, [assignments, contexts], nats.
        beta: temperature, reward units per nat.
    """
    logits, rewards = numbers
    grid = np.asarray(list(itertools.product(*(range(size) for size in shape.sizes))))
    rows = [_one_context(shape, grid, logits, rewards, c, log_q[:, c], beta) for c in range(max(shape.contexts, 1))]
    return Truth(*(float(np.mean(column)) for column in zip(*rows, strict=True)))


def _one_context(
    shape: Shape, grid: np.ndarray, logits: dict[str, Array], rewards: Array, c: int, log_q: np.ndarray, beta: float
) -> Truth:
    log_prior, log_nature = np.zeros(len(grid)), np.zeros(len(grid))
    conditionals = []
    for i, site in enumerate(shape.sites):
        table = np.asarray(logits[site.name], float)[c]
        table = table - logsumexp(table, axis=-1, keepdims=True)
        score = table[(*(grid[:, p] for p in site.parents), grid[:, i])]
        conditionals.append(score.reshape(shape.sizes))
        if site.kind == "action":
            log_prior = log_prior + score
        else:
            log_nature = log_nature + score
    reward = np.asarray(rewards, float)[c].reshape(-1)
    log_q = log_q - logsumexp(log_q + log_nature)  # in single precision, probabilities sum to 1 only approximately
    q, prior = np.exp(log_q + log_nature), np.exp(log_prior + log_nature)
    mean_reward, kl = float(q @ reward), float(q @ (log_q - log_prior))
    objective = mean_reward - beta * kl
    optimum = _control_optimum(shape, conditionals, reward.reshape(shape.sizes), beta)
    log_z = optimum / beta
    log_target = log_prior + reward / beta - log_z
    reverse = float(np.exp(log_q) @ (log_q - log_target)) if not shape.has_nature else np.nan
    forward = float(np.exp(log_target) @ (log_target - log_q)) if not shape.has_nature else np.nan
    missed = float(np.exp(log_target) @ (log_target - log_q > np.log(10))) if not shape.has_nature else np.nan
    return Truth(optimum, objective, mean_reward, kl, log_z, reverse, forward, float(prior @ reward), missed)


def _control_optimum(shape: Shape, conditionals: list[np.ndarray], reward: np.ndarray, beta: float) -> float:
    """Go through the sites from last to first: soft maxima at actions, expectations over nature's draws.

    `mass` is nature's probability of its draws, `value` the same times the value. Hidden draws are
    summed out first, since no action reads them.
    """
    mass = np.ones(shape.sizes)
    for i, site in enumerate(shape.sites):
        if site.kind != "action":
            mass = mass * np.exp(conditionals[i])
    value = mass * reward
    hidden = tuple(i for i, site in enumerate(shape.sites) if site.kind == "hidden")
    mass, value = mass.sum(hidden, keepdims=True), value.sum(hidden, keepdims=True)
    for i in reversed(range(len(shape.sites))):
        if shape.sites[i].kind == "seen":
            mass, value = mass.sum(i, keepdims=True), value.sum(i, keepdims=True)
        elif shape.sites[i].kind == "action":
            # The prior reads nothing hidden, so it is the same at any hidden value.
            seen = tuple(slice(0, 1) if j in hidden else slice(None) for j in range(len(shape.sites)))
            log_prior = conditionals[i][seen].max(tuple(range(i + 1, len(shape.sites))), keepdims=True)
            best = beta * logsumexp(log_prior + value / mass / beta, axis=i, keepdims=True)
            mass = mass.mean(i, keepdims=True)
            value = mass * best
    return float((value / mass).reshape(()))


def log_q_of(posterior: bayesrl.Posterior, sites: dict[str, Array]) -> np.ndarray:
    """Score every assignment under a single fit, [assignments, contexts]."""
    scores = np.asarray(posterior.log_prob(sites), float)
    return scores.reshape(len(next(iter(sites.values()))), -1)
