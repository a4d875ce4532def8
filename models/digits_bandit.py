"""Handwritten digits as a contextual bandit: 64 pixels, 10 arms, reward 1 for the right digit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.contrib.module import eqx_module

import bayesrl

NUM_LABELLED = 100


def problem(
    *, beta: float = 0.1, hidden: int = 128, num_steps: int = 1500, batch: int = 256, seed: int = 0
) -> bayesrl.Problem:
    """Make the problem from scikit-learn's 1,797 digits (Alpaydin & Kaynak 1998).

    The prior is a logistic policy trained on 100 labelled digits; the guide is an Equinox network of
    one hidden layer; a third of the rest is held out.
    """
    images, labels = _digits()
    order = np.random.default_rng(seed).permutation(len(images))
    first, rest = order[:NUM_LABELLED], order[NUM_LABELLED:]
    train, test = rest[: len(rest) * 2 // 3], rest[len(rest) * 2 // 3 :]
    weights, bias = _behaviour(images[first], labels[first], seed)

    def behaviour(pixels: Array) -> Array:
        return pixels @ weights + bias

    def digits(images: Array, labels: Array) -> None:
        size = min(int(batch), len(images))
        with numpyro.plate("image", len(images), subsample_size=size) as i:
            guess = numpyro.sample("guess", dist.Categorical(logits=behaviour(images[i])))
            right = (guess == labels[i]).astype(jnp.float32)
            bayesrl.reward("right", right)
            numpyro.deterministic("accuracy", right)

    network = Correction(64, int(hidden), 10, key=jax.random.key(seed))

    def guide(images: Array, labels: Array) -> None:
        size = min(int(batch), len(images))
        correct = eqx_module("network", network)
        with numpyro.plate("image", len(images), subsample_size=size) as i:
            logits = behaviour(images[i]) + jax.vmap(correct)(images[i])
            numpyro.sample("guess", dist.Categorical(logits=logits))

    return bayesrl.Problem(
        digits,
        (images[train], labels[train]),
        beta,
        {"guide": guide, "num_steps": int(num_steps)},
        held_out=(images[test], labels[test]),
    )


class Correction(eqx.Module):
    """What the network adds to the prior's logits; zero at the start, so that the fit starts at the prior."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, pixels: int, hidden: int, arms: int, *, key: Array) -> None:
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(pixels, hidden, key=first)
        out = eqx.nn.Linear(hidden, arms, key=second)
        self.out = eqx.tree_at(lambda layer: (layer.weight, layer.bias), out, replace_fn=jnp.zeros_like)

    def __call__(self, pixels: Array) -> Array:
        """Give the correction of the logits for one image."""
        return self.out(jax.nn.relu(self.hidden(pixels)))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16.0).astype(np.float32), labels.astype(np.int32)


def _behaviour(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=1000, random_state=seed).fit(images, labels)
    return model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)
