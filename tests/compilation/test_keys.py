"""Keys that are derived from others, by number and by splitting: what they draw is uniform and independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import compilations
from jax import Array

from bayesrl.compilation.random_keys import as_hash_key, fold_in, split, split_keys

STEPS, TIMES, LANES = 500, 65, 8


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    """As a source derives them: by update, time and environment, and then by purpose, [purposes, steps, times, lanes]."""

    def of_lane(key: Array) -> Array:
        whether, own, other = split_keys(key, 3)
        first = jax.random.uniform(fold_in(own, 1))
        return jnp.stack(
            [first, jax.random.uniform(own), *jax.random.uniform(other, (2,)), jax.random.uniform(whether)]
        )

    def of_step(step: Array) -> Array:
        key = split(fold_in(as_hash_key(jax.random.key(3)), 5), 1)[0]
        times = jnp.arange(TIMES)
        return jax.vmap(lambda t: jax.vmap(of_lane)(split(fold_in(fold_in(key, step), t), LANES)))(times)

    drawn = jax.jit(jax.vmap(of_step))(4 * jnp.arange(STEPS))
    return np.moveaxis(np.asarray(drawn, float), -1, 0)


LAGS = [(0, *lag) for lag in np.ndindex(3, 3, 3) if any(lag)] + [(0, 16, 0, 0), (0, 0, 16, 0), (0, 0, 0, 4)]
LAGS += [(1, 0, 0, 0), (2, 0, 0, 0), (3, 0, 0, 0), (4, 0, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)]


@pytest.mark.parametrize("lag", LAGS, ids=str)
def test_neighbours_are_not_correlated(uniforms: np.ndarray, lag: tuple[int, ...]) -> None:
    """Numbers and their leading bits; 4.5 standard errors, a false alarm in 2,000 runs of all of these."""
    later = uniforms[tuple(slice(shift, None) for shift in lag)]
    earlier = uniforms[tuple(slice(None, size - shift) for size, shift in zip(uniforms.shape, lag, strict=True))]
    numbers = 12.0 * ((later - 0.5) * (earlier - 0.5)).mean() * np.sqrt(later.size)
    bits = 4.0 * (((later * 2) % 1 > 0.5) - 0.5) * (((earlier * 2) % 1 > 0.5) - 0.5)
    assert abs(numbers) < 4.5
    assert abs(bits.mean() * np.sqrt(later.size)) < 4.5


def test_means_over_each_axis_scatter_as_they_should(uniforms: np.ndarray) -> None:
    """The variance of standardised means is 1; 4.5 of its standard errors, √(2/n)."""
    for axes in ((1,), (2,), (3,), (1, 2), (1, 3), (2, 3)):
        means = uniforms.mean(axes) - 0.5
        scatter = 12.0 * means.var() * (uniforms.size / means.size)
        assert abs(scatter - 1.0) < 4.5 * np.sqrt(2.0 / means.size), axes


def test_pairs_fall_into_all_cells_alike(uniforms: np.ndarray) -> None:
    """χ² of 256 cells of neighbours along each axis; its standard deviation is √(2·255)."""
    cells = (uniforms * 16).astype(int)
    for axis in range(4):
        one, other = (np.delete(cells, end, axis).ravel() for end in (0, -1))
        counts = np.bincount(16 * one + other, minlength=256)
        expected = one.size / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255.0) < 4.5 * np.sqrt(510.0), axis


def test_outside_of_a_trace_each_use_is_one_program() -> None:
    """Not one for every operation of a hash, of which there are dozens; shapes that nothing else draws."""
    key = as_hash_key(jax.random.key(3))
    with compilations() as names:
        for used in (jax.random.split(key, 13), jax.random.fold_in(key, 7), jax.random.bits(key, (13, 17))):
            jax.block_until_ready(used)
    assert {"_split", "_random_bits"} <= set(names) <= {"_split", "_fold_in", "convert_element_type", "_random_bits"}
