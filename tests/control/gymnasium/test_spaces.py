"""Spaces of Gymnasium: what policies see, what environments are given, and which priors fit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from gymnasium import spaces

from bayesrl.control import GymnasiumSource
from bayesrl.control.gymnasium.spaces import describe_actions, describe_observations
from bayesrl.errors import ControlError


def test_finitely_many_observations_are_counted_from_zero() -> None:
    seen = describe_observations(spaces.Discrete(4, start=-2))
    assert (seen.num, seen.shape, seen.dtype) == (4, (), np.int32)
    assert seen.from_environment(np.array([-2, 1])).tolist() == [0, 3]


def test_arrays_of_any_type_become_floats_of_about_unit_size() -> None:
    """Pixels are divided by 255; bounds of float32's greatest number are none."""
    pixels = describe_observations(spaces.Box(0, 255, (2, 2), np.uint8))
    assert pixels.from_environment(np.full((3, 2, 2), 200, np.uint8)).dtype == np.float32
    assert (np.asarray(pixels.scale) == 255).all()
    most = np.finfo(np.float32).max
    low, high = np.array([[-4.0, -most, -np.inf], [2.0, most, np.inf]], np.float32)
    mixed = describe_observations(spaces.Box(low, high))
    assert np.asarray(mixed.scale).tolist() == [4.0, 1.0, 1.0]


def test_what_is_seen_is_no_view_of_a_buffer_that_is_used_again() -> None:
    seen = describe_observations(spaces.Box(-1, 1, (2,), np.float32))
    buffer = np.zeros((1, 2), np.float32)
    kept = seen.from_environment(buffer)
    buffer[:] = 1.0
    assert (kept == 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_bounded_actions_are_cut_at_their_bounds(shape: tuple[int, ...]) -> None:
    actions = describe_actions(spaces.Box(-2.0, 6.0, shape, np.float64))
    prior = actions.prior()
    assert prior.event_shape == shape
    draws = prior.sample(jax.random.key(0), (5,))
    given = actions.to_environment(np.asarray(draws) + 100.0)
    assert given.shape == (5, *shape)
    assert given.dtype == np.float64
    assert (given == 6.0).all()
    # Around the middle, 2, with half the range, 4, as its scale.
    assert float(prior.log_prob(jnp.full(shape, 2.0))) == pytest.approx(
        -np.log(4 * np.sqrt(2 * np.pi)) * int(np.prod(shape)), rel=1e-5
    )


def test_the_greatest_number_is_no_bound() -> None:
    most = np.finfo(np.float32).max
    prior = describe_actions(spaces.Box(-most, most, (2,))).prior()
    assert np.isfinite(np.asarray(prior.log_prob(jnp.ones(2))))
    assert float(prior.log_prob(jnp.zeros(2))) == pytest.approx(-np.log(2 * np.pi), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "prior", "message"),
    [
        ("CartPole-v1", lambda: dist.Normal(0.0, 1.0), r"Normal draws float32\[\], and actions .* are integers"),
        ("CartPole-v1", lambda: dist.Categorical(logits=jnp.zeros(3)), "from 3 actions, and the environment has 2"),
        ("Pendulum-v1", lambda: dist.Categorical(logits=jnp.zeros(3)), r"are floats of shape \[1\]"),
        ("Pendulum-v1", lambda: dist.Normal(0.0, 1.0), r"draws float32\[\], and actions .* floats of shape \[1\]"),
    ],
)
def test_priors_of_other_actions_are_refused(name: str, prior: Any, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        GymnasiumSource(name, num_envs=1).policy(prior=lambda observation, time: prior())
