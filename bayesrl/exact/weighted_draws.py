"""The result of engines without training: assignments or draws with their weights under p*."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayesrl.arguments import CountOrZero, checked
from bayesrl.compilation.jit import to_host
from bayesrl.compilation.random_keys import key_data
from bayesrl.core.programs import Programs
from bayesrl.core.structure import Structure
from bayesrl.errors import EngineError
from bayesrl.exact.backward_induction import inverse_cdf
from bayesrl.exact.grid import BatchEvaluator, run_with_sites
from bayesrl.statistics.estimates import Estimate, Estimates, mean_of_draws
from bayesrl.statistics.evaluations import Evaluations
from bayesrl.statistics.regularizer_names import regularizer_symbol
from bayesrl.typing import Numbers, PRNGKey

type Sampler = Callable[[np.random.Generator, int, int], dict[str, Numbers]]
"""Draws from p*: (source of randomness, index of the flat β, number of draws) → sites."""

_SAME = 1e-6
_METRIC_DRAWS = 1024


class QuasiRejection(NamedTuple):
    """How far draws accepted below the true bound are from p*; q is what they follow, [*beta, *contexts].

    Attributes:
        acceptance: probability that a proposal is accepted.
        total_variation: TV(p*, q) = ½ Σ |p* − q|.
        kl_forward: KL(p*‖q), nats.
        kl_reverse: KL(q‖p*), nats; β times it is the gap J* − J(q).
    """

    acceptance: Estimate
    total_variation: Estimate
    kl_forward: Estimate
    kl_reverse: Estimate


@checked(EngineError)
@dataclass(frozen=True)
class WeightedDraws:
    """Assignments or draws of a policy with their weights under the tilted posterior, per context.

    p*(x) ∝ π₀(x)·exp(R(x)/β). With observed data y, π₀ means p(x|y). Evidence and weights are NumPy
    arrays in double precision, because a gap is a small difference of large numbers.

    Attributes:
        sites: values of the latent sites, [N, ...]; empty if an engine solves a `scan` state by
            state and never stores whole paths (`resample` still draws them).
        log_weights: [*beta, N, *contexts], nats, normalised over N for each context: log p* of each
            assignment from enumeration, self-normalised weights from importance sampling. With
            environment sites enumeration returns the log of optimal policy × nature.
        log_evidence: log Z, [*beta, *contexts], nats; with observed data and rewards
            log Z − log p(y), without rewards log p(y). None if environment sites are enumerated:
            β·log Z would then not be the optimum.
        log_marginal: log p(y), [*contexts], nats; None without observed sites.
        optimum: J*, [*beta, *contexts], reward units: β·`log_evidence`, or the optimum of control
            with environment sites; log p(y), nats, without rewards. None if the engine cannot
            know it.
        ess: effective number of draws, [*beta, *contexts]; None if exact.
        estimates: expectations under p*, averaged over contexts, [*beta].
        beta: temperatures, [*beta], reward units per nat; None without rewards.
        structure: structure of the policy.
        axes: the axes of each site's value that are contexts.
        num_proposed: number of proposals behind `log_evidence` and `num_accepted`, fixed before
            they were made; 0 for engines without rejection.
        num_accepted: number of accepted proposals, [*beta, *contexts]: binomial, with probability
            exp(log Z − bound/β).
        reward_bound: upper bound on the total reward, [*contexts], reward units.
        explanation: what ended a run of adaptive length.
        regularizer: what keeps q near the prior: "kl", or another name of `enumerate_posterior`. p* is then the
            optimum of E[R] − β·D_f(q‖π₀): weights, `optimum` and estimates are its own, and there is no log Z.
        alpha: order of regularizer="alpha".
        multiplier: λ, [*beta, *contexts], reward units, of the optimum q = π₀·(f′)⁻¹((R − λ)/β) with another
            regulariser; None for KL.
        quasi: how far the draws are from p*, if they were accepted below the true bound; `estimates` and
            weights are then those of the draws' own law.
        evaluations: how often the program was evaluated for `log_weights` and `log_evidence`; of one step of a `scan`,
            where it is solved state by state.

    Example:
        >>> import jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, bayesrl
        >>> def bandit():
        ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        ...     bayesrl.reward("payoff", jnp.array([0.0, 1.0, 2.0])[arm])
        >>> exact = bayesrl.enumerate_posterior(bandit, beta=1.0)
        >>> np.exp(exact.log_weights).round(3).tolist()  # (1, e, e²) / (1 + e + e²)
        [0.09, 0.245, 0.665]
        >>> float(exact.optimum.round(3)), float(exact.log_evidence.mean.round(3))
        (1.309, 1.309)
    """

    sites: dict[str, Numbers]
    log_weights: Float[np.ndarray, "..."]
    log_evidence: Estimate | None
    log_marginal: Estimate | None
    optimum: Float[np.ndarray, "..."] | None
    ess: Float[np.ndarray, "..."] | None
    estimates: Estimates
    beta: Float[np.ndarray, "*beta"] | None
    structure: Structure
    axes: dict[str, tuple[int | None, ...]] = field(repr=False)
    sampler: Sampler | None = field(default=None, repr=False)
    num_proposed: int = 0
    num_accepted: np.ndarray | None = None
    reward_bound: np.ndarray | None = None
    explanation: str = ""
    regularizer: str = "kl"
    alpha: float | None = None
    multiplier: Float[np.ndarray, "..."] | None = None
    quasi: QuasiRejection | None = None
    evaluations: Evaluations = field(default_factory=Evaluations)

    def __repr__(self) -> str:
        """Describe the result in one line; numbers are means over contexts, [*beta]."""
        lead, contexts = np.ndim(self.beta) if self.beta is not None else 0, math.prod(self.structure.context_shape)

        def written(values: Any) -> str:
            array = np.asarray(values, float)
            return np.array2string(array.reshape(*array.shape[:lead], -1).mean(-1), precision=4, threshold=8)

        num = self.log_weights.shape[lead]
        parts = [
            f"{num:,} draws" if num else "solved state by state",
            *([f"{contexts} contexts"] if contexts > 1 else []),
        ]
        if self.regularizer != "kl":
            parts.append(f"{regularizer_symbol(self.regularizer, self.alpha)} in the place of KL")
        other = self.estimates.divergence
        named = {
            "beta": self.beta,
            "log Z": None if self.log_evidence is None else self.log_evidence.mean,
            "J*": self.optimum,
            "E[R]": self.estimates.reward.mean if self.structure.names("reward") else None,
            # KL comes after it, as it is the symbol of KL too.
            regularizer_symbol(self.regularizer, self.alpha): None if other is None else other.mean,
            "KL": self.estimates.kl.mean,
            "ESS": self.ess,
            "TV to p*": None if self.quasi is None else self.quasi.total_variation.mean,
        }
        if self.regularizer != "kl":
            parts.append(f"regularizer {self.regularizer}")
        parts += [f"{name} {written(value)}" for name, value in named.items() if value is not None]
        return f"WeightedDraws({', '.join(parts)})"

    def resample(self, key: PRNGKey, num_samples: CountOrZero) -> dict[str, Numbers]:
        """Draw from p*, independently in each context.

        Args:
            key: consumed whole.
            num_samples: number of draws.

        Returns:
            {site: [*beta, num_samples, ...]}.

        Raises:
            EngineError: contexts share a draw of nature whose weights differ between them.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, bayesrl
            >>> def bandit():
            ...     arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(2)))
            ...     bayesrl.reward("payoff", 50.0 * arm)
            >>> draws = bayesrl.enumerate_posterior(bandit, beta=1.0).resample(jax.random.key(0), 4)
            >>> draws["arm"].tolist()
            [1, 1, 1, 1]
        """
        rng = numpy_generator(key)
        shape = () if self.beta is None else self.beta.shape
        self.structure.check_memory(num_samples * math.prod(shape), EngineError)
        draws = [self._draw(rng, i, num_samples) for i in range(math.prod(shape))]
        return {
            name: jax.device_put(np.stack([d[name] for d in draws]).reshape(*shape, *draws[0][name].shape))
            for name in draws[0]
        }

    def select(self, beta: float | None) -> "WeightedDraws | None":
        """Select one of several temperatures; None if it is not among them."""
        if self.beta is None or np.ndim(self.beta) == 0:
            return self
        same = np.flatnonzero(np.isclose(self.beta, np.nan if beta is None else beta, rtol=1e-4))
        if not same.size:
            return None
        index, draw = int(same[0]), self.sampler
        names = (
            "beta",
            "log_weights",
            "log_evidence",
            "estimates",
            "optimum",
            "ess",
            "num_accepted",
            "multiplier",
            "quasi",
        )
        own = {name: jax.tree.map(lambda x: np.asarray(x[index]), getattr(self, name)) for name in names}
        # The selection has one lane, but its sampler must draw from the lane that it came from.
        if draw is not None:
            own["sampler"] = lambda rng, _, num_samples: draw(rng, index, num_samples)
        return replace(self, **own)

    def _draw(self, rng: np.random.Generator, lane: int, num_samples: int) -> dict[str, Any]:
        if self.sampler is not None:
            return self.sampler(rng, lane, num_samples)
        contexts = math.prod(self.structure.context_shape)
        num = next(iter(self.sites.values())).shape[0]
        log_weights = self.log_weights.reshape(-1, num, contexts)[lane]
        shared = shared_sites(self.structure)
        if shared:
            index = _with_shared(self.sites, shared, log_weights, rng, num_samples)
        else:
            index = np.stack([inverse_cdf(log_weights[:, c], rng.random(num_samples)) for c in range(contexts)], 1)
        shape = self.structure.context_shape
        return {name: gather_by_context(value, index, self.axes[name], shape) for name, value in self.sites.items()}


def refuse_other_regularizer(
    target: WeightedDraws | None, what: str, regularizer: str = "kl", alpha: float | None = None
) -> None:
    """Refuse an optimum with another regulariser than that of the fit that it is to be the target of.

    Raises:
        EngineError: naming both.
    """
    if target is not None and (target.regularizer, target.alpha) != (regularizer, alpha):
        told = [
            f"{name!r}" + (f", alpha={order:g}" if order is not None else "")
            for name, order in ((target.regularizer, target.alpha), (regularizer, alpha))
        ]
        raise EngineError(
            f"the target is the optimum with regularizer={told[0]}, and {what} that with regularizer={told[1]}; "
            f"use bayesrl.enumerate_posterior(..., regularizer={told[1]})"
        )


def numpy_generator(key: PRNGKey) -> np.random.Generator:
    """Make a NumPy generator from a JAX key: double-precision uniforms without 64-bit mode."""
    return np.random.default_rng(np.asarray(key_data(key)).tolist())


def shared_sites(structure: Structure) -> list[str]:
    """Return the names of nature's draws outside some context plate, which contexts therefore share."""
    if math.prod(structure.context_shape) == 1:
        return []
    own = {frame.name for frame in structure.contexts}
    return [s.name for s in structure.sites if s.latent and not own <= {frame.name for frame in s.frames}]


def _with_shared(
    sites: dict[str, Numbers], shared: list[str], log_weights: np.ndarray, rng: np.random.Generator, num_samples: int
) -> np.ndarray:
    """Draw shared sites once, then the rest in each context given those, [draws, contexts]."""
    num, contexts = log_weights.shape
    columns = np.concatenate([np.asarray(sites[name]).reshape(num, -1) for name in shared], 1)
    _, group = np.unique(columns, axis=0, return_inverse=True)
    # NumPy 2.0 gives the inverse one more axis here than other versions do.
    group = group.reshape(-1)
    mass = np.zeros((group.max() + 1, contexts))
    np.add.at(mass, group, np.exp(log_weights))
    if np.abs(mass - mass[:, :1]).max() > _SAME:
        raise EngineError(
            f"contexts share site {shared[0]!r}, and their weights disagree on it, so there is no joint draw; "
            "put the site inside the context plate"
        )
    with np.errstate(divide="ignore"):
        drawn = inverse_cdf(np.log(mass[:, 0]), rng.random(num_samples))
    index = np.zeros((num_samples, contexts), int)
    for g in np.unique(drawn):
        at, rows = np.flatnonzero(drawn == g), np.flatnonzero(group == g)
        for c in range(contexts):
            index[at, c] = rows[inverse_cdf(log_weights[rows, c], rng.random(len(at)))]
    return index


def gather_by_context(
    value: Numbers, index: np.ndarray, axes: tuple[int | None, ...], context_shape: tuple[int, ...]
) -> np.ndarray:
    """Let each element of the context plates select its own row of a site [N, ...]."""
    at = index.reshape(-1, *context_shape)
    # Along context plates that the site is outside of, every row is the same.
    at = at[(slice(None), *(0 if axis is None else slice(None) for axis in axes))]
    own = [1 + axis for axis in axes if axis is not None]
    sizes = (value.shape[i] if i in own else 1 for i in range(1, value.ndim))
    return np.take_along_axis(np.asarray(value), at.reshape(-1, *sizes), axis=0)


def context_axes(structure: Structure) -> dict[str, tuple[int | None, ...]]:
    """Return the axes of each site's value that are contexts; None for a plate that the site is outside of."""
    frames = sorted(structure.contexts, key=lambda frame: frame.dim)
    result = {}
    for name in structure.names("action", "environment"):
        site = structure[name]
        own = {frame.name for frame in site.frames}
        batch_dims = len(site.shape) - site.event_dim
        result[name] = tuple(batch_dims + frame.dim if frame.name in own else None for frame in frames)
    return result


def metrics_from_draws(
    key: PRNGKey, result: WeightedDraws, program: Programs, names: Sequence[str]
) -> dict[str, Estimate]:
    """Average metrics that mix contexts over draws from p*, with standard errors.

    They are nan if p* has no joint draws (see `WeightedDraws.resample`).
    """
    lead = () if result.beta is None else result.beta.shape
    try:
        draws = result.resample(key, _METRIC_DRAWS)
    except EngineError:
        unknown = np.full(lead, np.nan)
        return {name: Estimate(unknown, unknown) for name in names}
    flat = {name: value.reshape(-1, *value.shape[len(lead) + 1 :]) for name, value in to_host(draws).items()}
    values = evaluate_metrics(program, names, flat)
    return {name: mean_estimate(list(value.reshape(-1, _METRIC_DRAWS)), lead) for name, value in values.items()}


def evaluate_metrics(program: Programs, names: Sequence[str], sites: dict[str, Any]) -> dict[str, np.ndarray]:
    """Average deterministic sites over all their axes, for each draw, {name: [draws]}."""

    def metrics(args: tuple[Any, ...], values: dict[str, Numbers]) -> dict[str, Numbers]:
        found = run_with_sites(program.policy, values, args).sites
        return {name: jnp.asarray(found[name].value, float).mean() for name in names}

    evaluate: Callable[[Any], dict[str, np.ndarray]] = BatchEvaluator(metrics, program.args, program.structure)
    return evaluate(sites)


def mean_estimate(lanes: Sequence[np.ndarray], lead: tuple[int, ...]) -> Estimate:
    """Average the independent values of each β."""
    each = [mean_of_draws(np.asarray(values, float)) for values in lanes]
    return Estimate(*(np.array(part).reshape(lead) for part in zip(*each, strict=True)))
