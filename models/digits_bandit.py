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

NEEDS = {"sklearn": {}}

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

    network = Correction(64, int(hidden), 10, seed=seed)

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
    """The network's correction of the prior's logits; it starts at 0, so that the fit starts at the prior."""

    inner: Array
    shift: Array
    outer: Array
    bias: Array

    def __init__(self, pixels: int, hidden: int, arms: int, *, seed: int) -> None:
        # NumPy draws without compiling.
        rng, reach = np.random.default_rng(seed), pixels**-0.5
        inner, shift = rng.uniform(-reach, reach, (hidden, pixels)), rng.uniform(-reach, reach, hidden)
        starts = (inner, shift, np.zeros((arms, hidden)), np.zeros(arms))
        self.inner, self.shift, self.outer, self.bias = jax.device_put([x.astype(np.float32) for x in starts])

    def __call__(self, pixels: Array) -> Array:
        """Compute the correction of the logits for one image."""
        return self.outer @ jax.nn.relu(self.inner @ pixels + self.shift) + self.bias


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16.0).astype(np.float32), labels.astype(np.int32)


def _behaviour(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=1000, random_state=seed).fit(images, labels)
    return model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)
