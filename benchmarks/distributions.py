"""The automatic guide on every distribution that NumPyro names, moved to another member of its family.

Each is the prior of one action, x ~ p₀, with reward β·(log p₁(x) − log p₀(x)), where p₁ has other parameters: p* is p₁,
J* is 0, and there is β·KL(p₀‖p₁) to gain. A good fit leaves under 1% of it; a refusal before the first step names the
site and what to do. If a family has only one member, p₁ comes from another family with the same support.
Every name in `numpyro.distributions.__all__` is among them, or in `NO_FAMILY` with the reason.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import hyp1f1

import bayesrl
from bayesrl.errors import BayesRLError

BETA, NUM_STEPS, GOOD = 0.5, 1000, 0.01

type Family = Callable[[float], Any]
"""A function to a member of a family: the prior at 0, the target at 1."""


class Tilted(NamedTuple):
    """The target of p₀ under a reward in closed form: log p₁ − log p₀ = reward(x) − log Z."""

    reward: Callable[[Any], Any]
    log_z: float


def log_ratio(family: Family, x: Any) -> Any:
    """Compute log p₁ − log p₀ of draws."""
    other = family(1.0)
    if isinstance(other, Tilted):
        return other.reward(x) - other.log_z
    return other.log_prob(x) - family(0.0).log_prob(x)


def _pair(*numbers: float) -> jax.Array:
    return jnp.array(numbers)


_eye = np.eye(2)
_corr = np.array([[1.0, 0.5], [0.5, 1.0]])
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
    "Delta": lambda s: dist.Delta(1.0),
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
    "MultivariateNormal": lambda s: dist.MultivariateNormal(_pair(1, 0) * s, _corr),
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

# Continuous families of special shapes, wrappers, one-member families, and those that are refused.
FAMILIES |= {
    "Beta(.1, .1)": lambda s: Tilted(lambda x: 3 * x, float(np.log(hyp1f1(0.1, 0.2, 3)))) if s else dist.Beta(0.1, 0.1),
    "Dirichlet(.1, .1, .1)": lambda s: (
        Tilted(lambda x: 3 * x[..., 0], float(np.log(hyp1f1(0.1, 0.3, 3)))) if s else dist.Dirichlet(0.1 * jnp.ones(3))
    ),
    "Gamma(.05, 1)": lambda s: Tilted(lambda x: 0.8 * x, -0.05 * float(np.log(0.2))) if s else dist.Gamma(0.05, 1.0),
    "Poisson(200,000)": lambda s: (
        Tilted(lambda x: x / 1000, 2e5 * float(np.expm1(1e-3))) if s else dist.Poisson(200_000.0)
    ),
    "DiscreteUniform": lambda s: dist.BinomialProbs(0.7, total_count=10) if s else dist.DiscreteUniform(0, 10),
    "EulerMaruyama": lambda s: dist.EulerMaruyama(
        jnp.arange(4) / 4.0, lambda x, t: (-x, jnp.ones_like(x)), dist.Normal(s, 1.0)
    ),
    "ExpandedDistribution": lambda s: dist.ExpandedDistribution(dist.Gamma(3.0, 1 + s), ()),
    "GaussianCopula": lambda s: dist.GaussianCopula(dist.Gamma(3.0, jnp.ones(2) * (1 + s)), correlation_matrix=_corr),
    "GaussianCopulaBeta": lambda s: dist.GaussianCopulaBeta(
        jnp.ones(2) * (2 + s), 3.0 * jnp.ones(2), correlation_matrix=_corr
    ),
    "GaussianStateSpace": lambda s: dist.GaussianStateSpace(3, 0.5 * _eye, (1 + s) * _eye),
    "HurdleGamma": lambda s: dist.HurdleGamma(0.3 + 0.3 * s, 3.0, 1 + s),
    "HurdleLogits": lambda s: dist.HurdleLogits(dist.Poisson(2 + s), -1 + s),
    "HurdleLogNormal": lambda s: dist.HurdleLogNormal(0.3 + 0.3 * s, s, 1.0),
    "HurdleProbs": lambda s: dist.HurdleProbs(dist.Poisson(2 + s), 0.3 + 0.3 * s),
    "ImproperUniform": lambda s: dist.ImproperUniform(dist.constraints.real, (), ()),
    "Independent": lambda s: dist.Independent(dist.Gamma(jnp.array([2.0, 3.0]), 1 + s), 1),
    "IntervalCensoredDistribution": lambda s: (
        Tilted(jnp.sum, 0.0)
        if s
        else dist.IntervalCensoredDistribution(dist.Normal(), jnp.array(False), jnp.array(False))
    ),
    "InverseWishart": lambda s: dist.InverseWishart(5 + s, scale_matrix=_eye),
    "InverseWishartCholesky": lambda s: dist.InverseWishartCholesky(5 + s, scale_matrix=_eye),
    "LeftCensoredDistribution": lambda s: dist.LeftCensoredDistribution(dist.Normal(s, 1.0), jnp.array(False)),
    "LeftTruncatedGamma": lambda s: dist.LeftTruncatedGamma(dist.Gamma(3.0, 1 + s), low=0.5),
    "LKJ": lambda s: dist.LKJ(3, 1 + s),
    "LogUniform": lambda s: dist.DoublyTruncatedPowerLaw(0.5, 0.5, 3.0) if s else dist.LogUniform(0.5, 3.0),
    "MaskedDistribution": lambda s: dist.MaskedDistribution(dist.Gamma(3.0, 1 + s), True),
    "RightCensoredDistribution": lambda s: dist.RightCensoredDistribution(dist.Normal(s, 1.0), jnp.array(False)),
    "RightTruncatedGamma": lambda s: dist.RightTruncatedGamma(dist.Gamma(3.0, 1 + s), high=4.0),
    "SineBivariateVonMises": lambda s: dist.SineBivariateVonMises(s, 0.0, 1.5, 1.5, correlation=0.5),
    "SineSkewed": lambda s: dist.SineSkewed(
        dist.VonMises(jnp.zeros(2), jnp.ones(2)).to_event(1), skewness=_pair(0.2, 0.2) + _pair(0.5, 0) * s
    ),
    "TransformedDistribution": lambda s: dist.TransformedDistribution(
        dist.Normal(s, 1.0), dist.transforms.SigmoidTransform()
    ),
    "TruncatedPolyaGamma": lambda s: (
        dist.TransformedDistribution(dist.Beta(2.0, 8.0), dist.transforms.AffineTransform(0.0, 2.5))
        if s
        else dist.TruncatedPolyaGamma()
    ),
    "TwoSidedTruncatedGamma": lambda s: dist.TwoSidedTruncatedGamma(dist.Gamma(3.0, 1 + s), low=0.5, high=4.0),
    "Uniform": lambda s: dist.Beta(2.0, 3.0) if s else dist.Uniform(0.0, 1.0),
    "Unit": lambda s: dist.Unit(0.0),
    "Wishart": lambda s: dist.Wishart(4 + s, scale_matrix=_eye),
    "WishartCholesky": lambda s: dist.WishartCholesky(4 + s, scale_matrix=_eye),
    "ZeroSumNormal": lambda s: dist.ZeroSumNormal(1 + s, (3,)),
}

_CHOOSERS = (
    "Bernoulli Binomial Categorical Geometric HurdleDistribution Mixture Multinomial NegativeBinomial RelaxedBernoulli "
    "TruncatedCauchy TruncatedDistribution TruncatedGamma TruncatedNormal ZeroInflatedDistribution"
)
NO_FAMILY: dict[str, str] = {
    "Distribution": "the abstract base",
    **dict.fromkeys(("biject_to", "constraints", "kl_divergence", "transforms"), "no distribution"),
    **dict.fromkeys(_CHOOSERS.split(), "a function that gives one of the classes above"),
}


class Found(NamedTuple):
    """The outcome of one family: `good`, `refused`, `left` too much, or `raw`, an error that is not the library's."""

    name: str
    outcome: str
    words: str
    seconds: float


def untold() -> list[str]:
    """List the names in NumPyro's own list that are neither in `FAMILIES` nor in `NO_FAMILY`."""
    return sorted(set(dist.__all__) - set(FAMILIES) - set(NO_FAMILY))


def try_family(name: str, num_steps: int = NUM_STEPS) -> Found:
    """Fit the automatic guide to one family."""
    family, begin = FAMILIES[name], time.perf_counter()

    def policy() -> None:
        x = numpyro.sample("x", family(0.0))
        bayesrl.reward("r", BETA * log_ratio(family, x))

    try:
        posterior = bayesrl.fit(jax.random.key(0), policy, beta=BETA, num_steps=num_steps, progress=False)
        left = -posterior.estimate(jax.random.key(1), 4000).objective.mean[0]
        ratios = jax.jit(lambda key: log_ratio(family, family(0.0).sample(key, (20_000,))))(jax.random.key(2))
        gain = -BETA * float(np.mean(np.asarray(ratios, float)))
        share = float(left) / gain
        outcome, words = "good" if share < GOOD else "left", f"{share:.2%} of {gain:.3g}"
    except BayesRLError as error:
        outcome, words = "refused", str(error)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is told)
        outcome, words = "raw", f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    return Found(name, outcome, words, time.perf_counter() - begin)


def is_partial(options: Sequence[str]) -> bool:
    """Check whether only some families were requested."""
    return "--only" in options


def run(options: Sequence[str] = ()) -> str:
    """Try all families, or those after `--only`, and return a table; `--keep FILE` continues from that file."""
    kept = Path(options[1]) if options[:1] == ["--keep"] else None
    held = [json.loads(line) for line in kept.read_text("utf-8").splitlines()] if kept and kept.exists() else []
    told = {one.name: one for one in (Found(*values) for values in held)}
    found = []
    for name in options[1:] if is_partial(options) else FAMILIES:
        one = told.get(name) or try_family(name)
        found.append(one)
        if name not in told:
            print(*one[:3], f"{one.seconds:.0f} s", flush=True)
            if kept:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(one) + "\n")
            jax.clear_caches()
    counts = {kind: sum(one.outcome == kind for one in found) for kind in ("good", "refused", "left", "raw")}
    lines = [
        f"Of {len(found)} families, {NUM_STEPS:,} steps each: {counts['good']} end within {GOOD:.0%} of what there was "
        f"to gain, {counts['refused']} are refused by name before the first step, {counts['left']} leave more, and "
        f"{counts['raw']} end in an error that is not ours.",
        "",
        "| family | outcome | left of the gain, or the refusal |",
        "|---|---|---|",
        *(f"| {one.name} | {one.outcome} | {one.words} |" for one in found),
        "",
        f"Without a family: {'; '.join(f'{name} ({reason})' for name, reason in NO_FAMILY.items())}.",
    ]
    if missing := untold():
        lines.append(f"Not tried in this run: {', '.join(missing)}.")
    return "\n".join(lines)
