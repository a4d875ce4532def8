"""`Decision`: which action is best, how surely, and what a wrong choice may cost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayesrl.arguments import Count, MemoryNeed, checked
from bayesrl.compilation.random_keys import split
from bayesrl.control.exploration.beliefs import Belief
from bayesrl.errors import ControlError
from bayesrl.typing import PRNGKey


class Decision(NamedTuple):
    """What draws of action values say about a choice between the actions.

    Attributes:
        p_optimal: P(action is best), [..., actions].
        regret: expected loss of taking each action instead of the best, reward units, [..., actions].
        interval: quantiles of order .025 and .975 of that loss, [..., actions, 2].
    """

    p_optimal: Any
    regret: Any
    interval: Any

    @classmethod
    def from_samples(cls, values: Any, allowed: Any = None) -> "Decision":
        """Compare the actions in each draw; NumPy arrays give NumPy arrays.

        Args:
            values: draws of the action values, reward units, [samples, ..., actions].
            allowed: which actions are allowed, [..., actions]; by default, all. The others are never best, and their
                loss is nan.
        """
        xp = values.__array_namespace__()
        allowed = xp.ones((), bool) if allowed is None else allowed
        among = xp.where(allowed, values, -xp.inf)
        loss = xp.where(allowed, among.max(-1, keepdims=True) - values, xp.nan)
        # The first of several equal values wins, so the probabilities sum to 1.
        best = among.argmax(-1)[..., None] == xp.arange(values.shape[-1])
        ends = xp.quantile(loss, xp.asarray([0.025, 0.975]), axis=0)
        return cls(best.mean(0), loss.mean(0), xp.moveaxis(ends, 0, -1))


@checked(
    ControlError,
    MemoryNeed(
        lambda given: 12.0 * given["num_samples"] * min(map(np.size, jax.tree.leaves(given["belief"])), default=1),
        ("num_samples",),
        "ask for fewer",
    ),
)
def best_action_probabilities(key: PRNGKey, belief: Belief, *, num_samples: Count = 4000) -> Decision:
    """Compute which action is best, how surely, and what a wrong choice may cost.

    Args:
        key: random key; do not use it again.
        belief: the posterior of the values of the actions.
        num_samples: number of draws; the standard error of a probability is at most .5 / √num_samples.

    Raises:
        ControlError: num_samples is below 1; `belief` is not a belief, or its draws are not finite, as for a Beta with
            a or b below 1.
        EngineError: `key` is not a random key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl.control.exploration.beliefs import BetaBelief
        >>> from bayesrl.control.exploration.decisions import best_action_probabilities
        >>> belief = BetaBelief(jnp.array([30.0, 12.0]), jnp.array([12.0, 30.0]))
        >>> bool(best_action_probabilities(jax.random.key(0), belief).p_optimal[0] > 0.99)
        True
    """
    try:
        # Traced only: shapes that do not fit together are refused before anything compiles.
        shape = jax.eval_shape(belief.sample, key).shape
    except (TypeError, ValueError) as error:
        raise ControlError(
            f"{belief!r} cannot be drawn from: {error}; pass arrays [..., actions] of one shape"
        ) from error
    if not shape:
        raise ControlError(f"{belief!r} is of a single value; pass arrays [..., actions]")
    values = jax.lax.map(belief.sample, split(key, num_samples))
    # Under jit, the values are not known yet, so there is nothing to check.
    if not isinstance(values, jax.core.Tracer) and not bool(jnp.isfinite(values).all()):
        raise ControlError(
            f"draws of {belief!r} are not finite; use finite numbers, variances of at least 0, and a and b of at "
            "least 1 for a Beta"
        )
    return Decision.from_samples(values)
