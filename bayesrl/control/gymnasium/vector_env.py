"""Gymnasium environments side by side: start their next episodes, and drop episodes that end with an error."""

import logging
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from bayesrl.arguments import user_code
from bayesrl.control.action_masks import mask_method
from bayesrl.control.gymnasium.spaces import MASK, Actions, Observations
from bayesrl.display.formatting import pluralize
from bayesrl.errors import ControlError

_FAILED = "bayesrl: the episode failed"
"""Key in `info` that marks an episode to drop; no environment uses it itself."""

_NUM_PROBES = 256
"""Number of random steps that estimate the size of returns."""

_REMEDY = "gymnasium.utils.env_checker.check_env says what does not fit Gymnasium's interface"

_log = logging.getLogger(__name__)


@dataclass
class FailureCounter:
    """Counts the episodes that ended with an error, and allows `most` of them."""

    most: int
    count: int = 0

    def add(self, seed: int, step: int, error: Exception) -> None:
        """Count an episode, and raise if there are too many."""
        self.count += 1
        event = f"the episode of seed {seed} ended in step {step} with {type(error).__name__}: {error}"
        _log.warning("%s; it is dropped", event)
        if self.count > self.most:
            episodes = pluralize(self.count, "episode")
            raise ControlError(f"{episodes} ended with an error, and {self.most} are allowed; the last: {event}")


def import_gymnasium() -> Any:
    """Import Gymnasium, or say how to install it."""
    try:
        import gymnasium
    except ImportError as error:
        raise ControlError("Gymnasium is not installed; install bayesrl[control]") from error
    return gymnasium


def make_environment(environment: Any, **options: Any) -> Any:
    """Make an environment from its id and options, or by a function; return an environment as it is."""
    gymnasium = import_gymnasium()
    if hasattr(environment, "action_space") and not isinstance(environment, type):
        return environment
    try:
        made = gymnasium.make(environment, **options) if isinstance(environment, str) else environment()
        if not hasattr(made, "action_space"):
            raise TypeError(f"it gave {made!r}, which is not a Gymnasium environment")
    except Exception as error:
        raise _not_made(environment, error) from error
    return made


def _not_made(environment: Any, error: Exception) -> ControlError:
    if isinstance(error, ControlError):
        return error
    known = isinstance(environment, str)
    remedy = "gymnasium.registry lists those that are known" if known else "let the function give a gymnasium.Env"
    return ControlError(f"environment {environment!r} cannot be made: {error}; {remedy}")


def open_environments(source: Any, number: int, seed: int) -> Any:
    """Open environments of a `GymnasiumSource` side by side, with a seed for each episode, from `seed` on.

    A function's `VectorEnv` is used as it is.
    """
    import_gymnasium()
    from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

    made: list[Any] = []
    spare: list[Any] = []

    def build() -> Any:
        return spare.pop() if spare else make_environment(source.environment, **source.options)

    def open_one(index: int) -> Any:
        masks = bool(source.action_masks)
        made.append(_guarded()(build, seed + index, number, source.failures, asks_masks=masks))
        return made[-1]

    try:
        if callable(source.environment):
            # Made to see what the function gives, this one is then played in, too.
            spare.append(make_environment(source.environment))
            if isinstance(spare[0], VectorEnv):
                return spare[0]
        openers = [partial(open_one, index) for index in range(number)]
        # `VectorRunner` copies observations, so the environments may reuse their buffer.
        return SyncVectorEnv(openers, copy=False, autoreset_mode=AutoresetMode.NEXT_STEP)
    except Exception as error:
        for one in made:
            one.close()
        raise _not_made(source.environment, error) from error


@cache
def _guarded() -> Any:
    """Make the wrapper class; it needs Gymnasium, which is optional."""
    import gymnasium

    class Guarded(gymnasium.Wrapper):
        """Drops an episode that ends with an error, and starts the next one in a fresh environment."""

        def __init__(self, build: Any, seed: int, stride: int, failures: FailureCounter, *, asks_masks: bool) -> None:
            super().__init__(build())
            self._asks_masks = asks_masks
            self._build, self._seed, self._stride, self._failures = build, seed, stride, failures
            self._now, self._length = seed, 0
            self._seen: Any = None

        def reset(self, **options: Any) -> Any:
            """Reset with the environment's own next seed."""
            options.pop("seed", None)
            # This ends: `failures` raises when there are too many.
            while True:
                self._now, self._length = self._seed, 0
                self._seed += self._stride
                try:
                    self._seen, info = self.env.reset(seed=self._now, **options)
                    return self._seen, self._with_mask(info)
                except Exception as error:  # noqa: BLE001  (whatever an environment raises)
                    self._renew(error)

        def step(self, action: Any) -> Any:
            """Take a step; an error ends the episode, marked `failed`."""
            try:
                self._length += 1
                self._seen, *given, info = self.env.step(action)
                return self._seen, *given, self._with_mask(info)
            except Exception as error:  # noqa: BLE001
                self._renew(error)
                # Cut off, so that the next call resets this environment.
                return self._seen, 0.0, False, True, {_FAILED: True}

        def _with_mask(self, info: Any) -> Any:
            """Put the mask of the method `action_masks` into `info`, if `info` has no mask."""
            if not self._asks_masks or MASK in info or (method := mask_method(self.env)) is None:
                return info
            return {**info, MASK: np.asarray(method())}

        def close(self) -> None:
            """Close the environment; log errors, so that the other environments are closed too."""
            try:
                self.env.close()
            except Exception as error:  # noqa: BLE001
                _log.warning("closing an environment raised %s: %s", type(error).__name__, error)

        def _renew(self, error: Exception) -> None:
            self._failures.add(self._now, max(self._length - 1, 0), error)
            self.close()
            try:
                self.env = self._build()
            except Exception as second:
                raise ControlError(
                    f"the environment cannot be made again after the episode of seed {self._now} ended with "
                    f"{type(error).__name__}: {second}; let the function make several, one after another"
                ) from second

    return Guarded


def is_sync_vector(envs: Any) -> bool:
    """Check whether `open_environments` put these environments side by side, not the function that made them."""
    return isinstance(next(iter(getattr(envs, "envs", ())), None), _guarded())


def reset_mode(envs: Any) -> str:
    """Read how environments side by side start the next episode: "NextStep", "SameStep" or "Disabled"."""
    mode = envs.metadata.get("autoreset_mode")
    name = str(getattr(mode, "value", mode))
    if name not in ("NextStep", "SameStep", "Disabled"):
        raise ControlError(
            f"{type(envs).__name__} has metadata['autoreset_mode']={mode!r}; use a gymnasium.vector.AutoresetMode"
        )
    return name


@dataclass
class VectorStep:
    """The outcome of one step of all environments, [num_envs] each.

    Attributes:
        reward: reward units.
        terminated: whether the episode came to its own end, not to a time limit.
        counts: whether this was a step, not a reset in place of one.
        failed: whether the episode ended with an error.
        ended: whether the episode ended, for any reason.
        length: steps of the episode so far.
        finished: return and length of the episodes that ended without an error.
        last: the last observations of the episodes that ended, [num_envs, *shape], if the next ones have begun; else
            None.
    """

    reward: np.ndarray
    terminated: np.ndarray
    counts: np.ndarray
    failed: np.ndarray
    ended: np.ndarray
    length: np.ndarray
    finished: list[tuple[float, int]]
    last: np.ndarray | None = None


class VectorRunner:
    """Plays environments from `open_environments`, and keeps track of their observations and episodes."""

    def __init__(self, envs: Any, observations: Observations, actions: Actions, seed: int) -> None:
        self.number = number = int(envs.num_envs)
        self._envs, self._observations, self._actions = envs, observations, actions
        self._mode = reset_mode(envs)
        self._never = np.zeros(number, bool)
        self._resetting = self._never
        self._earned, self._length = np.zeros(number), np.zeros(number, int)
        try:
            with user_code("reset", ControlError, _REMEDY):
                first = envs.reset(seed=seed)
            self.observation = self._read(*first)
        except BaseException:
            envs.close()
            raise

    def step(self, action: Any) -> VectorStep:
        """Take one step in each environment; after an episode, a reset replaces the next step, or comes at once.

        A reset in place of a step does not count as a step.
        """
        # `Guarded` catches errors inside single environments, so errors here concern their outputs.
        with user_code("step", ControlError, _REMEDY):
            seen, reward, terminated, truncated, info = self._envs.step(self._actions.to_environment(action))
        failed = np.asarray(info[_FAILED], bool) if _FAILED in info else self._never
        counts = ~(self._resetting | failed)
        reward = np.where(counts, reward, 0.0)
        self._check("reward", reward)
        self._length += ~self._resetting
        self.observation = self._read(seen, info)
        self._earned += reward
        ended = terminated | truncated
        length = self._length.copy()
        finished = [(float(self._earned[i]), int(length[i])) for i in np.flatnonzero(ended & ~failed)]
        self._earned[ended], self._length[ended] = 0.0, 0
        last = None
        if self._mode == "NextStep":
            self._resetting = ended  # the next call resets these instead of stepping
        elif ended.any():
            last = self._begun_anew(ended, info)
        return VectorStep(reward, terminated & ~failed, counts, failed, ended, length, finished, last)

    def _begun_anew(self, ended: np.ndarray, info: Any) -> np.ndarray:
        """Return the last observations of the episodes that ended, and move to the start of the next ones."""
        last = self.observation.copy()
        if self._mode == "Disabled":
            with user_code("reset", ControlError, _REMEDY):
                first, infos = self._envs.reset(options={"reset_mask": ended.copy()})
            self.observation[ended] = self._read(first, infos)[ended]
            return last
        found = info.get("final_obs")
        if found is None:
            raise ControlError(
                "environments that start the next episode in the same step give no info['final_obs'], so what the last "
                "one ended in is unknown; use autoreset_mode=AutoresetMode.NEXT_STEP"
            )
        # Gymnasium gives last observations one by one, in an array of objects.
        for i in np.flatnonzero(ended):
            last[i] = self._observations.one(found[i])
        self._check("an observation", last)
        return last

    def estimate_return_scale(self, discount: float, seed: int) -> float:
        """Play some steps of the default prior, and estimate the size of returns to come, reward units.

        It is their root mean square, or the largest reward if that is more: a reward that random play rarely meets may
        later come in every episode.
        """
        rng, masked = np.random.default_rng(seed), self._observations.masked
        steps = []
        for _ in range(_NUM_PROBES):
            allowed = self.observation[:, -masked:] > 0 if masked else None
            steps.append(self.step(self._actions.sample_prior(rng, self.number, allowed)))
        later, squares, count = np.zeros(self.number), 0.0, 0
        largest = max(float(np.abs(step.reward).max()) for step in steps)
        for step in reversed(steps):
            later = step.reward + discount * np.where(step.ended, 0.0, later)
            squares, count = squares + float((later[step.counts] ** 2).sum()), count + int(step.counts.sum())
        return max(float(np.sqrt(squares / max(count, 1))), largest)

    def unfinished(self) -> list[tuple[float, int]]:
        """Return the return and length of the episodes under way."""
        return list(zip(self._earned.tolist(), self._length.tolist(), strict=True))

    def close(self) -> None:
        """Close all environments."""
        self._envs.close()

    def _read(self, seen: Any, info: Any) -> np.ndarray:
        allowed = None
        if self._observations.masked and self._observations.mask is None and MASK in info:
            # An environment without a mask allows all actions.
            known = np.asarray(info.get(f"_{MASK}", np.ones(self.number, bool)), bool)
            allowed = np.where(known[:, None], np.asarray(info[MASK]) > 0, True)
        with user_code("reading an observation", ControlError, _REMEDY):
            observation = self._observations.from_environment(seen, allowed)
        self._check("an observation", observation)
        return observation

    def _check(self, what: str, values: np.ndarray) -> None:
        if np.isfinite(values).all():
            return
        index = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(-1))[0])
        bad = np.ravel(values[index])
        raise ControlError(
            f"environment {index} gave {what} {bad[~np.isfinite(bad)][0]} in step {int(self._length[index])} of an "
            "episode; make it finite"
        )
