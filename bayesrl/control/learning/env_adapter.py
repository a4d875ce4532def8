"""The environment as agents of `learn` see it, and the play of one episode."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.learning.replay_memory import Episode, Experience, ReplayMemory
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey


@dataclass(frozen=True)
class EpisodePolicy:
    """The policy of one episode.

    Attributes:
        choose: a function from the time step, the observation and the mask, [actions] or None without masks, to an
            action and its log-probability, or nan if that is not known.
        probs: the same as probabilities, [steps or 1, states, actions], if there are finitely many observations.
    """

    choose: Callable[..., tuple[int, float]]
    probs: np.ndarray | None = None


class EnvAdapter(abc.ABC):
    """An environment that agents can play but not look into.

    Attributes:
        num_actions: number of actions.
        num_observations: number of observations, if they are the integers from 0 on; else None.
        shape: shape of one observation.
        dtype: type of one observation.
        scale: the rough size of the numbers in an observation, [*shape].
        max_steps: length of the longest episode.
        discount: γ of the returns.
        optimum: the greatest expected return of an episode, reward units; None if unknown.
        unknown: why the optimum is unknown, if it is.
        action_names: one name per action, if actions have names.
        name: name of the environment.
        options: the options of the environment, as text, for the run folder.
        masked: whether it has action masks.
        allowed: which actions are allowed in the present state, [actions]; None if it has no masks.
    """

    num_actions: int
    num_observations: int | None = None
    shape: tuple[int, ...] = ()
    dtype: Any = np.int32
    scale: Any = 1.0
    max_steps: int = 1
    discount: float = 1.0
    optimum: float | None = None
    unknown: str = "the environment publishes no model"
    action_names: tuple[str, ...] = ()
    name: str = ""
    options: Mapping[str, str] = MappingProxyType({})
    masked: bool = False
    allowed: np.ndarray | None = None
    _tables: TabularMDP | None = None
    """Tables for the computation of regret; agents do not see them."""

    @abc.abstractmethod
    def begin(self, key: PRNGKey) -> np.ndarray:
        """Start an episode and return the first observation; the key fixes everything random in the episode."""

    @abc.abstractmethod
    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Take an action; return (observation, reward, terminated, truncated)."""

    def close(self) -> None:
        """Close the environment."""
        return

    def regret(self, episode: Episode, act: EpisodePolicy) -> float:
        """Compute how much more the best policy is expected to earn than the policy played, reward units.

        It is exact if tables tell what a policy is worth; else it is the optimum minus the return, which has the same
        mean over episodes. It is nan if the optimum is unknown.
        """
        if self.optimum is None:
            return np.nan
        if self._tables is not None and act.probs is not None:
            return self.optimum - _worth(self._tables, act.probs, self.max_steps)
        return self.optimum - float(episode.returns(self.discount)[0])

    def play(self, key: PRNGKey, act: EpisodePolicy) -> Episode:
        """Play an episode.

        Raises:
            ControlError: the environment does not have or allow an action, or a reward is not finite.
        """
        seen = self.begin(key)
        rows: list[tuple[Any, ...]] = []
        masks = [self.allowed]
        over = terminated = False
        while not over:
            allowed = self.allowed
            if allowed is not None and not allowed.any():
                raise ControlError(
                    f"{self.name} allows no action in step {len(rows)} of an episode that goes on; let it allow one, "
                    "or end"
                )
            action, log_prob = act.choose(len(rows), seen, allowed)
            if not 0 <= action < self.num_actions:
                raise ControlError(
                    f"action {action} was chosen in step {len(rows)}, and the environment has actions 0 to "
                    f"{self.num_actions - 1}; give one of these"
                )
            if allowed is not None and not allowed[action]:
                raise ControlError(
                    f"action {action} was chosen in step {len(rows)}, and the environment allows only "
                    f"{np.flatnonzero(allowed).tolist()} there; use belief.allowed in the rule, or choose by "
                    "belief.mean or belief.sample(key), which are −inf for all others"
                )
            after, reward, terminated, truncated = self.step(action)
            # Experience is kept in single precision, where a large reward overflows.
            with np.errstate(over="ignore"):
                finite = np.isfinite(np.float32(reward))
            if not finite:
                raise ControlError(
                    f"the environment gave reward {reward} in step {len(rows)}; make it finite, in single precision"
                )
            rows.append((seen, action, reward, after, log_prob))
            masks.append(self.allowed)
            over, seen = terminated or truncated or len(rows) >= self.max_steps, after
        observed, actions, rewards, following, scores = (np.array(part) for part in zip(*rows, strict=True))
        kinds = (observed.astype(self.dtype), following.astype(self.dtype))
        flags = np.array(masks, bool) if self.masked else None
        return Episode(kinds[0], actions, rewards.astype(float), kinds[1], terminated, scores.astype(float), flags)

    def example(self) -> Experience:
        """Make an experience of one row without a step, to trace programs with."""
        blank = ReplayMemory(self.shape, self.dtype, 1).experience()
        if not self.masked or self.num_observations is None:
            return blank
        return blank._replace(allowed=np.ones((self.num_observations, self.num_actions), bool))

    @property
    def blank(self) -> np.ndarray | None:
        """An observation, [1, *shape], to compute values at if there are not finitely many; else None."""
        return None if self.num_observations is not None else np.zeros((1, *self.shape), self.dtype)


def draw_index(rng: np.random.Generator, cumulated: np.ndarray) -> int:
    """Draw an index by its cumulative probabilities, [indices], of which rounding may leave the last one below 1."""
    return min(int(np.searchsorted(cumulated, rng.random(), side="right")), len(cumulated) - 1)


def _worth(mdp: TabularMDP, probs: np.ndarray, steps: int) -> float:
    """Compute the expected return of a policy [steps or 1, states, actions] over this number of steps.

    Unlike `evaluate_policy`, it skips KL and occupancy, because it runs in every episode.
    """
    earned, value = mdp.expected_rewards(), np.zeros(mdp.num_states)
    alive = ~mdp.terminal
    for t in reversed(range(steps)):
        # Backups fill terminal states too, and what is earned there must not count.
        ahead = (mdp.probabilities * (value * alive)[mdp.successors]).sum(-1)
        value = (probs[min(t, len(probs) - 1)] * (earned + mdp.discount * ahead)).sum(-1)
    return float(mdp.start @ (value * alive))
