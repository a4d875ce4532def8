"""Cheaper draws have the distribution of the draws that they replace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesrl.core.rng import draw_category, draw_subset


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_categories_have_their_probabilities(key: jax.Array, shape: tuple[int, ...]) -> None:
    logits = jax.random.normal(key, shape).at[..., 1].set(-jnp.inf)
    num = 20_000
    draws = jax.jit(jax.vmap(draw_category, (0, None)))(jax.random.split(key, num), logits)
    assert draws.shape == (num, *shape[:-1])
    probability = jax.nn.softmax(logits, axis=-1)
    frequency = jax.nn.one_hot(draws, shape[-1]).mean(0)
    # 6 standard errors: one false alarm in 10^7.
    assert (jnp.abs(frequency - probability) <= 6 * jnp.sqrt(probability * (1 - probability) / num)).all()


@pytest.mark.parametrize("never", [0, 2, 4])
def test_what_has_probability_zero_is_never_drawn(key: jax.Array, never: int) -> None:
    logits = jnp.zeros(5).at[never].set(-jnp.inf)
    draws = jax.jit(jax.vmap(draw_category, (0, None)))(jax.random.split(key, 10_000), logits)
    assert not (draws == never).any()
    assert int(draws.min()) >= 0
    assert int(draws.max()) <= 4


@pytest.mark.parametrize(("size", "num"), [(7, 3), (7, 1), (7, 7)])
def test_subsets_are_uniform_and_have_no_repetition(key: jax.Array, size: int, num: int) -> None:
    draws = np.asarray(jax.vmap(lambda k: draw_subset(k, size, num))(jax.random.split(key, 10_000)))
    assert draws.shape == (10_000, num)
    assert all(len(set(row)) == num for row in draws.tolist())
    counts = np.stack([(draws == i).mean(0) for i in range(size)])
    assert (np.abs(counts - 1 / size) <= 6 * np.sqrt((1 / size) * (1 - 1 / size) / 10_000)).all()
