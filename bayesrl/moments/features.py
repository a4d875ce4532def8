"""Features of a policy's draws, and the two programs that collect them as rewards: measured, and tilted."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array

from bayesrl.arguments import user_code
from bayesrl.core.handlers import IntoScans, reward_as_metric, scan_length, watch_body
from bayesrl.core.primitives import MARK, reward
from bayesrl.core.structure import Structure, structure_of
from bayesrl.core.trace import Frame, Trace, per_context, trace_program
from bayesrl.errors import EngineError, PolicyError
from bayesrl.exact.grid import metric_by_context
from bayesrl.typing import Program

type Feature = str | Callable[[dict[str, Array]], Any]
"""The name of a site, or a function of {site: value} of one draw."""

SITE = "moment_constraints"
"""Name of the reward site of a tilted program."""


class RewardsAsMetrics(IntoScans):
    """Turn the reward sites of a program into deterministic sites that only handlers inside this one see."""

    def __init__(self, fn: Program) -> None:
        super().__init__(fn)
        self.names: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Turn a reward into a value; hide it from outer handlers, except that a scan still has to stack it."""
        super().process_message(msg)
        if msg.get("name") in self.names:
            msg["stop"] = True

    def process_site(self, msg: dict[str, Any]) -> None:
        """Turn a reward into a value."""
        if msg["type"] == "sample" and msg["infer"].get(MARK) == "reward":
            reward_as_metric(msg)
            self.names.add(msg["name"])


class _InPlace(IntoScans):
    """Turn rewards into deterministic sites, and reward features where they arise, inside scans too."""

    def __init__(self, multipliers: Mapping[str, np.ndarray], dims: tuple[int, ...]) -> None:
        super().__init__(None)
        self.multipliers, self.dims = multipliers, dims

    def enter_scan(self, msg: dict[str, Any]) -> None:
        """Handle the sites of a scan's body, whose deterministic sites are averaged over its steps."""
        watch_body(msg, partial(self._handle, length=scan_length(msg)))

    def process_site(self, msg: dict[str, Any]) -> None:
        """Handle a site outside of scans."""
        self._handle(msg, length=1)

    def _handle(self, msg: dict[str, Any], length: int) -> None:
        name = str(msg.get("name"))
        if msg["type"] == "sample" and msg["infer"].get(MARK) == "reward" and not name.startswith(SITE):
            reward_as_metric(msg)
            length = 1  # rewards are summed over time, where other deterministic sites are averaged
        if msg["type"] == "deterministic" and name in self.multipliers:
            value, multiplier = jnp.asarray(msg["value"], float), self.multipliers[name]
            if multiplier.shape:
                shape = [1] * max(-dim for dim in self.dims)
                for dim, size in zip(self.dims, multiplier.shape, strict=True):
                    shape[dim] = size
                _check_contexts(multiplier.shape, tuple(value.shape[dim] for dim in self.dims))
                multiplier = multiplier.reshape(shape)
            reward(f"{SITE} {name}", jnp.asarray(multiplier / length, value.dtype) * value)


def _check_contexts(found: tuple[int, ...], now: tuple[int, ...]) -> None:
    if found != now:
        raise PolicyError(
            f"the multipliers were found for contexts of shape {found}, and the program has {now} now; "
            "call bayesrl.constrain with these arguments"
        )


class Measurement:
    """One run of a policy without its rewards, and the features of what it drew.

    Attributes:
        result: what the policy returned.
        contexts: its plates of contexts.
        rewards: total of each reward site, [*contexts], or of all contexts where the site is outside their plates.
        values: values of the features, each [*contexts] or one number for all contexts.
    """

    def __init__(self, policy: Program, features: Mapping[str, Feature], args: tuple[Any, ...]) -> None:
        returned: list[Any] = []
        handler = RewardsAsMetrics(policy)

        # A trace does not keep what a program returns.
        def run(*args: Any) -> None:
            returned.append(policy(*args))

        with handler:
            trace = trace_program(run, *args)
        if any(name.startswith(SITE) for name in handler.names):
            raise EngineError(
                f"the policy is constrained already (site {SITE!r}), and that reward would no longer count; "
                "give all targets in one call, for the policy before"
            )
        structure = structure_of(trace)
        self.result, self.contexts = returned[0], structure.contexts
        self.rewards = {name: _total(name, trace, structure) for name in trace.sites if name in handler.names}
        known = {name: site.value for name, site in trace.sites.items()}
        self.values = {}
        for label, feature in features.items():
            if isinstance(feature, str):
                value = self.rewards[feature] if feature in self.rewards else _site_feature(feature, trace, structure)
            else:
                value = _computed(label, feature, known, structure)
            self.values[label] = value


def _total(name: str, trace: Trace, structure: Structure) -> Array:
    site = trace.sites[name]
    inside = set(structure.contexts) <= set(site.frames)
    total: Array = per_context(jnp.asarray(site.value, float), site, structure.contexts if inside else ()).sum(-1)
    return total


def _site_feature(name: str, trace: Trace, structure: Structure) -> Array:
    if name not in trace.sites:
        raise EngineError(
            f"the policy has no site {name!r} whose mean could be constrained; its sites are {sorted(trace.sites)}; "
            "name one of them, or pass a function of a dictionary of their values"
        )
    site = structure[name]
    value = jnp.asarray(trace.sites[name].value, float)
    if site.kind == "metric":
        by_context = metric_by_context(value, site, structure)
        return value.mean() if by_context is None else jnp.asarray(by_context)
    shape = structure.context_shape if set(structure.contexts) <= set(site.frames) else ()
    if site.kind == "observed":
        raise EngineError(f"feature {name!r} is an observed site, whose value is given; name a site that is drawn")
    if site.event_dim or value.size != int(np.prod(shape, dtype=int)):
        raise EngineError(
            f"site {name!r} has values of shape {value.shape}, and a feature is one number per draw"
            f"{f' and context (shape {shape})' if shape else ''}; pass a function of it, such as "
            f"lambda sites: sites[{name!r}].sum()"
        )
    return value.reshape(shape)


def _computed(
    label: str, feature: Callable[[dict[str, Array]], Any], values: dict[str, Any], structure: Structure
) -> Array:
    remedy = "it gets a dictionary of the values of one draw, and returns a number (per context), computed by jax.numpy"
    with user_code(f"feature {label!r}", EngineError, remedy):
        value = jnp.asarray(feature(dict(values)))
        real = jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool
        if not real or jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise EngineError(f"feature {label!r} returned {value.dtype}; {remedy}")
    if value.shape not in ((), structure.context_shape):
        wanted = f"(), or {structure.context_shape} for one per context" if structure.contexts else "()"
        raise EngineError(
            f"feature {label!r} returned an array of shape {value.shape}, and one number per draw is wanted: "
            f"shape {wanted}; take a sum or a mean"
        )
    return value.astype(float)


def _placed(name: str, value: Array, contexts: tuple[Frame, ...], put: Callable[[str, Array], Any]) -> None:
    """Write a site inside the context plates, or outside if it has one value for all contexts."""
    frames = contexts if value.shape else ()
    full = [1] * max((-frame.dim for frame in frames), default=0)
    for frame in frames:
        full[frame.dim] = frame.size
    with ExitStack() as stack:
        for frame in frames:
            stack.enter_context(numpyro.plate(frame.name, frame.size, dim=frame.dim))
        put(name, value.reshape(full))


@dataclass(frozen=True, eq=False)
class MeasuredPolicy:
    """A policy whose rewards are the features, each a reward site of its own."""

    policy: Program
    features: Mapping[str, Feature]

    def __call__(self, *args: Any) -> Any:
        """Run the policy, and collect its features."""
        found = Measurement(self.policy, self.features, args)
        for label, value in found.values.items():
            _placed(measured_site(label), value, found.contexts, reward)
        return found.result


def measured_site(label: str) -> str:
    """Return the name of the reward site of a feature."""
    return f"feature {label}"


# eq=False, as arrays have no hash, and compiled programs are looked up by their policy.
@dataclass(frozen=True, eq=False)
class TiltedPolicy:
    """A policy with the reward Σ λᵢ·fᵢ; its own rewards are deterministic sites.

    Attributes:
        policy: the prior.
        features: the features.
        multipliers: λ, [features, *contexts] or [features].
    """

    policy: Program
    features: Mapping[str, Feature]
    multipliers: np.ndarray

    def __call__(self, *args: Any) -> Any:
        """Run the policy, and reward its features."""
        found = Measurement(self.policy, self.features, args)
        for name, value in found.rewards.items():
            _placed(name, value, found.contexts, numpyro.deterministic)
        for label, value in found.values.items():
            if not isinstance(self.features[label], str):
                _placed(label, value, found.contexts, numpyro.deterministic)
        values, shape = list(found.values.values()), self.multipliers.shape[1:]
        if shape:
            _check_contexts(shape, values[0].shape)
        terms = [jnp.asarray(m, v.dtype) * v for m, v in zip(self.multipliers, values, strict=True)]
        _placed(SITE, sum(terms[1:], start=terms[0]), found.contexts, reward)
        return found.result


@dataclass(frozen=True, eq=False)
class SteppedPolicy:
    """A policy whose features are sites, each rewarded by λ·f where it arises: step by step inside a scan.

    So a tilt along time is solved state by state, and earlier steps learn from later ones. The policy's own rewards are
    deterministic sites.

    Attributes:
        policy: the prior.
        multipliers: λ by site, [*contexts] or ().
        dims: the axes of the plates of contexts.
    """

    policy: Program
    multipliers: Mapping[str, np.ndarray]
    dims: tuple[int, ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Run the policy, and reward its features."""
        with _InPlace(self.multipliers, self.dims):
            return self.policy(*args)


def arise_in_steps(features: Mapping[str, Feature], rewards: set[str], structure: Structure) -> bool:
    """Whether all features are sites with one value for each context (and step), and some of them stand in a scan.

    Args:
        features: the features.
        rewards: which of them are rewards, whose elements inside a context are summed.
        structure: of the policy with its rewards as deterministic sites.
    """
    contexts = structure.contexts

    def fits(feature: Feature) -> bool:
        site = next((site for site in structure.sites if site.name == feature), None)
        if site is None or site.kind != "metric" or not set(contexts) <= set(site.frames):
            return False
        steps = site.shape[0] if site.scan is not None else 1
        return feature in rewards or math.prod(site.shape) == steps * math.prod(structure.context_shape)

    return all(map(fits, features.values())) and any(structure[str(f)].scan is not None for f in features.values())
