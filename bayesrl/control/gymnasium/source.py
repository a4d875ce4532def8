"""`GymnasiumSource`: draws from Gymnasium environments, without a model of the environment."""

from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax
import numpy as np
from jax import Array

from bayesrl.arguments import Count, CountOrZero, MemoryNeed, Seed, UnusedOption, checked, real_range
from bayesrl.compilation.jit import trace_once
from bayesrl.compilation.random_keys import as_hash_key, fold_in, key_data, split_keys
from bayesrl.control.exploration.rules import Exploration
from bayesrl.control.gymnasium.behaviour_policies import Behaviour, ScoredActions, choose_actions, play_guide
from bayesrl.control.gymnasium.recorded_rollout import ExternalEnvironment, RecordedRollout
from bayesrl.control.gymnasium.spaces import (
    MASK,
    Actions,
    Observations,
    describe_actions,
    describe_observations,
    has_mask,
)
from bayesrl.control.gymnasium.vector_env import (
    FailureCounter,
    VectorRunner,
    is_sync_vector,
    open_environments,
    reset_mode,
)
from bayesrl.control.policies import RolloutGuide
from bayesrl.core.draws import Draws, Totals
from bayesrl.core.programs import Programs
from bayesrl.errors import ControlError, GuideError
from bayesrl.svi.reused_draws import BatchSource
from bayesrl.typing import Params, PRNGKey

MOST_STEPS = 100_000
"""A longer episode counts as one that never ends."""

_RECENT_EPISODES = 100
"""Number of episodes in the mean return of the history."""

_SEED_STRIDE = 1_000_003
"""Step between the seeds of fits made side by side."""


@checked(
    ControlError,
    UnusedOption(
        "options",
        lambda given: callable(given["environment"]),
        "a function makes the environment: use functools.partial",
    ),
    # 1,000 bytes of an environment, and 10 of an observation, a reward, a log-probability and flags.
    MemoryNeed(
        lambda given: given["num_envs"] * (1000.0 + 10.0 * given["window"]), ("num_envs", "window"), "use fewer"
    ),
)
@dataclass(eq=False)
class GymnasiumSource(BatchSource):
    """Play in real environments, and make draws of a policy for `bayesrl.fit(source=...)`.

    Environment terms cancel from J, so no model of the environment is needed. Each batch holds `window` steps of
    `num_envs` environments side by side, from wherever they are, and serves `num_updates` gradient steps;
    `ActorCritic` clips the ratio to the policy that drew the batch. A time limit cuts an episode off, and the critic
    values what would have followed; termination ends the episode.

    Args:
        environment: id of a registered environment, or a function that makes one environment, or `num_envs` side by
            side as a `gymnasium.vector.VectorEnv` with any autoreset mode.
        num_envs: number of environments side by side.
        window: steps of each environment in a batch.
        num_updates: gradient steps per batch. With too many, a policy settles before it has seen what other actions
            are worth: with 8, 2,000 steps did not learn Acrobot; with 4, they do.
        behaviour: the policy that plays: the guide, `epsilon_greedy(ε)`, `prior_mixture(ε)`, or your own function;
            see `bayesrl.control.gymnasium.behaviour_policies`.
        seed: seed of the environments; the k-th episode of environment i resets with seed + i + k·num_envs.
        max_failures: number of episodes that may end with an error; each is dropped, and its seed logged.
        options: keyword arguments for an environment given by its id.
        action_masks: whether to take only allowed actions, by the `action_mask` in a Dict observation or in `info`, or
            by a method `action_masks()`; by default, if the observation has one. The mask is then appended to the
            observation.

    Attributes:
        steps_taken: steps of the environments in all fits so far.

    Raises:
        ControlError: the environment is unknown; a space is not supported; a number is out of range.

    Example:
        >>> from bayesrl.control import GymnasiumSource
        >>> source = GymnasiumSource("CartPole-v1", num_envs=4, window=32)
        >>> source.actions.num
        2

    References:
        Windows that serve several updates: Schulman et al. (2017). Time limits: Pardo, Tavakoli, Levdik & Kormushev
        (2018).
    """

    environment: str | Callable[[], Any]
    num_envs: Count = 8
    window: Count = 128
    num_updates: Count = 4
    behaviour: Behaviour | Exploration = play_guide
    seed: Seed = 0
    max_failures: CountOrZero = 10
    options: dict[str, Any] = field(default_factory=dict)
    action_masks: bool | None = None

    def __post_init__(self) -> None:
        self.failures = FailureCounter(self.max_failures)
        with closing(open_environments(self, 1, self.seed)) as probe:
            self.actions: Actions = describe_actions(probe.single_action_space)
            self.observations: Observations = self._observed(probe)
        self.steps_taken = 0
        self._playing: VectorRunner | None = None
        self._lanes: list[GymnasiumSource] = []
        self._programs: tuple[tuple[Any, Any], _Compiled] | None = None
        self._finished: deque[tuple[float, int]] = deque(maxlen=_RECENT_EPISODES)

    def _observed(self, probe: Any) -> Observations:
        if not is_sync_vector(probe) and probe.num_envs != self.num_envs:
            raise ControlError(
                f"GymnasiumSource got num_envs={self.num_envs!r}, and the function makes {probe.num_envs} side by "
                f"side; pass num_envs={probe.num_envs}"
            )
        reset_mode(probe)
        space = probe.single_observation_space
        within = has_mask(space, self.actions)
        masked = within if self.action_masks is None else self.action_masks
        if masked and not within:
            shape = np.shape(probe.reset(seed=self.seed)[1].get(MASK, ()))
            if self.actions.num is None or shape != (probe.num_envs, self.actions.num):
                raise ControlError(
                    f"action_masks=True, and {self.environment!r} gives no action_mask of {self.actions.num} actions, "
                    "neither in a Dict observation nor in info; leave action_masks out"
                )
        return describe_observations(space, masked=self.actions.num or 0 if masked else 0, within=within)

    def policy(
        self, *, discount: Annotated[float, real_range(above=0, most=1)] = 0.99, prior: Any = None
    ) -> RecordedRollout:
        """Make the program to fit: a rollout whose environment is recorded.

        Random steps in a separate environment estimate the size of returns, the unit of the critic's outputs.

        Args:
            discount: γ, in (0, 1].
            prior: a function from (observation, time) to a distribution of actions; by default, uniform over finitely
                many actions, and Normal with half the range as its scale over bounded ones.

        Raises:
            ControlError: the discount is out of range, or the prior's draws are not actions of the environment.
        """
        seen = self.observations
        world = ExternalEnvironment(seen, self.actions.prior())
        program = RecordedRollout(world, self.window + 1, discount, prior, self._return_scale(discount))
        nothing = jax.device_put((np.zeros(seen.shape, seen.dtype), np.zeros((), np.int32)))
        self.actions.check_prior(program.prior_policy(*nothing).action)
        return program

    def _return_scale(self, discount: float) -> float:
        """Estimate the size of returns by random steps in a separate environment.

        A critic whose outputs are far too small lags behind: then all advantages are positive, every action taken is
        reinforced, and the policy stops exploring. That stalled CartPole for a third of the seeds.
        """
        failed = self.failures.count
        try:
            with closing(self._open(1, self.seed)) as playing:
                found = playing.estimate_return_scale(discount, self.seed)
        except ControlError:  # play will raise it again
            found = 1.0
        self.failures.count = failed  # failures in these random steps do not count
        return found if np.isfinite(found) and found > 0 else 1.0

    def lane(self, index: int) -> "GymnasiumSource":
        """Make a source for one of several fits made side by side, with its own environments."""
        other = replace(self, seed=self.seed + _SEED_STRIDE * index)
        self._lanes.append(other)
        return other

    def draw_batch(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Play `window` steps in each environment, and return them as draws [num_envs, window + 1, ...]."""
        if not isinstance(programs.guide, RolloutGuide):
            raise GuideError(
                "GymnasiumSource asks the guide for one action at a time, which "
                f"{type(programs.guide).__name__} cannot give; "
                "use guide=NetworkPolicy(), LinearPolicy() or TablePolicy()"
            )
        rollout = programs.guide.rollout
        if not isinstance(rollout, RecordedRollout) or rollout.horizon != self.window + 1:
            raise ControlError(
                f"the policy is a {type(rollout).__name__} of {rollout.horizon} steps, and this source records "
                f"{self.window} and what follows them; fit the policy that source.policy() of the same source gives"
            )
        return self._play(key, params, programs)

    def _play(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        if self._playing is None:
            self._playing = self._open(self.num_envs, self.seed)
        playing, size, seen = self._playing, self.window + 1, self.observations
        observed = np.zeros((self.num_envs, size, *seen.shape), seen.dtype)
        earned, behaviour = np.zeros((2, self.num_envs, size), np.float32)
        counts, terminated = np.zeros((2, self.num_envs, size), bool)
        sites = {"observation": observed, "counts": counts, "terminated": terminated, "earned": earned}
        functions, key = self._compiled(programs), as_hash_key(key)
        at = np.zeros(self.num_envs, int)  # the row that each environment has reached
        for t in range(size):
            chosen = functions.act(params, key, np.asarray(t, np.int32), playing.observation)
            action, log_prob = jax.device_get(chosen)
            # Only a draw tells the shape and type of actions.
            if t == 0:
                actions = sites["action"] = np.zeros((self.num_envs, size, *action.shape[1:]), action.dtype)
            lanes = np.flatnonzero(at <= self.window)
            rows = at[lanes]
            observed[lanes, rows], actions[lanes, rows] = playing.observation[lanes], action[lanes]
            behaviour[lanes, rows] = log_prob[lanes]
            if t == self.window:
                break
            step = playing.step(action)
            # The last row only values what follows, so no step is recorded in it.
            lanes = np.flatnonzero(at < self.window)
            rows = at[lanes]
            earned[lanes, rows], counts[lanes, rows] = step.reward[lanes], step.counts[lanes]
            terminated[lanes, rows] = step.terminated[lanes]
            # A failed episode is dropped as a whole, as far as it lies in this window.
            for i in np.flatnonzero(step.failed):
                # `length` includes the step that failed, which is that of row at[i].
                counts[i, max(at[i] + 1 - int(step.length[i]), 0) : at[i]] = False
            at += 1
            if step.last is not None:
                # An extra row, which does not count, holds the last observation of an episode that was cut off, for
                # the critic to value. Its environment is then a row ahead, and fills the window earlier.
                for i in np.flatnonzero(step.ended & ~step.terminated & (at <= self.window)):
                    observed[i, at[i]] = step.last[i]
                    at[i] += 1
            self._finished.extend(step.finished)
            self.steps_taken += int(step.counts.sum())
        scored: Draws = functions.score(params, sites)
        means = np.asarray(self._finished or playing.unfinished(), float).mean(0)
        metrics = {
            name: np.full(self.num_envs, x, np.float32) for name, x in zip(("return", "length"), means, strict=True)
        }
        # Steps that do not count have no density, and a ratio to whatever is stored there might overflow.
        behaviour[~counts] = 0.0
        return scored._replace(log_behaviour={"action": jax.device_put(behaviour)}, metrics=metrics)

    def _open(self, number: int, seed: Seed) -> VectorRunner:
        return VectorRunner(open_environments(self, number, seed), self.observations, self.actions, seed)

    def _compiled(self, programs: Programs) -> "_Compiled":
        """Compile the functions of these programs, and keep them until the source is closed."""
        of = (programs.policy, programs.guide)
        if self._programs is None or self._programs[0] != of:
            self._programs = of, _Compiled(programs, self.behaviour)
        return self._programs[1]

    def episodes(self, key: PRNGKey, params: Params, programs: Programs, num_episodes: Count) -> tuple[Draws, Totals]:
        """Play whole episodes by the guide, in separate environments, which the key seeds.

        Returns:
            Draws with sites `action` and `observation` [num_episodes, longest, ...], padded with nan or −1, and metrics
            `return` and `length`; and discounted totals [num_episodes].

        Raises:
            ControlError: an episode does not end.
        """
        discount = getattr(programs.policy, "discount", 1.0)
        key, seeding = split_keys(key)
        seed = int(np.asarray(key_data(seeding))[0] % 2**30)
        spans: list[tuple[int, int, int, int]] = []
        steps: list[tuple[np.ndarray, ...]] = []
        decide_all = _Compiled(programs, self.behaviour).decide  # fresh: the programs may read other numbers now
        with closing(self._open(min(num_episodes, self.num_envs), seed)) as playing:
            # Each environment plays a fixed number of episodes: to take whichever end first would favour short ones.
            wanted = np.array([len(part) for part in np.array_split(np.arange(num_episodes), playing.number)])
            played = np.zeros(playing.number, int)
            while len(spans) < num_episodes:
                seen = playing.observation
                chosen = jax.device_get(decide_all(params, key, np.asarray(len(steps), np.int32), seen))
                step = playing.step(chosen.action)
                steps.append((seen, chosen.action, chosen.log_prior, chosen.log_q, step.reward))
                if step.length.max() > MOST_STEPS:
                    raise ControlError(
                        f"an episode has gone on for {step.length.max():,} steps; let the environment end it, or "
                        "wrap it in gymnasium.wrappers.TimeLimit"
                    )
                for i in np.flatnonzero(step.ended & ~step.failed & (played < wanted)):
                    spans.append((int(played[i]), int(i), len(steps) - int(step.length[i]), len(steps)))
                    played[i] += 1
        # Sorted by seed: the order of their ends would put short ones first.
        return _as_draws([np.stack(part, 1) for part in zip(*steps, strict=True)], sorted(spans), discount)

    def close(self) -> None:
        """Close the environments and forget the batch; they reopen at their first seed when needed."""
        if self._playing is not None:
            self._playing.close()
        super().close()
        self._playing = self._programs = None
        self._finished.clear()
        self.failures.count = 0
        for other in self._lanes:
            other.close()
        self._lanes.clear()


class _Compiled:
    """The compiled functions of a policy and its guide: to act by the behaviour, decide by the guide, score a batch."""

    def __init__(self, programs: Programs, behaviour: Behaviour | Exploration) -> None:
        played = behaviour.behave if isinstance(behaviour, Exploration) else behaviour

        def act(params: Params, key: PRNGKey, time: Any, seen: Array) -> tuple[Array, Array]:
            decision = choose_actions(programs, params, fold_in(key, time), seen, played)
            return decision.action, decision.log_behaviour

        def by_guide(params: Params, key: PRNGKey, time: Any, seen: Array) -> ScoredActions:
            return choose_actions(programs, params, fold_in(key, time), seen, play_guide)

        def score(params: Params, sites: dict[str, Array]) -> Draws:
            return programs.score(params, Draws.from_sites(sites))

        self.act, self.decide = trace_once(act, name="behave"), trace_once(by_guide, name="decide")
        self.score = trace_once(score, name="score_batch")


def _as_draws(steps: list[np.ndarray], spans: list[tuple[int, int, int, int]], discount: float) -> tuple[Draws, Totals]:
    """Cut episodes (…, environment, first step, end) from recorded arrays, [num_envs, step, ...]."""
    observation, action, *scores = steps
    longest = max(end - begin for *_, begin, end in spans)
    weights = discount ** np.arange(longest)

    def padded(array: np.ndarray) -> np.ndarray:
        blank = np.nan if np.issubdtype(array.dtype, np.floating) else -1
        result = np.full((len(spans), longest, *array.shape[2:]), blank, array.dtype)
        for row, (_, i, begin, end) in zip(result, spans, strict=True):
            row[: end - begin] = array[i, begin:end]
        return result

    def summed(array: np.ndarray, weights: np.ndarray) -> np.ndarray:
        sums = [array[i, begin:end].astype(float) @ weights[: end - begin] for _, i, begin, end in spans]
        return np.array(sums, np.float32)

    log_prior, log_q, earned = (summed(array, weights) for array in scores)
    metrics = {
        "return": summed(scores[-1], np.ones(longest)),
        "length": np.array([end - begin for *_, begin, end in spans], np.float32),
    }
    draws = Draws.from_sites({"observation": padded(observation), "action": padded(action)})._replace(metrics=metrics)
    return draws, Totals(log_prior, log_q, np.zeros(len(spans), np.float32), earned)
