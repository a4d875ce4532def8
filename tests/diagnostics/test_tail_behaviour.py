"""Diagnostics of draws are held against ArviZ's own."""

import math
import subprocess
import sys

import numpy as np
import pytest
from arviz_stats.base.array import array_stats

from bayesrl.diagnostics.tail_behaviour import pareto_shape, rank_rhat


@pytest.mark.parametrize("count", [26, 100, 225, 226, 1000, 5000])
@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0, 3.0])
def test_the_shape_of_a_tail_is_that_of_arviz(count: int, scale: float) -> None:
    random = np.random.default_rng(count)
    for log_weights in (random.exponential(scale, count), scale * random.normal(size=count)):
        assert pareto_shape(log_weights) == pytest.approx(
            float(array_stats.psislw(-log_weights)[1]), rel=1e-10, nan_ok=True
        )


@pytest.mark.parametrize("shape", [(2, 4), (2, 7), (4, 100), (8, 501)])
@pytest.mark.parametrize("apart", [0.0, 0.3, 5.0])
def test_rhat_is_that_of_arviz(shape: tuple[int, int], apart: float) -> None:
    random = np.random.default_rng(shape[1])
    chains = random.normal(size=shape) + apart * np.arange(shape[0])[:, None]
    for own in (chains, np.round(chains), np.exp(3 * chains)):  # distinct, tied, heavy-tailed
        assert rank_rhat(own) == pytest.approx(
            float(array_stats.rhat(own, chain_axis=0, draw_axis=1)), rel=1e-10, nan_ok=True
        )


def test_what_cannot_be_told_is_nan() -> None:
    assert math.isnan(pareto_shape(np.arange(20.0)))
    assert math.isnan(pareto_shape(np.zeros(1000)))
    assert math.isnan(rank_rhat(np.zeros((1, 10))))
    assert math.isnan(rank_rhat(np.zeros((2, 3))))
    assert math.isnan(rank_rhat(np.full((2, 10), np.nan)))


def test_a_verdict_imports_neither_arviz_nor_xarray_nor_scipy_stats() -> None:
    code = (
        "import sys, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl\n"
        "def bandit():\n"
        "    arm = numpyro.sample('arm', dist.Categorical(logits=jnp.zeros(3)))\n"
        "    bayesrl.reward('payoff', jnp.array([0.0, 1.0, 2.0])[arm])\n"
        "fit = bayesrl.fit(jax.random.key(0), bandit, beta=1.0, num_steps=20, num_restarts=2, progress=False)\n"
        "print(bayesrl.diagnose(jax.random.key(1), fit))\n"
        "heavy = {'arviz_stats', 'arviz', 'xarray', 'pandas', 'matplotlib', 'scipy.stats'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
