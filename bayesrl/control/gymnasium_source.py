"""Gymnasium environments as a black box: `GymnasiumSource` plays in them and hands over what it saw."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bayesrl.control.behaviours import Behaviour, Decision, as_fitted, decide
from bayesrl.control.policies import PolicyGuide
from bayesrl.control.recorded import Outside, RecordedRollout
from bayesrl.control.spaces import Actions, describe_actions, describe_observations
from bayesrl.control.vector import Failures, open_environments
from bayesrl.core.draws import Draws, Totals, is_count
from bayesrl.core.pairing import Pair
from bayesrl.errors import ControlError, GuideError
from bayesrl.typing import Params, PRNGKey

MOST_STEPS = 100_000
"""An episode of more steps is taken for one that never ends."""

_KEPT = 100
"""So many of the last episodes tell the mean return of the history."""


@dataclass
class GymnasiumSource:
    """Plays in real environments, and makes draws of a policy for `bayesrl.fit(source=...)`.

    Environment terms cancel from J, so no model of the environment is needed. Each batch holds `window`
    steps of `num_envs` environments side by side, from wherever they stand, and serves `num_updates`
    gradient steps; the ratio to the policy that drew it is clipped by `ActorCritic`. Time limits cut an episode off,
    and what would have followed is valued by the critic; termination ends it.

    Args:
        environment: id of a registered environment, or a function that makes one.
        num_envs: environments side by side.
        window: steps of each environment in a batch.
        num_updates: gradient steps per batch.
        behaviour: who plays: the guide itself, or `epsilon_greedy(ε)`, `prior_mixture(ε)`, or a function of yours;
            see `bayesrl.control.behaviours`.
        seed: of the environments; the k-th episode of all is reset with seed + k.
        max_failures: so many episodes may end with an error; each is dropped with its seed in the log.
        options: keyword arguments for the environment.

    Raises:
        ControlError: unknown environment; a space that is not supported; a number out of range.

    References:
        Schulman et al. (2017) for windows that serve several updates; Pardo, Tavakoli, Levdik & Kormushev (2018)
        for time limits.
    """

    environment: str | Callable[[], Any]
    num_envs: int = 8
    window: int = 128
    num_updates: int = 8
    behaviour: Behaviour = as_fitted
    seed: int = 0
    max_failures: int = 10
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_envs", "window", "num_updates"):
            value = getattr(self, name)
            if not is_count(value, least=1):
                raise ControlError(f"GymnasiumSource got {name}={value!r}; use an integer of at least 1")
        self.failures = Failures(self.max_failures)
        probe = open_environments(self, 1)
        try:
            self._outside = describe_observations(probe.single_observation_space)
            self.actions: Actions = describe_actions(probe.single_action_space)
        finally:
            probe.close()
        self._envs: Any = None
        self._served = 0
        self._lanes: list[GymnasiumSource] = []
        self._batch: Draws | None = None
        self._programs: tuple[Pair, tuple[Any, Any, Any]] | None = None
        self._finished: deque[tuple[float, int]] = deque(maxlen=_KEPT)
        self.steps_taken = 0

    def policy(self, *, discount: float = 0.99, prior: Any = None) -> RecordedRollout:
        """Give the program to fit: a rollout whose environment is recorded.

        Args:
            discount: γ, in (0, 1].
            prior: from (observation, time) to a distribution of actions; by default uniform over finitely many
                actions, and Normal with half the range as its scale over bounded ones.
        """
        shape, dtype, number, scale = self._outside
        world = Outside(shape, dtype, self.actions.prior(), number, scale)
        return RecordedRollout(world, self.window + 1, discount, prior)

    def lane(self, index: int) -> "GymnasiumSource":
        """Give a source for one of several fits made side by side, with environments of its own."""
        other = GymnasiumSource(
            self.environment,
            self.num_envs,
            self.window,
            self.num_updates,
            self.behaviour,
            self.seed + 1_000_003 * index,
            self.max_failures,
            self.options,
        )
        self._lanes.append(other)
        return other

    def __call__(self, key: PRNGKey, params: Params, pair: Pair) -> Draws:
        """Give a batch of draws, [num_envs, window + 1, ...]: a new one, or the last one again.

        Raises:
            ControlError: a reward is not finite, or too many episodes ended with an error.
        """
        if not isinstance(pair.guide, PolicyGuide):
            raise GuideError(
                f"GymnasiumSource asks the guide for one action at a time, which {type(pair.guide).__name__} cannot "
                "give; use guide=NetworkPolicy(), LinearPolicy() or TablePolicy()"
            )
        if self._batch is None or self._served >= self.num_updates:
            self._batch, self._served = self._play(key, params, pair), 0
        self._served += 1
        return self._batch

    def _play(self, key: PRNGKey, params: Params, pair: Pair) -> Draws:
        if self._envs is None:
            self._envs = _Playing(open_environments(self, self.num_envs))
        playing, size = self._envs, self.window + 1
        seen = np.zeros((self.num_envs, size, *self._outside[0]), self._outside[1])
        earned, behaviour = np.zeros((2, self.num_envs, size), np.float32)
        counts, terminated = np.zeros((2, self.num_envs, size), bool)
        actions: list[np.ndarray] = []
        choose, _, score = self._compiled(pair)
        for t in range(size):
            seen[:, t] = playing.observation
            chosen = choose(params, key, t, playing.observation)
            action = np.asarray(chosen.action)
            actions.append(action)
            if t == self.window:
                break
            behaviour[:, t] = chosen.log_behaviour
            step = playing.step(self.actions.to_environment(action))
            earned[:, t], terminated[:, t], counts[:, t] = step.reward, step.terminated, step.counts
            for i in np.flatnonzero(step.failed):
                counts[i, max(t - int(step.length[i]), 0) : t + 1] = False
            self._finished.extend(step.finished)
            self.steps_taken += int(step.counts.sum())
        sites = {
            "observation": seen,
            "action": np.stack(actions, 1),
            "counts": counts,
            "terminated": terminated,
            "earned": earned,
        }
        scored: Draws = score(params, sites)
        earned_in_all, length = np.asarray(self._finished or playing.unfinished(), float).mean(0)
        metrics = {
            "return": jnp.full(self.num_envs, earned_in_all, jnp.float32),
            "length": jnp.full(self.num_envs, length, jnp.float32),
        }
        return scored._replace(log_behaviour={"action": jnp.asarray(behaviour)}, metrics=metrics)

    def _compiled(self, pair: Pair) -> tuple[Any, Any, Any]:
        """Give the compiled functions that choose actions, by `behaviour` and by the guide, and score a batch."""
        if self._programs is None or self._programs[0] is not pair:

            def chooser(behaviour: Behaviour) -> Any:
                def choose(params: Params, key: PRNGKey, time: Any, seen: Array) -> Decision:
                    return decide(pair, params, jax.random.fold_in(key, time), seen, behaviour)

                return jax.jit(choose)

            def score(params: Params, sites: dict[str, Array]) -> Draws:
                return pair.score(params, Draws.held(sites))

            self._programs = (pair, (chooser(self.behaviour), chooser(as_fitted), jax.jit(score)))
        return self._programs[1]

    def episodes(self, key: PRNGKey, params: Params, pair: Pair, num_episodes: int) -> tuple[Draws, Totals]:
        """Play whole episodes by the guide, in environments of their own.

        Args:
            key: consumed whole; the environments are seeded by it too.
            params: unconstrained parameters of the guide.
            pair: the programs.
            num_episodes: how many.

        Returns:
            Draws with sites `action` and `observation` [num_episodes, longest, ...], padded with nan or −1, and metrics
            `return` and `length`; and discounted totals [num_episodes].

        Raises:
            ControlError: none were asked for; an episode does not end.
        """
        if num_episodes < 1:
            raise ControlError(f"num_episodes={num_episodes}; play at least 1 episode")
        discount = getattr(pair.policy, "discount", 1.0)
        seed = int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2**30))
        number = min(num_episodes, self.num_envs)
        playing = _Playing(open_environments(self, number, seed))
        choose = self._compiled(pair)[1]
        wanted = [len(part) for part in np.array_split(np.arange(num_episodes), number)]
        kept: list[_Episode] = []
        running = [_Episode() for _ in range(number)]
        time = 0
        try:
            while len(kept) < num_episodes:
                seen = playing.observation.copy()
                chosen = jax.tree.map(np.asarray, choose(params, key, time, seen))
                step = playing.step(self.actions.to_environment(chosen.action))
                time += 1
                if step.length.max() > MOST_STEPS:
                    raise ControlError(
                        f"an episode has gone on for {step.length.max():,} steps; let the environment end it, or "
                        "wrap it in gymnasium.wrappers.TimeLimit"
                    )
                for i in range(number):
                    if step.counts[i] and not step.failed[i]:
                        running[i].add(seen[i], jax.tree.map(lambda x, i=i: x[i], chosen), step.reward[i], discount)
                    if step.ended[i]:
                        if wanted[i] and not step.failed[i]:
                            kept.append(running[i])
                            wanted[i] -= 1
                        running[i] = _Episode()
        finally:
            playing.close()
        return _as_draws(kept, pair)

    def close(self) -> None:
        """Close the environments; they open again when they are needed."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None
        self._batch = None
        for other in self._lanes:
            other.close()


class _Episode:
    """One episode while it goes on."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.actions: list[Any] = []
        self.scores = np.zeros(3)
        self.returned = 0.0

    def add(self, seen: Any, chosen: Any, earned: Any, discount: float) -> None:
        """Add one step."""
        weight = discount ** len(self.actions)
        self.seen.append(seen)
        self.actions.append(chosen.action)
        self.scores += weight * np.array([chosen.log_prior, chosen.log_q, earned])
        self.returned += float(earned)


def _as_draws(episodes: list[_Episode], pair: Pair) -> tuple[Draws, Totals]:
    longest = max(len(one.actions) for one in episodes)

    def padded(steps: list[Any]) -> np.ndarray:
        array = np.stack(steps)
        blank = np.nan if np.issubdtype(array.dtype, np.floating) else -1
        return np.pad(array, [(0, longest - len(array)), *((0, 0),) * (array.ndim - 1)], constant_values=blank)

    sites = {
        "observation": jnp.asarray(np.stack([padded(one.seen) for one in episodes])),
        "action": jnp.asarray(np.stack([padded(one.actions) for one in episodes])),
    }
    log_prior, log_q, earned = np.stack([one.scores for one in episodes]).T.astype(np.float32)
    metrics = {
        "return": jnp.asarray([one.returned for one in episodes]),
        "length": jnp.asarray([float(len(one.actions)) for one in episodes]),
    }
    totals = Totals(jnp.asarray(log_prior), jnp.asarray(log_q), jnp.zeros(len(episodes)), jnp.asarray(earned))
    return Draws.held(sites)._replace(metrics=metrics), totals


@dataclass
class _Step:
    """What one step of all environments gave, [num_envs] each."""

    reward: np.ndarray
    terminated: np.ndarray
    counts: np.ndarray
    failed: np.ndarray
    ended: np.ndarray
    length: np.ndarray
    finished: list[tuple[float, int]]


class _Playing:
    """Environments in play: where they stand, and how the episodes under way have gone."""

    def __init__(self, envs: Any) -> None:
        self.envs = envs
        self.observation = envs.reset()[0]
        number = envs.num_envs
        self.resetting = np.zeros(number, bool)
        self.earned, self.length = np.zeros(number), np.zeros(number, int)

    def step(self, action: Any) -> _Step:
        """Take one step of each; an environment whose episode is over is reset in its stead, which does not count."""
        self.observation, reward, terminated, truncated, info = self.envs.step(action)
        counts = ~self.resetting
        failed = np.asarray(info.get("failed", np.zeros(len(counts), bool)), bool)
        bad = counts & ~failed & ~np.isfinite(reward)
        if bad.any():
            raise ControlError(
                f"environment {int(np.flatnonzero(bad)[0])} gave reward {reward[bad][0]} in step "
                f"{int(self.length[bad][0])} of an episode; make the reward finite"
            )
        self.earned += np.where(counts, reward, 0.0)
        self.length += counts
        ended = terminated | truncated
        finished = [(float(self.earned[i]), int(self.length[i])) for i in np.flatnonzero(ended & ~failed)]
        step = _Step(reward, terminated & ~failed, counts & ~failed, failed, ended, self.length.copy(), finished)
        self.resetting = ended.copy()
        self.earned[ended], self.length[ended] = 0.0, 0
        return step

    def unfinished(self) -> list[tuple[float, int]]:
        """Tell return and length of the episodes under way."""
        return list(zip(self.earned.tolist(), self.length.tolist(), strict=True))

    def close(self) -> None:
        """Close all."""
        self.envs.close()
