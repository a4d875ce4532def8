"""The physics of the programs against those of Gymnasium's environments of the same names."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from bayesrl.control import CartPole, Pendulum


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_physics_are_those_of_gymnasium(name: str) -> None:
    """200 random states: what follows, rewards and ends; float32 against float64 within 1e-5 of a size of at least 1."""
    env = gymnasium.make(name).unwrapped
    cart = name == "CartPole-v1"
    program = CartPole() if cart else Pendulum()
    rng = np.random.default_rng(0)
    step = jax.jit(lambda state, action: tuple(program.step(state, action)))
    env.reset(seed=0)
    ends = 0
    for _ in range(200):
        most = np.array([2.4, 2, 0.2, 2] if cart else [3, 8])
        state = rng.uniform(-most, most).astype(np.float32)
        env.state = state.astype(float)  # type: ignore[attr-defined]
        env.steps_beyond_terminated = None  # type: ignore[attr-defined]
        action = rng.integers(2) if cart else rng.uniform(-3, 3, 1).astype(np.float32)
        seen, reward, terminated, _, _ = env.step(action)
        after, earned, ended, _ = step(jnp.asarray(state), jnp.asarray(action).reshape(()))
        np.testing.assert_allclose(program.observe(after), seen, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(earned, reward, rtol=1e-5, atol=1e-5)
        assert bool(ended) == terminated
        ends += terminated
    assert (ends > 0) == cart


@pytest.mark.parametrize("program", [CartPole(), Pendulum()], ids=["cart", "pendulum"])
def test_episodes_start_where_those_of_gymnasium_do(program: CartPole | Pendulum) -> None:
    """Uniform starts: 2,000 draws inside the bounds, and within 2% of them (false alarm below 1e-8)."""
    starts = np.asarray(
        jax.vmap(lambda key: handlers.seed(program.reset, key)())(jax.random.split(jax.random.key(0), 2_000))
    )
    bounds = np.full(4, 0.05) if isinstance(program, CartPole) else np.array([np.pi, 1.0])
    for reached in (starts.max(0), -starts.min(0)):
        assert (reached <= bounds + 1e-6).all()
        assert (reached > 0.98 * bounds).all()
