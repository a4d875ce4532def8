"""`KLControlAgent`: KL-regularised RL as an agent that learns one episode at a time."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from numpyro import handlers

from bayesrl.arguments import Count, Positive, UnitInterval, checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import as_hash_key, fold_in
from bayesrl.control.actor_critic import ActorCritic
from bayesrl.control.exploration.rules import Thompson
from bayesrl.control.gymnasium.behaviour_policies import choose_actions
from bayesrl.control.gymnasium.recorded_rollout import ExternalEnvironment, RecordedRollout
from bayesrl.control.gymnasium.spaces import Actions, Observations
from bayesrl.control.learning.agents.base import Agent, AgentState, UpdateInfo, restore_leaves
from bayesrl.control.learning.agents.bayesian import BayesianAgent, ModelOrProgram
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy, draw_index
from bayesrl.control.learning.replay_memory import Episode
from bayesrl.control.policies import NetworkPolicy, ObservationPolicy, TablePolicy, action_distribution
from bayesrl.core.draws import Draws
from bayesrl.errors import ControlError
from bayesrl.exact.weighted_draws import numpy_generator
from bayesrl.svi.problem_setup import set_up
from bayesrl.svi.step import LANES, FitState, State, StepConfig, StepInfo, start, step_on_draws
from bayesrl.typing import PRNGKey


@checked(ControlError)
@dataclass(frozen=True, eq=False)
class KLControlAgent(Agent):
    """KL-regularised RL: the policy is the posterior p* ∝ π₀·exp(R/β), fitted to the episodes played.

    The current policy plays the episodes (or an exploration rule does, with importance weights), and a batch of them
    serves several updates of J = E[R] − β·KL by `ActorCritic`. The agent holds no beliefs about the environment, so it
    does not seek out what it has never tried.

    Args:
        beta: temperature, reward units per nat.
        reference: the policy from which the KL is measured: the "prior", or the "previous" one (mirror descent).
        policy: `TablePolicy()`, `LinearPolicy()` or `NetworkPolicy()`; by default, a table if there are finitely many
            observations, else a network.
        batch: episodes between updates.
        num_updates: gradient steps for each batch.
        trace: λ of the advantages.
        learning_rate: Adam's learning rate; by default, that of the policy's family.
        discount: γ; by default, that of the environment.

    Raises:
        ControlError: an option is out of range.

    Example:
        >>> from bayesrl import control
        >>> agent = control.KLControlAgent(beta=0.1, policy=control.NetworkPolicy(hidden=32))
        >>> agent.describe()
        {'type': 'KLControlAgent', 'beta': 0.1, 'reference': 'prior', 'batch': 8}
        >>> agent.default_exploration  # it plays what it has fitted
        Thompson()

    References:
        Levine (2018), "Reinforcement learning and control as probabilistic inference". Batches that serve several
        updates: Schulman et al. (2017).
    """

    beta: Positive
    reference: Literal["prior", "previous"] = "prior"
    policy: ObservationPolicy | None = None
    batch: Count = 8
    num_updates: Count = 8
    trace: UnitInterval = 0.95
    learning_rate: Positive | None = None
    discount: UnitInterval | None = None

    def describe(self) -> dict[str, Any]:
        """Describe the agent's identity; see `Agent.describe`."""
        return {"type": "KLControlAgent", "beta": float(self.beta), "reference": self.reference, "batch": self.batch}

    def enter(self, key: PRNGKey, env: EnvAdapter, num_episodes: int) -> "KLControlAgentState":
        """Get ready for an environment; see `Agent.enter`."""
        return KLControlAgentState(key, self, env, num_episodes)


class KLControlAgentState(AgentState):
    """A `KLControlAgent` in one environment.

    Attributes:
        state: parameters and optimiser.
    """

    changing = "state", "masks", "_batch", "_info"

    def __init__(self, key: PRNGKey, agent: KLControlAgent, env: EnvAdapter, num_episodes: int) -> None:
        super().__init__(env)
        self.agent = agent
        discount = env.discount if agent.discount is None else agent.discount
        prior, masked = Actions(env.num_actions).prior(), env.num_actions if env.masked else 0
        scale: Any = env.scale
        if masked and env.num_observations is None:
            scale = np.append(np.broadcast_to(scale, env.shape).ravel(), np.ones(masked, np.float32))
        self._shape = (math.prod(env.shape) + masked,) if masked else env.shape
        seen = Observations(self._shape, jnp.dtype(env.dtype), env.num_observations, scale, masked=masked)
        # One step more than an episode: it only values what follows the last action.
        self._size = min(env.max_steps, 2000) + 1
        # A rollout needs γ above 0, and an environment may have γ = 0.
        rollout = RecordedRollout(ExternalEnvironment(seen, prior), self._size, max(discount, 1e-6), None)
        family = agent.policy or (TablePolicy() if env.num_observations is not None else NetworkPolicy())
        objective = ActorCritic(trace=agent.trace, reference=agent.reference)
        self._setup = set_up(as_hash_key(key), rollout, (), agent.beta, family, objective, 1, _no_source)
        rate = self._setup.learning_rate if agent.learning_rate is None else agent.learning_rate
        programs = self._setup.programs
        config = StepConfig(self._setup.objective, optax.adam(rate), programs)
        train = closure_jit(partial(start, config), name="initial")(self._setup.params)
        self.state = State(train, self._setup.betas, eqx.filter(programs.args, eqx.is_array), config)
        self._batch: list[Episode] = []
        self._info = UpdateInfo()

    def explore(self, key: PRNGKey, exploration: Any, episode: int) -> EpisodePolicy:
        """Choose how to act in the next episode; see `AgentState.explore`."""
        if self.env.num_observations is not None and isinstance(exploration, Thompson) and not self.env.masked:
            return self._table_policy(key)
        behaviour = getattr(exploration, "behave", exploration)

        def act(key: PRNGKey, stacked: Any, seen: Array) -> tuple[Array, Array]:
            # The setup is one fit, whose arrays have a leading axis of size 1.
            params = jax.tree.map(lambda x: x[0], stacked)
            chosen = choose_actions(self._setup.programs, params, key, seen[None], behaviour)
            return chosen.action[0], chosen.log_behaviour[0]

        act_fn = self._program("act", lambda: act, exploration)

        def choose(time: int, seen: np.ndarray, allowed: np.ndarray | None) -> tuple[int, float]:
            joined = self._join_masks(np.asarray(seen)[None], None if allowed is None else allowed[None])
            action, log_prob = act_fn(fold_in(key, time), self.state.train.params, np.asarray(joined[0]))
            return int(action), float(log_prob)

        return EpisodePolicy(choose)

    def _table_policy(self, key: PRNGKey) -> EpisodePolicy:
        """Draw from the policy itself, whose probabilities do not change within an episode."""
        probs = self.probs()
        cumulated = probs.cumsum(-1)
        # Drawn on the host: a step by a table needs no compiled program.
        rng = numpy_generator(key)

        def choose(time: int, seen: np.ndarray, allowed: None) -> tuple[int, float]:
            action = draw_index(rng, cumulated[int(seen)])
            return action, float(np.log(probs[int(seen), action]))

        return EpisodePolicy(choose, probs[None])

    def update(self, key: PRNGKey, episode: Episode, *, always_judge: bool) -> UpdateInfo:
        """Update by inference; see `AgentState.update`."""
        if self.masks is not None:
            self.masks.note(episode, same=False)
        self._batch.append(episode)
        if len(self._batch) == self.agent.batch:
            sites, behaviour = self._batch_sites()
            train, info = self._program("update", lambda: self._steps)(self.state, sites, behaviour)
            self.state = replace(self.state, train=train)
            self._info = UpdateInfo(objective=float(info["objective"]), kl=float(info["kl"]))
            self._batch = []
        return self._info

    def _batch_sites(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Lay the batch out as sites, [batch, steps + 1, ...]."""
        env, shape = self.env, (len(self._batch), self._size)
        sites: dict[str, np.ndarray] = {
            "observation": np.zeros((*shape, *self._shape), env.dtype),
            "action": np.zeros(shape, np.int32),
            "counts": np.zeros(shape, bool),
            "terminated": np.zeros(shape, bool),
            "earned": np.zeros(shape, np.float32),
        }
        behaviour = np.zeros(shape, np.float32)
        # The horizon of a table is a real end, not a time limit, so nothing is valued after it.
        at_horizon = getattr(getattr(env, "mdp", None), "horizon", None) is not None
        for i, episode in enumerate(self._batch):
            count = min(len(episode.reward), self._size - 1)
            seen = np.concatenate([episode.observation[:count], episode.next_observation[count - 1 : count]])
            allowed = None if episode.allowed is None else episode.allowed[: count + 1]
            sites["observation"][i, : count + 1] = self._join_masks(seen, allowed)
            sites["action"][i, :count] = episode.action[:count]
            sites["counts"][i, :count] = True
            sites["earned"][i, :count] = episode.reward[:count]
            # An episode longer than the batch's rows does not end in the last of them.
            ended = episode.terminated and count == len(episode.reward)
            sites["terminated"][i, count - 1] = ended or (count == env.max_steps and at_horizon)
            behaviour[i, :count] = episode.log_behaviour[:count]
        return sites, behaviour

    def _join_masks(self, seen: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
        """Append action masks to observations, as `ExternalEnvironment` reads them, [steps, ...]."""
        if allowed is None:
            return seen
        return np.concatenate([seen.reshape(len(seen), -1), allowed], -1).astype(self.env.dtype)

    def _steps(self, state: State, sites: Any, behaviour: Array) -> tuple[FitState, dict[str, Array]]:
        # The density of the behaviour stays fixed over the updates: importance weights correct for the policy's change.
        first = jax.tree.map(lambda x: x[0], state.train.params)
        draws = self._setup.programs.score(first, Draws.from_sites(sites))._replace(log_behaviour={"action": behaviour})

        def one(lane: State) -> tuple[FitState, StepInfo]:
            new, info = step_on_draws(lane, draws)
            return new.train, info

        def take(train: FitState, _: None) -> tuple[FitState, dict[str, Array]]:
            lanes = replace(state, train=train)
            # A step takes one lane, and the state stacks lanes.
            new, info = jax.vmap(one, in_axes=(state.lane_axes,), out_axes=(LANES, 0))(lanes)
            return new, {"objective": info.objective[0], "kl": info.kl[0]}

        train, info = lax.scan(take, state.train, None, length=self.agent.num_updates)
        return train, jax.tree.map(lambda x: x[-1], info)

    def probs(self) -> np.ndarray:
        """Compute π(a | s), [states, actions]."""
        allowed = None if self.masks is None else self.masks.table
        states = self._join_masks(np.arange(self.env.num_observations or 0), allowed)
        policy = self._program("policy", lambda: self._probabilities)
        probs = np.asarray(policy(self.state.train.params, states), float)
        return probs / probs.sum(-1, keepdims=True)

    def _probabilities(self, stacked: Any, states: Array) -> Array:
        params = jax.tree.map(lambda x: x[0], stacked)
        programs = self._setup.programs
        guide = handlers.substitute(programs.guide, data=programs.constrain(params))
        return jax.vmap(lambda s: jax.nn.softmax(action_distribution(guide, s).logits))(states)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint must keep; see `AgentState.arrays`."""
        arrays = {f"policy/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state.train))}
        arrays["update_info"] = np.array(self._info)
        for i, episode in enumerate(self._batch):
            fields = episode._asdict().items()
            arrays |= {f"batch/{i}/{name}": np.asarray(value) for name, value in fields if value is not None}
        return arrays | super().arrays()

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore the state from a checkpoint; see `AgentState.restore`."""
        super().restore(arrays)
        self.state = replace(self.state, train=restore_leaves(self.state.train, arrays, "policy"))
        self._info = UpdateInfo(*arrays["update_info"].tolist())
        self._batch = []
        while f"batch/{len(self._batch)}/reward" in arrays:
            fields: dict[str, Any] = {x: arrays.get(f"batch/{len(self._batch)}/{x}") for x in Episode._fields}
            self._batch.append(Episode(**fields | {"terminated": bool(fields["terminated"])}))


def _no_source(*_: Any) -> Any:
    """Stand in for a source of draws; `learn` hands over episodes as they are played."""
    raise ControlError("episodes are handed over by learn(...)")


@checked(ControlError)
def agent_from_name(name: str, model: ModelOrProgram, *, beta: float) -> Agent:
    """Make an agent from its name: `bayesian` with a model of the unknown, or `kl_control` at a temperature.

    Raises:
        ControlError: there is no such agent.
    """
    if name == "bayesian":
        return BayesianAgent(model)
    if name == "kl_control":
        return KLControlAgent(beta)
    raise ControlError(f"there is no agent {name!r}; use bayesian or kl_control")
