"""What one run of a policy shows: its sites, its contexts and their order."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from bayesrl.arguments import check_memory
from bayesrl.compilation.jit import cached_analysis, closure_jit, has_tracers
from bayesrl.core.primitives import SiteKind, unwrapped
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.trace import Frame, Trace, TraceSite, abstract_trace, trace_abstractly_twice, trace_program
from bayesrl.core.unsupported import Refusals, check_arguments, explain_errors, refuse_stray
from bayesrl.errors import BayesRLError, EngineError, PolicyError
from bayesrl.typing import PRNGKey, Program

type FiniteSupport = Sequence[Any]
"""The values of a finite support, hashable: numbers, or vectors of one length."""


@dataclass(frozen=True)
class Site:
    """The unchanging facts of one site.

    Attributes:
        name: its name.
        kind: action, environment, observed, reward or metric.
        hidden: True for nature's draws that the agent does not see.
        frames: the plates around it.
        scan: the number of the scan around it, or None.
        length: steps of that scan, or of a distribution with its own time axis; 1 otherwise.
        shape: shape of one value, time included.
        discrete: True where the support is discrete.
        support: the values of a finite support, numbers or vectors, if it is the same everywhere; else None.
        event_dim: how many of the last axes of a latent value belong to one draw.
        recorded: True where the site records what happened outside the program.
        discounted: True where a handler scales its log-probability, other than for a mini-batch.
        held: how many numbers it takes to draw and score its value: the size of the value, unless the distribution
            declares more per event (`num_held`), as that of a language model does.
    """

    name: str
    kind: SiteKind
    hidden: bool
    frames: tuple[Frame, ...]
    scan: int | None
    length: int
    shape: tuple[int, ...]
    discrete: bool
    support: FiniteSupport | None
    event_dim: int = 0
    recorded: bool = False
    discounted: bool = False
    held: int = 0

    @property
    def latent(self) -> bool:
        """Whether the site is drawn: an action or nature."""
        return self.kind in ("action", "environment")


@dataclass(frozen=True)
class Structure:
    """The sites of a program in program order, and the plates whose elements are separate problems."""

    sites: tuple[Site, ...]
    contexts: tuple[Frame, ...]

    def __getitem__(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def names(self, *kinds: SiteKind) -> tuple[str, ...]:
        """Names of the sites of these kinds, in program order."""
        return tuple(site.name for site in self.sites if site.kind in kinds)

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the action sites."""
        return self.names("action")

    def check_memory(self, number: int, error: type[BayesRLError] = PolicyError) -> None:
        """Refuse more draws than fit into memory, before making any.

        Args:
            number: how many draws are in memory at a time.
            error: the class of error to raise.

        Raises:
            BayesRLError: of that class, if the draws do not fit.
        """
        scores = 4 * math.prod(self.context_shape)  # log π₀, log q, likelihood and reward of each context
        each = scores + sum(math.prod(site.shape) for site in self.sites if site.latent)
        # A number of single precision takes four bytes.
        check_memory(4.0 * each * number, f"{number:,} draws of {each:,} numbers each", "ask for fewer", error)

    def check_complete(self, purpose: str, error: type[BayesRLError] = PolicyError) -> None:
        """Refuse a program whose environment is outside it.

        Args:
            purpose: what cannot be done without the environment.
            error: the class of error to raise.

        Raises:
            BayesRLError: of that class, naming a site that is only recorded.
        """
        outside = [site.name for site in self.sites if site.recorded]
        if outside:
            raise error(
                f"site {outside[0]!r} is recorded from an environment that is not a program, so {purpose}; "
                "use bayesrl.fit(..., source=source), whose source plays in it, or write the environment as a program"
            )

    def check_drawn(self) -> None:
        """Refuse a program that draws nothing: it has one value and no distribution over values.

        Raises:
            EngineError: no site is latent.
        """
        if not self.names("action", "environment"):
            given = self.names("observed")
            why = f"site {given[0]!r} is observed" if given else "it has no site to draw"
            raise EngineError(
                f"the policy draws nothing ({why}), "
                "so there is nothing to choose; bayesrl.log_density(policy, {}, beta=...) tells its reward and density"
            )

    def check_whole_density(self) -> None:
        """Refuse a program with discounted actions: exp(log π₀ + R/β) is then not a density over draws.

        Raises:
            EngineError: naming the site.
        """
        scaled = [site.name for site in self.sites if site.discounted and site.latent]
        if scaled:
            raise EngineError(
                f"site {scaled[0]!r} is discounted (or stands under handlers.scale), and J is then an objective of "
                "control that is no β·log Z of draws; pass the optimum to evidence(optimum=...), or use discount 1"
            )

    @property
    def context_shape(self) -> tuple[int, ...]:
        """Sizes of the context axes in one run (mini-batch sizes where subsampled)."""
        return tuple(frame.size for frame in sorted(self.contexts, key=lambda frame: frame.dim))

    @property
    def num_contexts(self) -> int:
        """Number of separate problems in the full data, not only in the mini-batch."""
        return int(np.prod([frame.full_size for frame in self.contexts], dtype=int))

    @property
    def width(self) -> int:
        """Roughly how many numbers one draw takes: its values, the work arrays of scoring them, and its totals."""
        # Draws share observed values, but scoring these may take numbers of its own for each draw (`num_held`).
        drawn = sum(site.held for site in self.sites if site.latent or site.held > math.prod(site.shape))
        return drawn + 4 * math.prod(self.context_shape)

    @property
    def subsampled(self) -> tuple[str, ...]:
        """Names of the plates that a run subsamples."""
        frames = {frame.name: frame for site in self.sites for frame in site.frames}
        return tuple(name for name, frame in frames.items() if frame.size != frame.full_size)

    @property
    def drawn_before_action(self) -> tuple[str, ...]:
        """Names of plates and of nature's draws that come before the first action."""
        names = list(self.subsampled)
        for site in self.sites:
            if site.kind == "action" or site.scan is not None:
                break
            if site.kind == "environment":
                names.append(site.name)
        return tuple(names)

    def groups(self) -> list[list[Site]]:
        """Lists of sites that advance through time together: one list per scan, one per site outside scans."""
        result: list[list[Site]] = []
        for site in self.sites:
            if result and site.scan is not None and result[-1][0].scan == site.scan:
                result[-1].append(site)
            else:
                result.append([site])
        return result

    def in_order(self, values: Mapping[str, Array], names: Iterable[str]) -> Array:
        """Lay per-site arrays [..., T] out along one axis of events in program order.

        Events are the named sites; the sites of a scan interleave step by step, as they happen. A named site
        that `values` lacks counts as zero.

        Returns:
            Array [..., num_events].
        """
        wanted = frozenset(names)
        shape = next(iter(values.values())).shape[:-1] if values else ()
        parts = []
        for group in self.groups():
            members = [site for site in group if site.name in wanted]
            if members:
                blank = jnp.zeros((*shape, members[0].length))
                stacked = jnp.stack([values.get(site.name, blank) for site in members], axis=-1)
                parts.append(stacked.reshape((*stacked.shape[:-2], -1)))
        return jnp.concatenate(parts, axis=-1) if parts else jnp.zeros((*shape, 0))


def as_arrays(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turn NumPy arrays into JAX arrays, so that programs may index them with traced values."""
    result: tuple[Any, ...] = jax.tree.map(lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x, args)
    return result


def inspect(key: PRNGKey, policy: Program, *args: Any) -> Structure:
    """Run a policy once and return its structure.

    Raises:
        PolicyError: the program repeats a name, does not take these arguments, or does something unsupported.
    """

    def look() -> Structure:
        return _look(key, policy, args)

    return cached_analysis(look, policy, args)


def _look(key: PRNGKey, policy: Program, given: tuple[Any, ...]) -> Structure:
    args = as_arrays(given)
    check_arguments(policy, args, "the policy", PolicyError)
    with explain_errors("the policy", PolicyError):
        trace, strays = trace_abstractly_twice(lambda: trace_program(FoldedKeys(Refusals(policy), key), *args))
    # Inside a trace of the caller's own, its tracers are constants here too, and have not leaked.
    if strays and not has_tracers((key, args)):
        refuse_stray(strays[0])
    abstract_trace(key, policy, given, trace)  # caches the trace, so that the next caller need not run the program
    unknown = [name for name, site in trace.sites.items() if _ends_are_computed(site)]
    if not unknown:
        return structure_of(trace)

    # Some bounds of supports depend on values, which an abstract trace lacks: run the program for them.
    def ends() -> dict[str, tuple[Any, Any]]:
        sites = trace_program(FoldedKeys(policy, key), *args).sites
        return {name: jax.tree.map(jnp.asarray, _ends(sites[name].fn)) for name in unknown}

    found = closure_jit(ends, name="supports")()
    return structure_of(trace, {name: _range(*pair) for name, pair in found.items()})


def structure_of(trace: Trace, supports: Mapping[str, FiniteSupport | None] = MappingProxyType({})) -> Structure:
    """Derive the structure from one trace, and from the supports that the trace could not show."""
    sites = tuple(_site(site, supports.get(site.name)) for site in trace.sites.values())
    return Structure(sites, _contexts(sites))


def _site(site: TraceSite, known: FiniteSupport | None) -> Site:
    fn, shape, latent = site.fn, tuple(jnp.shape(site.value)), site.kind in ("action", "environment")
    discrete = latent and is_discrete(fn)
    return Site(
        site.name,
        site.kind,
        site.hidden,
        site.frames,
        site.scan,
        site.length,
        shape,
        discrete,
        support=(known or finite_support(fn)) if discrete else None,
        event_dim=int(fn.event_dim) if latent else 0,
        recorded=latent and bool(getattr(fn, "recorded", False)),
        # A mini-batch scales its sites as well; without one, the scale is a discount or another handler's.
        discounted=site.scale is not None and all(frame.size == frame.full_size for frame in site.frames),
        held=max(math.prod(shape), math.prod(fn.batch_shape) * int(fn.num_held) if hasattr(fn, "num_held") else 0),
    )


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is discrete, without computing the bounds of its support."""
    fn = unwrapped(fn)
    return not isinstance(fn, dist.TransformedDistribution) and bool(fn.support.is_discrete)


def finite_support(fn: Any) -> FiniteSupport | None:
    """Return the values of a finite support that is the same everywhere, or None.

    A distribution over vectors declares them in its attribute `finite_values`.
    """
    if getattr(fn, "finite_values", None) is not None:
        values: FiniteSupport = fn.finite_values
        return values
    if fn.event_shape or not is_discrete(fn):
        return None
    support = elementwise_support(fn.support)
    if support is constraints.boolean:
        return (0, 1)
    lower, upper = _ends(fn)
    return None if lower is None or upper is None or has_tracers((lower, upper)) else _range(lower, upper)


def elementwise_support(support: Any) -> Any:
    """Return the support of the elements of a distribution with this support, whatever its number of event axes."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _ends(fn: Any) -> tuple[Any, Any]:
    """Return the bounds of the support of a discrete distribution over numbers; None where a bound is missing."""
    support = elementwise_support(fn.support)
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


def _ends_are_computed(site: TraceSite) -> bool:
    """Whether both bounds of a support exist and one of them needs a real run of the program."""
    if site.kind not in ("action", "environment") or not is_discrete(site.fn) or site.fn.event_shape:
        return False
    if getattr(site.fn, "finite_values", None) is not None:
        return False
    ends = _ends(site.fn)
    return all(end is not None for end in ends) and has_tracers(ends)


def _range(lower: Any, upper: Any) -> FiniteSupport | None:
    """Return the integers from `lower` to `upper`, or None if the bounds vary between elements."""
    low, high = np.unique(np.asarray(lower)), np.unique(np.asarray(upper))
    if low.size != 1 or high.size != 1:
        return None
    return tuple(range(int(low[0]), int(high[0]) + 1))


def _contexts(sites: tuple[Site, ...]) -> tuple[Frame, ...]:
    """Return the plates around every action, reward and observed site: their elements are separate problems."""
    if not any(site.kind == "action" for site in sites):
        return ()
    shared = set.intersection(*(set(site.frames) for site in sites if site.kind in ("action", "reward", "observed")))
    return tuple(sorted(shared, key=lambda frame: frame.dim))


def check_policy(structure: Structure, *, has_beta: bool) -> None:
    """Refuse programs with nothing to fit, and a temperature that has nothing to temper.

    Raises:
        PolicyError: neither rewards nor observed sites; beta missing with rewards, or given without them.
    """
    rewards, observed = structure.names("reward"), structure.names("observed")
    if not rewards and not observed:
        raise PolicyError(
            "the policy has neither a reward nor an observed site, so there is nothing to fit; "
            "add bayesrl.reward(name, value) or numpyro.sample(..., obs=data)"
        )
    if rewards and not has_beta:
        raise PolicyError(f"the policy has rewards ({rewards[0]!r}), so it needs a temperature: pass beta=...")
    if not rewards and has_beta:
        raise PolicyError(
            "beta was given, but the policy has no reward site for it to temper; "
            "leave beta out, or add bayesrl.reward(name, value)"
        )
