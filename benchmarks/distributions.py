"""The automatic guide on every distribution that NumPyro names, moved to another member of its family.

Each is the prior of one action, x ~ p₀, with reward β·(log p₁(x) − log p₀(x)), where p₁ has other parameters: p* is p₁,
J* is 0, and β·KL(p₀‖p₁) is what there is to gain. A fit is good that leaves under 1% of it; a refusal before the first
step names the site and what to do.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesrl
from bayesrl.errors import BayesRLError

BETA, NUM_STEPS, GOOD = 0.5, 1000, 0.01

type Family = Callable[[float], Any]
"""Gives a member of a family: the prior at 0, what it is moved to at 1."""


def _pair(*numbers: float) -> jax.Array:
    return jnp.array(numbers)


_eye = np.eye(2)
FAMILIES: dict[str, Family] = {
    "AsymmetricLaplace": lambda s: dist.AsymmetricLaplace(0.5 * s, 1.0, 1 + 0.2 * s),
    "AsymmetricLaplaceQuantile": lambda s: dist.AsymmetricLaplaceQuantile(0.5 * s, 1.0, 0.4 + 0.1 * s),
    "BernoulliLogits": dist.BernoulliLogits,
    "BernoulliProbs": lambda s: dist.BernoulliProbs(0.3 + 0.4 * s),
    "Beta": lambda s: dist.Beta(2 + 2 * s, 3.0),
    "BetaBinomial": lambda s: dist.BetaBinomial(2 + 2 * s, 3.0, 10),
    "BetaNegativeBinomial": lambda s: dist.BetaNegativeBinomial(5 + 3 * s, 3.0, 4.0),
    "BetaProportion": lambda s: dist.BetaProportion(0.3 + 0.3 * s, 5.0),
    "BinomialLogits": lambda s: dist.BinomialLogits(s, total_count=8),
    "BinomialProbs": lambda s: dist.BinomialProbs(0.3 + 0.3 * s, total_count=8),
    "CAR": lambda s: dist.CAR(_pair(0.5, 0.0) * s, 0.5, 1 + s, np.array([[0, 1], [1, 0]]), is_sparse=False),
    "CategoricalLogits": lambda s: dist.CategoricalLogits(_pair(0, 1, 2) * s),
    "CategoricalProbs": lambda s: dist.CategoricalProbs(_pair(0.2, 0.4, 0.4) + _pair(0.3, 0, -0.3) * s),
    "Cauchy": lambda s: dist.Cauchy(s, 1 + s),
    "Chi2": lambda s: dist.Chi2(3 + 2 * s),
    "CirculantNormal": lambda s: dist.CirculantNormal(jnp.ones(3) * s, covariance_row=_pair(1.0, 0.2, 0.2)),
    "Dagum": lambda s: dist.Dagum(2.0, 1 + s, 2.0),
    "Dirichlet": lambda s: dist.Dirichlet(_pair(2, 2, 3) + _pair(1, 0, 0) * s),
    "DirichletMultinomial": lambda s: dist.DirichletMultinomial(_pair(1, 2, 3) + _pair(2, 0, 0) * s, 5),
    "DoublyTruncatedPowerLaw": lambda s: dist.DoublyTruncatedPowerLaw(-1.5 + s, 0.5, 3.0),
    "Exponential": lambda s: dist.Exponential(1 + s),
    "FoldedDistribution": lambda s: dist.FoldedDistribution(dist.Normal(s, 1.0)),
    "Gamma": lambda s: dist.Gamma(3.0, 1 + s),
    "GammaPoisson": lambda s: dist.GammaPoisson(3 + 2 * s, 1 - 0.3 * s),
    "GaussianRandomWalk": lambda s: dist.GaussianRandomWalk(1 + s, 4),
    "GeometricLogits": lambda s: dist.GeometricLogits(-s),
    "GeometricProbs": lambda s: dist.GeometricProbs(0.5 - 0.2 * s),
    "Gompertz": lambda s: dist.Gompertz(1 + s, 1.0),
    "Gumbel": lambda s: dist.Gumbel(s, 1 + 0.5 * s),
    "HalfCauchy": lambda s: dist.HalfCauchy(1 + s),
    "HalfNormal": lambda s: dist.HalfNormal(1 + s),
    "HurdleNegativeBinomial2": lambda s: dist.HurdleNegativeBinomial2(
        mean=2 + s, concentration=3.0, gate=0.3 + 0.3 * s
    ),
    "HurdlePoisson": lambda s: dist.HurdlePoisson(gate=0.3 + 0.3 * s, rate=2 + s),
    "InverseGamma": lambda s: dist.InverseGamma(3.0, 2 + s),
    "Kumaraswamy": lambda s: dist.Kumaraswamy(2 + s, 3.0),
    "Laplace": lambda s: dist.Laplace(s, 1 + 0.5 * s),
    "LeftTruncatedDistribution": lambda s: dist.LeftTruncatedDistribution(dist.Normal(0.5 * s, 1.0), low=-1.0),
    "Levy": lambda s: dist.Levy(0.0, 1 + s),
    "LKJCholesky": lambda s: dist.LKJCholesky(3, 1 + s),
    "Logistic": lambda s: dist.Logistic(s, 1 + 0.5 * s),
    "LogNormal": lambda s: dist.LogNormal(s, 1.0),
    "LowerTruncatedPowerLaw": lambda s: dist.LowerTruncatedPowerLaw(-3 - s, 1.0),
    "LowRankMultivariateNormal": lambda s: dist.LowRankMultivariateNormal(
        _pair(1, 0) * s, np.array([[1.0], [0.5]]), np.ones(2)
    ),
    "MatrixNormal": lambda s: dist.MatrixNormal(jnp.ones((2, 2)) * s, _eye, _eye),
    "MixtureGeneral": lambda s: dist.MixtureGeneral(
        dist.Categorical(probs=_pair(0.7, 0.3) + _pair(-0.4, 0.4) * s),
        [dist.Normal(-1.0, 0.5), dist.Normal(1 + s, 0.5)],
    ),
    "MixtureSameFamily": lambda s: dist.MixtureSameFamily(
        dist.Categorical(probs=_pair(0.7, 0.3) + _pair(-0.4, 0.4) * s), dist.Normal(_pair(-1, 1) + _pair(0, 1) * s, 0.5)
    ),
    "MultinomialLogits": lambda s: dist.MultinomialLogits(_pair(1, 0, 0) * s, total_count=4),
    "MultinomialProbs": lambda s: dist.MultinomialProbs(_pair(0.2, 0.4, 0.4) + _pair(0.3, 0, -0.3) * s, total_count=4),
    "MultivariateNormal": lambda s: dist.MultivariateNormal(_pair(1, 0) * s, np.array([[1.0, 0.5], [0.5, 1.0]])),
    "MultivariateStudentT": lambda s: dist.MultivariateStudentT(5.0, _pair(1, 0) * s, _eye),
    "NegativeBinomial2": lambda s: dist.NegativeBinomial2(2 + 2 * s, 3.0),
    "NegativeBinomialLogits": lambda s: dist.NegativeBinomialLogits(3.0, 0.5 * s),
    "NegativeBinomialProbs": lambda s: dist.NegativeBinomialProbs(3.0, 0.4 + 0.2 * s),
    "Normal": lambda s: dist.Normal(s, 1 + s),
    "OrderedLogistic": lambda s: dist.OrderedLogistic(s, _pair(-1, 0, 1)),
    "Pareto": lambda s: dist.Pareto(1.0, 3 + s),
    "Poisson": lambda s: dist.Poisson(3 + 2 * s),
    "ProjectedNormal": lambda s: dist.ProjectedNormal(_pair(1, 0) * (0.2 + s)),
    "RelaxedBernoulliLogits": lambda s: dist.RelaxedBernoulliLogits(1.0, logits=s),
    "RightTruncatedDistribution": lambda s: dist.RightTruncatedDistribution(dist.Normal(0.5 * s, 1.0), high=1.0),
    "SoftLaplace": lambda s: dist.SoftLaplace(s, 1 + 0.5 * s),
    "StudentT": lambda s: dist.StudentT(5.0, s, 1.0),
    "TwoSidedTruncatedDistribution": lambda s: dist.TwoSidedTruncatedDistribution(
        dist.Normal(0.5 * s, 1.0), low=-1.0, high=2.0
    ),
    "VonMises": lambda s: dist.VonMises(s, 1 + s),
    "Weibull": lambda s: dist.Weibull(1 + s, 2.0),
    "ZeroInflatedLogits": lambda s: dist.ZeroInflatedLogits(dist.Poisson(2 + s), -1 + s),
    "ZeroInflatedNegativeBinomial2": lambda s: dist.ZeroInflatedNegativeBinomial2(2 + s, 3.0, gate=0.3 + 0.3 * s),
    "ZeroInflatedPoisson": lambda s: dist.ZeroInflatedPoisson(0.3 + 0.3 * s, 2 + s),
    "ZeroInflatedProbs": lambda s: dist.ZeroInflatedProbs(dist.Poisson(2 + s), 0.3 + 0.3 * s),
}


class Found(NamedTuple):
    """What became of one family: `good`, `refused`, `left` too much, or `raw`, an error that is not the library's."""

    name: str
    outcome: str
    words: str
    seconds: float


def untold() -> list[str]:
    """Name the distributions of NumPyro's own list that have no family here."""
    named = [getattr(dist, name) for name in dist.__all__]
    kinds = {kind.__name__ for kind in named if inspect.isclass(kind) and issubclass(kind, dist.Distribution)}
    return sorted(kinds - set(FAMILIES))


def try_family(name: str, num_steps: int = NUM_STEPS) -> Found:
    """Fit the automatic guide to one family."""
    family, begin = FAMILIES[name], time.perf_counter()

    def policy() -> None:
        x = numpyro.sample("x", family(0.0))
        bayesrl.reward("r", BETA * (family(1.0).log_prob(x) - family(0.0).log_prob(x)))

    try:
        posterior = bayesrl.fit(jax.random.key(0), policy, beta=BETA, num_steps=num_steps, progress=False)
        left = -posterior.estimate(jax.random.key(1), 4000).objective.mean[0]
        x = family(0.0).sample(jax.random.key(2), (20_000,))
        gain = BETA * float(np.mean(np.asarray(family(0.0).log_prob(x) - family(1.0).log_prob(x), float)))
        share = float(left) / gain
        outcome, words = "good" if share < GOOD else "left", f"{share:.2%} of {gain:.3g}"
    except BayesRLError as error:
        outcome, words = "refused", str(error)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is told)
        outcome, words = "raw", f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    return Found(name, outcome, words, time.perf_counter() - begin)


def is_partial(options: Sequence[str]) -> bool:
    """Whether some families only were asked for."""
    return bool(options)


def run(options: Sequence[str] = ()) -> str:
    """Try all families, or those that follow `--only`, and give a table."""
    found = []
    for name in options[1:] or FAMILIES:
        found.append(try_family(name))
        print(*found[-1][:3], f"{found[-1].seconds:.0f} s", flush=True)
        jax.clear_caches()
    counts = {kind: sum(one.outcome == kind for one in found) for kind in ("good", "refused", "left", "raw")}
    lines = [
        f"Of {len(found)} families, {NUM_STEPS:,} steps each: {counts['good']} end within {GOOD:.0%} of what there was "
        f"to gain, {counts['refused']} are refused by name before the first step, {counts['left']} leave more, and "
        f"{counts['raw']} end in an error that is not ours.",
        "",
        "| family | | |",
        "|---|---|---|",
        *(f"| {one.name} | {one.outcome} | {one.words} |" for one in found if one.outcome != "good"),
        "",
        f"Without a family here: {', '.join(untold())}.",
    ]
    return "\n".join(lines)
