"""Small programs that several engines and objectives refuse."""

import numpyro
import numpyro.distributions as dist

import bayesrl


def windy() -> None:
    """A reward that nature has a share in."""
    wind = bayesrl.environment("wind", dist.Bernoulli(0.5), observable=True)
    bayesrl.reward("r", numpyro.sample("arm", dist.Bernoulli(0.5)) * 1.0 * wind)


def observed() -> None:
    """A reward beside data."""
    x = numpyro.sample("x", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)
    bayesrl.reward("r", 1.0 * x)
