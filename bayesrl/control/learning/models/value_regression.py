"""Models of action values: Gaussian posteriors over Q from returns, linear, of a last layer, or by ensembles."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array

from bayesrl.arguments import Count, CountOrZero, MemoryNeed, Positive, checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.keys import as_hash_key, fold_in, split
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.models.base import ACTION_VALUES, EnvironmentModel, Sites, observe_masked
from bayesrl.control.learning.replay_memory import Experience, blank_experience
from bayesrl.control.policies import network_bytes
from bayesrl.errors import ControlError
from bayesrl.typing import Numbers, PRNGKey, PRNGKeys

_BATCH = 512
_MOST_MOMENTS = 2**27
"""Numbers in the second moments of linear regression, half a gigabyte."""


@checked(ControlError)
@dataclass(frozen=True, eq=False, kw_only=True)
class ValueModel(EnvironmentModel):
    """What models of Q share: returns are observed as R ~ Normal(Q(s, a; θ), noise).

    The negative log-likelihood is (R − Q(s, a; θ))² / 2·noise² but for a constant, so that maximum likelihood is
    the fit of least squares, and with θ ~ Normal(0, prior_scale) the most probable θ is the ridge fit with penalty
    noise²/prior_scale². R is the return that followed, under whatever policy was played.

    Args:
        num_actions: number of actions.
        num_observations: how many there are, where they are the integers from 0 on; else None.
        features: what is read of one observation, a function to [features]; by default one-hot, or the numbers of
            the observation and a 1.
        prior_scale: standard deviation of θ.
        noise: standard deviation of a return around Q, reward units.

    Raises:
        ControlError: a number is out of range.
    """

    num_actions: Count
    num_observations: Count | None = None
    features: Callable[[Any], Any] | None = None
    prior_scale: Positive = 1.0
    noise: Positive = 1.0

    def check(self, env: EnvAdapter) -> None:
        """Refuse another environment; see `EnvironmentModel.check`."""
        if env.num_actions != self.num_actions or env.num_observations != self.num_observations:
            raise ControlError(
                f"the model is of {self.num_actions} actions and num_observations={self.num_observations}, and the "
                f"environment has {env.num_actions} and {env.num_observations}; make it of the same numbers"
            )

    def read(self, observations: Numbers) -> Array:
        """Give the features of observations, [..., features]."""
        if self.features is not None:
            return jnp.asarray(jax.vmap(self.features)(observations))
        if self.num_observations is not None:
            return jax.nn.one_hot(observations, self.num_observations)
        flat = jnp.asarray(observations).reshape(len(observations), -1).astype(float)
        return jnp.concatenate([flat, jnp.ones((len(flat), 1))], -1)

    def asked(self, experience: Experience, seen: Any) -> Array:
        """Give the observations whose values are told."""
        if self.num_observations is not None:
            return jnp.arange(self.num_observations)
        return jnp.zeros((1, *experience.observation.shape[1:])) if seen is None else seen

    @abc.abstractmethod
    def heads(self, experience: Experience) -> tuple[Any, Callable[[Any, Any], Array]]:
        """Draw θ, and give it with the function from (θ, observations) to values, [..., actions]."""

    def __call__(self, experience: Experience, seen: Any = None) -> None:
        """Draw θ, observe the returns, and tell `action_values`."""
        theta, value = self.heads(experience)
        taken = jnp.take_along_axis(value(theta, experience.observation), experience.action[:, None], -1)[:, 0]
        observe_masked("return", dist.Normal(taken, self.noise), experience.returns, experience.mask)
        numpyro.deterministic(ACTION_VALUES, value(theta, self.asked(experience, seen)))


class Moments(NamedTuple):
    """What linear regression keeps of experience, for each action.

    Attributes:
        square: Σ φ·φᵀ, [actions, features, features].
        product: Σ φ·R, [actions, features].
    """

    square: Numbers
    product: Numbers


@checked(ControlError)
@dataclass(frozen=True, eq=False, kw_only=True)
class LinearValues(ValueModel):
    """Q(s, a; θ) = φ(s)·θ_a, with the exact Normal posterior of θ [actions, features]; see `ValueModel`.

    Example:
        >>> from bayesrl.control import LinearValues
        >>> LinearValues(num_actions=2, num_observations=5, noise=0.5).prior_scale
        1.0

    References:
        Azizzadenesheli, Brunskill & Anandkumar (2018), "Efficient exploration through Bayesian deep Q-networks".
    """

    online: ClassVar[bool] = True

    def check(self, env: EnvAdapter) -> None:
        """Refuse another environment, and features whose square would not be kept; see `EnvironmentModel.check`."""
        super().check(env)
        size = int(jax.eval_shape(self.read, blank_experience(env.shape, env.dtype).observation).shape[-1])
        if self.num_actions * size**2 > _MOST_MOMENTS:
            raise ControlError(
                f"LinearValues keeps a matrix of {size:,} × {size:,} numbers for each of {self.num_actions} actions, "
                "one row for each feature; use LastLayerValues, or pass features=, a function to fewer of them"
            )

    def heads(self, experience: Experience) -> tuple[Any, Callable[[Any, Any], Array]]:
        """Draw `weights`; see `ValueModel.heads`."""
        size = jax.eval_shape(self.read, experience.observation).shape[-1]
        prior = dist.Normal(jnp.zeros((self.num_actions, size)), self.prior_scale)
        return numpyro.sample("weights", prior.to_event(2)), lambda theta, seen: self.read(seen) @ theta.T

    def empty(self, experience: Experience) -> Moments:
        """Give the moments of no experience of this kind."""
        size = jax.eval_shape(self.read, experience.observation).shape[-1]
        shape = (self.num_actions, size)
        return Moments(np.zeros((*shape, size), np.float32), np.zeros(shape, np.float32))

    def init(self, key: PRNGKey, env: EnvAdapter) -> Moments:
        """Give the moments of no experience; see `EnvironmentModel.init`."""
        return self.empty(blank_experience(env.shape, env.dtype))

    def condition(self, state: Moments, rows: Experience) -> Moments:
        """Add up moments; see `EnvironmentModel.condition`."""
        return jax.tree.map(jnp.add, state, _moments(self, self.read(rows.observation), rows))

    def posterior(self, state: Moments) -> tuple[Array, Array]:
        """Give E[θ] [actions, features], and the lower Cholesky factor of the precision of each action's θ."""
        return _regressed(state, self.prior_scale, self.noise)

    def sample(self, key: PRNGKey, state: Moments, experience: Experience, num_samples: int) -> Sites:
        """Draw θ from the exact posterior; see `EnvironmentModel.sample`."""
        return {"weights": _drawn(key, *self.posterior(state), num_samples)}

    def mean_values(self, state: Moments, experience: Experience, seen: Any = None) -> Array:
        """Give φ·E[θ]; see `EnvironmentModel.mean_values`."""
        return self.values({"weights": self.posterior(state)[0]}, experience, seen)

    def replace_data(self, experience: Experience, data: dict[str, Array]) -> Experience:
        """Give experience with other returns, as `bayesrl.calibrate` simulates them."""
        return experience._replace(returns=data["return"])


class Trained(NamedTuple):
    """What a network carries from one update to the next."""

    params: Any
    opt_state: Any
    anchors: Any


@checked(ControlError)
@dataclass(frozen=True, eq=False, kw_only=True)
class NetworkValues(ValueModel):
    """What models of Q by networks share.

    Args:
        hidden: width of the hidden layers, tanh units.
        depth: number of hidden layers; 0 is linear.
        num_steps: gradient steps for each update, on batches of 512 rows, drawn with repetition.
        learning_rate: of Adam.
    """

    hidden: Count = 64
    depth: CountOrZero = 2
    num_steps: Count = 50
    learning_rate: Positive = 1e-3

    def layers(self, size: int) -> list[tuple[int, int]]:
        """Give the shapes of the layers, the last one with an output for each action."""
        sizes = [size, *(self.hidden,) * self.depth, self.num_actions]
        return list(zip(sizes[1:], sizes[:-1], strict=True))

    def scales(self, size: int) -> list[float]:
        """Give the prior's standard deviation of the weights of each layer, 1/√inputs, the last times prior_scale."""
        return [
            (self.prior_scale if i == self.depth else 1.0) / narrow**0.5
            for i, (_, narrow) in enumerate(self.layers(size))
        ]

    def drawn_prior(self, key: PRNGKey, size: int) -> dict[str, Array]:
        """Draw a network from the prior."""
        pairs = zip(self.layers(size), self.scales(size), strict=True)
        return {
            f"layer{i}": scale * jax.random.normal(fold_in(key, i), shape) for i, (shape, scale) in enumerate(pairs)
        }

    def hidden_of(self, params: dict[str, Array], seen: Numbers) -> Array:
        """Give what the last layer reads, [..., hidden]."""
        x = self.read(seen)
        for i in range(self.depth):
            x = jnp.tanh(x @ params[f"layer{i}"].T)
        return x

    def output(self, params: dict[str, Array], seen: Numbers) -> Array:
        """Give the values, [..., actions]."""
        return self.hidden_of(params, seen) @ params[f"layer{self.depth}"].T

    def size_of(self, experience: Experience) -> int:
        """Give the number of features."""
        return int(jax.eval_shape(self.read, experience.observation).shape[-1])

    def heads(self, experience: Experience) -> tuple[Any, Callable[[Any, Any], Array]]:
        """Draw `layer0`, `layer1`, …; see `ValueModel.heads`."""
        size = self.size_of(experience)
        pairs = zip(self.layers(size), self.scales(size), strict=True)
        theta = {
            f"layer{i}": numpyro.sample(f"layer{i}", dist.Normal(jnp.zeros(shape), scale).to_event(2))
            for i, (shape, scale) in enumerate(pairs)
        }
        return theta, self.output

    def trained(self, key: PRNGKey, state: Trained, experience: Experience, jitter: Any) -> Trained:
        """Take gradient steps towards the most probable network around its anchor, with returns jittered by noise."""
        total = jnp.maximum(experience.mask.sum(), 1)
        optimizer = optax.adam(self.learning_rate)
        scales = dict(zip(state.params, self.scales(self.size_of(experience)), strict=True))

        def loss(params: Any, rows: Array) -> Array:
            taken = jnp.take_along_axis(
                self.output(params, experience.observation[rows]), experience.action[rows][:, None], -1
            )[:, 0]
            error = (experience.returns[rows] + jitter(rows) - taken) ** 2 / (2 * self.noise**2)
            apart = sum(((params[k] - state.anchors[k]) ** 2).sum() / (2 * scales[k] ** 2) for k in params)
            return error.mean() + apart / total

        def step(carry: tuple[Any, Any], own: PRNGKey) -> tuple[tuple[Any, Any], None]:
            params, opt_state = carry
            rows = jax.random.randint(own, (_BATCH,), 0, total)
            updates, opt_state = optimizer.update(jax.grad(loss)(params, rows), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        carry, _ = jax.lax.scan(step, (state.params, state.opt_state), split(key, self.num_steps))
        return Trained(*carry, state.anchors)


@checked(ControlError, MemoryNeed(network_bytes, ("hidden", "depth"), "use fewer"))
@dataclass(frozen=True, eq=False, kw_only=True)
class LastLayerValues(NetworkValues):
    """A network whose last layer has its exact Normal posterior, the layers below being those of the best fit.

    References:
        Riquelme, Tucker & Snoek (2018), "Deep Bayesian bandits showdown", section 3, "neural linear".
    """

    def init(self, key: PRNGKey, env: EnvAdapter) -> Trained:
        """Draw the first network; see `EnvironmentModel.init`."""
        size = self.size_of(blank_experience(env.shape, env.dtype))

        def first(key: PRNGKey) -> Trained:
            params = self.drawn_prior(key, size)
            return Trained(params, optax.adam(self.learning_rate).init(params), jax.tree.map(jnp.zeros_like, params))

        told: Trained = closure_jit(first, name="initial")(key)
        return told

    def refit(self, key: PRNGKey, state: Trained, experience: Experience) -> Trained:
        """Train the network; see `EnvironmentModel.refit`."""
        return self.trained(key, state, experience, lambda rows: 0.0)

    def sample(self, key: PRNGKey, state: Trained, experience: Experience, num_samples: int) -> Sites:
        """Draw last layers, on one and the same network; see `EnvironmentModel.sample`."""
        below = {k: jnp.broadcast_to(v, (num_samples, *v.shape)) for k, v in state.params.items()}
        center, factor = self._posterior(state, experience)
        return below | {f"layer{self.depth}": _drawn(key, center, factor, num_samples)}

    def mean_values(self, state: Trained, experience: Experience, seen: Any = None) -> Array:
        """Give the values by the expected last layer; see `EnvironmentModel.mean_values`."""
        expected = state.params | {f"layer{self.depth}": self._posterior(state, experience)[0]}
        return self.values(expected, experience, seen)

    def _posterior(self, state: Trained, experience: Experience) -> tuple[Array, Array]:
        read = self.hidden_of(state.params, experience.observation)
        return _regressed(_moments(self, read, experience), self.prior_scale / read.shape[-1] ** 0.5, self.noise)


@checked(
    ControlError,
    MemoryNeed(
        lambda given: given["num_members"] * network_bytes(given),
        ("num_members", "hidden", "depth"),
        "use fewer of each",
    ),
)
@dataclass(frozen=True, eq=False, kw_only=True)
class EnsembleValues(NetworkValues):
    """An ensemble of networks, each with a prior network of its own and returns with noise of their own.

    Member k minimises Σ (R + noise·z_k − Q(s, a; θ))²/2·noise² + (θ − θ_k)²/2·scale², with θ_k and z_k drawn once. For
    linear Q the minimisers are exact draws from the posterior; for networks they stand for such draws.

    Args:
        num_members: of the ensemble.

    References:
        Osband, Aslanides & Cassirer (2018), "Randomized prior functions for deep reinforcement learning", lemma 3;
        Pearce, Leibfried & Brintrup (2020), "Uncertainty in neural networks: approximately Bayesian ensembling".
    """

    num_members: Count = 10

    def init(self, key: PRNGKey, env: EnvAdapter) -> Trained:
        """Draw the prior networks; see `EnvironmentModel.init`."""
        size = self.size_of(blank_experience(env.shape, env.dtype))

        def first(keys: PRNGKeys) -> Trained:
            anchors = jax.vmap(lambda k: self.drawn_prior(k, size))(keys)
            return Trained(anchors, jax.vmap(optax.adam(self.learning_rate).init)(anchors), anchors)

        told: Trained = closure_jit(first, name="initial")(split(key, self.num_members))
        return told

    def refit(self, key: PRNGKey, state: Trained, experience: Experience) -> Trained:
        """Train all members; see `EnvironmentModel.refit`."""

        def one(member: Array, own: Trained) -> Trained:
            fixed = jax.random.fold_in(as_hash_key(np.array([0, 7], np.uint32)), member)

            def jitter(rows: Array) -> Array:
                return self.noise * jax.vmap(lambda row: jax.random.normal(fold_in(fixed, row)))(rows)

            return self.trained(fold_in(key, member), own, experience, jitter)

        return jax.vmap(one)(jnp.arange(self.num_members), state)

    def sample(self, key: PRNGKey, state: Trained, experience: Experience, num_samples: int) -> Sites:
        """Pick members; see `EnvironmentModel.sample`."""
        chosen = jax.random.randint(key, (num_samples,), 0, self.num_members)
        return {k: v[chosen] for k, v in state.params.items()}


def _moments(model: ValueModel, read: Array, experience: Experience) -> Moments:
    taken = jax.nn.one_hot(experience.action, model.num_actions) * experience.mask[:, None]
    square = jnp.einsum("na,nd,ne->ade", taken, read, read)
    return Moments(square, jnp.einsum("na,nd,n->ad", taken, read, experience.returns))


def _regressed(moments: Moments, prior_scale: float, noise: float) -> tuple[Array, Array]:
    """Give mean and lower Cholesky factor of the precision of Bayesian linear regression, for each action."""
    prior = jnp.eye(moments.product.shape[-1]) / prior_scale**2
    factor = jnp.linalg.cholesky(moments.square / noise**2 + prior)
    return jax.scipy.linalg.cho_solve((factor, True), moments.product[..., None] / noise**2)[..., 0], factor


def _drawn(key: PRNGKey, center: Array, factor: Array, num_samples: int) -> Array:
    """Draw Normal vectors of these means and precisions, [draws, actions, features]."""
    noise = jax.random.normal(key, (num_samples, *center.shape))
    upper = jnp.broadcast_to(factor, (num_samples, *factor.shape))
    turned = jax.scipy.linalg.solve_triangular(upper, noise[..., None], lower=True, trans=1)[..., 0]
    return center + turned
