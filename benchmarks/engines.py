"""Every engine on the same posteriors, with as many evaluations of the program each.

Three problems whose log Z is known: README's five-armed bandit, a walk of eight steps that pays only at the one place
that all steps lead to (1 of 256 draws of the prior), and `bayesrl fit bigram_text`. `compare_engines` gives each engine
the same budget of evaluations; the seconds are of a machine with other work to do, and the evaluations of any.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.problem import load_problem
from benchmarks.results import table, target, write_page

BUDGET = 2**15


def bandit() -> None:
    """Run README's bandit."""
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
    bayesrl.reward("payoff", jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])[arm])


def walk() -> None:
    """Run a walk whose reward comes at the end, if all steps went up."""

    def step(x: Any, _: None) -> tuple[Any, None]:
        return x + numpyro.sample("step", dist.Bernoulli(0.5)), None

    x, _ = scan(step, 0, None, length=8)
    bayesrl.reward("goal", jnp.where(x == 8, 1.0, 0.0))


def run() -> str:
    """Compare the engines on each problem, and write the page of the documents too."""
    text: Any = load_problem("bigram_text")
    problems: dict[str, tuple[Callable[..., None], tuple[Any, ...], float]] = {
        "The bandit, β = .1": (bandit, (), 0.1),
        "The walk, β = .1": (walk, (), 0.1),
        f"`bigram_text`, β = {text.beta:g}": (text.policy, tuple(text.args), float(text.beta)),
    }
    parts, missed = [], []
    for title, (policy, args, beta) in problems.items():
        found = bayesrl.compare_engines(jax.random.key(0), policy, *args, beta=beta, budget=BUDGET)
        print(found, file=sys.stderr, flush=True)
        truth = float(found["enumeration"].bracket().mean)
        for row in found.rows:
            bracket = row.bracket()
            if not bracket.conservative_lower - 1e-4 <= truth <= bracket.conservative_upper + 1e-4:
                missed.append(f"{row.engine} on {title}")
        costs = {row[0]: row[1:] for row in found.cost_table().rows}
        shown = found.table()
        header = [*shown.headings, *found.cost_table().headings[1:]]
        rows = [[*row, *costs.get(row[0], [""] * 5)] for row in shown.rows]
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.refusals.items())
        parts += [f"**{title}**", table(header, rows), f"Not here: {reasons}."]
    write_page("engines", "\n\n".join(parts))
    about = (__doc__ or "").partition("\n\n")[2].strip()
    why = "not so for " + ", ".join(missed)
    goal = target("the limits of every engine hold the exact log Z", met=not missed, why_not=why)
    return "\n\n".join([about, *parts, goal])
