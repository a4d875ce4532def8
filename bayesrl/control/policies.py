"""Guides of rollouts: tables, linear maps and networks that tilt the prior as a function of the observation."""

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from bayesrl.arguments import Count, MemoryNeed, checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import as_hash_key, dummy_key, fold_in, split, split_keys
from bayesrl.control.gymnasium.recorded_rollout import RecordedRollout
from bayesrl.control.rollout import EpisodeProgram, PolicyFn, PolicyOutput, Rollout
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import Structure
from bayesrl.core.trace import trace_program
from bayesrl.errors import EngineError, GuideError
from bayesrl.guides import AutoGuide, PolicyGuide
from bayesrl.guides.tilts.families import tilt_distribution, tilt_shape
from bayesrl.posterior.posterior import Posterior
from bayesrl.typing import Params, PRNGKey, Program
from bayesrl.value_checks import format_value

_NUM_PROBES = 64


class RolloutGuide(PolicyGuide):
    """A guide of a rollout that can also draw its action in one state; `make_policy` declares the parameters."""

    def __init__(self, rollout: EpisodeProgram, make_policy: Callable[[], PolicyFn]) -> None:
        # A tilt keeps the support of the prior.
        super().__init__(lambda *observation: rollout.run(make_policy(), *observation), within_prior=True)
        self.rollout, self._make_policy = rollout, make_policy

    def twist_values(self, params: Params) -> Callable[[Any, Any], Array]:
        """Return the critic as a twist of the rollout's particles: from (step, carry) to V of what is to come.

        Raises:
            EngineError: the guide has no critic.
        """

        def value(step: Any, carry: tuple[Any, Array]) -> Array:
            state, alive = carry
            with handlers.block(), handlers.substitute(data=params):
                output = self._make_policy()(self.rollout.environment.observe(state), jnp.asarray(step) + 1)
            if output.value is None:
                raise EngineError(
                    "twist= is a fit without a critic; fit with NetworkPolicy(critic=True) and "
                    "objective=bayesrl.control.ActorCritic()"
                )
            # Rewards and log-ratios of later steps carry γᵗ.
            weight = self.rollout.discount ** (jnp.asarray(step, float) + 1)
            return jnp.where(alive, weight * output.value, 0.0)

        return value


def action_distribution(program: Program, observation: Any, time: Any = 0) -> dist.Distribution:
    """Read off the action's distribution in one state, from a rollout or from its guide with parameters substituted."""
    with handlers.block(), handlers.trace() as drawn:
        FoldedKeys(program, dummy_key())(observation, jnp.asarray(time))
    chosen: dist.Distribution = drawn["action"]["fn"]
    return chosen


@checked(GuideError)
def as_prior(posterior: Posterior) -> Callable[[Any, Array], dist.Distribution]:
    """Use a fitted policy as the prior of another rollout: `Rollout(..., prior=as_prior(posterior))`.

    Args:
        posterior: a fit of a rollout, by a policy of `bayesrl.control` at one temperature; the best restart is used.

    Raises:
        GuideError: the fit used another kind of guide.
        PolicyError: the fit has several temperatures.

    Example:
        >>> import jax, bayesrl
        >>> from bayesrl import control
        >>> program = control.Rollout(control.CartPole(), horizon=3)
        >>> guide = control.LinearPolicy(critic=False)
        >>> posterior = bayesrl.fit(jax.random.key(0), program, beta=1.0, guide=guide, num_steps=1, progress=False)
        >>> continued = control.Rollout(control.CartPole(), horizon=3, prior=control.as_prior(posterior))
    """
    programs, params = (posterior if posterior.num_restarts == 1 else posterior.select(restart="best")).unbatched()
    if not isinstance(programs.guide, RolloutGuide):
        raise GuideError(
            f"the posterior was fitted with {type(programs.guide).__name__}, which does not draw single actions; "
            "use TablePolicy(), LinearPolicy() or NetworkPolicy()"
        )
    fitted = handlers.substitute(programs.guide, data=programs.constrain(params))
    return lambda observation, time: action_distribution(fitted, observation, time)


@dataclass(frozen=True, kw_only=True)
class ObservationPolicy(AutoGuide):
    """A guide of a `Rollout`: the prior's distribution tilted by θ(o, t), beside a critic V(o, t).

    θ tilts the prior as `AutoTilt` does: it adds to logits, moves the location and scale of a Normal, and is an affine
    map in unconstrained space of all other continuous actions. θ starts at zero, so the fit starts at the prior.
    V estimates the return to come, in reward units; `ActorCritic` learns it.

    Args:
        stationary: whether the policy is the same at all times; near a finite horizon, another one may be better.
        critic: whether to learn V too.
    """

    stationary: bool = True
    critic: bool = True

    @abc.abstractmethod
    def declare(self, key: PRNGKey, name: str, rollout: EpisodeProgram, shape: tuple[int, ...], *, timed: bool) -> Any:
        """Declare the parameters NAME$… of a function of (observation, time), and return the function.

        Its values have this shape, and depend on the time only if `timed`.
        """

    def build(self, key: PRNGKey, policy: Program, structure: Structure, args: tuple[Any, ...]) -> Program:
        """Build the guide; see `AutoGuide.build`."""
        if not isinstance(policy, EpisodeProgram):
            raise GuideError(
                f"{type(self).__name__} is for programs such as bayesrl.control.Rollout, got {format_value(policy)}; "
                "use bayesrl.guides.AutoTilt()"
            )
        if not self.stationary and not isinstance(policy, Rollout):
            raise GuideError(
                "stationary=False: recorded steps begin anywhere in an episode, so their time is unknown; use a "
                "stationary policy, or put the time into the observation"
            )
        site = structure["action"]
        shape = _abstractly(lambda: tilt_shape("action", _prior_of(policy), site.support))
        scale = _return_scale(key, policy) if self.critic else 1.0
        actor_key, critic_key = split_keys(key)

        def make_policy() -> PolicyFn:
            theta = self.declare(actor_key, "action", policy, shape, timed=not self.stationary)
            # The return to come depends on the steps left, even if the policy does not read the time.
            timed = not self.stationary or policy.ends_at_horizon
            value = self.declare(critic_key, "critic", policy, (1,), timed=timed) if self.critic else None

            def choose(observation: Any, time: Array) -> PolicyOutput:
                prior = policy.prior_policy(observation, time).action
                action = tilt_distribution(prior, theta(observation, time), site.support)
                return PolicyOutput(action, None if value is None else scale * value(observation, time)[0])

            return choose

        return RolloutGuide(policy, make_policy)

    def overdispersed_init(self, key: PRNGKey, params: Params) -> Params:
        """Perturb the last layers of θ so that tilts differ by about one; see `AutoGuide.overdispersed_init`."""
        result = {}
        for index, (name, value) in enumerate(sorted(params.items())):
            noise = jax.random.normal(fold_in(key, index), value.shape, value.dtype)
            last = name.startswith("action$") and ("out" in name or name == "action$table")
            # An output sums over its inputs, so the noise of each weight shrinks with their number.
            fan = value.shape[-1] if "weight" in name and value.ndim > 1 else 1
            result[name] = value + noise / math.sqrt(fan) if last else value
        return result


@checked(GuideError)
@dataclass(frozen=True, kw_only=True)
class TablePolicy(ObservationPolicy):
    """One tilt for each of finitely many observations: a softmax over a table Q(o, a)/β.

    Example:
        >>> from bayesrl import control
        >>> control.TablePolicy(stationary=False).learning_rate_for({})
        0.1
    """

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate."""
        return 0.1

    def declare(self, key: PRNGKey, name: str, rollout: EpisodeProgram, shape: tuple[int, ...], *, timed: bool) -> Any:
        """Declare `NAME$table` [*time, observations, *shape]; see `ObservationPolicy.declare`."""
        count = rollout.environment.num_observations
        if count is None:
            raise GuideError(
                "TablePolicy needs finitely many observations, and those of "
                f"{type(rollout.environment).__name__} are vectors; use LinearPolicy() or NetworkPolicy()"
            )
        times = (rollout.horizon,) if timed else ()
        table = jnp.asarray(numpyro.param(f"{name}$table", jnp.zeros((*times, count, *shape))))

        def look_up(observation: Array, time: Array) -> Array:
            label = rollout.environment.label(observation)
            return table[time, label] if timed else table[label]

        return look_up


@checked(GuideError)
@dataclass(frozen=True, kw_only=True)
class LinearPolicy(ObservationPolicy):
    """A tilt that is linear in the features of the observation (and of time, if not stationary).

    Example:
        >>> from bayesrl import control
        >>> control.LinearPolicy(critic=False).stationary
        True
    """

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate."""
        return 0.03

    def declare(self, key: PRNGKey, name: str, rollout: EpisodeProgram, shape: tuple[int, ...], *, timed: bool) -> Any:
        """Declare `NAME$out.weight` and `NAME$out.bias`; see `ObservationPolicy.declare`."""
        return _declare_network(key, name, _Features(rollout, timed=timed), shape, ())


def network_bytes(given: Mapping[str, Any]) -> float:
    """Bound from below the memory of a network of these sizes; each layer is an array of its own."""
    hidden, depth = float(given["hidden"]), float(given["depth"])
    return 4 * (hidden**2 * (depth - 1) + hidden) + 1000 * depth


@checked(
    GuideError,
    MemoryNeed(network_bytes, ("hidden", "depth"), "use fewer"),
)
@dataclass(frozen=True, kw_only=True)
class NetworkPolicy(ObservationPolicy):
    """A tilt by a tanh network of the features of the observation; the critic has a network of its own.

    Args:
        hidden: width of the hidden layers.
        depth: number of hidden layers.

    Example:
        >>> from bayesrl import control
        >>> control.NetworkPolicy(hidden=32, depth=1).hidden
        32
    """

    hidden: Count = 64
    depth: Count = 2

    def learning_rate_for(self, params: Params) -> float:
        """Suggest an Adam rate."""
        return 0.003

    def declare(self, key: PRNGKey, name: str, rollout: EpisodeProgram, shape: tuple[int, ...], *, timed: bool) -> Any:
        """Declare the arrays of a network, the last layer zero; see `ObservationPolicy.declare`."""
        return _declare_network(key, name, _Features(rollout, timed=timed), shape, (self.hidden,) * self.depth)


def _declare_network(
    key: PRNGKey, name: str, features: "_Features", shape: tuple[int, ...], hidden: tuple[int, ...]
) -> Callable[[Any, Array], Array]:
    """Declare a tanh network whose last layer is zero; without hidden layers it is a linear map."""
    layers, narrow = [], features.size
    for index, wide in enumerate(hidden):
        # NumPyro calls a function (with a key, `_`) only where no value is given, so steps factorise no matrix.
        start = partial(_orthogonal, fold_in(key, index), wide, narrow)
        weight = numpyro.param(f"{name}$layer{index}.weight", start)
        layers.append((weight, numpyro.param(f"{name}$layer{index}.bias", jnp.zeros(wide))))
        narrow = wide
    last = numpyro.param(f"{name}$out.weight", jnp.zeros((math.prod(shape), narrow)))
    bias = numpyro.param(f"{name}$out.bias", jnp.zeros(math.prod(shape)))

    def network(observation: Any, time: Array) -> Array:
        x = features(observation, time)
        for weight, shift in layers:
            x = jnp.tanh(weight @ x + shift)
        return (last @ x + bias).reshape(shape)

    return network


def _orthogonal(key: PRNGKey, wide: int, narrow: int, _: Any = None) -> Array:
    """Initialise a layer: orthogonal rows or columns, whichever are fewer, with gain √2."""
    return math.sqrt(2.0) * jax.random.orthogonal(key, wide, m=narrow)


class _Features:
    """The vector of `size` numbers that linear maps and networks take from an observation and a time."""

    def __init__(self, rollout: EpisodeProgram, *, timed: bool) -> None:
        self.environment, self.horizon, self.timed = rollout.environment, rollout.horizon, timed
        self.size = int(_abstractly(lambda: self(_observation_of(rollout), jnp.asarray(0))).shape[0])

    def __call__(self, observation: Any, time: Array) -> Array:
        features = self.environment.features(observation)
        # Time runs from −1 to 1, the size of other features.
        return jnp.append(features, 2.0 * time / self.horizon - 1.0) if self.timed else features


def _observation_of(rollout: EpisodeProgram) -> Any:
    """Make one observation, for its shapes and types."""
    with handlers.block():
        return rollout.environment.observe(FoldedKeys(rollout.environment.reset, dummy_key())())


def _prior_of(rollout: EpisodeProgram) -> dist.Distribution:
    return rollout.prior_policy(_observation_of(rollout), jnp.asarray(0)).action


def _abstractly[T](make: Callable[[], T]) -> T:
    """Make an object for its types and shapes, without computing anything."""
    # eval_shape returns arrays only; a distribution leaves the trace by way of the list.
    made: list[T] = []
    jax.eval_shape(lambda: made.append(make()))
    return made[0]


def _return_scale(key: PRNGKey, rollout: EpisodeProgram) -> float:
    """Estimate the root mean square of the prior's returns to come, reward units: the unit of the critic's outputs."""
    if isinstance(rollout, RecordedRollout):
        return rollout.return_scale

    def rewards(key: PRNGKey) -> Array:
        return trace_program(FoldedKeys(rollout, key)).sites["reward"].fn.log_factor

    probe = closure_jit(lambda key: jax.vmap(rewards)(split(key, _NUM_PROBES)), name="rewards")
    earned = np.asarray(probe(as_hash_key(key)), float)
    to_come = np.cumsum(earned[:, ::-1], -1)
    scale = float(np.sqrt(np.mean(to_come**2)))
    return scale if np.isfinite(scale) and scale > 0 else 1.0
