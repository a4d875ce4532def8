"""A policy in an environment, for a number of steps: a NumPyro program."""

import abc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.primitives import Messenger

from bayesrl.arguments import Count, checked, real_range
from bayesrl.control.environments.base import Environment
from bayesrl.core.primitives import reward, site_kind
from bayesrl.errors import ControlError

VALUE, WEIGHT, CONTINUE = "value$", "weight$", "continue$"
"""Deterministic sites, [time], that `ActorCritic` reads from the guide of a rollout."""


class PolicyOutput(NamedTuple):
    """The output of a policy at one step: a distribution of actions, and its value of the state, reward units."""

    action: dist.Distribution
    value: Array | None = None


type PolicyFn = Callable[[Any, Array], PolicyOutput]
"""A function from an observation and the time step to a `PolicyOutput`."""


@dataclass(frozen=True, eq=False)
class EpisodeProgram(abc.ABC):
    """A policy in an environment as a program: what simulated and recorded rollouts share; see `Rollout`."""

    environment: Environment
    horizon: Count
    discount: Annotated[float, real_range(above=0, most=1)] = 1.0
    prior: Callable[[Any, Array], dist.Distribution] | None = None

    def __call__(self, *observation: Any) -> Any:
        """Run as a program; with an observation, draw one action only."""
        return self.run(self.prior_policy, *observation)

    def prior_policy(self, observation: Any, time: Array) -> PolicyOutput:
        """Return the output of the prior."""
        prior = self.environment.prior(observation) if self.prior is None else self.prior(observation, time)
        return PolicyOutput(prior)

    def run(self, choose: PolicyFn, *observation: Any) -> Any:
        """Run with another policy in place of the prior; one that values states adds the sites of `ActorCritic`.

        With an observation, and perhaps a time step (0 by default), it only draws one action.
        """
        if observation:
            seen, time = (*observation, jnp.asarray(0))[:2]
            return numpyro.sample("action", choose(seen, time).action)
        return self.play(choose)

    @property
    def ends_at_horizon(self) -> bool:
        """Whether episodes really end at the horizon."""
        return False

    @abc.abstractmethod
    def play(self, choose: PolicyFn) -> Any:
        """Run all steps."""


@checked(ControlError)
@dataclass(frozen=True, eq=False)
class Rollout(EpisodeProgram):
    """One episode of a policy in an environment, as a program for `bayesrl.fit`.

    At step t < horizon, the agent observes o_t, draws `action` from π(·|o_t) and earns `reward`. With a
    discount γ, the reward and the log-ratio of step t carry γᵗ: the event "survive to the next step",
    integrated out. After termination nothing counts: J = E Σ_t γᵗ·(r_t − β·log(q/π₀)_t).

    Args:
        environment: the environment in which the policy acts.
        horizon: greatest number of steps.
        discount: γ, in (0, 1].
        prior: the policy to start from and the reference of the KL, a function from an observation and the time
            step to a distribution of actions; by default the environment's own.
        unbounded: whether the horizon, and `truncated` of the environment, only cut off an episode that goes on. If
            so, the last step does not count, and `ActorCritic` takes the value of the last state for all that follows.
            Otherwise episodes end there.

    Raises:
        ControlError: the horizon or the discount is out of range.

    Example:
        >>> import jax, bayesrl
        >>> from bayesrl import control
        >>> program = control.Rollout(control.CartPole(), horizon=20)
        >>> bayesrl.importance(jax.random.key(0), program, beta=1.0, num_samples=100).sites["action"].shape
        (100, 20)
    """

    unbounded: bool = False

    @property
    def ends_at_horizon(self) -> bool:
        """Whether episodes really end at the horizon."""
        return not self.unbounded

    def play(self, choose: PolicyFn) -> Any:
        """Run one episode; see `EpisodeProgram.run`."""
        weights = self.discount ** jnp.arange(self.horizon)
        if self.unbounded:
            weights = weights.at[-1].set(0.0)

        def step(carry: tuple[Any, Array], time: Array) -> tuple[Any, tuple[Array, Array]]:
            state, alive = carry
            choice = choose(self.environment.observe(state), time)
            # After the end, draws go on; masked, they have no density, and so no share in the KL or in gradients.
            with handlers.mask(mask=alive):
                action = numpyro.sample("action", choice.action)
                outcome = self.environment.step(state, action)
            earned = jnp.where(alive, outcome.reward, 0.0)
            reward("reward", earned)
            over = outcome.terminated | outcome.truncated
            ended = outcome.terminated if self.unbounded else over
            emit_critic_sites(choice, weights[time] * alive, self.discount * (1.0 - ended))
            # A scan cannot stop early: after the end, the state stands still.
            after = jax.tree.map(lambda new, old: jnp.where(alive, new, old), outcome.state, state)
            return (after, alive & ~over), (earned, alive)

        first = (self.environment.reset(), jnp.asarray(True))
        with _Weighted(weights) if self.unbounded or self.discount < 1 else nullcontext():
            (state, _), (earned, alive) = scan(step, first, jnp.arange(self.horizon))
        numpyro.deterministic("return", earned.sum())
        numpyro.deterministic("length", alive.sum())
        return state


def emit_critic_sites(choice: PolicyOutput, weight: Array, go_on: Array) -> None:
    """Add the sites that `ActorCritic` reads, if the policy values states."""
    if choice.value is not None:
        numpyro.deterministic(VALUE, choice.value)
        numpyro.deterministic(WEIGHT, weight)
        numpyro.deterministic(CONTINUE, go_on)


class _Weighted(Messenger):
    """Weight actions and rewards by time step; `numpyro.handlers.scale` inside a scan cannot change with time."""

    def __init__(self, weights: Array) -> None:
        super().__init__(None)
        self.weights = weights

    def process_message(self, msg: dict[str, Any]) -> None:
        """Scale the sites that a scan has stacked."""
        if msg.get("_control_flow_done") and msg["type"] == "sample" and site_kind(msg) in ("action", "reward"):
            msg["scale"] = self.weights if msg["scale"] is None else msg["scale"] * self.weights
