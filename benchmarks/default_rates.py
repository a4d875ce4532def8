"""What the defaults of `fit` leave of what there was to gain, with guides written by hand that hold p*.

Finite programs have a random shape, some with a plate, and a guide with a table of logits for each action. Gaussian
programs have a quadratic reward. Rewards are of any size, and so are the units of the guide's parameters: a logit is
a parameter times a number between 1/30 and 30.
"""

import os

# Many small programs run briefly, and only their results count, not their speed: XLA may optimise less.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

import bayesrl
from benchmarks.random_programs import Shape, all_assignments, log_q_of, make_shape, truth

NUM_PROGRAMS = 200
PER_SHAPE = 10
GOOD = 0.01


class Left(NamedTuple):
    """What one fit left: its program, β and sizes; shares of J* − J(π₀) and of J* − J at the fit's own start.

    Only fits that are not good have a verdict.
    """

    program: str
    beta: float
    reward: float
    scale: float
    share: float
    of_way: float
    verdict: str


def table_guide(shape: Shape) -> Callable[..., None]:
    """Make a guide with a table of logits for each action, indexed by all that it sees; it contains p*."""

    def guide(_: Any, rewards: Array, scale: Array) -> None:
        seen: list[int] = []
        tables = {}
        for i, site in enumerate(shape.sites):
            sizes = (max(shape.contexts, 1), *(shape.sizes[j] for j in seen), site.size)
            tables[site.name] = numpyro.param(f"{site.name} table", jnp.zeros(sizes))
            seen.append(i)
        if shape.contexts:
            with numpyro.plate("context", shape.contexts):
                draw(tables, scale, (jnp.arange(shape.contexts),))
        else:
            draw(tables, scale, (0,))

    def draw(tables: dict[str, Array], scale: Array, lead: tuple[Any, ...]) -> None:
        before: list[Array] = []
        for site in shape.sites:
            logits = scale * tables[site.name][(*lead, *before)]
            before.append(numpyro.sample(site.name, dist.Categorical(logits=logits)))

    return guide


def began(posterior: bayesrl.Posterior) -> float:
    """Compute J over the first hundredth of the run, which may be far below J(π₀)."""
    return float(posterior.history["objective"][0, 0])


def verdict_of(posterior: bayesrl.Posterior, share: float) -> str:
    """Diagnose a fit that leaves too much; its verdict must not be a pass."""
    return bayesrl.diagnose(jax.random.key(1), posterior).verdict if share >= GOOD else ""


def finite_fits(key: Array, rng: np.random.Generator, count: int) -> list[Left]:
    """Fit programs of one shape with different numbers, β and scales."""
    shape = make_shape(rng, nature=False)

    def policy(logits: dict[str, Array], rewards: Array, _: Array) -> None:
        shape.program(logits, rewards)

    sites, guide, found = all_assignments(shape), table_guide(shape), []
    for i in range(count):
        logits, rewards = shape.numbers(rng)
        reward, scale = (float(np.exp(rng.uniform(-np.log(30), np.log(30)))) for _ in range(2))
        beta = reward * float(np.exp(rng.uniform(np.log(0.05), np.log(5))))
        numbers = (logits, reward * rewards)
        args = (*numbers, jnp.asarray(scale))
        posterior = bayesrl.fit(jax.random.fold_in(key, i), policy, *args, beta=beta, guide=guide, progress=False)
        known = truth(shape, numbers, log_q_of(posterior, sites), beta)
        left = known.optimum - known.objective
        shares = left / (known.optimum - known.prior_objective), left / (known.optimum - began(posterior))
        name = f"{len(shape.sites)} sites" + (f" × {shape.contexts}" if shape.contexts else "")
        found.append(Left(name, beta, reward, scale, *shares, verdict_of(posterior, shares[0])))
        print(*found[-1], flush=True)
    return found


def quadratic(slope: Array, weight: Array, scale: Array) -> None:
    """A Gaussian action x with reward slope·x − weight·x²/2."""
    x = numpyro.sample("x", dist.Normal(jnp.zeros(slope.shape), 1.0).to_event(1))
    bayesrl.reward("r", (slope * x - weight * x**2 / 2).sum())


def normal_guide(slope: Array, weight: Array, scale: Array) -> None:
    """The family of p* under `quadratic`, with parameters in units of 1 / scale."""
    mean = numpyro.param("mean", jnp.zeros(slope.shape))
    log_width = numpyro.param("log width", jnp.zeros(slope.shape))
    numpyro.sample("x", dist.Normal(scale * mean, jnp.exp(scale * log_width)).to_event(1))


def gaussian_fits(key: Array, rng: np.random.Generator, count: int) -> list[Left]:
    """Fit Gaussian programs; J of a fit is known in closed form."""
    found, size = [], int(rng.integers(1, 6))
    for i in range(count):
        reward, scale = (float(np.exp(rng.uniform(-np.log(30), np.log(30)))) for _ in range(2))
        beta = reward * float(np.exp(rng.uniform(np.log(0.05), np.log(5))))
        slope, weight = reward * rng.normal(size=size), reward * rng.uniform(0.1, 2, size=size)
        args = (*(jnp.asarray(x, jnp.float32) for x in (slope, weight)), jnp.asarray(scale))
        posterior = bayesrl.fit(
            jax.random.fold_in(key, i), quadratic, *args, beta=beta, guide=normal_guide, progress=False
        )
        mean = scale * np.asarray(posterior.params["mean"], float)[0]
        width = np.exp(scale * np.asarray(posterior.params["log width"], float)[0])
        kl = (mean**2 + width**2 - 1 - 2 * np.log(width)).sum() / 2
        objective = float((slope * mean - weight * (mean**2 + width**2) / 2).sum() - beta * kl)
        start = float(-weight.sum() / 2)
        optimum = float((slope**2 / (2 * (weight + beta)) - beta / 2 * np.log1p(weight / beta)).sum())
        shares = (optimum - objective) / (optimum - start), (optimum - objective) / (optimum - began(posterior))
        found.append(Left(f"Gaussian of {size}", beta, reward, scale, *shares, verdict_of(posterior, shares[0])))
        print(*found[-1], flush=True)
    return found


def is_partial(options: Sequence[str]) -> bool:
    """Check whether fewer than all programs were requested."""
    return bool(options)


def run(options: Sequence[str] = ()) -> str:
    """Fit all programs, or as many as `--programs COUNT` says, and return a table of what they leave."""
    count = int(options[1]) if options else NUM_PROGRAMS
    rng, found = np.random.default_rng(0), list[Left]()
    for index in range(-(-count // PER_SHAPE)):
        make = gaussian_fits if index % 5 == 4 else finite_fits
        found += make(jax.random.key(index), rng, min(PER_SHAPE, count - len(found)))
        jax.clear_caches()
    shares = np.asarray([left.share for left in found])
    good = float((shares < GOOD).mean())
    of_way = float(np.mean([left.of_way < GOOD for left in found]))
    lines = [
        f"{count} programs with guides written by hand, by the defaults of `fit`: under {GOOD:.0%} of what there was "
        f"to gain is left on {good:.1%} of them (wanted: 95%); median {np.median(shares):.2%}, "
        f"95th percentile {np.quantile(shares, 0.95):.2%}, worst {shares.max():.1%}. The guides begin at even odds, "
        f"some far below J(π₀): of the way from there to J* under {GOOD:.0%} is left on {of_way:.1%}.",
        "",
        f"Of the {int((shares >= GOOD).sum())} that leave more, "
        f"{sum(left.verdict == 'pass' for left in found)} are told to pass by `bayesrl.diagnose`.",
        "",
        "The five worst:",
        "",
        "| program | β / size of reward | size of reward | size of a parameter | left |",
        "|---|---|---|---|---|",
    ]
    for left in sorted(found, key=lambda left: -left.share)[:5]:
        ratio = left.beta / left.reward
        lines.append(f"| {left.program} | {ratio:.3g} | {left.reward:.3g} | {left.scale:.3g} | {left.share:.2%} |")
    return "\n".join(lines)
