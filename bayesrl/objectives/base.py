"""The protocol of objectives, which are also NumPyro ELBOs."""

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers
from numpyro.infer.elbo import ELBO

from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import ObjectiveError
from bayesrl.statistics.definitions import divergence, is_conditioned
from bayesrl.typing import Params, PRNGKey, Program

OWN = "objective$"
"""The names of an objective's own parameters start with this."""


class Info(NamedTuple):
    """Statistics of one evaluation of an objective: scalar means over draws and contexts.

    With both data and rewards, J is known up to −β·log p(y) and KL up to log p(y); the history adds these terms
    later. See `bayesrl.statistics.definitions`.

    Attributes:
        objective: J = E_q[R] − β·KL(q‖π₀), reward units (the ELBO, nats, without rewards).
        reward: E_q[R], reward units.
        kl: KL(q‖π₀), nats.
        spread: variance of the log-ratio w over draws, nats²; near the optimum, the gap is half of it.
        metrics: means of the deterministic sites; objectives may add their own.
        nonfinite: number of draws with a non-finite reward, by reward site.
    """

    objective: Array
    reward: Array
    kl: Array
    spread: Array
    metrics: dict[str, Array]
    nonfinite: dict[str, Array]


class Objective(ELBO):
    """An objective in two pure parts: `draw` makes draws, `surrogate` turns them into a loss.

    The gradient of the surrogate estimates the gradient of the objective. An objective is also a NumPyro
    ELBO: `SVI(tilt(policy, beta), guide, optimizer, ReverseKL())` minimises the same loss, summed over
    contexts.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
        >>> from numpyro.infer import SVI
        >>> def policy():
        ...     bayesrl.reward("payoff", 3.0 * numpyro.sample("arm", dist.Bernoulli(0.5)))
        >>> def guide():
        ...     numpyro.sample("arm", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(()))))
        >>> objective = bayesrl.objectives.ReverseKL(num_particles=8)
        >>> svi = SVI(bayesrl.tilt(policy, 1.0), guide, numpyro.optim.Adam(0.1), objective)
        >>> result = svi.run(jax.random.key(0), 200, progress_bar=False)
        >>> bool(abs(result.params["logits"] - 3.0) < 0.1)  # the odds of the posterior are exp(3)
        True
    """

    can_infer_discrete = True
    num_particles: int

    weighs_behaviour: ClassVar[bool] = False
    """Whether its `Info` allows for draws of another policy; if not, the history tells of the policy that drew."""

    @property
    def told(self) -> dict[str, Any]:
        """Settings of a fit that say what it maximises, if that is not E[R] − β·KL."""
        return {}

    @property
    def refuses_impossible(self) -> str:
        """Why rewards of −inf are refused; empty if they are allowed."""
        return f"the expectation that {type(self).__name__} takes is then -inf"

    def init_params(self, key: PRNGKey, programs: Programs) -> Params:
        """Return starting values of parameters of its own, which are trained beside the guide's; by default none.

        Their names start with `OWN`. They are in `params` of every method, and not in the posterior.
        """
        return {}

    def for_source(self, source: Any) -> "Objective":
        """Return the objective for draws that a source makes in its place.

        Raises:
            ObjectiveError: it would be biased on such draws.
        """
        if getattr(source, "off_policy", False) and not self.weighs_behaviour:
            raise ObjectiveError(
                f"{type(self).__name__} learns from draws of the present policy, and {type(source).__name__} gives "
                "draws of others; use objective=TrajectoryBalance(), whose optimum is p* whoever drew"
            )
        return self

    @abstractmethod
    def prepare(self, key: PRNGKey, programs: Programs, params: Params) -> "Objective":
        """Refuse options that would be biased for these programs, and resolve the options left to `auto`.

        Raises:
            ObjectiveError: the objective does not suit the programs; the message names the site.
        """

    @abstractmethod
    def draw(self, key: PRNGKey, params: Params, programs: Programs) -> Draws:
        """Draw from the guide. Pure; differentiable in `params` through pathwise sites."""

    @abstractmethod
    def surrogate(self, params: Params, draws: Draws, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Turn draws into a loss in nats per context, and an `Info`. Pure."""

    def evaluate(self, key: PRNGKey, params: Params, programs: Programs, beta: Any) -> tuple[Array, Info]:
        """Compose `draw` and `surrogate`: the default step."""
        return self.surrogate(params, self.draw(key, params, programs), programs, beta)

    def loss_with_mutable_state(
        self, rng_key: PRNGKey, param_map: Params, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Evaluate as NumPyro's SVI does: the loss in nats, summed over contexts.

        `model` is a tilted policy. SVI also trains the parameters inside it; if they belong to the prior,
        freeze them with `numpyro.handlers.substitute`.
        """

        def policy(*args: Any) -> Any:
            return handlers.substitute(model, data=param_map)(*args, **kwargs)

        def own_guide(*args: Any) -> Any:
            return guide(*args, **kwargs)

        structure = inspect(rng_key, policy, *args)
        # No transforms, because SVI gives constrained parameters.
        programs = Programs(policy, own_guide, structure, args, {})
        ready = self.prepare(rng_key, programs, param_map)
        # β is 1 here, because `tilt` has divided the rewards by it.
        value, _ = ready.evaluate(rng_key, param_map, programs, 1.0)
        return {"loss": value * structure.num_contexts, "mutable_state": None}


def without_enumeration[O: Any](objective: O) -> O:
    """Return an objective that enumerates no site, for draws of a source.

    Raises:
        ObjectiveError: the user asked it to enumerate sites.
    """
    if objective.enumerated not in ("auto", ()):
        raise ObjectiveError(
            f"{type(objective).__name__}(enumerated={objective.enumerated!r}) runs all values of these sites, and a "
            "source draws them; leave enumerated= or source= out"
        )
    changed: O = replace(objective, enumerated=())
    return changed


def draws_of_its_own(objective: str, why: str) -> ObjectiveError:
    """Make the error of an objective that cannot learn from draws of a source."""
    return ObjectiveError(f"{objective} {why}, so it makes its own draws; leave source= out")


def guide_params(params: Params) -> Params:
    """Leave out the parameters that belong to the objective."""
    return {name: value for name, value in params.items() if not name.startswith(OWN)}


def info_from_draws(
    draws: Draws, programs: Programs, beta: Any, shape: tuple[int, ...], weight: Array | None = None
) -> Info:
    """Summarise draws of the guide, [*shape] = [*draws, *contexts].

    If sites are enumerated, `weight` is q of each branch, [particles, branches, *contexts].
    """
    totals = jax.lax.stop_gradient(draws.totals(shape))
    w = totals.log_weight(beta)
    num = len(shape) - len(programs.structure.context_shape)
    axes, size = tuple(range(num)), math.prod(shape[:num])

    # A branch of probability 0 may have an infinite value, and 0 · inf would be nan.
    def mean(values: Array) -> Array:
        return values.mean() if weight is None else (weight * jnp.where(weight > 0, values, 0.0)).sum(1).mean()

    if weight is None:
        spread = ((w - w.mean(axes, keepdims=True)) ** 2).mean() * size / max(size - 1, 1)
    else:
        centre = (weight * jnp.where(weight > 0, w, 0.0)).sum(1, keepdims=True).mean(0, keepdims=True)
        spread = mean((w - centre) ** 2)
    metrics = {name: jnp.asarray(value, float) for name, value in draws.metrics.items()}
    return Info(
        objective=beta * mean(w),
        reward=mean(totals.reward),
        kl=mean(divergence(totals, conditioned=is_conditioned(programs.structure))),
        spread=spread,
        metrics={n: x.mean() if weight is None else _branch_mean(x, weight) for n, x in metrics.items()},
        nonfinite=count_nonfinite(draws),
    )


def info_from_reused_draws(info: Info, draws: Draws, programs: Programs, beta: Any) -> Info:
    """Report J, E[R] and KL of the policy that made the draws, not of the policy after later updates."""
    shapes = {score.shape[:-1] for score in draws.log_q.values()}
    if set(draws.log_q) != set(programs.structure.actions) or len(shapes) != 1:
        return info
    (shape,) = shapes
    if len(shape) != 1 + len(programs.structure.context_shape):
        return info
    own = info_from_draws(draws, programs, beta, shape)
    return info._replace(objective=own.objective, reward=own.reward, kl=own.kl, spread=own.spread)


def count_nonfinite(draws: Draws, *, never: bool = False) -> dict[str, Array]:
    """Count draws with a non-finite reward, by reward site; `never` lets −inf pass."""

    def bad(value: Any) -> Array:
        return (jnp.isnan(value) | (value == jnp.inf)) if never else ~jnp.isfinite(value)

    return {
        name: bad(value).reshape(value.shape[0], -1).any(-1).sum().astype(jnp.int32)
        for name, value in draws.rewards.items()
    }


def _branch_mean(values: Array, weight: Array) -> Array:
    """Average a metric over particles, branches (by weight) and all other axes."""
    contexts = math.prod(weight.shape[2:])
    extra = values.ndim - weight.ndim
    if values.shape[2 : 2 + weight.ndim - 2] == weight.shape[2:] and extra >= 0:
        aligned = weight.reshape(weight.shape + (1,) * extra)
        return (aligned * values).sum(1).mean()
    # A metric outside the context plates has one value for all contexts, so average their weights.
    flat = weight.reshape(*weight.shape[:2], contexts).mean(-1)
    return (flat.reshape(flat.shape + (1,) * (values.ndim - 2)) * values).sum(1).mean()
