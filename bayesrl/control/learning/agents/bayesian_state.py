"""`BayesianAgentState`: what a `BayesianAgent` believes in one environment, how it explores, and its updates."""

from collections.abc import Callable, Hashable
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.arguments import check_memory, user_code
from bayesrl.compilation.jit import trace_once
from bayesrl.compilation.keys import dummy_key, fold_in, split_keys
from bayesrl.control.exploration.beliefs import SampleBelief
from bayesrl.control.learning.agents.base import AgentState, UpdateInfo
from bayesrl.control.learning.allowed_actions import masks_of
from bayesrl.control.learning.choices import losses, restored, shares
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy
from bayesrl.control.learning.models.base import EnvironmentModel
from bayesrl.control.learning.replay_memory import Episode, Experience, Memory, first_rows
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey

_DRAWS_AT_ONCE = (64, 1000)
"""Draws are made so many at once, fewer where tables are large, whatever number is asked for: one compiled program
serves them all. By as many the decision in the first state is judged while it is learned."""
_LOOKS = 50
"""About so many times in a run the decision in the first state is looked at, where no criterion asks for more."""


class BayesianAgentState(AgentState):
    """A `BayesianAgent` agent in one environment.

    What its model and the exploration rule read besides their arguments is read when they are first asked, and stays as
    it was: the posterior is of that.

    Attributes:
        model: of the unknown.
        env: the environment.
        memory: all that was lived through.
        masks: what each of finitely many states allows, where the environment tells it.
        state: what inference carries.
    """

    def __init__(self, key: PRNGKey, agent: Any, model: Any, env: EnvAdapter, num_episodes: int) -> None:
        self.agent, self.model, self.env = agent, model, env
        self.memory = Memory(env.shape, env.dtype, min(num_episodes * env.max_steps, 10**9))
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.state = model.init(fold_in(key, 1), env)
        self._episodes, self._every = 0, max(num_episodes // _LOOKS, 1)
        self.masks = masks_of(env)
        self._held: Experience | None = env.example() if model.online else None
        shape = jax.eval_shape(
            lambda key, state, experience: self._tables(key, state, experience, 1),
            dummy_key(),
            self.state,
            self.experience(),
        )
        self._check_values(tuple(shape.shape[1:]))
        self._at_once = int(np.clip(500_000 // max(shape.size, 1), *_DRAWS_AT_ONCE))

    @property
    def finite(self) -> bool:
        """Whether observations are finitely many."""
        return self.env.num_observations is not None

    def _check_values(self, found: tuple[int, ...]) -> None:
        env = self.env
        wanted = (env.num_observations, env.num_actions) if self.finite else (1, env.num_actions)
        timed = len(found) == 3 and self.finite
        if found[-2:] != wanted or not (len(found) == 2 or timed):
            raise ControlError(
                f"'action_values' of the model has shape {found}; the environment needs {wanted}"
                + (f" or [steps, {wanted[0]}, {wanted[1]}]" if self.finite else ", one row for each observation seen")
            )
        if len(found) == 3 and found[0] < env.max_steps:
            raise ControlError(
                f"'action_values' of the model is for {found[0]} steps, and an episode may have {env.max_steps}; "
                "make the horizon of the model that long"
            )

    def experience(self) -> Experience:
        """Give all experience, or a row of nothing to models that have absorbed it."""
        if self._held is None:
            self._held = self.memory.experience()
        return self._held if self.masks is None else self._held._replace(allowed=self.masks.table.copy())

    def rows(self, first: int, last: int) -> Experience:
        """Give some of the rows that were lived through, with what states allow, as NumPy's arrays."""
        told: Experience = jax.tree.map(lambda x: x[first:last], self.memory.rows())
        return told if self.masks is None else told._replace(allowed=self.masks.table.copy())

    def _alone(self, episode: Episode) -> Experience:
        """Give the rows of one episode, their number a power of two, lest each length be compiled anew."""
        rows = 2 ** int(np.ceil(np.log2(max(len(episode.reward), 8))))
        alone = Memory(self.env.shape, self.env.dtype, rows)
        alone.add(episode, self._discount)
        return alone.rows()

    def _tables(self, key: PRNGKey, state: Any, experience: Experience, num_samples: int, seen: Any = None) -> Array:
        """Draw action values, [draws, ...]."""
        return self._sites(key, state, experience, seen, num_samples)[1]

    def _sites(
        self, key: PRNGKey, state: Any, experience: Experience, seen: Any, num_samples: int
    ) -> tuple[Any, Array]:
        """Draw θ and its action values, [draws, ...]."""
        if not self.finite and seen is None:
            seen = jnp.zeros((1, *self.env.shape), self.env.dtype)
        sites = self.model.sample(key, state, experience, num_samples)
        return sites, jax.vmap(lambda one: self.model.values(one, experience, seen))(sites)

    def program(self, name: str, make: Callable[[], Callable[..., Any]], kind: Any = None) -> Callable[..., Any]:
        """Give a compiled function by its name and kind, made when it is first asked for."""
        if (name, kind) not in self._compiled:
            self._compiled[name, kind] = trace_once(make(), name=name)
        return self._compiled[name, kind]

    def drawn(
        self, key: PRNGKey, num_samples: int, *, state: Any = None, seen: Any = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draw θ and its action values, [draws, ...], NumPy's arrays; a draw does not depend on how many are asked for.

        Args:
            key: consumed whole.
            num_samples: how many.
            state: of inference; by default as it is now.
            seen: the observations whose values are told, where observations are not finitely many.
        """
        each = self.env.num_actions * (self.env.num_observations or 1)
        check_memory(
            4.0 * num_samples * each, f"{num_samples:,} draws of {each:,} values", "ask for fewer", ControlError
        )
        draw = self.program("sample_posterior", lambda: partial(self._sites, num_samples=self._at_once))
        state = self.state if state is None else state
        if not self.finite:
            seen = np.zeros((1, *self.env.shape), self.env.dtype) if seen is None else np.asarray(seen)
        given = state, self.experience(), seen
        parts = [jax.device_get(draw(fold_in(key, i), *given)) for i in range(-(-num_samples // self._at_once))]
        sites, tables = jax.tree.map(lambda *xs: np.concatenate(xs)[:num_samples], *parts)
        return dict(sites), tables

    def explore(self, key: PRNGKey, exploration: Any, episode: int) -> EpisodePolicy:
        """Choose how to act in the next episode; see `AgentState.explore`."""
        number = np.asarray(episode, np.int32)
        if self.env.masked:
            return self._among_allowed(key, exploration, number)
        if self.finite:
            plan = self.program("plan", lambda: self._planner(exploration), _known(exploration))
            table = np.asarray(plan(key, self.state, self.experience(), number))
            probs = np.eye(self.env.num_actions)[np.clip(table, 0, self.env.num_actions - 1)]
            return EpisodePolicy(lambda time, seen: (int(table[min(time, len(table) - 1), int(seen)]), np.nan), probs)
        prepare = self.program("draw", lambda: self._drawer(exploration), _known(exploration))
        act = self.program("act", lambda: self._actor(exploration), _known(exploration))
        sites = prepare(key, self.state, self.experience())
        step_key = fold_in(key, 1)

        def choose(time: int, seen: np.ndarray) -> tuple[int, float]:
            own = key if _committed(exploration) else fold_in(step_key, time)
            return int(act(own, sites, np.asarray(seen), number)), np.nan

        return EpisodePolicy(choose)

    def _among_allowed(self, key: PRNGKey, exploration: Any, number: np.ndarray) -> EpisodePolicy:
        """Choose in each step anew, among the actions that are allowed there."""
        prepare = self.program("look", lambda: self._looker(exploration), _known(exploration))
        act = self.program("act_allowed", lambda: self._chooser(exploration), _known(exploration))
        told = prepare(key, self.state, self.experience())
        step_key = fold_in(key, 1)

        def choose(time: int, seen: np.ndarray, allowed: np.ndarray) -> tuple[int, float]:
            own = key if _committed(exploration) else fold_in(step_key, time)
            return int(act(own, told, np.asarray(time, np.int32), np.asarray(seen), allowed, number)), np.nan

        return EpisodePolicy(choose)

    def _looker(self, exploration: Any) -> Callable[..., Any]:
        """Give the function to what one episode is played by: draws of action values and what stands for their mean."""
        if not self.finite:
            return self._drawer(exploration)
        count = 1 if _committed(exploration) else self.agent.num_samples

        def look(key: PRNGKey, state: Any, experience: Experience) -> Any:
            if self._soft(exploration):
                told = self.model.cumulants(state, experience.allowed)
                return told.values / told.temperature
            return self._tables(key, state, experience, count), self.model.mean_values(state, experience)

        return look

    def _chooser(self, exploration: Any) -> Callable[..., Array]:
        """Give the function to one action that is allowed."""

        def choose(key: PRNGKey, told: Any, time: Array, seen: Array, allowed: Array, episode: Array) -> Array:
            if not self.finite:
                empty = self.env.example()
                values = jax.vmap(lambda one: self.model.values(one, empty, seen[None]))(told)[:, 0]
                return _chosen(exploration, key, SampleBelief(values, None, allowed), episode)
            if self._soft(exploration):
                return jax.random.categorical(key, jnp.where(allowed, _row(told, time, seen), -jnp.inf))
            values = jax.vmap(lambda one: _row(one, time, seen))(told[0])
            center = None if told[1] is None else _row(told[1], time, seen)
            return _chosen(exploration, key, SampleBelief(values, center, allowed), episode)

        return choose

    def _soft(self, exploration: Any) -> bool:
        return bool(getattr(exploration, "soft", False)) and hasattr(self.model, "cumulants")

    def _planner(self, exploration: Any) -> Callable[..., Array]:
        """Give the function to actions of all states at all times, [steps, states]."""
        steps = min(self.env.max_steps, 100_000 // max(self.env.num_observations or 1, 1) + 1)

        def plan(key: PRNGKey, state: Any, experience: Experience, episode: Array) -> Array:
            draw_key, rule_key = split_keys(key)
            if self._soft(exploration):
                told = self.model.cumulants(state)
                return jax.random.categorical(rule_key, told.values / told.temperature)
            count = 1 if _committed(exploration) else self.agent.num_samples
            tables = self._tables(draw_key, state, experience, count)
            belief = SampleBelief(tables, self.model.mean_values(state, experience))
            if belief.mean.ndim == 3 or _committed(exploration):
                chosen = _chosen(exploration, rule_key, belief, episode)
                return chosen if chosen.ndim == 2 else chosen[None]
            # A state that is visited twice is decided upon anew.
            keys = jax.random.split(rule_key, steps)
            return jax.lax.map(lambda own: _chosen(exploration, own, belief, episode), keys)

        return plan

    def _drawer(self, exploration: Any) -> Callable[..., Any]:
        count = 1 if _committed(exploration) else self.agent.num_samples
        return lambda key, state, experience: self.model.sample(key, state, experience, count)

    def _actor(self, exploration: Any) -> Callable[..., Array]:
        def act(key: PRNGKey, sites: Any, seen: Array, episode: Array) -> Array:
            empty = self.env.example()
            told = jax.vmap(lambda one: self.model.values(one, empty, seen[None]))(sites)[:, 0]
            return _chosen(exploration, key, SampleBelief(told), episode)

        return act

    def update(self, key: PRNGKey, episode: Episode, *, told: bool) -> UpdateInfo:
        """Update by inference; see `AgentState.update`."""
        rows = self._alone(episode)
        self.model.check_experience(rows)
        if self.masks is not None:
            self.masks.note(episode, same=self.model.plans)
        self.memory.add(episode, self._discount)
        self._held = None if not self.model.online else self._held
        self._episodes += 1
        self.state = self._absorbed(self.state, rows)
        if self._episodes % self.agent.update_every == 0 and not self.model.online:
            run = self.program("update", lambda: self.model.refit)
            self.state = run(fold_in(key, 0), self.state, self.experience())
        if not told and self._episodes % self._every:
            return UpdateInfo()
        first = None if episode.allowed is None else episode.allowed[0]
        return self._told(fold_in(key, 1), episode.observation[0], first)

    @property
    def _discount(self) -> float:
        return float(getattr(self.model, "discount", self.env.discount))

    def _absorbed(self, state: Any, rows: Experience) -> Any:
        if type(self.model).condition is EnvironmentModel.condition:  # a no-op is not worth compiling
            return state
        return self.program("condition", lambda: self.model.condition)(state, rows)

    def _told(self, key: PRNGKey, start: Any, allowed: np.ndarray | None) -> UpdateInfo:
        values = self.at(key, start, self._at_once)
        optimal, regret = shares(values, allowed), losses(values, allowed).mean(0)
        best = int(np.argmin(np.where(np.isnan(regret), np.inf, regret)))
        return UpdateInfo(float(optimal[best]), float(regret[best]))

    def at(self, key: PRNGKey, seen: Any, num_samples: int, time: int = 0) -> np.ndarray:
        """Draw the values of the actions where one observation is seen, [draws, actions], reward units."""
        if not self.finite:
            return self.drawn(key, num_samples, seen=np.asarray(seen, self.env.dtype)[None])[1][:, 0]
        tables = self.drawn(key, num_samples)[1]
        return tables[:, time, seen] if tables.ndim == 4 else tables[:, seen]

    def back_then(self, rows: int) -> Any:
        """Give the state of inference as it was when so many rows had been lived, where that can be told."""
        if not self.model.online:
            raise ControlError(
                "the posterior was fitted or trained, and how it was earlier was not kept; leave snapshot out"
            )
        return self._absorbed(self.model.init(dummy_key(), self.env), first_rows(self.memory.rows(), rows))

    def mark(self) -> tuple[Any, ...]:
        """Remember how it is; see `AgentState.mark`."""
        return self.state, self._episodes, self.memory.num_rows, copy(self.masks)

    def back(self, mark: tuple[Any, ...]) -> None:
        """Be as it was; see `AgentState.back`."""
        self.state, self._episodes, rows, self.masks = mark
        self.memory.forget(rows)
        self._held = self._held if self.model.online else None

    def arrays(self) -> dict[str, np.ndarray]:
        """Give what a checkpoint has to keep; see `AgentState.arrays`."""
        leaves = jax.tree.leaves(self.state)
        held = {f"memory/{name}": values for name, values in self.memory.arrays().items()}
        held["episodes"] = np.asarray(self._episodes)
        if self.masks is not None:
            held["masks"] = self.masks.array()
        return held | {f"inference/{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what a checkpoint kept; see `AgentState.restore`."""
        self.memory.restore({k.removeprefix("memory/"): v for k, v in arrays.items() if k.startswith("memory/")})
        self._held = self._held if self.model.online else None
        self._episodes = int(arrays["episodes"])
        if self.masks is not None:
            self.masks.restore(arrays["masks"])
        self.state = restored(self.state, arrays, "inference")


def _chosen(exploration: Any, key: PRNGKey, belief: SampleBelief, episode: Array) -> Array:
    """Ask a rule, and refuse what are no actions."""
    wanted = belief.mean.shape[:-1]
    with user_code(f"the exploration rule {exploration!r}", ControlError, "let it give integers"):
        chosen = jnp.asarray(exploration(key, belief, episode))
    if chosen.shape != wanted or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ControlError(
            f"the exploration rule {exploration!r} gave {chosen.dtype}{list(chosen.shape)}; give integers "
            f"{list(wanted)}, an action for each row of belief.mean {list(belief.mean.shape)}"
        )
    return chosen


def _row(table: Array, time: Array, seen: Array) -> Array:
    """Pick the values of one state, at one time where that matters, [actions]."""
    return table[time, seen] if table.ndim == 3 else table[seen]


def _known(exploration: Any) -> Any:
    """Tell rules apart: built-in ones by what they are, yours by themselves, whatever their text says."""
    return exploration if isinstance(exploration, Hashable) else id(exploration)


def _committed(exploration: Any) -> bool:
    return bool(getattr(exploration, "committed", False))
