"""A recurrent network of log F, the log-evidence of what follows the first steps of a scan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bayesrl.compilation.random_keys import dummy_key, split_keys
from bayesrl.core.draws import Draws
from bayesrl.core.structure import Site, Structure
from bayesrl.errors import ObjectiveError
from bayesrl.guides.networks import Summary
from bayesrl.objectives.base import OWN
from bayesrl.typing import Params, PRNGKey

_WIDTH = 32
_MOST_VALUES = 64
"""Sites with at most this many values enter one-hot, all others as numbers."""

_STEP = 0.1
"""Parameters are stored at 1 / _STEP of their size, so that the rate of tables suits them, as in `AutoTilt`."""


@dataclass(frozen=True)
class FlowNetwork:
    """A network from the actions of steps before t to log F_t − log Z, for t = 1, …, T − 1.

    Attributes:
        scan: number of the scan.
        length: its steps, T.
        num_features: of one step.
        contexts: sizes of the context plates. All elements share the recurrent part, and each has a last layer of its
            own, since the same steps may be worth something else in it.
    """

    scan: int
    length: int
    num_features: int
    contexts: tuple[int, ...]

    @classmethod
    def of(cls, structure: Structure) -> "FlowNetwork":
        """Make the network of a program.

        Raises:
            ObjectiveError: the actions are not in exactly one scan, or plates are subsampled.
        """
        scans = sorted({site.scan for site in structure.sites if site.kind == "action" and site.scan is not None})
        if len(scans) != 1:
            found = f"its actions are in {len(scans)}" if scans else f"{list(structure.actions)} are drawn in none"
            raise ObjectiveError(
                f"form='subtrajectory' needs the steps of one scan, and {found}; use TrajectoryBalance(), which takes "
                "whole draws"
            )
        if structure.subsampled:
            raise ObjectiveError(
                f"form='subtrajectory' has no network for mini-batches (plate {structure.subsampled[0]!r}); use "
                "TrajectoryBalance(), or all data"
            )
        members = _members(structure, scans[0])
        return cls(
            scans[0],
            max(site.length for site in structure.sites if site.scan == scans[0]),
            sum(_num_features(site, structure) for site in members),
            structure.context_shape,
        )

    def init_params(self, key: PRNGKey) -> Params:
        """Return parameters at which log F is log Z everywhere."""
        cell = Summary(split_keys(key)[0], num_features=self.num_features, width=_WIDTH)
        leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(cell, eqx.is_inexact_array))[0]
        return {f"{OWN}flow{jax.tree_util.keystr(path)}": leaf / _STEP for path, leaf in leaves} | {
            f"{OWN}flow.out": jnp.zeros((*self.contexts, self.length - 1, _WIDTH)),
            f"{OWN}flow.bias": jnp.zeros((*self.contexts, self.length - 1)),
        }

    def log_flows(self, params: Params, draws: Draws, structure: Structure) -> Array:
        """Return log F_t − log Z, [draws, *contexts, T − 1]."""
        # A cell with any weights, for its structure alone.
        like, rest = eqx.partition(
            Summary(dummy_key(), num_features=self.num_features, width=_WIDTH), eqx.is_inexact_array
        )
        paths, treedef = jax.tree_util.tree_flatten_with_path(like)
        held = [_STEP * params[f"{OWN}flow{jax.tree_util.keystr(path)}"] for path, _ in paths]
        cell = eqx.combine(jax.tree.unflatten(treedef, held), rest)
        # After the last step log F is known, so nothing reads that state.
        features = self._features(draws, structure)[..., :-1, :]
        flat = features.reshape((-1, *features.shape[-2:]))

        def one(steps: Array) -> Array:
            def advance(state: Array, step: Array) -> tuple[Array, Array]:
                new = cell(step, state)
                return new, new

            return lax.scan(advance, jnp.zeros(_WIDTH), steps)[1]

        states = jax.vmap(one)(flat).reshape((*features.shape[:-1], _WIDTH))
        out = (states * params[f"{OWN}flow.out"]).sum(-1)
        return out + params[f"{OWN}flow.bias"]

    def _features(self, draws: Draws, structure: Structure) -> Array:
        """Describe the actions of each step, [draws, *contexts, T, features]; those before the scan, at every step."""
        parts = [_describe(draws.sites[site.name], site, structure) for site in _members(structure, self.scan)]
        wide = [jnp.broadcast_to(part, (*part.shape[:-2], self.length, part.shape[-1])) for part in parts]
        return jnp.concatenate(wide, -1)


def _members(structure: Structure, scan: int) -> list[Site]:
    """Return the actions of the scan, and those before it."""
    names = [site.name for site in structure.sites]
    last = max(names.index(site.name) for site in structure.sites if site.scan == scan)
    return [site for site in structure.sites[: last + 1] if site.kind == "action"]


def _num_features(site: Site, structure: Structure) -> int:
    each = int(np.prod(site.shape)) // (site.length if site.scan is not None else 1)
    return each // int(np.prod(structure.context_shape, dtype=int)) * _codes(site)


def _codes(site: Site) -> int:
    """Count the numbers that describe one number of a site."""
    return len(site.support) if _is_listed(site) and site.support is not None else 1


def _is_listed(site: Site) -> bool:
    return site.support is not None and site.event_dim == 0 and len(site.support) <= _MOST_VALUES


def _describe(value: Array, site: Site, structure: Structure) -> Array:
    """Turn the values of a site, [draws, (T,) *plates, *event], into features, [draws, *contexts, T or 1, features]."""
    value = jnp.asarray(value)
    frames = sorted(structure.contexts, key=lambda frame: frame.dim)
    axes = [value.ndim - site.event_dim + frame.dim for frame in frames]
    value = jnp.moveaxis(value, axes, range(1, 1 + len(axes)))
    lead = 1 + len(axes)
    if site.scan is None:
        value = jnp.expand_dims(value, lead)
    value = value.reshape((*value.shape[: lead + 1], -1))
    if _is_listed(site):
        codes = (value[..., None] == jnp.asarray(site.support)).astype(float)
        return codes.reshape((*value.shape[:-1], -1))
    number = value.astype(float)
    return jnp.sign(number) * jnp.log1p(jnp.abs(number))


def per_step(parts: Mapping[str, Array], structure: Structure, scan: int) -> Array:
    """Sum per-site terms [..., T] by step of a scan; what stands before it joins the first step, what follows the last.

    Returns:
        Array [..., T].
    """
    inside = [site.name for site in structure.sites if site.scan == scan]
    order = [site.name for site in structure.sites]
    start = order.index(inside[0])
    result: Any = sum(parts[name] for name in inside if name in parts)
    for name, part in parts.items():
        if name not in inside:
            place = 0 if order.index(name) < start else -1
            result = result.at[..., place].add(part.sum(-1))
    return result


def pairwise_weights(length: int, decay: float) -> np.ndarray:
    """Weigh the stretch from m to n by λⁿ⁻ᵐ, normalised to sum 1, [T + 1, T + 1]; 0 for n ≤ m."""
    steps = np.arange(length + 1)
    apart = steps[None, :] - steps[:, None]
    logs = np.where(apart > 0, apart * np.log(decay), -np.inf)
    # Only the ratios count, and powers of a large λ would overflow.
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()
