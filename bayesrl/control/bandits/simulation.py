"""`play_bandit`: thousands of independent runs of an exploration rule on a bandit, in one compiled program."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bayesrl.arguments import Count, MemoryNeed, UnitInterval, checked, user_code
from bayesrl.compilation.jit import trace_once
from bayesrl.compilation.random_keys import as_hash_key, split_keys
from bayesrl.control.bandits.arms import Bandit
from bayesrl.control.exploration.rules import Rule
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey

_TOGETHER = 1000
"""Runs played at once: few enough for a processor's cache."""


@checked(ControlError)
class BanditRuns(NamedTuple):
    """What an exploration rule lost on instances drawn from the prior.

    Attributes:
        regret: cumulative expected regret of each run, reward units, [runs, steps]: how much more the best arm would
            have paid on average, free of the noise of rewards.
        arms: the arm chosen at each step, [runs, steps].
        posterior: the bandit's state at the end, [runs, ...].
    """

    regret: np.ndarray
    arms: np.ndarray
    posterior: Any

    @property
    def mean(self) -> np.ndarray:
        """Bayes regret after each step, reward units, [steps]."""
        return np.asarray(self.regret.mean(0, dtype=np.float64))

    @property
    def se(self) -> np.ndarray:
        """Standard error of `mean`, [steps]; nan for a single run."""
        runs = len(self.regret)
        return np.asarray(self.regret.std(0, ddof=1, dtype=np.float64) / runs**0.5) if runs > 1 else self.mean * np.nan

    def band(self, level: UnitInterval = 0.9) -> np.ndarray:
        """Compute the quantiles between which this share of the runs lies, reward units, [2, steps].

        Raises:
            ControlError: the share is outside [0, 1].
        """
        return np.asarray(np.quantile(self.regret, [(1 - level) / 2, (1 + level) / 2], axis=0))


@checked(
    ControlError,
    MemoryNeed(
        lambda given: 12.0 * given["num_runs"] * (given["num_steps"] + given["bandit"].num_arms),
        ("num_runs", "num_steps"),
        "ask for fewer runs or steps",
    ),
)
def play_bandit(
    key: PRNGKey,
    bandit: Bandit,
    exploration: Rule,
    *,
    num_steps: Count,
    num_runs: Count = 1000,
) -> BanditRuns:
    """Play independent runs, each on its own instance from the prior.

    Args:
        key: random key.
        bandit: the prior, and the update of its posterior.
        exploration: how to act on the posterior: `thompson()`, `bayes_ucb()`, `k_learning()`, ..., or your own
            function from (key, belief, step) to integers [runs].
        num_steps: steps of each run.
        num_runs: number of runs.

    Raises:
        ControlError: a number is below 1; the bandit or the rule is not one; the rule does not return integers of the
            right shape, or returns an action that the bandit does not have; a value of the bandit is not finite.
        EngineError: `key` is not a random key.

    Example:
        >>> import jax
        >>> from bayesrl.control import random, thompson
        >>> from bayesrl.control.bandits import BernoulliArms, play_bandit
        >>> key, arms = jax.random.key(0), BernoulliArms(2)
        >>> good, bad = (play_bandit(key, arms, rule, num_steps=100) for rule in (thompson(), random()))
        >>> bool(good.mean[-1] < 4 < 15 < bad.mean[-1])  # 2.78 and 100/6
        True
    """
    count = -(-num_runs // _TOGETHER)
    together = -(-num_runs // count)  # batches of one size share one compiled program
    _check(as_hash_key(key), bandit, exploration, together)
    played = _play(bandit, exploration, num_steps, together)
    parts = jax.device_get([played(k) for k in split_keys(key, count)])
    arms, regret, posterior = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_runs], *parts)
    # Arms come first: the value of an arm out of range is nan, and would be blamed on the bandit.
    bad = (arms < 0) | (arms >= bandit.num_arms)
    if bad.any():
        raise ControlError(
            f"the exploration rule took action {arms[bad][0]}, and {type(bandit).__name__} has actions 0 to "
            f"{bandit.num_arms - 1}; give one of these"
        )
    if not np.isfinite(regret).all():
        raise ControlError(
            f"a value of {bandit!r} is not finite; sample_instances and values have to give finite numbers"
        )
    return BanditRuns(regret, arms, posterior)


def _check(key: PRNGKey, bandit: Bandit, exploration: Any, num_runs: int) -> None:
    """Trace the rule on the prior, so that a bad rule fails before anything compiles."""
    context = jax.eval_shape(partial(bandit.sample_context, num_runs=num_runs), key)
    belief = jax.eval_shape(bandit.posterior, jax.eval_shape(lambda: bandit.init(num_runs)), context)
    remedy = "use thompson(), with its brackets, bayes_ucb(), ... or a function of (key, belief, step)"
    with user_code("the exploration rule", ControlError, remedy):
        chosen = jax.eval_shape(exploration, key, belief, jax.ShapeDtypeStruct((), jnp.int32))
    if getattr(chosen, "shape", None) != (num_runs,) or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ControlError(
            f"the exploration rule gives {chosen!r} for {num_runs} runs; give integers of shape ({num_runs},), one "
            "action for each run"
        )


def _play(bandit: Bandit, exploration: Any, num_steps: int, num_runs: int) -> Any:
    """Compile the function from a key to (arms, regret [runs, steps], posterior)."""

    def played(key: PRNGKey) -> tuple[Array, Array, Any]:
        instance_key, step_key = jax.random.split(key)
        instances = bandit.sample_instances(instance_key, num_runs)

        def step(state: Any, time: Array) -> tuple[Any, tuple[Array, Array]]:
            # Keys depend on the step alone, so a longer run begins with the same steps.
            keys = jax.random.split(jax.random.fold_in(step_key, time), 3)
            context = bandit.sample_context(keys[0], num_runs)
            arm = exploration(keys[1], bandit.posterior(state, context), time)
            values = bandit.expected_rewards(instances, context)
            taken = jnp.take_along_axis(values, arm[:, None], 1)[:, 0]
            state = bandit.update(state, context, arm, bandit.sample_reward(keys[2], taken))
            return state, (arm, values.max(-1) - taken)

        posterior, (arms, lost) = lax.scan(step, bandit.init(num_runs), jnp.arange(num_steps))
        return arms.T, jnp.cumsum(lost, 0).T, posterior

    return trace_once(played, name="play_bandit")
