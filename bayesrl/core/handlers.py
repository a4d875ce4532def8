"""Effect handlers: `tilt`, which makes the posterior, `power`, and those that the library uses to run programs."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from numpyro.primitives import Messenger

from bayesrl.argument_types import CHECKED_IN_BODY, Requirement
from bayesrl.arguments import checked
from bayesrl.compilation.random_keys import fold_in
from bayesrl.core.primitives import MARK, log_prob_of_draw, reward
from bayesrl.errors import PolicyError
from bayesrl.typing import PRNGKey, Program
from bayesrl.value_checks import LARGEST, LEAST, are_numbers, array_of, format_value


def check_beta(beta: ArrayLike) -> None:
    """Refuse a temperature that is not positive and finite; traced values pass."""
    if isinstance(beta, jax.core.Tracer):
        return
    if not are_numbers(beta):
        raise PolicyError(f"beta={format_value(beta)} is not a number; pass a positive float or an array of them")
    values = array_of(beta).astype(float)
    bad = values[~((values < LARGEST) & (values >= LEAST))]
    if bad.size or values.size == 0:
        shown = ", ".join(str(x) for x in bad[:3]) or "an empty array"
        raise PolicyError(f"beta must be positive and finite, but holds {shown}; choose beta in reward units per nat")


@checked(PolicyError)
class tilt(Messenger):  # noqa: N801  (a handler, spelled like NumPyro's)
    """Tilt a policy by its rewards: an ordinary NumPyro model for any NumPyro engine.

    The joint density becomes π₀(x) · exp(R(x) / β), unnormalised. Environment sites are latent like
    any others here, so a generic engine also tilts nature, which gives the optimistic posterior;
    `bayesrl.fit` does not.

    Args:
        policy: the program.
        beta: temperature, in reward units per nat; may be traced and differentiated.

    Raises:
        PolicyError: beta is not positive and finite.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from numpyro.infer.util import log_density
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2)))
        ...     bayesrl.reward("payoff", 1.0 * arm)
        >>> value, _ = log_density(bayesrl.tilt(bandit, 0.5), (), {}, {"arm": jnp.array(1)})
        >>> round(float(value), 4)  # log(1/2) + 1/0.5
        1.3069
    """

    def __init__(self, policy: Program | None = None, beta: Annotated[ArrayLike, CHECKED_IN_BODY] = 1.0) -> None:
        check_beta(beta)
        self.beta = beta
        super().__init__(policy)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Multiply the scale of reward sites by 1/β."""
        if msg["type"] == "sample" and msg["infer"].get(MARK) == "reward":
            scale = 1.0 if msg["scale"] is None else msg["scale"]
            msg["scale"] = scale / self.beta


class SharedKeys(Messenger):
    """Draw the named sites and plates from one key, whatever the key of the seed handler.

    The particles of a leave-one-out group run under the same `SharedKeys`, so that they share their
    mini-batch and nature's draws before the first action.
    """

    def __init__(self, fn: Program, key: PRNGKey, names: Iterable[str]) -> None:
        super().__init__(fn)
        self.key = key
        # By sorted name, so that a site has the same key in policy and guide, wherever it stands.
        self.names = {name: index for index, name in enumerate(sorted(names))}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the message's key, so that the seed handler leaves it alone."""
        if msg["type"] in ("sample", "plate") and msg["name"] in self.names and msg["value"] is None:
            msg["kwargs"]["rng_key"] = fold_in(self.key, self.names[msg["name"]])


@checked(PolicyError)
class full_data(Messenger):  # noqa: N801  (a handler, spelled like NumPyro's)
    """Run a program on all of its data: plates ignore their `subsample_size`.

    A mini-batch has the evidence of a different problem. Under `full_data`, you can enumerate and weight a
    program that has mini-batches.

    Args:
        policy: the program.

    Example:
        >>> import jax, numpyro, bayesrl
        >>> def program():
        ...     with numpyro.plate("n", 10, subsample_size=2) as i:
        ...         return i.shape
        >>> numpyro.handlers.seed(bayesrl.full_data(program), rng_seed=0)()
        (10,)
    """

    def __init__(self, policy: Program | None = None) -> None:
        super().__init__(policy)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set a plate's value to all of its indices."""
        if msg["type"] == "plate" and msg["value"] is None:
            size, _ = msg["args"]
            # NumPyro warns if the size of a mini-batch in args is not that of the value.
            msg["args"] = (size, None)
            msg["value"] = jnp.arange(size)


class IntoScans(Messenger):
    """A handler that also acts inside the bodies of `scan`, which NumPyro hides from outer handlers."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Wrap the body of a scan; pass every other site to `process_site`."""
        if msg["type"] == "control_flow":
            self.enter_scan(msg)
        elif not msg.get("_control_flow_done"):
            # Not the stacked sites that follow a scan: they were met one by one inside of it.
            self.process_site(msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Pass every site outside scans to `finish_site`."""
        if msg["type"] != "control_flow" and not msg.get("_control_flow_done"):
            self.finish_site(msg)

    def enter_scan(self, msg: dict[str, Any]) -> None:
        """Replace the scan's body by one that runs under this handler's site methods."""
        watch_body(msg, self.process_site, self.finish_site)

    def process_site(self, msg: dict[str, Any]) -> None:
        """Act on one site before its value is drawn."""

    def finish_site(self, msg: dict[str, Any]) -> None:
        """Act on one site after its value is drawn."""


type SiteHook = Callable[[dict[str, Any]], None]


class SiteHooks(Messenger):
    """Call one function before, and perhaps one after, each site inside."""

    def __init__(self, before: SiteHook, after: SiteHook | None = None) -> None:
        super().__init__(None)
        self.process_message = before
        if after is not None:
            self.postprocess_message = after


def watch_body(msg: dict[str, Any], before: SiteHook, after: SiteHook | None = None) -> None:
    """Let the body of a scan run under `SiteHooks`."""
    body, *rest = msg["args"]

    def watched(carry: Any, x: Any) -> Any:
        with SiteHooks(before, after):
            return body(carry, x)

    msg["args"] = (watched, *rest)


def scan_length(msg: dict[str, Any]) -> int:
    """Return the number of steps of a scan's message."""
    _, _, xs, length, *_ = msg["args"]
    return int(length) if length is not None else int(jnp.shape(jax.tree.leaves(xs)[0])[0])


class StopValues(IntoScans):
    """Cut the gradient of the values drawn at the named sites."""

    def __init__(self, fn: Program, names: Iterable[str]) -> None:
        super().__init__(fn)
        self.names = frozenset(names)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Stop values outside scans, and a scan's stacked values, which it copied before they were stopped inside."""
        if msg["type"] != "control_flow":
            self.finish_site(msg)

    def finish_site(self, msg: dict[str, Any]) -> None:
        """Stop the gradient of a named site's value."""
        if msg["type"] == "sample" and msg["name"] in self.names:
            msg["value"] = lax.stop_gradient(msg["value"])
            msg["intermediates"] = []  # a density that reads them would carry the gradient past the stopped value


def reward_as_metric(msg: dict[str, Any]) -> None:
    """Turn the message of a reward site into one of a deterministic site of the same name and value."""
    value = msg["fn"].log_prob(msg["value"])
    msg["value"] = value if msg["scale"] is None else value * msg["scale"]
    msg["type"], msg["is_observed"] = "deterministic", False


_MADE_BY = "made by"
"""Key under which a reward that `power` makes says by which one."""


def _is_power(alpha: float) -> bool:
    return LEAST <= alpha < LARGEST and abs(alpha - 1) >= LEAST


@checked(PolicyError)
class power(IntoScans):  # noqa: N801  (a handler, spelled like NumPyro's)
    """Reward a policy by its own log-probability, so that its tilted posterior is its power π₀ᵅ/Z.

    The reward is log π₀(x), collected draw by draw, and the temperature β = 1/(α − 1) is in the attribute `beta`:

        p*(x) ∝ π₀(x)·exp(log π₀(x)/β) = π₀(x)ᵅ,   log Z = log Σ π₀(x)ᵅ.

    For 0 < α < 1 the power is flatter than π₀: the reward is then −log π₀(x), and β = 1/(1 − α). Rewards that the
    program collects no longer count. They become metrics of the same name, so that estimates show what π₀ᵅ earns.

    Args:
        policy: the program.
        alpha: the power, above 0 and not 1.

    Raises:
        PolicyError: alpha is not above 0, or 1; on use, if there are environment or observed sites, whose powers are
            no policy's.

    Example:
        >>> import jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, bayesrl
        >>> def word():
        ...     numpyro.sample("x", dist.Categorical(probs=jnp.array([0.5, 0.3, 0.2])))
        >>> sharp = bayesrl.power(word, 2.0)
        >>> exact = bayesrl.enumerate_posterior(sharp, beta=sharp.beta)
        >>> np.exp(exact.log_weights).round(4).tolist()  # (.25, .09, .04) / .38
        [0.6579, 0.2368, 0.1053]

    References:
        Karan & Du (2025), "Reasoning with sampling: your base model is smarter than you think", section 4.
    """

    def __init__(
        self,
        policy: Program,
        alpha: Annotated[float, Requirement("a number above 0 other than 1, which is the policy itself", _is_power)],
    ) -> None:
        self.alpha, self.beta = alpha, 1 / abs(alpha - 1)
        super().__init__(policy)

    def process_site(self, msg: dict[str, Any]) -> None:
        """Turn rewards into metrics; refuse what is no draw of the policy."""
        if msg["type"] != "sample":
            return
        mark = msg["infer"].get(MARK)
        if mark == "reward":
            maker = msg["infer"].get(_MADE_BY)
            # `finish_site` sends the reward through all handlers, so it comes by here as well.
            if maker == id(self):
                return
            if maker is not None:
                raise PolicyError("power was given a power of a policy; pass the policy and the product of both alphas")
            reward_as_metric(msg)
        elif mark is not None:
            raise PolicyError(
                f"power would raise environment site {msg['name']!r}, which is nature's; "
                "make it an ordinary site if the policy may choose it"
            )
        elif msg["is_observed"]:
            raise PolicyError(
                f"site {msg['name']!r} is observed, and a power of the policy given data is not defined here; "
                "fit the data first and pass posterior.policy"
            )

    def finish_site(self, msg: dict[str, Any]) -> None:
        """Reward a draw by its log-probability."""
        if msg["type"] != "sample" or msg["infer"].get(MARK) is not None:
            return
        log_prob = log_prob_of_draw(msg["fn"], msg["value"], msg.get("intermediates"))
        frames = msg["cond_indep_stack"]
        inside = {log_prob.ndim + frame.dim for frame in frames}
        others = [axis for axis in range(log_prob.ndim) if axis not in inside]
        depth = max((-frame.dim for frame in frames), default=0)
        # A reward must have exactly the shape of its plates.
        total = log_prob.sum(others, keepdims=True)
        total = total.reshape(total.shape[total.ndim - depth :])
        with SiteHooks(self._sign):
            reward(f"{msg['name']}_log_prob", total if self.alpha > 1 else -total)

    def _sign(self, msg: dict[str, Any]) -> None:
        msg["infer"] = {**msg["infer"], _MADE_BY: id(self)}


def stop_gradient(tree: Any) -> Any:
    """Stop the gradients of a pytree's inexact arrays; leave the rest as it is."""

    def stop(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            return lax.stop_gradient(leaf)
        return leaf

    return jax.tree.map(stop, tree)
