"""Pictures as observations: what is made for them is of their size, not of its square."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from bayesrl.control import LastLayerValues, LinearValues
from bayesrl.control.gymnasium.recorded_rollout import ExternalEnvironment, RecordedRollout
from bayesrl.control.gymnasium.spaces import Actions, Observations, describe_observations
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.policies import _orthogonal
from bayesrl.core.structure import inspect
from bayesrl.errors import ControlError
from bayesrl.posterior.sampling import batch_of

KEY = jax.random.key(0)


def largest(program: Any, *args: Any) -> int:
    """The most numbers in any array that a program makes on the way, inner programs included."""

    def most(jaxpr: Any) -> int:
        sizes = [int(np.prod(v.aval.shape)) for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "shape")]
        held = [getattr(value, "jaxpr", value) for e in jaxpr.eqns for value in e.params.values()]
        inner = [most(value) for value in held if hasattr(value, "eqns")]
        return max([*sizes, *inner], default=0)

    return most(jax.make_jaxpr(program)(*args).jaxpr)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(16, 12_288), (64, 28_224), (16, 720_000), (720_000, 16), (1, 100_000), (33, 33), (7, 5)],
)
def test_a_starting_layer_takes_memory_of_its_own_size(wide: int, narrow: int) -> None:
    assert largest(lambda key: _orthogonal(key, wide, narrow), KEY) <= 4 * wide * narrow


@pytest.mark.parametrize(("wide", "narrow"), [(3, 50), (50, 3), (8, 8), (1, 9), (9, 1)])
def test_its_rows_or_columns_are_orthogonal_with_gain_root_two(wide: int, narrow: int) -> None:
    layer = np.asarray(_orthogonal(KEY, wide, narrow))
    assert layer.shape == (wide, narrow)
    square = layer @ layer.T if wide <= narrow else layer.T @ layer
    np.testing.assert_allclose(square, 2.0 * np.eye(min(wide, narrow)), atol=1e-5)


def test_recordings_of_pictures_are_drawn_few_at_once() -> None:
    """Eight environments' windows of Atari's pictures are 116 MB; many draws of the placeholder were gigabytes."""
    seen = describe_observations(spaces.Box(0, 255, (84, 84, 4), np.uint8))
    world = ExternalEnvironment(seen, Actions(2).prior())
    structure = inspect(KEY, RecordedRollout(world, 129, 0.99))
    assert batch_of(structure) * structure.width < 2**23
    few = ExternalEnvironment(Observations((4,), np.float32), Actions(2).prior())
    small = inspect(KEY, RecordedRollout(few, 129, 0.99))
    assert batch_of(small) == 1024


def test_linear_values_of_pictures_are_refused_and_those_of_a_last_layer_are_not() -> None:
    class Pictures(EnvAdapter):
        num_actions, shape, dtype = 2, (84, 84, 4), np.float32

        def begin(self, key: Any) -> Any: ...
        def step(self, action: int) -> Any: ...

    world = Pictures()
    with pytest.raises(ControlError, match=r"a matrix of 28,225 × 28,225 numbers .*use LastLayerValues"):
        LinearValues(num_actions=2).check(world)
    LastLayerValues(num_actions=2).check(world)
    LinearValues(num_actions=2, features=lambda seen: jnp.ravel(seen)[:10]).check(world)
