"""Resampling: right on average, by context, robust at the edges."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl.monte_carlo.particles.resampling import (
    ancestors,
    effective_size,
    fewest_moves,
    gather,
    lineages,
    log_mean,
)

WEIGHTS = jnp.log(jnp.array([[0.5, 0.0], [0.2, 0.25], [0.3, 0.25], [0.0, 0.5]]))


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
def test_each_parent_has_its_share_of_children(scheme: Any) -> None:
    """8 means of 4,000 runs within 5 standard errors of N·w (5e-6 false alarms); no child of a parent without weight."""
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda key: ancestors(key, WEIGHTS, scheme))(keys))
    children = np.stack([(drawn == i).sum(1) for i in range(4)], 1)  # [runs, parents, contexts]
    expected = 4 * np.exp(np.asarray(WEIGHTS))
    se = children.std(0) / np.sqrt(4000)
    assert (np.abs(children.mean(0) - expected) <= 5 * se + 1e-6).all()
    assert (children[:, 3, 0] == 0).all()
    assert (children[:, 0, 1] == 0).all()
    if scheme == "systematic":  # whole shares have exactly as many children
        assert (children[:, 0, 0] == 2).all()
        assert (children[:, 1, 1] == 1).all()


def test_sizes_and_means_of_weights() -> None:
    weights = jnp.log(jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])) + 1000.0
    np.testing.assert_allclose(effective_size(weights), [2.0, 1.0, 0.0])
    np.testing.assert_allclose(log_mean(weights), [1000.0, 1000.0 + np.log(0.5), -np.inf])
    # Nothing has a weight: any parent will do, and none is nan or out of range.
    assert set(np.asarray(ancestors(jax.random.key(0), weights, "systematic"))[:, 2].tolist()) <= {0, 1}


def test_contexts_inherit_apart() -> None:
    """Wherever the context axis lies, and where there is none."""
    parents = jnp.array([[1, 0, 0], [1, 1, 0]])
    first = jnp.arange(2 * 3 * 2).reshape(2, 3, 2)
    expected = np.stack([[np.asarray(first)[parents[n, c], c] for c in range(3)] for n in range(2)])
    np.testing.assert_array_equal(gather(first, parents, (0,), (3,)), expected)
    last = jnp.moveaxis(first, 1, 2)
    np.testing.assert_array_equal(gather(last, parents, (1,), (3,)), np.moveaxis(expected, 1, 2))
    two = jnp.arange(2 * 2 * 3).reshape(2, 2, 3)  # contexts 3 × 2, stored the other way round
    at = jax.random.randint(jax.random.key(0), (2, 6), 0, 2)
    each = np.asarray(at).reshape(2, 3, 2)
    crossed = [[[np.asarray(two)[each[n, a, b], b, a] for a in range(3)] for b in range(2)] for n in range(2)]
    np.testing.assert_array_equal(gather(two, at, (1, 0), (3, 2)), crossed)


def test_lineages_lead_back_to_the_start() -> None:
    parents = jnp.array([[[2], [0], [1]], [[1], [1], [0]]])
    lines, start = lineages(parents)
    # The last particles 0, 1, 2 came from 1, 1, 0 of the step before, and those from 0, 0, 2 of the start.
    np.testing.assert_array_equal(lines[..., 0], [[1, 1, 0], [0, 1, 2]])
    np.testing.assert_array_equal(start[:, 0], [0, 0, 2])


def test_survivors_stay_where_they_are() -> None:
    """Each particle has as many children as before, none changes its place, and sources are never overwritten."""
    for parents in ([1, 1, 3, 3, 3, 5], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5, 5, 5, 5, 5, 5]):
        moves = fewest_moves(jnp.array(parents))
        count = int(moves.num_moved)
        assert sorted(moves.parents.tolist()) == sorted(parents)
        assert all(int(moves.parents[i]) == i for i in parents)
        rows = list(range(6))
        for source, target in zip(moves.source[:count].tolist(), moves.target[:count].tolist(), strict=True):
            assert source not in moves.target[:count].tolist()
            rows[target] = rows[source]
        assert rows == moves.parents.tolist()
