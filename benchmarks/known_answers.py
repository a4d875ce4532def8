"""Answers known in closed form, beside what the engines and `evidence` say of them.

Every row is a number that can be worked out by hand (exponential tilts of a Poisson, sums over three
sequences, transfer matrices, Gaussian integrals); z is the distance in standard errors.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesrl
from bayesrl.diagnostics.evidence.bounds import evidence
from benchmarks.results import table, target

ROUNDING = 2e-5


class Answer(NamedTuple):
    """One number: its name, the truth, the estimate and its standard error."""

    what: str
    truth: float
    found: float
    se: float

    @property
    def z(self) -> float:
        """Distance from the truth in standard errors, none of them below single precision."""
        return abs(self.found - self.truth) / math.hypot(self.se, ROUNDING)


def run() -> str:
    """Ask every engine."""
    answers = [*_poisson(), *_sequences(), *_bigrams(), *_gaussian()]
    rows = [[a.what, f"{a.truth:.6f}", f"{a.found:.6f}", f"{a.se:.1e}", f"{a.z:.1f}"] for a in answers]
    words = target("every answer within 3 standard errors", met=all(a.z < 3 for a in answers))
    return (
        f"{table(['quantity', 'truth', 'found', 'se', 'z'], rows)}\n\n{__doc__.partition('\n\n')[2].strip()}\n\n{words}"
    )


def _poisson() -> list[Answer]:
    """Poisson(10) becomes Poisson(11) by rewards of x·log 1.1 at β = 1, and log Z = 1."""

    def count() -> None:
        x = numpyro.sample("x", dist.Poisson(10.0))
        bayesrl.reward("growth", x * math.log(1.1))

    weighted = bayesrl.importance(jax.random.key(0), count, beta=1.0, num_samples=100_000)
    posterior = bayesrl.fit(jax.random.key(1), count, beta=1.0, num_steps=500, progress=False)
    bracket = evidence(jax.random.key(2), posterior, method="importance")
    assert bracket.log_evidence is not None
    mean = posterior.estimate(jax.random.key(3), 20_000).reward
    return [
        Answer(
            "Poisson: log Z, importance from the prior",
            1.0,
            *_numbers(weighted.log_evidence.mean, weighted.log_evidence.se),
        ),
        Answer("Poisson: log Z, evidence of a fit", 1.0, *_numbers(bracket.log_evidence.mean, bracket.log_evidence.se)),
        Answer("Poisson: mean of the fitted policy × log 1.1", 11 * math.log(1.1), *_numbers(mean.mean, mean.se)),
    ]


def _sequences() -> list[Answer]:
    """Prior weights 3:2:1 and reward factors 1:2:3: Z = 10/6, posterior (.3, .4, .3)."""

    def sequence() -> None:
        x = numpyro.sample("x", dist.Categorical(probs=jnp.array([3.0, 2.0, 1.0]) / 6))
        bayesrl.reward("score", jnp.log(jnp.array([1.0, 2.0, 3.0]))[x])

    exact = bayesrl.enumerate_posterior(sequence, beta=1.0)
    assert exact.log_evidence is not None
    drawn = bayesrl.rejection(jax.random.key(0), sequence, beta=1.0, num_samples=20_000)
    kept = np.asarray(drawn.resample(jax.random.key(1), 20_000)["x"])
    error = math.sqrt(0.4 * 0.6 / 20_000) * math.sqrt(2)  # twice the variance: these are draws from draws
    return [
        Answer("sequences: log Z, enumeration", math.log(10 / 6), float(exact.log_evidence.mean), 0.0),
        Answer("sequences: p*(“00”), enumeration", 0.4, float(np.exp(exact.log_weights[1])), 0.0),
        Answer(
            "sequences: log Z, rejection", math.log(10 / 6), *_numbers(drawn.log_evidence.mean, drawn.log_evidence.se)
        ),
        Answer("sequences: p*(“00”), rejection", 0.4, float((kept == 1).mean()), error),
    ]


def _bigrams() -> list[Answer]:
    """32 characters of English, a reward of 1 for each vowel, β = 1."""
    problem = bayesrl.load_problem("bigram_text")
    assert problem.optimum is not None
    truth = problem.optimum(1.0)
    exact = bayesrl.enumerate_posterior(problem.policy, beta=1.0)
    assert exact.optimum is not None
    posterior = bayesrl.fit(jax.random.key(0), problem.policy, beta=1.0, progress=False, **problem.fit_options)
    bracket = evidence(jax.random.key(1), posterior, method="importance")
    assert bracket.log_evidence is not None
    return [
        Answer("bigrams: log Z, dynamic programming", truth, float(exact.optimum), 0.0),
        Answer(
            "bigrams: log Z, evidence of a fit", truth, *_numbers(bracket.log_evidence.mean, bracket.log_evidence.se)
        ),
    ]


def _gaussian() -> list[Answer]:
    """A Normal prior and a quadratic reward."""
    problem = bayesrl.load_problem("gaussian_target")
    assert problem.optimum is not None
    truth = problem.optimum(0.5) / 0.5
    drawn = bayesrl.rejection(jax.random.key(0), problem.policy, beta=0.5, num_samples=5000)
    posterior = bayesrl.fit(jax.random.key(1), problem.policy, beta=0.5, num_steps=40, progress=False)
    chains = evidence(jax.random.key(2), posterior, method="nuts")
    assert chains.log_evidence is not None
    return [
        Answer("Gaussian: log Z, rejection", truth, *_numbers(drawn.log_evidence.mean, drawn.log_evidence.se)),
        Answer(
            "Gaussian: log Z, a poor fit beside NUTS",
            truth,
            *_numbers(chains.log_evidence.mean, chains.log_evidence.se),
        ),
    ]


def _numbers(mean: object, se: object) -> tuple[float, float]:
    return float(np.asarray(mean).reshape(-1)[0]), float(np.asarray(se).reshape(-1)[0])
