"""Hypergrid and bit sequences: the posterior over end points is the law of the reward, by enumeration of all walks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesrl
from bayesrl.errors import PolicyError


def walks(dimensions: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """List all walks: actions, padded by stops, [walks, T], and the index of the cell where each ends."""
    found: list[tuple[list[int], list[int]]] = []

    def go_on(cell: list[int], actions: list[int]) -> None:
        found.append((cell, actions))
        for d in range(dimensions):
            if cell[d] < height - 1:
                go_on([x + (i == d) for i, x in enumerate(cell)], [*actions, d])

    go_on([0] * dimensions, [])
    longest = dimensions * (height - 1) + 1
    padded = [actions + [dimensions] * (longest - len(actions)) for _, actions in found]
    ends = np.array([cell for cell, _ in found]) @ height ** np.arange(dimensions - 1, -1, -1)
    return np.array(padded), ends


def published_reward(dimensions: int, height: int) -> np.ndarray:
    """R of Bengio et al. (2021) with R0 = 0.1, R1 = 0.5 and R2 = 2, cell by cell."""
    values = []
    for cell in np.ndindex(*[height] * dimensions):
        far = [abs(x / (height - 1) - 0.5) for x in cell]
        values.append(0.1 + 0.5 * all(f > 0.25 for f in far) + 2.0 * all(0.3 < f < 0.4 for f in far))
    return np.array(values)


@pytest.mark.parametrize(("dimensions", "height"), [(2, 5), (3, 3)])
def test_ends_have_exactly_the_law_of_the_reward(dimensions: int, height: int) -> None:
    problem = bayesrl.load_problem("hypergrid", dimensions=dimensions, height=height)
    actions, ends = walks(dimensions, height)
    assert len(actions) > height**dimensions, "several walks lead to one end"

    @jax.jit
    @jax.vmap
    def score(actions: Any) -> Any:
        density = bayesrl.log_density(problem.policy, {"action": actions}, beta=1.0)
        return density.log_prior, density.log_target

    log_prior, log_target = (np.asarray(x, float) for x in score(jnp.asarray(actions)))
    prior = np.bincount(ends, np.exp(log_prior))
    np.testing.assert_allclose(prior, np.full(height**dimensions, 1 / height**dimensions), rtol=1e-5)
    posterior = np.bincount(ends, np.exp(log_target))
    law = published_reward(dimensions, height)
    np.testing.assert_allclose(posterior / posterior.sum(), law / law.sum(), rtol=1e-5)
    exact = bayesrl.enumerate_posterior(problem.policy, beta=1.0)
    assert float(exact.optimum) == pytest.approx(np.log(law.mean()), abs=1e-5)
    assert problem.optimum is not None
    assert problem.optimum(1.0) == pytest.approx(np.log(law.mean()), abs=1e-9)


@pytest.mark.parametrize("objective", [None, bayesrl.objectives.TrajectoryBalance(prior_fraction=1.0)])
def test_trajectory_balance_learns_the_law_of_8_by_8(objective: Any) -> None:
    """In L1 summed over the 64 cells, from 32,000 walks: of the fit, and of the prior alone; .012 is published."""
    problem = bayesrl.load_problem("hypergrid", steps=500)
    options = dict(problem.fit_options) | ({} if objective is None else {"objective": objective})
    fitted = bayesrl.fit(jax.random.key(0), problem.policy, beta=1.0, progress=False, **options)
    actions, ends = walks(2, 8)
    scores = np.asarray(fitted.log_prob({"action": jnp.asarray(actions)})[0], float)
    stops = np.cumsum(fitted.draws["action"] == 2, -1) > 0
    assert (fitted.draws["action"][stops] == 2).all(), "who has stopped does nothing else"
    found, law = np.bincount(ends, np.exp(scores)), published_reward(2, 8)
    assert np.abs(1 / 64 - law / law.sum()).sum() > 0.5, "the prior is far from it"
    assert np.abs(found - law / law.sum()).sum() < 1e-3


def test_bit_sequences_have_the_optimum_of_their_sums() -> None:
    problem = bayesrl.load_problem("bit_sequences", length=8, modes=2)
    exact = bayesrl.enumerate_posterior(problem.policy, beta=0.1)
    assert problem.optimum is not None
    assert problem.optimum(0.1) == pytest.approx(float(exact.optimum), abs=1e-5)
    fitted = bayesrl.fit(
        jax.random.key(0), problem.policy, beta=0.1, progress=False, **{**problem.fit_options, "num_steps": 600}
    )
    gap = bayesrl.evidence(jax.random.key(1), fitted).gap
    assert float(gap.upper) < 0.005


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hypergrid", {"height": 1}, "make no grid"),
        ("hypergrid", {"dimensions": 9}, "use fewer, such as"),
        ("hypergrid", {"r0": 0.0}, "log R needs r0 above 0"),
        ("bit_sequences", {"length": 10}, "multiple of 4 and of word"),
        ("bit_sequences", {"length": 24}, "use a length of 4 to 20 bits"),
        ("bit_sequences", {"modes": 0}, "modes=0; use at least 1"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        bayesrl.load_problem(name, **options)
