"""Adapters for all the environments of `learn`: tables, programs, Gymnasium environments and bandits."""

import re
from typing import Annotated, Any

import jax
import numpy as np
from numpyro import handlers

from bayesrl.argument_types import Requirement
from bayesrl.arguments import FiniteNumbersOrNone, Seed, checked
from bayesrl.compilation.jit import closure_jit
from bayesrl.compilation.random_keys import as_hash_key, dummy_key, fold_in
from bayesrl.control.action_masks import METHOD, parse_mask, read_mask
from bayesrl.control.bandits.arms import Bandit
from bayesrl.control.environments.base import Environment
from bayesrl.control.environments.from_gymnasium import to_tabular
from bayesrl.control.environments.published_models import active_wrappers, has_model, read_published_model, time_limit
from bayesrl.control.environments.tabular import TabularMDP
from bayesrl.control.gymnasium.source import MOST_STEPS
from bayesrl.control.gymnasium.spaces import MASK, describe_actions, describe_observations, drop_mask, has_mask
from bayesrl.control.gymnasium.vector_env import make_environment
from bayesrl.control.learning.env_adapter import EnvAdapter, EpisodePolicy, draw_index
from bayesrl.control.learning.replay_memory import Episode
from bayesrl.control.planning import soft_value_iteration
from bayesrl.errors import ControlError
from bayesrl.exact.weighted_draws import numpy_generator
from bayesrl.typing import PRNGKey
from bayesrl.value_checks import is_function, is_valid_text


class TabularAdapter(EnvAdapter):
    """A `TabularMDP`, whose tables the agent does not see."""

    def __init__(self, mdp: TabularMDP) -> None:
        if mdp.horizon is None and mdp.discount == 1 and not mdp.terminal.any():
            raise ControlError(f"{mdp.name or 'the problem'} has no end; pass mdp.replace(horizon=...)")
        self.mdp = mdp
        self._tables = mdp if mdp.horizon is not None else None
        self.num_actions, self.num_observations = mdp.num_actions, mdp.num_states
        self.action_names, self.name = mdp.action_names, mdp.name or "table"
        self.max_steps = MOST_STEPS if mdp.horizon is None else mdp.horizon
        self.discount = mdp.discount
        # The best over all actions, not only over those that the prior takes.
        self.optimum = float(soft_value_iteration(mdp.replace(prior=None), 0.0).objective)
        self._cumulated = mdp.probabilities.cumsum(-1)
        self._state, self._rng = 0, np.random.default_rng(0)

    def begin(self, key: PRNGKey) -> np.ndarray:
        """Draw the first state."""
        self._rng = numpy_generator(key)
        self._state = draw_index(self._rng, self.mdp.start.cumsum())
        return np.asarray(self._state)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Draw an outcome."""
        at = (self._state, action)
        outcome = draw_index(self._rng, self._cumulated[at])
        self._state = int(self.mdp.successors[at][outcome])
        reward = float(self.mdp.rewards[at][outcome])
        return np.asarray(self._state), reward, bool(self.mdp.terminal[self._state]), False


class GymnasiumAdapter(EnvAdapter):
    """A Gymnasium environment, its id or a function that makes one; the optimum is known if it publishes its model."""

    def __init__(self, environment: Any, action_masks: bool | None = False) -> None:
        self._env = make_environment(environment)
        self._own = self._env is not environment
        try:
            self._describe(action_masks)
        except BaseException:
            self.close()
            raise

    def _describe(self, action_masks: bool | None) -> None:
        self._actions = describe_actions(self._env.action_space)
        if self._actions.num is None:
            raise ControlError(
                f"{self._env} has actions that are vectors, and `learn` chooses among finitely many; use bayesrl.fit "
                "with GymnasiumSource"
            )
        space = self._env.observation_space
        self._within = action_masks is not False and has_mask(space, self._actions)
        seen = self._seen = describe_observations(drop_mask(space) if self._within else space)
        self.num_actions, self.num_observations = self._actions.num, seen.num
        spec = getattr(self._env, "spec", None)
        self.name = getattr(spec, "id", type(self._env).__name__)
        self.shape, self.dtype, self.scale = seen.shape, seen.dtype, seen.scale
        given = sorted(getattr(spec, "kwargs", {}).items())
        # How an environment is shown does not change the run.
        self.options = {key: _stable_repr(value) for key, value in given if key != "render_mode"}
        around = [
            f"{type(one).__name__}({_stable_repr(getattr(one, '_saved_kwargs', {}))})"
            for one in active_wrappers(self._env)
        ]
        if around:
            self.options["wrappers"] = ", ".join(around)
        limit = time_limit(self._env)
        self.max_steps = MOST_STEPS if limit is None else limit
        self.masked = action_masks is not False and (self._within or self._gives_masks())
        if action_masks and not self.masked:
            raise ControlError(
                f"action_masks=True, and {self.name} gives no masks: neither in a Dict observation, nor in "
                f"info['{MASK}'], nor by a method {METHOD}; leave action_masks out"
            )
        self._find_optimum(limit)

    def _gives_masks(self) -> bool:
        """Check whether a mask comes beside the observation of a reset."""
        mask = read_mask(self._env, *self._env.reset(seed=0), within=False)
        if mask is not None:
            parse_mask(mask, self._actions, self.name)
        return mask is not None

    def _find_optimum(self, limit: int | None) -> None:
        """Find the optimum, or why it is unknown."""
        if not has_model(self._env):
            return
        try:
            model = read_published_model(self._env)
            tables = to_tabular(self._env, model, discount=1.0, horizon=limit, masked=self.masked)
            self.optimum = float(soft_value_iteration(tables, 0.0).objective)
        except ControlError as error:
            self.unknown = str(error)
            return
        # Without a limit the tables have no last step, so the regret comes from returns.
        fits = limit is not None and model.observed and tables.num_states == self.num_observations
        self._tables = tables if fits else None
        self.action_names = tables.action_names

    def begin(self, key: PRNGKey) -> np.ndarray:
        """Reset with a seed drawn from the key."""
        seed = int(numpy_generator(key).integers(2**31 - 1))
        return self._taken(*self._env.reset(seed=seed))

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Take a step."""
        seen, reward, terminated, truncated, info = self._env.step(self._actions.one(action))
        try:
            earned = float(np.asarray(reward).item() if np.ndim(reward) == 0 else np.nan)
        except (TypeError, ValueError):
            earned = np.nan
        # `play` refuses floats that are not finite, and knows the step.
        if np.isnan(earned) and not isinstance(reward, float | np.floating):
            raise ControlError(f"{self.name} gave the reward {reward!r:.100}; let it give one finite number")
        return self._taken(seen, info), earned, bool(terminated), bool(truncated)

    def close(self) -> None:
        """Close the environment if it was opened here."""
        if self._own:
            self._env.close()

    def _taken(self, seen: Any, info: Any) -> np.ndarray:
        count = self.num_observations
        if self.masked:
            mask = read_mask(self._env, seen, info, within=self._within)
            # Without a mask, all actions are allowed.
            self.allowed = parse_mask(np.ones(self.num_actions) if mask is None else mask, self._actions, self.name)
        try:
            observation = np.asarray(self._seen.one(seen))
        except (TypeError, ValueError, LookupError):
            observation = np.asarray(np.nan)
        in_range = np.isfinite(observation).all() if count is None else 0 <= observation < count
        if observation.shape != self.shape or not in_range:
            wanted = f"finite numbers {list(self.shape)}" if count is None else f"one of {count} integers"
            raise ControlError(f"{self.name} gave the observation {seen!r}; its space has {wanted}")
        return observation


class ProgramAdapter(EnvAdapter):
    """An environment written as a program, such as `CartPole()`."""

    def __init__(self, environment: Environment, max_steps: int, action_masks: bool | None = None) -> None:
        self.name = type(environment).__name__
        self.num_observations, self.max_steps = environment.num_observations, max_steps

        def observe(state: Any, masked: bool = True) -> tuple[Any, Any]:
            seen = environment.observe(state)
            shown = environment.features(seen) if environment.num_observations is None else seen
            return shown, environment.allowed(seen) if masked else None

        def look(key: PRNGKey) -> Any:
            with handlers.block(), handlers.seed(rng_seed=key):
                state = environment.reset()
                prior = environment.prior(environment.observe(state))
            if not prior.has_enumerate_support or prior.event_shape or prior.batch_shape:
                raise ControlError(
                    f"{self.name} draws actions from {type(prior).__name__}, and `learn` chooses among finitely many; "
                    "use bayesrl.fit with a Rollout"
                )
            return prior.enumerate_support(), *observe(state)

        # Traced but not run, so that nothing compiles.
        actions, seen, allowed = jax.eval_shape(look, dummy_key())
        self.num_actions = int(actions.shape[0])
        self.masked = masked = allowed is not None and action_masks is not False
        if (action_masks and not masked) or (masked and allowed.shape != (self.num_actions,)):
            raise ControlError(
                f"{self.name} gives {'no masks' if allowed is None else f'masks of shape {allowed.shape}'} for its "
                f"{self.num_actions} actions; {'leave action_masks out' if allowed is None else 'give a flag for each'}"
            )

        if self.num_observations is None:
            self.shape, self.dtype = tuple(seen.shape), np.float32

        def begin(key: PRNGKey) -> tuple[Any, ...]:
            with handlers.block(), handlers.seed(rng_seed=key):
                state = environment.reset()
            return state, *observe(state, masked)

        def step(key: PRNGKey, state: Any, action: Any) -> tuple[Any, ...]:
            with handlers.block(), handlers.seed(rng_seed=key):
                outcome = environment.step(state, action)
            ends = outcome.terminated, outcome.truncated
            return outcome.state, *observe(outcome.state, masked), outcome.reward, *ends

        self._begin, self._step = closure_jit(begin, name="reset"), closure_jit(step, name="play_step")
        self._key, self._state, self._time = dummy_key(), None, 0

    def begin(self, key: PRNGKey) -> np.ndarray:
        """Draw the first state."""
        self._key, self._time = as_hash_key(key), 0
        return self._enter(*self._begin(fold_in(key, 0)))

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Take a step."""
        self._time += 1
        key = fold_in(self._key, self._time)
        *after, reward, terminated, truncated = self._step(key, self._state, np.asarray(action, np.int32))
        return self._enter(*after), float(reward), bool(terminated), bool(truncated)

    def _enter(self, state: Any, seen: Any, allowed: Any) -> np.ndarray:
        self._state, self.allowed = state, None if allowed is None else np.asarray(allowed)
        return np.asarray(seen)


@checked(ControlError)
class BanditEnv(EnvAdapter):
    """One instance of a bandit; an episode is one pull. Observations are the features of all arms.

    Args:
        bandit: the prior of the instance.
        values: the instance, in the form of one run of `bandit.sample_instances`; by default, it is drawn.
        seed: seed of that draw.
        names: names of the arms.
    """

    def __init__(
        self, bandit: Bandit, values: FiniteNumbersOrNone = None, seed: Seed = 0, names: tuple[str, ...] = ()
    ) -> None:
        self.bandit, self.name, self.num_actions = bandit, type(bandit).__name__, bandit.num_arms
        self.action_names = names or tuple(str(arm) for arm in range(bandit.num_arms))
        # A key holds two words, so a 64-bit seed fits without loss.
        key = as_hash_key(np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32))

        def draw(key: PRNGKey) -> Any:
            return bandit.sample_instances(key, 1)

        def observe(key: PRNGKey) -> Any:
            return bandit.sample_context(key, 1)

        def pay(key: PRNGKey, instance: Any, seen: Any, arm: Any) -> Any:
            return bandit.sample_reward(key, bandit.expected_rewards(instance, seen)[:, arm])[0]

        self._values = closure_jit(bandit.expected_rewards, name="values")
        self._observe, self._pay = closure_jit(observe, name="observe"), closure_jit(pay, name="pay")
        drawn, first = jax.eval_shape(draw, key), jax.eval_shape(observe, key)
        given = closure_jit(draw, name="draw_instance")(key) if values is None else np.asarray(values, np.float32)[None]
        self.values = np.asarray(given)
        if self.values.shape != drawn.shape:
            shape, wanted = self.values.shape[1:], drawn.shape[1:]
            raise ControlError(f"values has shape {shape}, and {bandit} draws instances of shape {wanted}; pass that")
        self._key, self._seen = key, np.zeros(first.shape, first.dtype)
        if self._seen.size == 0:
            self.num_observations = 1
            self.optimum = float(np.asarray(self._values(self.values, self._seen)).max())
        else:
            self.shape, self.dtype = tuple(first.shape[1:]), np.float32
            self.unknown = "the best arm changes with the features"

    def begin(self, key: PRNGKey) -> np.ndarray:
        """Draw the features."""
        self._key = as_hash_key(key)
        if self._seen.size == 0:
            return np.asarray(0)
        self._seen = np.asarray(self._observe(fold_in(key, 1)))
        return self._seen[0]

    def regret(self, episode: Episode, act: EpisodePolicy) -> float:
        """Compute how much less the arm pays on average than the best one, reward units."""
        values = np.asarray(self._values(self.values, self._seen))[0]
        return float(values.max() - values[episode.action[0]])

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """Pull an arm."""
        arm = np.asarray(action, np.int32)
        reward = float(self._pay(fold_in(self._key, 2), self.values, self._seen, arm))
        return np.asarray(0) if self._seen.size == 0 else self._seen[0], reward, True, False


type Playable = Annotated[
    Any,
    Requirement(
        "a TabularMDP, a bandit, an Environment, or a Gymnasium environment, its id or a function that makes one",
        lambda one: (
            isinstance(one, EnvAdapter | TabularMDP | Bandit | Environment)
            or is_valid_text(one)
            or is_function(one)
            or hasattr(one, "action_space")
        ),
        any_type=True,
    ),
]
"""Anything that `adapt_environment` adapts."""


@checked(ControlError)
def adapt_environment(
    environment: Playable, max_steps: int | None = None, *, action_masks: bool | None = None
) -> EnvAdapter:
    """Adapt a user's environment: a table, a program, a bandit, or a Gymnasium environment or its id.

    Raises:
        ControlError: the environment is none of these, or has no masks though action_masks is True.
    """
    if action_masks and isinstance(environment, EnvAdapter | TabularMDP | Bandit):
        raise ControlError(f"action_masks=True, and a {type(environment).__name__} has none; leave action_masks out")
    if isinstance(environment, EnvAdapter):
        return environment
    if isinstance(environment, TabularMDP):
        return TabularAdapter(environment)
    if isinstance(environment, Bandit):
        return BanditEnv(environment)
    if isinstance(environment, Environment):
        return ProgramAdapter(environment, 500 if max_steps is None else max_steps, action_masks)
    return GymnasiumAdapter(environment, action_masks)


def _stable_repr(value: Any) -> str:
    """Return the repr without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
