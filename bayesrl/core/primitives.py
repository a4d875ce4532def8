"""The primitives of a policy program beyond ordinary NumPyro: `reward` and `environment`."""

import inspect
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.primitives import Messenger

from bayesrl.argument_types import CHECKED_IN_BODY
from bayesrl.arguments import checked
from bayesrl.errors import PolicyError

type SiteKind = Literal["action", "environment", "observed", "reward", "metric"]

MARK = "bayesrl"
"""Key under which a site's `infer` dictionary carries its kind."""


class _OwnPlates(Messenger):
    """Records which plates stand around the one site inside it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.frames: list[Any] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            self.frames = msg["cond_indep_stack"]  # keep the list itself: outer plates add themselves to it later

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [1] * max((-frame.dim for frame in self.frames), default=0)
        for frame in self.frames:
            sizes[frame.dim] = frame.size
        return tuple(sizes)


@checked(PolicyError)
def reward(name: str, value: Annotated[ArrayLike, CHECKED_IN_BODY]) -> None:
    """Collect a reward inside a policy program.

    Under `tilt(policy, beta)` the site multiplies the density by exp(value / beta). Several reward
    sites add up.

    Args:
        name: name of the site, unique in the program.
        value: reward, in reward units; one real number per element of the enclosing plates
            (shape `()` outside plates).

    Raises:
        PolicyError: the value is not real, or its shape is not that of the plates.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> sites = {"arm": jnp.array(2)}
        >>> float(bayesrl.log_density(bandit, sites, beta=0.5).total_reward)
        2.0
    """
    try:
        array = jnp.asarray(value)
        number = not jnp.issubdtype(array.dtype, jax.dtypes.extended)
    except (TypeError, ValueError, OverflowError) as error:
        raise PolicyError(
            f"reward site {name!r} got {value!r}, which is not a number or an array of numbers; "
            "pass the reward as a real JAX array"
        ) from error
    if not number:
        raise PolicyError(f"reward site {name!r} holds {array.dtype}, which is no number; pass a real JAX array")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise PolicyError(f"reward site {name!r} is complex ({array.dtype}); rewards are real: pass value.real")
    array = array.astype(jnp.result_type(float) if not jnp.issubdtype(array.dtype, jnp.floating) else array.dtype)
    # `Unit` holds the reward as its log-density, so that the trace adds exactly the program's numbers.
    plates = _OwnPlates()
    try:
        with plates:
            numpyro.sample(
                name,
                dist.Unit(array),
                obs=jnp.zeros((*array.shape, 0)),
                infer={MARK: "reward"},
            )
    except ValueError:
        _check_reward_shape(name, array, plates)  # a clearer error, if the shape does not fit the plates
        raise
    _check_reward_shape(name, array, plates)


def _check_reward_shape(name: str, array: Array, plates: _OwnPlates) -> None:
    if array.shape == plates.shape:
        return
    if not plates.frames:
        raise PolicyError(
            f"reward site {name!r} has shape {array.shape} but stands in no plate; "
            "sum it (value.sum()), or put it inside numpyro.plate(...) if its elements are separate problems"
        )
    inside = ", ".join(f"{frame.name!r} (size {frame.size})" for frame in plates.frames)
    times = f" and would count {math.prod(plates.shape)} times" if array.shape == () else ""
    raise PolicyError(
        f"reward site {name!r} has shape {array.shape} inside plate {inside}{times}; "
        f"pass one value per element (shape {plates.shape}), or move it out of the plate"
    )


@checked(PolicyError)
def environment(name: str, distribution: dist.Distribution, *, observable: Annotated[bool, CHECKED_IN_BODY]) -> Array:
    """Let nature draw a site that the policy can neither choose nor tilt.

    A guide replays the site, so it cancels from the KL. If `observable` is False, the agent does not see
    the draw, and no automatic guide reads it.

    Args:
        name: name of the site, unique in the program.
        distribution: the distribution that nature draws from.
        observable: whether the agent sees the draw; there is no default.

    Returns:
        The draw.

    Raises:
        PolicyError: `observable` is not a bool.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, bayesrl
        >>> def weather():
        ...     return bayesrl.environment("rain", dist.Bernoulli(0.3), observable=True)
        >>> int(numpyro.handlers.seed(weather, rng_seed=0)()) in (0, 1)
        True
    """
    if not isinstance(observable, bool):
        raise PolicyError(
            f"environment site {name!r} got observable={observable!r}; "
            "say True where the agent sees the draw, False where it does not"
        )
    kind = "environment" if observable else "hidden environment"
    value: Array = numpyro.sample(name, distribution, infer={MARK: kind})
    return value


def site_kind(msg: dict[str, Any]) -> SiteKind:
    """Return the kind of a sample or deterministic message."""
    if msg["type"] == "deterministic":
        return "metric"
    mark = msg["infer"].get(MARK)
    if mark == "reward":
        return "reward"
    if msg["is_observed"]:
        return "observed"
    return "environment" if mark is not None else "action"


def unwrapped(fn: Any) -> Any:
    """Remove all of NumPyro's wrappers from a distribution."""
    while isinstance(fn, dist.MaskedDistribution | dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def log_prob_of_draw(fn: Any, value: Any, intermediates: Any) -> Array:
    """Log-probability of a value, with what its draw computed on the way, [*batch], nats."""
    known = (intermediates,) if intermediates and _takes_intermediates(fn) else ()
    return jnp.asarray(fn.log_prob(value, *known))


def _takes_intermediates(fn: Any) -> bool:
    """Whether `log_prob` takes the draw's intermediates; some transformed distributions override it without them."""
    return "intermediates" in inspect.signature(unwrapped(fn).log_prob).parameters


def is_hidden(msg: dict[str, Any]) -> bool:
    """Whether a message is a draw of nature that the agent does not see."""
    return bool(msg.get("infer", {}).get(MARK) == "hidden environment")
