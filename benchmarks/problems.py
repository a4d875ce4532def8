"""Problems shared by the benchmarks, each with its exact objective and optimum."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.contrib.control_flow import scan
from scipy.special import logsumexp

import bayesrl

NUM_LABELLED = 100


@dataclass(frozen=True)
class Benchmark:
    """A policy with a hand-written guide and everything known about it.

    Attributes:
        name: its name in the tables.
        policy: the program.
        guide: the program with the parameters; it starts at the prior.
        args: arguments of both.
        beta: temperature, reward units per nat.
        params: starting parameters of the guide.
        exact: J of the guide with given parameters, per context, reward units; pure JAX.
        optimum: J*, per context, reward units.
        start: J of the prior policy, which is E_π₀[R].
        data: arrays that a hand-written loop needs.
    """

    name: str
    policy: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    beta: float
    params: dict[str, Any]
    exact: Callable[[dict[str, Any]], Array]
    optimum: float
    start: float
    data: dict[str, Array]

    def gap(self, params: dict[str, Any]) -> float:
        """Compute (J* − J) / (J* − J(π₀)) of the guide with these parameters."""
        return (self.optimum - float(self.exact(params))) / (self.optimum - self.start)


def bandit(arms: int = 1000, beta: float = 0.3, seed: int = 0) -> Benchmark:
    """Make a bandit with means drawn from N(0, 1) and a uniform prior; one logit per arm."""
    means = np.random.default_rng(seed).normal(size=arms).astype(np.float32)
    rewards = jnp.asarray(means)

    def policy() -> None:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(arms)))
        bayesrl.reward("payoff", rewards[arm])

    def guide() -> None:
        logits = numpyro.param("logits", jnp.zeros(arms))
        numpyro.sample("arm", dist.Categorical(logits=logits))

    def exact(params: dict[str, Any]) -> Array:
        log_q = jax.nn.log_softmax(params["logits"])
        return jnp.exp(log_q) @ (rewards - beta * (log_q + jnp.log(arms)))

    optimum = beta * (logsumexp(means.astype(np.float64) / beta) - np.log(arms))
    name = f"{arms:,}-arm bandit"
    params = {"logits": jnp.zeros(arms)}
    return Benchmark(
        name, policy, guide, (), beta, params, exact, float(optimum), float(means.mean()), {"rewards": rewards}
    )


def chain(
    *, stochastic: bool = True, states: int = 10, actions: int = 4, steps: int = 20, beta: float = 1.0, seed: int = 0
) -> Benchmark:
    """Make a Markov chain with rewards from N(0, 1); one logit per step, state and action.

    Rows of transition probabilities are Dirichlet(0.3); states are drawn from them, or move to the likeliest one.
    """
    random = np.random.default_rng(seed)
    reward = random.normal(size=(states, actions))
    probs = random.dirichlet(np.full(states, 0.3), size=(states, actions))
    following = random.integers(states, size=(states, actions))
    if not stochastic:
        probs = np.eye(states)[following]
    prior = random.normal(size=(states, actions))
    prior -= logsumexp(prior, axis=-1, keepdims=True)
    data = {"reward": reward, "probs": probs, "prior": prior}
    R, P, log_prior = (jnp.asarray(x, jnp.float32) for x in data.values())
    target = jnp.asarray(following, jnp.int32)

    def move(state: Array, action: Array) -> Array:
        if stochastic:
            return bayesrl.environment("state", dist.Categorical(probs=P[state, action]), observable=True)
        return target[state, action]

    def policy() -> None:
        def step(state: Array, _: None) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Categorical(logits=log_prior[state]))
            bayesrl.reward("r", R[state, action])
            return move(state, action), None

        scan(step, jnp.int32(0), None, length=steps)

    def guide() -> None:
        tilts = numpyro.param("tilts", jnp.zeros((steps, states, actions)))

        def step(state: Array, tilt: Array) -> tuple[Array, None]:
            action = numpyro.sample("action", dist.Categorical(logits=log_prior[state] + tilt[state]))
            return move(state, action), None

        scan(step, jnp.int32(0), tilts)

    def exact(params: dict[str, Any]) -> Array:
        def back(value: Array, tilt: Array) -> tuple[Array, None]:
            log_q = jax.nn.log_softmax(log_prior + tilt)
            q = R - beta * (log_q - log_prior) + P @ value
            return (jnp.exp(log_q) * q).sum(-1), None

        return jax.lax.scan(back, jnp.zeros(states), params["tilts"], reverse=True)[0][0]

    best, start = np.zeros(states), np.zeros(states)
    for _ in range(steps):
        best = beta * logsumexp(prior + (reward + probs @ best) / beta, axis=-1)
        start = (np.exp(prior) * (reward + probs @ start)).sum(-1)
    kind = "stochastic" if stochastic else "deterministic"
    name = f"{states}-state {steps}-step chain, {kind}"
    params = {"tilts": jnp.zeros((steps, states, actions))}
    arrays = {"reward": R, "probs": P, "prior": log_prior, "following": target}
    return Benchmark(name, policy, guide, (), beta, params, exact, float(best[0]), float(start[0]), arrays)


def digits(beta: float = 0.1, hidden: int = 128, batch: int = 256, seed: int = 0) -> Benchmark:
    """Make a contextual bandit from scikit-learn's 1,797 digits: reward 1 for the right digit.

    The prior is a logistic policy trained on 100 labelled digits, which are left out. The guide adds
    a network of one hidden layer, which starts at zero, to its logits.
    """
    images, labels, log_prior = _digits(seed)
    size = len(images)
    keys = jax.random.split(jax.random.key(seed), 2)
    first = {
        "weight": jax.random.normal(keys[0], (images.shape[1], hidden)) / np.sqrt(images.shape[1]),
        "bias": jnp.zeros(hidden),
        "out_weight": jnp.zeros((hidden, 10)),
        "out_bias": jnp.zeros(10),
    }

    def policy(images: Array, labels: Array, log_prior: Array) -> None:
        with numpyro.plate("image", size, subsample_size=batch) as i:
            guess = numpyro.sample("guess", dist.Categorical(logits=log_prior[i]))
            bayesrl.reward("right", (guess == labels[i]).astype(jnp.float32))

    def guide(images: Array, labels: Array, log_prior: Array) -> None:
        params = {name: numpyro.param(name, value) for name, value in first.items()}
        with numpyro.plate("image", size, subsample_size=batch) as i:
            numpyro.sample("guess", dist.Categorical(logits=log_prior[i] + network(params, images[i])))

    def exact(params: dict[str, Any]) -> Array:
        log_q = jax.nn.log_softmax(log_prior + network(params, images))
        right = jax.nn.one_hot(labels, 10)
        return (jnp.exp(log_q) * (right - beta * (log_q - log_prior))).sum(-1).mean()

    prior, right = np.asarray(log_prior, np.float64), np.eye(10)[np.asarray(labels)]
    optimum = beta * logsumexp(prior + right / beta, axis=-1).mean()
    start = (np.exp(prior) * right).sum(-1).mean()
    data = {"images": images, "labels": labels, "prior": log_prior}
    args = (images, labels, log_prior)
    return Benchmark("digits", policy, guide, args, beta, first, exact, float(optimum), float(start), data)


def network(params: dict[str, Array], images: Array) -> Array:
    """Compute the network's correction of the prior's logits, [..., 10]."""
    hidden = jax.nn.relu(images @ params["weight"] + params["bias"])
    return hidden @ params["out_weight"] + params["out_bias"]


def _digits(seed: int) -> tuple[Array, Array, Array]:
    """Return images [N, 64], labels [N] and the normalised logits of the prior policy [N, 10]."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    first, rest = order[:NUM_LABELLED], order[NUM_LABELLED:]
    model = LogisticRegression(max_iter=1000, random_state=seed).fit(images[first], labels[first])
    log_prior = model.predict_log_proba(images[rest]).astype(np.float32)
    return jnp.asarray(images[rest]), jnp.asarray(labels[rest], jnp.int32), jnp.asarray(log_prior)
