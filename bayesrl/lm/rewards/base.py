"""`Reward`: a number for each completion; sums of rewards, and functions of tokens."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bayesrl.arguments import checked
from bayesrl.errors import LanguageModelError
from bayesrl.lm.prompts import Completions
from bayesrl.value_checks import array_of, format_value, is_real, is_traced


class Reward(abc.ABC):
    """A number for each completion: a reward that tilts the policy, in reward units, or a metric.

    Rewards add up and may be multiplied by numbers: `0.7 * right + 0.1 * short`.

    Example:
        >>> isinstance(length() - 0.5 * length(), Reward)
        True
    """

    @abc.abstractmethod
    def __call__(self, completions: Completions) -> Array:
        """Return one number for each completion, [...], inside compiled code."""

    @property
    def separate(self) -> bool:
        """Whether a completion's number is known not to depend on the other completions of the call."""
        return False

    @property
    def fields(self) -> frozenset[str] | None:
        """The fields of the prompts' records that it reads, beside the prompt; None if that is not known."""
        return None

    def __add__(self, other: "Reward") -> "WeightedSum":
        return WeightedSum(((1.0, self), (1.0, other)))

    def __radd__(self, nothing: int) -> "Reward":
        """Let `sum`, which begins at 0, add up rewards."""
        return self if nothing == 0 else NotImplemented

    def __sub__(self, other: "Reward") -> "WeightedSum":
        return WeightedSum(((1.0, self), (-1.0, other)))

    def __mul__(self, weight: float) -> "WeightedSum":
        return WeightedSum(((weight, self),))

    __rmul__ = __mul__

    def __neg__(self) -> "WeightedSum":
        return WeightedSum(((-1.0, self),))

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Release resources such as worker processes; the reward can be used again."""


def evaluate(reward: Reward, completions: Completions, name: str | None = None) -> Array:
    """Return the numbers of a reward for completions, [...], or refuse what it returned instead, such as texts."""
    value, shape = reward(completions), completions.index.shape
    # JAX would read the numbers in an array of texts.
    wrong = "" if is_traced(value) or array_of(value).dtype.kind in "biuf" else " ".join(repr(value).split())[:60]
    if wrong or jnp.shape(value) != shape:
        name = name or getattr(reward, "name", type(reward).__name__)
        raise LanguageModelError(
            f"reward {name!r} returned {wrong or f'shape {jnp.shape(value)}'} for completions {list(shape)}; return "
            "one number for each"
        )
    return jnp.asarray(value)


@checked(LanguageModelError)
@dataclass(frozen=True)
class WeightedSum(Reward):
    """Σ_k weight_k · reward_k.

    Args:
        parts: pairs (weight, reward).

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesrl.lm.rewards import length, token_reward
        >>> score = token_reward(lambda tokens, mask: 1.0 * tokens[0]) - 0.5 * length()
        >>> [weight for weight, _ in score.parts]
        [1.0, -0.5]
    """

    parts: tuple[tuple[float, Reward], ...]

    def __post_init__(self) -> None:
        flat: list[tuple[float, Reward]] = []
        for weight, part in self.parts:
            if not is_real(weight):
                raise LanguageModelError(f"a reward was weighted by {weight!r}; use a finite number")
            if not isinstance(part, Reward):
                raise LanguageModelError(
                    f"a reward was added to {format_value(part)}; make it one by rewards.text_reward(fn) or "
                    "token_reward(fn)"
                )
            inner = part.parts if isinstance(part, WeightedSum) else ((1.0, part),)
            flat += [(float(weight) * own, reward) for own, reward in inner]
        object.__setattr__(self, "parts", tuple(flat))

    def __call__(self, completions: Completions) -> Array:
        """Return the sum, [...]."""
        total = jnp.zeros(completions.index.shape)
        for weight, part in self.parts:
            total = total + weight * evaluate(part, completions)
        return total

    @property
    def separate(self) -> bool:
        """Whether every part is separate; see `Reward.separate`."""
        return all(part.separate for _, part in self.parts)

    @property
    def fields(self) -> frozenset[str] | None:
        """What some part reads; see `Reward.fields`."""
        of_parts = [part.fields for _, part in self.parts]
        known = [fields for fields in of_parts if fields is not None]
        return frozenset().union(*known) if len(known) == len(of_parts) else None

    def close(self) -> None:
        """Close every part."""
        for _, part in self.parts:
            part.close()


@checked(LanguageModelError)
@dataclass(frozen=True)
class TokenReward(Reward):
    """A JAX function of the tokens of one completion; see `token_reward`."""

    fn: Callable[[Array, Array], Array]
    # Without annotations, so that they are no fields of the dataclass.
    separate = True
    fields = frozenset()

    def __call__(self, completions: Completions) -> Array:
        """Return the function's value for each completion, [...]."""
        shape = completions.index.shape
        tokens = completions.tokens.reshape(-1, completions.tokens.shape[-1])
        mask = completions.mask.reshape(tokens.shape)
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        try:
            value = jnp.asarray(jax.vmap(self.fn)(tokens, mask))
        except Exception as error:
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise LanguageModelError(
                f"reward {name!r} could not be run on tokens: {told}; it gets (tokens, mask), "
                "both [T], as JAX arrays; a function of the text is rewards.text_reward(fn)"
            ) from error
        if value.shape != tokens.shape[:1]:
            raise LanguageModelError(
                f"reward {name!r} returned shape {value.shape[1:]} for one completion; return one number"
            )
        return value.reshape(shape).astype(jnp.float32)


@checked(LanguageModelError)
def token_reward(fn: Callable[[Any, Any], Any]) -> TokenReward:
    """Make a reward from a JAX function of the tokens, so that generation, scoring and update are one compiled step.

    Args:
        fn: maps (tokens, mask), both [T], to one number; `mask` shows which tokens count: those up to and including
            the end of the text.

    Raises:
        LanguageModelError: it is not callable; on use, if it does not return a single number.

    Example:
        >>> import jax.numpy as jnp
        >>> zeros = token_reward(lambda tokens, mask: jnp.sum((tokens == 0) & mask))
    """
    return TokenReward(fn)


def length() -> TokenReward:
    """Return the length of a completion in tokens, its end included: a metric, or with a negative weight a cost.

    Example:
        >>> price = -0.01 * length()
    """
    return TokenReward(_length)


def _length(tokens: Array, mask: Array) -> Array:
    return mask.sum()
