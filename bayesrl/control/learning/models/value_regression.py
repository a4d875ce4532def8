"""Models of action values: Gaussian posteriors over Q from returns; linear, last-layer or by ensembles."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from bayesrl.compilation.random_keys import as_hash_key, fold_in, split
from bayesrl.control.exploration.beliefs import sample_by_precision
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.control.learning.models.base import ACTION_VALUES, EnvironmentModel, Sites, check_sizes, observe_masked
from bayesrl.control.learning.replay_memory import Experience
from bayesrl.control.policies import network_bytes
from bayesrl.errors import ControlError
from bayesrl.typing import Numbers, PRNGKey

_BATCH = 512
_MOST_MOMENTS = 2**27
"""Most numbers in the second moments of linear regression: half a gigabyte."""


@checked(ControlError)
@dataclass(frozen=True, eq=False, kw_only=True)
class ValueModel(EnvironmentModel):
    """The base of models of Q: returns are observed as R ~ Normal(Q(s, a; θ), noise).

    Up to a constant, the negative log-likelihood is (R − Q(s, a; θ))² / 2·noise². So maximum likelihood is least
    squares, and with θ ~ Normal(0, prior_scale) the most probable θ is the ridge fit with penalty
    noise²/prior_scale². R is the return that followed, under whatever policy was played.

    Args:
        num_actions: number of actions.
        num_observations: number of observations, if they are the integers from 0 on; else None.
        features: a function from one observation to [features]; by default one-hot, or the numbers of the
            observation and a 1.
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
        check_sizes(env, self.num_observations, self.num_actions)

    def featurize(self, observations: Numbers) -> Array:
        """Compute the features of observations, [rows, features]."""
        if self.features is not None:
            return jnp.asarray(jax.vmap(self.features)(observations))
        if self.num_observations is not None:
            return jax.nn.one_hot(observations, self.num_observations)
        flat = jnp.asarray(observations).reshape(len(observations), -1).astype(float)
        return jnp.concatenate([flat, jnp.ones((len(flat), 1))], -1)

    def num_features(self, experience: Experience) -> int:
        """Count the features of one observation."""
        return int(jax.eval_shape(self.featurize, experience.observation).shape[-1])

    @abc.abstractmethod
    def sample_network(self, experience: Experience) -> tuple[Any, Callable[[Any, Any], Array]]:
        """Draw θ, and return it with the function from (θ, observations) to values, [rows, actions]."""

    def __call__(self, experience: Experience, seen: Any = None) -> None:
        """Draw θ, observe the returns, and expose `action_values`."""
        theta, value_fn = self.sample_network(experience)
        taken = jnp.take_along_axis(value_fn(theta, experience.observation), experience.action[:, None], -1)[:, 0]
        observe_masked("return", dist.Normal(taken, self.noise), experience.returns, experience.mask)
        if self.num_observations is not None:
            seen = jnp.arange(self.num_observations)
        elif seen is None:
            seen = jnp.zeros((1, *experience.observation.shape[1:]))
        numpyro.deterministic(ACTION_VALUES, value_fn(theta, seen))


class Moments(NamedTuple):
    """The sufficient statistics of linear regression, for each action.

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
        """Refuse another environment, and too many features for a square matrix; see `EnvironmentModel.check`."""
        super().check(env)
        size = self.num_features(env.example())
        if self.num_actions * size**2 > _MOST_MOMENTS:
            raise ControlError(
                f"LinearValues keeps a matrix of {size:,} × {size:,} numbers for each of {self.num_actions} actions, "
                "one row for each feature; use LastLayerValues, or pass features=, a function to fewer of them"
            )

    def sample_network(self, experience: Experience) -> tuple[Any, Callable[[Any, Any], Array]]:
        """Draw `weights`; see `ValueModel.sample_network`."""
        prior = dist.Normal(jnp.zeros((self.num_actions, self.num_features(experience))), self.prior_scale)
        return numpyro.sample("weights", prior.to_event(2)), lambda theta, seen: self.featurize(seen) @ theta.T

    def empty(self, experience: Experience) -> Moments:
        """Return zeros; see `EnvironmentModel.empty`."""
        size = self.num_features(experience)
        return Moments(
            np.zeros((self.num_actions, size, size), np.float32), np.zeros((self.num_actions, size), np.float32)
        )

    def condition(self, state: Moments, rows: Experience) -> Moments:
        """Add up moments; see `EnvironmentModel.condition`."""
        return jax.tree.map(jnp.add, state, _moments(self, self.featurize(rows.observation), rows))

    def posterior(self, state: Moments) -> tuple[Array, Array]:
        """Compute E[θ] [actions, features], and the lower Cholesky factor of the precision of each action's θ."""
        return _regress(state, self.prior_scale, self.noise)

    def sample(self, key: PRNGKey, state: Moments, experience: Experience, num_samples: int) -> Sites:
        """Draw θ from the exact posterior; see `EnvironmentModel.sample`."""
        return {"weights": sample_by_precision(key, *self.posterior(state), (num_samples,))}

    def mean_values(self, state: Moments, experience: Experience, seen: Any = None) -> Array:
        """Compute φ·E[θ]; see `EnvironmentModel.mean_values`."""
        return self.values({"weights": self.posterior(state)[0]}, experience, seen)

    def replace_data(self, experience: Experience, data: dict[str, Array]) -> Experience:
        """Replace the returns by those that `bayesrl.calibrate` simulates."""
        return experience._replace(returns=data["return"])


class TrainState(NamedTuple):
    """A network in training: weights by layer, the state of Adam, and the anchors that pull the weights back."""

    params: Any
    opt_state: Any
    anchors: Any


@checked(ControlError)
@dataclass(frozen=True, eq=False, kw_only=True)
class NetworkValues(ValueModel):
    """The base of models of Q by networks.

    Args:
        hidden: width of the hidden layers, tanh units.
        depth: number of hidden layers; 0 is linear.
        num_steps: gradient steps for each update, on batches of 512 rows, drawn with replacement.
        learning_rate: Adam's learning rate.
    """

    hidden: Count = 64
    depth: CountOrZero = 2
    num_steps: Count = 50
    learning_rate: Positive = 1e-3

    def priors(self, experience: Experience) -> dict[str, dist.Normal]:
        """Return the prior of each layer's weights: standard deviation 1/√inputs, the last one times prior_scale."""
        sizes = [self.num_features(experience), *[self.hidden] * self.depth, self.num_actions]
        # Divided by √inputs, sums over inputs keep their size from layer to layer, however wide these are.
        scales = [1.0] * self.depth + [self.prior_scale]
        return {
            f"layer{i}": dist.Normal(jnp.zeros((sizes[i + 1], sizes[i])), scale / sizes[i] ** 0.5)
            for i, scale in enumerate(scales)
        }

    def apply(self, weights: dict[str, Array], observations: Numbers, *, head: bool = True) -> Array:
        """Compute the values, [rows, actions], or without the head the last layer's inputs, [rows, hidden]."""
        features = self.featurize(observations)
        for i in range(self.depth):
            features = jnp.tanh(features @ weights[f"layer{i}"].T)
        return features @ weights[f"layer{self.depth}"].T if head else features

    def sample_prior(self, key: PRNGKey, experience: Experience) -> dict[str, Array]:
        """Draw the weights of a network."""
        priors = self.priors(experience).items()
        return {name: prior.sample(fold_in(key, i)) for i, (name, prior) in enumerate(priors)}

    def start(self, key: PRNGKey, experience: Experience, *, anchored: bool) -> TrainState:
        """Draw a network to train, which is pulled back to itself or to zero."""
        weights = self.sample_prior(key, experience)
        anchors = weights if anchored else jax.tree.map(jnp.zeros_like, weights)
        return TrainState(weights, optax.adam(self.learning_rate).init(weights), anchors)

    def sample_network(self, experience: Experience) -> tuple[Any, Callable[[Any, Any], Array]]:
        """Draw `layer0`, `layer1`, …; see `ValueModel.sample_network`."""
        priors = self.priors(experience).items()
        return {name: numpyro.sample(name, prior.to_event(2)) for name, prior in priors}, self.apply

    def train(self, key: PRNGKey, state: TrainState, experience: Experience, jitter: Any) -> TrainState:
        """Take gradient steps towards the most probable network around its anchor, with returns jittered by noise."""
        total = jnp.maximum(experience.mask.sum(), 1)
        optimizer = optax.adam(self.learning_rate)
        priors = self.priors(experience)

        def loss(params: Any, rows: Array) -> Array:
            taken = jnp.take_along_axis(
                self.apply(params, experience.observation[rows]), experience.action[rows][:, None], -1
            )[:, 0]
            error = (experience.returns[rows] + jitter(rows) - taken) ** 2 / (2 * self.noise**2)
            pull = sum((((params[k] - state.anchors[k]) / priors[k].scale) ** 2).sum() / 2 for k in params)
            # The likelihood enters as a mean over rows, so the prior's share is one row's.
            return error.mean() + pull / total

        def step(carry: tuple[Any, Any], own: PRNGKey) -> tuple[tuple[Any, Any], None]:
            params, opt_state = carry
            rows = jax.random.randint(own, (_BATCH,), 0, total)  # rows with steps come first, blank ones after them
            updates, opt_state = optimizer.update(jax.grad(loss)(params, rows), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        carry, _ = jax.lax.scan(step, (state.params, state.opt_state), split(key, self.num_steps))
        return TrainState(*carry, state.anchors)


@checked(ControlError, MemoryNeed(network_bytes, ("hidden", "depth"), "use fewer"))
@dataclass(frozen=True, eq=False, kw_only=True)
class LastLayerValues(NetworkValues):
    """A network whose last layer has its exact Normal posterior; the layers below are those of the best fit.

    Example:
        >>> from bayesrl import control
        >>> model = control.LastLayerValues(num_actions=2, num_observations=5, hidden=16)
        >>> control.BayesianAgent(model).describe()
        {'type': 'BayesianAgent', 'model': 'LastLayerValues', 'inference': 'exact', 'num_samples': 32}

    References:
        Riquelme, Tucker & Snoek (2018), "Deep Bayesian bandits showdown", section 3, "neural linear".
    """

    def init(self, key: PRNGKey, env: EnvAdapter) -> TrainState:
        """Draw the first network; see `EnvironmentModel.init`."""
        start = partial(self.start, experience=env.example(), anchored=False)
        state: TrainState = closure_jit(start, name="initial")(key)
        return state

    def refit(self, key: PRNGKey, state: TrainState, experience: Experience) -> TrainState:
        """Train the network; see `EnvironmentModel.refit`."""
        return self.train(key, state, experience, lambda rows: 0.0)

    def sample(self, key: PRNGKey, state: TrainState, experience: Experience, num_samples: int) -> Sites:
        """Draw last layers on top of one network; see `EnvironmentModel.sample`."""
        below = {k: jnp.broadcast_to(v, (num_samples, *v.shape)) for k, v in state.params.items()}
        mean, factor = self._posterior(state, experience)
        return below | {f"layer{self.depth}": sample_by_precision(key, mean, factor, (num_samples,))}

    def mean_values(self, state: TrainState, experience: Experience, seen: Any = None) -> Array:
        """Compute the values by the expected last layer; see `EnvironmentModel.mean_values`."""
        expected = state.params | {f"layer{self.depth}": self._posterior(state, experience)[0]}
        return self.values(expected, experience, seen)

    def _posterior(self, state: TrainState, experience: Experience) -> tuple[Array, Array]:
        features = self.apply(state.params, experience.observation, head=False)
        # The scale that `priors` gives the last layer.
        return _regress(_moments(self, features, experience), self.prior_scale / features.shape[-1] ** 0.5, self.noise)


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
    """An ensemble of networks, each with its own prior network and its own noise on the returns.

    Member k minimises Σ (R + noise·z_k − Q(s, a; θ))²/2·noise² + (θ − θ_k)²/2·scale², with θ_k and z_k drawn once. For
    linear Q the minimisers are exact draws from the posterior; for networks they stand in for such draws.

    Args:
        num_members: number of networks.

    Example:
        >>> from bayesrl import control
        >>> model = control.EnsembleValues(num_actions=2, num_observations=5, num_members=3)
        >>> control.BayesianAgent(model).describe()
        {'type': 'BayesianAgent', 'model': 'EnsembleValues', 'inference': 'exact', 'num_samples': 32}

    References:
        Osband, Aslanides & Cassirer (2018), "Randomized prior functions for deep reinforcement learning", lemma 3;
        Pearce, Leibfried & Brintrup (2020), "Uncertainty in neural networks: approximately Bayesian ensembling".
    """

    num_members: Count = 10

    def init(self, key: PRNGKey, env: EnvAdapter) -> TrainState:
        """Draw the prior networks; see `EnvironmentModel.init`."""
        start = partial(self.start, experience=env.example(), anchored=True)
        state: TrainState = closure_jit(jax.vmap(start), name="initial")(split(key, self.num_members))
        return state

    def refit(self, key: PRNGKey, state: TrainState, experience: Experience) -> TrainState:
        """Train all members; see `EnvironmentModel.refit`."""

        def one(member: Array, own: TrainState) -> TrainState:
            # A fixed key per member gives each row the same noise z_k at every update, without storing it.
            fixed = jax.random.fold_in(as_hash_key(np.array([0, 7], np.uint32)), member)

            def jitter(rows: Array) -> Array:
                return self.noise * jax.vmap(lambda row: jax.random.normal(fold_in(fixed, row)))(rows)

            return self.train(fold_in(key, member), own, experience, jitter)

        return jax.vmap(one)(jnp.arange(self.num_members), state)

    def sample(self, key: PRNGKey, state: TrainState, experience: Experience, num_samples: int) -> Sites:
        """Pick members; see `EnvironmentModel.sample`."""
        chosen = jax.random.randint(key, (num_samples,), 0, self.num_members)
        return {k: v[chosen] for k, v in state.params.items()}


def _moments(model: ValueModel, features: Array, experience: Experience) -> Moments:
    taken = jax.nn.one_hot(experience.action, model.num_actions) * experience.mask[:, None]
    square = jnp.einsum("na,nd,ne->ade", taken, features, features)
    return Moments(square, jnp.einsum("na,nd,n->ad", taken, features, experience.returns))


def _regress(moments: Moments, prior_scale: float, noise: float) -> tuple[Array, Array]:
    """Compute the mean and the lower Cholesky factor of the precision of Bayesian linear regression, per action."""
    prior = jnp.eye(moments.product.shape[-1]) / prior_scale**2
    factor = jnp.linalg.cholesky(moments.square / noise**2 + prior)
    return jax.scipy.linalg.cho_solve((factor, True), moments.product[..., None] / noise**2)[..., 0], factor
