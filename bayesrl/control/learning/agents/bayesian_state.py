"""`BayesianAgentState`: the beliefs of a `BayesianAgent` in one environment, its exploration and its updates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.arguments import check_memory, user_code
from bayesrl.compilation.random_keys import dummy_key, fold_in, split_keys
from bayesrl.control.exploration.beliefs import SampleBelief
from bayesrl.control.exploration.decisions import Decision
from bayesrl.control.learning.agents.base import AgentState, UpdateInfo, restore_leaves
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy
from bayesrl.control.learning.models.base import EnvironmentModel
from bayesrl.control.learning.replay_memory import Episode, Experience, ReplayMemory
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey

_SAMPLES_AT_ONCE = (64, 1000)
"""Least and greatest size of a batch of draws; large tables get small batches. Draws come in batches of one size, so
that one compiled program serves any number; during learning, one batch judges the decision in the first state."""
_NUM_JUDGEMENTS = 50
"""About how often a run judges the decision in the first state, if no criterion needs it more often."""


class BayesianAgentState(AgentState):
    """A `BayesianAgent` in one environment.

    Values that the model and the exploration rule read from outside their arguments are fixed at the first call; the
    posterior belongs to those values.

    Attributes:
        model: the model of the unknown.
        memory: all steps played.
        state: the state of inference, carried from one update to the next.
    """

    changing = "state", "memory", "masks", "_episodes"

    def __init__(self, key: PRNGKey, agent: Any, model: Any, env: EnvAdapter, num_episodes: int) -> None:
        super().__init__(env)
        self.agent, self.model = agent, model
        self.memory = ReplayMemory(env.shape, env.dtype, min(num_episodes * env.max_steps, 10**9))
        self.state = model.init(fold_in(key, 1), env)
        self._episodes, self._judge_every = 0, max(num_episodes // _NUM_JUDGEMENTS, 1)
        self._blank, self._discount = env.example(), float(getattr(model, "discount", env.discount))
        draw = partial(self._sample, num_samples=1)
        shape = jax.eval_shape(draw, dummy_key(), self.state, self.experience(), env.blank)[1]
        self._timed = self._check_values(shape.shape[1:])
        # About half a million values at once fit into any memory.
        self._batch_size = int(np.clip(500_000 // max(shape.size, 1), *_SAMPLES_AT_ONCE))

    @property
    def finite(self) -> bool:
        """Whether there are finitely many observations."""
        return self.env.num_observations is not None

    def _check_values(self, found: tuple[int, ...]) -> bool:
        """Refuse action values of a shape that does not fit the environment; return whether they depend on the time."""
        env = self.env
        wanted = (env.num_observations, env.num_actions) if self.finite else (1, env.num_actions)
        timed = len(found) == 3 and self.finite
        if found[-2:] != wanted or not (len(found) == 2 or timed):
            raise ControlError(
                f"'action_values' of the model has shape {found}; the environment needs {wanted}"
                + (f" or [steps, {wanted[0]}, {wanted[1]}]" if self.finite else ", one row for each observation seen")
            )
        if timed and found[0] < env.max_steps:
            raise ControlError(
                f"'action_values' of the model is for {found[0]} steps, and an episode may have {env.max_steps}; "
                "make the horizon of the model that long"
            )
        return timed

    def experience(self) -> Experience:
        """Return all experience; for online models, which have conditioned on it, a row without a step."""
        return self._with_masks(self._blank if self.model.online else self.memory.experience())

    def rows(self, first: int, last: int) -> Experience:
        """Return some rows of experience, as NumPy arrays."""
        rows: Experience = jax.tree.map(lambda x: x[first:last], self.memory.rows())
        return self._with_masks(rows)

    def _with_masks(self, experience: Experience) -> Experience:
        return experience if self.masks is None else experience._replace(allowed=self.masks.table)

    def _sample(
        self, key: PRNGKey, state: Any, experience: Experience, observations: Any, num_samples: int
    ) -> tuple[Any, Array]:
        """Draw θ and its action values, [samples, ...]."""
        theta = self.model.sample(key, state, experience, num_samples)
        return theta, jax.vmap(lambda one: self.model.values(one, experience, observations))(theta)

    def sample(
        self, key: PRNGKey, num_samples: int, *, state: Any = None, observations: Any = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draw θ and its action values, [samples, ...], as NumPy arrays; more draws begin with the same ones."""
        each = self.env.num_actions * (self.env.num_observations or 1)
        check_memory(
            4.0 * num_samples * each, f"{num_samples:,} draws of {each:,} values", "ask for fewer", ControlError
        )
        draw = self._program("sample_posterior", lambda: partial(self._sample, num_samples=self._batch_size))
        state = self.state if state is None else state
        given = state, self.experience(), self.env.blank if observations is None else observations
        parts = [jax.device_get(draw(fold_in(key, i), *given)) for i in range(-(-num_samples // self._batch_size))]
        theta, values = jax.tree.map(lambda *xs: np.concatenate(xs)[:num_samples], *parts)
        return dict(theta), values

    def sample_values(self, key: PRNGKey, observation: Any, num_samples: int, time: int = 0) -> np.ndarray:
        """Draw the values of the actions at one observation, [samples, actions], reward units."""
        if not self.finite:
            seen = np.asarray(observation, self.env.dtype)[None]
            return self.sample(key, num_samples, observations=seen)[1][:, 0]
        return self.at(self.sample(key, num_samples)[1], time, observation)

    def at(self, tables: Any, time: Any, state: Any) -> Any:
        """Pick the values of one state at one time, [..., actions], from tables [..., states, actions]."""
        return tables[..., time, state, :] if self._timed else tables[..., state, :]

    def explore(self, key: PRNGKey, exploration: Any, episode: int) -> EpisodePolicy:
        """Choose how to act in the next episode; see `AgentState.explore`."""
        number = np.asarray(episode, np.int32)
        if self.finite and not self.env.masked:
            plan = self._program("plan", lambda: self._planner(exploration), exploration)
            table = np.asarray(plan(key, self.state, self.experience(), number))
            # `play` refuses an action out of range when it is taken; until then it must not fail here.
            probs = np.eye(self.env.num_actions)[np.clip(table, 0, self.env.num_actions - 1)]
            last = len(table) - 1
            return EpisodePolicy(lambda time, seen, _: (int(table[min(time, last), int(seen)]), np.nan), probs)
        prepare = self._program("prepare", lambda: self._preparer(exploration), exploration)
        act = self._program("act", lambda: self._actor(exploration), exploration)
        prepared = prepare(key, self.state, self.experience())
        step_key = fold_in(key, 1)

        def choose(time: int, seen: np.ndarray, allowed: np.ndarray | None) -> tuple[int, float]:
            # A committed rule repeats the same draw at every step of the episode.
            own = key if _commits(exploration) else fold_in(step_key, time)
            return int(act(own, prepared, np.asarray(time, np.int32), np.asarray(seen), allowed, number)), np.nan

        return EpisodePolicy(choose)

    def _has_cumulants(self, exploration: Any) -> bool:
        return bool(getattr(exploration, "soft", False)) and hasattr(self.model, "cumulants")

    def _planner(self, exploration: Any) -> Callable[..., Array]:
        """Make the function that chooses actions for all states at all times, [steps, states]."""
        # A plan holds about 100,000 decisions at most; later steps repeat its last row.
        steps = min(self.env.max_steps, 100_000 // max(self.env.num_observations or 1, 1) + 1)
        prepare = self._preparer(exploration)

        def plan(key: PRNGKey, state: Any, experience: Experience, episode: Array) -> Array:
            draw_key, rule_key = split_keys(key)
            prepared = prepare(draw_key, state, experience)
            if self._has_cumulants(exploration):
                return jax.random.categorical(rule_key, prepared)
            belief = SampleBelief(*prepared)
            if belief.mean.ndim == 3 or _commits(exploration):
                chosen = _choose(exploration, rule_key, belief, episode)
                return chosen if chosen.ndim == 2 else chosen[None]
            # A state visited twice gets a new decision each time.
            keys = jax.random.split(rule_key, steps)
            return jax.lax.map(lambda own: _choose(exploration, own, belief, episode), keys)

        return plan

    def _preparer(self, exploration: Any) -> Callable[..., Any]:
        """Make the function that prepares an episode: it returns logits, action values and their mean, or θ."""
        count = 1 if _commits(exploration) else self.agent.num_samples

        def prepare(key: PRNGKey, state: Any, experience: Experience) -> Any:
            if not self.finite:
                return self.model.sample(key, state, experience, count)
            if self._has_cumulants(exploration):
                cumulants = self.model.cumulants(state, experience.allowed)
                return cumulants.values / cumulants.temperature
            values = self._sample(key, state, experience, None, count)[1]
            return values, self.model.mean_values(state, experience)

        return prepare

    def _actor(self, exploration: Any) -> Callable[..., Array]:
        """Make the function that chooses one action, among the allowed ones if the environment has masks."""

        def act(key: PRNGKey, prepared: Any, time: Array, seen: Array, allowed: Any, episode: Array) -> Array:
            if not self.finite:
                values = jax.vmap(lambda one: self.model.values(one, self._blank, seen[None]))(prepared)[:, 0]
                return _choose(exploration, key, SampleBelief(values, None, allowed), episode)
            here = jax.tree.map(lambda table: self.at(table, time, seen), prepared)
            if self._has_cumulants(exploration):
                return jax.random.categorical(key, jnp.where(allowed, here, -jnp.inf))
            values, mean = here
            return _choose(exploration, key, SampleBelief(values, mean, allowed), episode)

        return act

    def update(self, key: PRNGKey, episode: Episode, *, always_judge: bool) -> UpdateInfo:
        """Update by inference; see `AgentState.update`."""
        # The length is padded to a power of two, so that few programs are compiled.
        length = 2 ** int(np.ceil(np.log2(max(len(episode.reward), 8))))
        padded = ReplayMemory(self.env.shape, self.env.dtype, length)
        padded.add(episode, self._discount)
        rows = padded.rows()
        self.model.check_experience(rows)
        if self.masks is not None:
            self.masks.note(episode, same=self.model.plans)
        self.memory.add(episode, self._discount)
        self._episodes += 1
        self.state = self._condition(self.state, rows)
        if self._episodes % self.agent.update_every == 0 and not self.model.online:
            refit = self._program("update", lambda: self.model.refit)
            self.state = refit(fold_in(key, 0), self.state, self.experience())
        if not always_judge and self._episodes % self._judge_every:
            return UpdateInfo()
        values = self.sample_values(fold_in(key, 1), episode.observation[0], self._batch_size)
        decision = Decision.from_samples(values, None if episode.allowed is None else episode.allowed[0])
        best = int(np.nanargmin(decision.regret))  # actions that are not allowed have loss nan
        return UpdateInfo(float(decision.p_optimal[best]), float(decision.regret[best]))

    def _condition(self, state: Any, rows: Experience) -> Any:
        if type(self.model).condition is EnvironmentModel.condition:  # a no-op is not worth compiling
            return state
        return self._program("condition", lambda: self.model.condition)(state, rows)

    def state_after(self, rows: int) -> Any:
        """Recompute the state of inference after this number of rows; only online models can."""
        if not self.model.online:
            raise ControlError(
                "the posterior was fitted or trained, and its earlier states were not kept; leave snapshot out"
            )
        known = self.memory.rows()
        # All rows, most of them blank: one program serves every snapshot.
        known = known._replace(mask=np.arange(len(known.mask)) < rows)
        return self._condition(self.model.init(dummy_key(), self.env), known)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint must keep; see `AgentState.arrays`."""
        arrays = {f"memory/{name}": values for name, values in self.memory.arrays().items()}
        arrays |= {f"inference/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}
        arrays["episodes"] = np.asarray(self._episodes)
        return arrays | super().arrays()

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore the state from a checkpoint; see `AgentState.restore`."""
        super().restore(arrays)
        self.memory.restore({k.removeprefix("memory/"): v for k, v in arrays.items() if k.startswith("memory/")})
        self._episodes = int(arrays["episodes"])
        self.state = restore_leaves(self.state, arrays, "inference")


def _choose(exploration: Any, key: PRNGKey, belief: SampleBelief, episode: Array) -> Array:
    """Ask a rule for actions, and refuse an answer of another shape or kind."""
    wanted = belief.mean.shape[:-1]
    with user_code(f"the exploration rule {exploration!r}", ControlError, "let it give integers"):
        chosen = jnp.asarray(exploration(key, belief, episode))
    if chosen.shape != wanted or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ControlError(
            f"the exploration rule {exploration!r} gave {chosen.dtype}{list(chosen.shape)}; give integers "
            f"{list(wanted)}, an action for each row of belief.mean {list(belief.mean.shape)}"
        )
    return chosen


def _commits(exploration: Any) -> bool:
    return bool(getattr(exploration, "committed", False))
