"""`LearnResult`: the result of `learn`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayesrl.arguments import AnyNumbers, Count, CountOrZero, FlagsOrNone, UnitInterval, checked
from bayesrl.compilation.random_keys import as_hash_key, dummy_key
from bayesrl.control.exploration.decisions import Decision
from bayesrl.control.learning.agents.base import AgentState
from bayesrl.control.learning.agents.bayesian_state import BayesianAgentState
from bayesrl.control.learning.env_adapter import EnvAdapter
from bayesrl.display.formatting import format_mean, format_number, last_tenth, pluralize
from bayesrl.display.tables import Displayable, DisplayBlock, Line, Table
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey

if TYPE_CHECKING:
    import xarray as xr

_KEPT_DRAWS = 400
_LARGEST = 2_000_000


class Snapshot(NamedTuple):
    """A moment of a run whose posterior can be recomputed: numbers of episodes and of rows (steps) so far."""

    episode: int
    rows: int


@checked(ControlError)
@dataclass(frozen=True, eq=False, repr=False)
class LearnResult(Displayable):
    """The result of `learn`.

    Attributes:
        agent_state: the agent in its environment, with all its experience.
        env: the environment.
        exploration: the exploration rule.
        history: one row per episode: `episode`, `return` and `discounted` return, `length`, `regret` (reward units; its
            mean is the expected regret); for `BayesianAgent`, `p_optimal` and `expected_regret` in the first state; for
            `KLControlAgent`, `objective` (J, reward units) and `kl` (nats) of the last batch.
        snapshots: moments whose posterior `sample(..., snapshot=...)` can recompute.
        problem: the identity of the run, and its settings.
        interrupted: whether Ctrl-C ended it.

    Example:
        >>> import jax
        >>> from bayesrl import control
        >>> arms = control.bandits.GaussianArms(2)
        >>> agent = control.BayesianAgent(control.ArmsModel(arms))
        >>> result = control.learn(jax.random.key(0), arms, agent, num_episodes=20)
        >>> result.sample(jax.random.key(1), 50)["instance"].shape
        (50, 2)
    """

    agent_state: AgentState
    env: EnvAdapter
    exploration: Any
    history: dict[str, np.ndarray]
    snapshots: tuple[Snapshot, ...]
    problem: dict[str, Any]
    interrupted: bool = False

    @property
    def num_episodes(self) -> int:
        """Number of episodes played."""
        return len(self.history.get("episode", ()))

    @property
    def regret(self) -> np.ndarray:
        """Cumulative regret after each episode, reward units, [episodes]."""
        return np.cumsum(self.history["regret"])

    def _blocks(self) -> Sequence[DisplayBlock]:
        """Show what was learned where, and the numbers of `summary`."""
        identity, played = self.problem["identity"], pluralize(self.num_episodes, "episode")
        told = f"LearnResult: {played} of {identity['agent']['type']} in {identity['environment']}"
        blocks: list[DisplayBlock] = [Line(told + (", interrupted" if self.interrupted else ""))]
        if self.num_episodes:
            rows = summary([self])[2:]
            blocks.append(listing([row for row in rows if not row[1].startswith("unknown")]))
            # Why a number is unknown is a sentence, too long for a cell.
            blocks += [Line(f"({name} {why})") for name, why in rows if why.startswith("unknown")]
        return blocks

    def action_name(self, action: CountOrZero) -> str:
        """Return the name of an action, or its number if it has no name.

        Raises:
            ControlError: the environment has no such action.
        """
        if action >= self.env.num_actions:
            raise ControlError(f"action={action}; use one of the environment's, from 0 to {self.env.num_actions - 1}")
        return self.env.action_names[action] if self.env.action_names else str(action)

    def solved_after(self, share: UnitInterval = 0.5) -> int | None:
        """Find the first episode at which the mean regret so far is at most this share of the optimum; None if never.

        References:
            Osband, Van Roy, Russo & Wen (2019), "Deep exploration via randomized value functions", section 4.
        """
        if self.env.optimum is None:
            raise ControlError(
                f"the optimum of the environment is not known, so neither is when it was reached: {self.env.unknown}"
            )
        mean = self.regret / np.arange(1, self.num_episodes + 1)
        reached = np.flatnonzero(mean <= share * self.env.optimum)
        return int(reached[0]) + 1 if len(reached) else None

    def sample(
        self, key: PRNGKey, num_samples: Count = _KEPT_DRAWS, *, snapshot: Snapshot | None = None
    ) -> dict[str, Any]:
        """Draw θ and the action values from the posterior.

        Args:
            key: random key; do not use it again.
            num_samples: number of draws.
            snapshot: one of `snapshots`; by default, the end. Only exact posteriors can go back.

        Returns:
            Sites of θ [draws, ...], and `action_values` if there are finitely many observations.

        Raises:
            ControlError: the agent has no posterior over the unknown, or cannot go back.
        """
        agent_state = self.bayesian_state()
        state = None if snapshot is None else agent_state.state_after(snapshot.rows)
        sites, tables = agent_state.sample(as_hash_key(key), num_samples, state=state)
        return sites | {"action_values": tables} if agent_state.finite else sites

    def decide(
        self,
        key: PRNGKey,
        observation: AnyNumbers,
        *,
        time: CountOrZero = 0,
        num_samples: Count = 1000,
        allowed: FlagsOrNone = None,
    ) -> Decision:
        """Judge the actions at one observation: which is best, how surely, and what a wrong choice may cost.

        Args:
            key: random key; do not use it again.
            observation: one of the environment's observations.
            time: step of the episode, if values depend on it.
            num_samples: number of draws from the posterior.
            allowed: the actions to choose among, [actions]; by default, all, or those that an environment with finitely
                many observations has allowed there. The others are never best, and their loss is nan.

        Raises:
            ControlError: the agent has no posterior over the unknown, or its draws are not finite; the observation is
                not one of the environment's; no action is allowed.
        """
        agent_state = self.bayesian_state()
        if time >= self.env.max_steps:
            raise ControlError(f"time={time!r}; use a step of the episode, from 0 to {self.env.max_steps - 1}")
        seen, among = self._choice(observation, allowed)
        values = agent_state.sample_values(as_hash_key(key), seen, num_samples, time)
        if not np.isfinite(values).all():
            raise ControlError("draws of the action values are not finite; look at the prior and the data of the model")
        return Decision.from_samples(values, among)

    def act(self, key: PRNGKey, observation: AnyNumbers, time: CountOrZero = 0, *, allowed: FlagsOrNone = None) -> int:
        """Choose an action by the exploration rule after learning, among those `allowed`; see `decide`."""
        rule = self.agent_state.explore(as_hash_key(key), self.exploration, self.num_episodes)
        return rule.choose(time, *self._choice(observation, allowed))[0]

    def _choice(self, observation: Any, allowed: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Check an observation and the actions to choose among there, which are None without masks."""
        seen, count, number = np.asarray(observation), self.env.num_observations, self.env.num_actions
        whole = np.issubdtype(seen.dtype, np.integer)
        if seen.shape != self.env.shape or (count is not None and not (whole and 0 <= int(seen) < count)):
            wanted = f"an integer from 0 to {count - 1}" if count is not None else f"an array of shape {self.env.shape}"
            raise ControlError(f"observation={observation!r} is not one of the environment's; use {wanted}")
        if not self.env.masked:
            if allowed is not None:
                raise ControlError(
                    "the environment has no action masks, so all actions are allowed; leave allowed= out"
                )
            return seen, None
        if allowed is None:
            known = self.agent_state.masks
            return seen, np.ones(number, bool) if known is None else known.table[int(seen)]
        flags = np.asarray(allowed, bool)
        if flags.shape != (number,) or not flags.any():
            raise ControlError(f"allowed={allowed!r}; give a flag for each of {number} actions, and allow at least one")
        return seen, flags

    def to_datatree(self) -> "xr.DataTree":
        """Convert posterior, experience and history to an ArviZ DataTree; see `bayesrl.to_datatree`.

        Its groups are `training` and, for `BayesianAgent`, `posterior` and `observed_data`.
        """
        import xarray as xr

        training = _dataset({k: v for k, v in self.history.items() if k != "episode"}, "episode")
        groups: dict[str, Any] = {"training": training.assign_coords(episode=self.history["episode"])}
        if isinstance(self.agent_state, BayesianAgentState):
            # A fixed key: one result gives the same tree each time.
            sites = self.sample(dummy_key())
            # Sites of millions of numbers are left out; `sample` gives them.
            small = {k: np.asarray(v)[None] for k, v in sites.items() if np.size(v) <= _LARGEST}
            groups["posterior"] = draws_dataset(small)
            memory = self.agent_state.memory.arrays()
            groups["observed_data"] = _dataset({k: v for k, v in memory.items() if k != "mask"}, "row")
        tree = xr.DataTree.from_dict(groups)
        tree.attrs = {"inference_library": "bayesrl", "interrupted": int(self.interrupted)}
        tree.attrs |= {k: v for k, v in self.problem["settings"].items() if isinstance(v, str | int | float)}
        return tree

    def bayesian_state(self) -> BayesianAgentState:
        """Return the state of the agent, which holds a posterior over the unknown.

        Raises:
            ControlError: the agent is not a `BayesianAgent`.
        """
        if not isinstance(self.agent_state, BayesianAgentState):
            raise ControlError(
                "KLControlAgent has no beliefs about the environment, so there is no posterior over what is unknown; "
                "learn with BayesianAgent(model)"
            )
        return self.agent_state


def summary(several: Sequence[LearnResult]) -> list[tuple[str, str]]:
    """Summarise runs of one kind in numbers, as rows of (what, value)."""
    first, optimum = several[0], several[0].env.optimum
    named, mean = mean_return(several)
    rows = [
        ("runs", str(len(several))),
        ("episodes", ", ".join(f"{run.num_episodes:,}" for run in several)),
        ("steps", ", ".join(f"{int(run.history['length'].sum()):,}" for run in several)),
        (f"mean return of the {named}", mean),
    ]
    regretted = not np.isnan(first.history["regret"]).all()
    shown = f"unknown: {first.env.unknown}" if optimum is None else format_number(optimum)
    rows.append(("optimum" if regretted else "optimum and regret", shown))
    if regretted:
        rows.append(("cumulated regret", format_mean([run.regret[-1] for run in several])))
    if optimum is not None and optimum > 0 and first.env.max_steps > 1:
        solved = ", ".join("never" if s is None else f"{s:,}" for s in (run.solved_after() for run in several))
        rows.append(("mean regret at half the optimum after", solved))
    if isinstance(first.agent_state, BayesianAgentState):
        judged = [run.history["p_optimal"][~np.isnan(run.history["p_optimal"])] for run in several]
        sure = ", ".join(f"{p[-1]:.2f}" if len(p) else "?" for p in judged)
        rows.append(("P(first decision is optimal) at the end", sure))
    return rows


def listing(rows: Sequence[tuple[str, str]]) -> Table:
    """Make a table of rows of (what, value)."""
    return Table(("what", "value"), rows, alignment="ll")


def mean_return(several: Sequence[LearnResult]) -> tuple[str, str]:
    """Return the name of the last episodes, and their mean return over the runs as text."""
    last, named = last_tenth(several[0].num_episodes, "episode")
    return named, format_mean([run.history["return"][-last:].mean() for run in several])


def draws_dataset(draws: Mapping[str, Any]) -> "xr.Dataset":
    """Convert draws, [chain, draw, ...] each, to an ArviZ dataset."""
    data = _dataset({name: np.asarray(x) for name, x in draws.items()}, "chain", "draw")
    return data.assign_coords({name: np.arange(size) for name, size in data.sizes.items() if name in ("chain", "draw")})


def _dataset(arrays: Mapping[str, np.ndarray], *dims: str) -> "xr.Dataset":
    import xarray as xr

    return xr.Dataset(
        {k: ([*dims, *(f"{k}_dim_{i}" for i in range(x.ndim - len(dims)))], x) for k, x in arrays.items()}
    )
