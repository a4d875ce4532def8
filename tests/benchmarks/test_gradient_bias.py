"""The table of gradient bias, where closed forms say what it has to be."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.enumerated_texts import bandit, flow, short_texts
from benchmarks.gradient_bias import Measured, Moments, moments, of_trainer
from benchmarks.trainer_losses import KL_LOSSES, minus_mean, policy_loss


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_texts_and_groups_are_all_there() -> None:
    texts = short_texts()
    assert len(texts.tokens) == 15
    chances = jnp.exp(texts.log_tokens(jnp.asarray(texts.log_prior)).sum(-1))
    np.testing.assert_allclose(chances.sum(), 1.0, rtol=1e-12)
    _, orders = texts.groups()
    np.testing.assert_allclose(np.exp(orders).sum(), 15**3, rtol=1e-12)


def test_kl_terms_have_the_gradients_of_their_closed_forms() -> None:
    """In the loss, k1 is no KL at all and k3 is that of the prior from the policy; in the reward, k1 is right."""
    arms = bandit()._replace(num_draws=2)
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(1, 5)))
    reward = jnp.asarray(arms.rewards[0])

    def worth(logits: jax.Array, kl: str) -> jax.Array:
        log_q, log_prior = (jax.nn.log_softmax(part)[0] for part in (logits, jnp.asarray(arms.log_prior)))
        divergence = {
            "none": 0.0,
            "reverse": jnp.exp(log_q) @ (log_q - log_prior),
            "forward": jnp.exp(log_prior) @ (log_prior - log_q),
        }[kl]
        return jnp.exp(log_q) @ reward - arms.beta * divergence

    named = {"k1 in the reward": "reverse", "k1 in the loss": "none", "k2 in the loss": "reverse"}
    named |= {"k3 in the loss": "forward", "k3 in the loss, times q/q_old": "reverse"}

    @jax.jit
    def look(logits: jax.Array) -> dict[str, Moments]:
        return {name: moments(arms, of_trainer(KL_LOSSES[name], arms))(logits, reward) for name in named}

    found = look(logits)
    for name, kl in named.items():
        mean, exact, *_ = found[name]
        np.testing.assert_allclose(mean, jax.grad(partial(worth, kl=kl))(logits), atol=1e-12, err_msg=name)
        np.testing.assert_allclose(exact, jax.grad(partial(worth, kl="reverse"))(logits), atol=1e-12)


def test_a_mean_with_the_own_draw_in_it_shortens_the_gradient() -> None:
    texts = short_texts()
    loss = of_trainer(partial(policy_loss, advantage=minus_mean), texts)
    logits = texts.log_prior + np.random.default_rng(2).normal(size=texts.log_prior.shape)
    mean, exact, *_ = jax.jit(moments(texts, loss))(jnp.asarray(logits), jnp.asarray(texts.rewards[0]))
    np.testing.assert_allclose(mean, exact * (1 - 1 / texts.num_draws), atol=1e-12)


def test_k3_in_the_loss_rests_at_the_optimum_under_another_regulariser() -> None:
    """Maximise E[R] − β·KL(π₀‖q): q = β·π₀/(λ − R), whose value on README's bandit is .728712."""
    arms = bandit()._replace(num_draws=2)
    reward = jnp.asarray(arms.rewards[0])
    look = jax.jit(moments(arms, of_trainer(KL_LOSSES["k3 in the loss"], arms)))
    rest = jax.nn.softmax(jnp.asarray(flow(lambda x: look(x, reward).move, arms.log_prior)))[0]
    assert float(rest @ reward + arms.beta * jnp.log(5 * rest).mean()) == pytest.approx(0.728712, abs=2e-6)
    np.testing.assert_allclose(1 / rest, (1 / rest)[-1] + (0.9 - reward) * 5 / arms.beta, rtol=1e-3)


def test_rows_tell_zero_only_where_it_is_zero() -> None:
    assert Measured(1e-12, 1.0, 7.25, 1e-9).cells() == ["0", "1.0000", "7.25", "0"]
    assert Measured(0.01, 0.5, 30.0, 0.02).cells() == ["0.010", "0.5000", "30", "0.0200"]
