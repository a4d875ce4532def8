"""Grids over finite supports: the assignments and the scores of each, in bounded memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from bayesrl.compilation.jit import ClosureJit, to_host, trace_cache
from bayesrl.compilation.random_keys import dummy_key
from bayesrl.core.primitives import SiteKind
from bayesrl.core.rng import FoldedKeys
from bayesrl.core.structure import FiniteSupport, Site, Structure
from bayesrl.core.trace import Frame, Trace, per_context, site_log_prob, trace_program
from bayesrl.errors import EngineError
from bayesrl.typing import Program

# Few batch sizes, so that few programs are compiled; a batch has at most _ELEMENTS array elements per site.
_BATCHES = (64, 2048, 65536)
_ELEMENTS = 2**22


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: what one site may draw at one time step, with its interacting elements jointly.

    Elements of context plates do not interact: they share the axis and all take the same value.

    Attributes:
        site: name of the site.
        kind: action or environment.
        hidden: True for draws of nature that the agent does not see.
        step: time step; 0 outside scans.
        scanned: whether the site is in a scan.
        support: values of one element.
        shape: shape of one step's value.
        contexts: axes of `shape` that are contexts, one per context plate; None if the site
            is outside that plate.
        event: shape of one value of the support: () for numbers, (n,) for vectors; not part of `shape`.
    """

    site: str
    kind: SiteKind
    hidden: bool
    step: int
    scanned: bool
    support: FiniteSupport
    shape: tuple[int, ...]
    contexts: tuple[int | None, ...]
    event: tuple[int, ...] = ()

    @property
    def cell(self) -> tuple[int, ...]:
        """Shape of one value of the axis: the shape of a step with contexts of size 1."""
        return tuple(1 if i in self.contexts else n for i, n in enumerate(self.shape))

    @property
    def num_elements(self) -> int:
        """Number of elements that are drawn jointly."""
        return math.prod(self.cell)

    @property
    def size(self) -> int:
        """Number of joint values."""
        return int(len(self.support) ** self.num_elements)

    def elements(self, digit: Any, xp: Any) -> Any:
        """Turn joint values numbered [...] into element values [..., num_elements, *event]."""
        base = len(self.support)
        powers = xp.asarray([base**e for e in reversed(range(self.num_elements))])
        table = xp.asarray(np.asarray(self.support, dtype=int))
        return table[(digit[..., None] // powers) % base]


def enumeration_axes(
    structure: Structure, sites: Sequence[Site], steps: Callable[[Site], Sequence[int]]
) -> tuple[Axis, ...]:
    """Arrange the latent sites among `sites` as axes in program order, with steps of a scan interleaved.

    Raises:
        EngineError: a site has no finite support.
    """
    chosen = {site.name for site in sites if site.latent}
    axes: list[Axis] = []
    for group in structure.groups():
        members = [site for site in group if site.name in chosen]
        if members:
            axes += [_axis(site, step, structure.contexts) for step in steps(members[0]) for site in members]
    return tuple(axes)


def path_axes(structure: Structure) -> tuple[Axis, ...]:
    """Arrange all latent sites of a program as axes, with the steps of its scans one after another.

    Raises:
        EngineError: a site has no finite support.
    """
    return enumeration_axes(structure, structure.sites, lambda site: range(site.length if site.scan is not None else 1))


def _axis(site: Site, step: int, contexts: tuple[Frame, ...]) -> Axis:
    if site.support is None:
        what = "no finite univariate support that is the same everywhere" if site.discrete else "continuous support"
        raise EngineError(
            f"site {site.name!r} has {what}, so its values cannot be enumerated; "
            "use bayesrl.importance(...) or bayesrl.fit(...)"
        )
    shape = site.shape[1:] if site.scan is not None else site.shape
    event = np.shape(site.support[0])
    shape = shape[: len(shape) - len(event)]
    own = {frame.name for frame in site.frames}
    # Plates count their axes from the right.
    where = tuple(len(shape) + f.dim if f.name in own else None for f in sorted(contexts, key=lambda f: f.dim))
    return Axis(site.name, site.kind, site.hidden, step, site.scan is not None, site.support, shape, where, event)


def num_assignments(axes: Sequence[Axis]) -> int:
    """Count the assignments of a grid."""
    return math.prod(axis.size for axis in axes)


def digits(axes: Sequence[Axis], index: Any) -> list[Any]:
    """Split assignments numbered [...] into one joint value per axis; the last axis runs fastest."""
    result, stride = [], 1
    for axis in reversed(axes):
        result.append((index // stride) % axis.size)
        stride *= axis.size
    return result[::-1]


def decode_assignment(axes: Sequence[Axis], index: Array) -> dict[str, Array]:
    """Return the site values of one assignment, the same in all contexts."""
    return _assemble(axes, digits(axes, index), jnp)


def assignments(axes: Sequence[Axis], index: np.ndarray) -> dict[str, Any]:
    """Return site values of assignments numbered [rows], the same in all contexts, on the host: [rows, *site shape]."""
    return _assemble(axes, digits(axes, index), np)


def first_assignment(axes: Sequence[Axis]) -> dict[str, Array]:
    """Return the first value of each site's support; unlike an index, this works for a grid of any size."""
    return _assemble(axes, [jnp.zeros((), int) for _ in axes], jnp)


def _assemble(axes: Sequence[Axis], joint: Sequence[Any], xp: Any) -> dict[str, Any]:
    """Return site values [*rows, *site shape] from the joint value of each axis, [*rows]."""
    parts: dict[str, list[tuple[Axis, Any]]] = {}
    for axis, digit in zip(axes, joint, strict=True):
        cell = axis.elements(digit, xp).reshape(*digit.shape, *axis.cell, *axis.event)
        value = xp.broadcast_to(cell, (*digit.shape, *axis.shape, *axis.event))
        parts.setdefault(axis.site, []).append((axis, value))
    return {name: _by_time(steps, xp, joint[0].ndim) for name, steps in parts.items()}


def scatter(axes: Sequence[Axis], joint: Sequence[np.ndarray], context_shape: tuple[int, ...]) -> dict[str, Any]:
    """Return site values [draws, *site shape]; each context has its own joint values of the axes, [draws, contexts]."""
    parts: dict[str, list[tuple[Axis, Any]]] = {}
    for axis, digit in zip(axes, joint, strict=True):
        values = axis.elements(digit, np).reshape(-1, *context_shape, *axis.cell, *axis.event)
        parts.setdefault(axis.site, []).append((axis, _into_plates(axis, values, len(context_shape))))
    return {name: jax.device_put(_by_time(steps, np, 1)) for name, steps in parts.items()}


def _into_plates(axis: Axis, values: np.ndarray, num_contexts: int) -> np.ndarray:
    """Move context axes [draws, *contexts, *cell, *event] to their places in the site's plates."""
    source = [0]
    for position in range(len(axis.shape)):
        at = axis.contexts.index(position) if position in axis.contexts else None
        source.append(1 + num_contexts + position if at is None else 1 + at)
    source += range(values.ndim - len(axis.event), values.ndim)
    unused = tuple(i for i in range(values.ndim) if i not in source)
    # Contexts outside the site's plates share its value: of their axes the first element is taken.
    return np.transpose(values, (*source, *unused)).reshape(*(values.shape[i] for i in source), -1)[..., 0]


def _by_time(steps: list[tuple[Axis, Any]], xp: Any, where: int) -> Any:
    if not steps[0][0].scanned:
        return steps[0][1]
    return xp.stack([value for _, value in sorted(steps, key=lambda pair: pair[0].step)], where)


class SiteScores(NamedTuple):
    """Scores of one assignment or, on the host, of many: [rows, contexts (, T)].

    Attributes:
        latent: log-probabilities of latent sites, [contexts, T], nats.
        likelihood: log-probabilities of observed sites by name, [contexts], nats.
        rewards: rewards by site, [contexts], reward units.
        metrics: values by deterministic site, [contexts], averaged over time and other axes.
    """

    latent: dict[str, Any]
    likelihood: dict[str, Any]
    rewards: dict[str, Any]
    metrics: dict[str, Any]


def run_with_sites(program: Program, values: Mapping[str, Any], args: tuple[Any, ...]) -> Trace:
    """Run a program with values for all its latent sites."""
    # Every latent site has a value, so the key draws nothing.
    return trace_program(FoldedKeys(handlers.substitute(program, data=dict(values)), dummy_key()), *args)


def score_trace(trace: Trace, structure: Structure, names: Sequence[str]) -> SiteScores:
    """Score the named sites of one run, per context."""
    result = SiteScores({}, {}, {}, {})
    shape = structure.context_shape
    for name in names:
        site = trace.sites[name]
        if site.kind == "metric":
            value = metric_by_context(jnp.asarray(site.value, float), structure[name], structure)
            if value is not None:
                result.metrics[name] = value.reshape(-1)
            continue
        score = per_context(site_log_prob(site), site, structure.contexts)
        score = jnp.broadcast_to(score, (*shape, score.shape[-1])).reshape(-1, score.shape[-1])
        if site.kind in ("action", "environment"):
            result.latent[name] = score
        else:
            (result.rewards if site.kind == "reward" else result.likelihood)[name] = score.sum(-1)
    return result


def metric_by_context(values: Any, site: Site, structure: Structure, lead: int = 0) -> Any | None:
    """Average a metric of a site over all but context axes, [*lead, *contexts]; None if it mixes contexts."""
    shape, ndim = structure.context_shape, values.ndim - lead
    if structure.num_contexts == 1:
        return values.mean(tuple(range(lead, values.ndim))).reshape(*values.shape[:lead], *shape)
    if not set(structure.contexts) <= set(site.frames):
        return None
    first = 0 if site.scan is None else 1
    right = [ndim + f.dim for f in sorted(structure.contexts, key=lambda f: f.dim)]
    left = [first + i for i in range(len(shape))]
    for axes in (right, left):
        # Plates count axes from the right, but a metric may have axes of its own there: then try from the left.
        if axes[0] >= first and axes[-1] < ndim and tuple(values.shape[lead + i] for i in axes) == shape:
            return values.mean(tuple(lead + i for i in range(ndim) if i not in axes))
    return None


class BatchEvaluator:
    """Evaluates a function of (args, row) on many rows, batch by batch, inside one jit.

    Arrays among the arguments are traced; everything else is static. Functions that compare equal, such
    as frozen dataclasses with equal fields, share one compilation.
    """

    def __init__(self, fn: Callable[..., Any], args: Any, structure: Structure) -> None:
        self._fn, self._args = fn, args
        self._limit = max(1, _ELEMENTS // max(structure.width, 1))

    def __call__(self, rows: Any) -> Any:
        """Evaluate rows [rows, ...]; the result is on the host."""
        held = to_host(rows)
        return self.of(len(jax.tree.leaves(held)[0]), lambda index: jax.tree.map(lambda x: x[index], held))

    def of(self, total: int, rows: Callable[[np.ndarray], Any]) -> Any:
        """Evaluate `total` rows, made batch by batch from their indices; the result is on the host."""
        batch = min(next((b for b in _BATCHES if b >= total), _BATCHES[-1]), self._limit)
        parts = []
        with trace_cache():
            for start in range(0, total, batch):
                # Fill up the last batch with its last row, so that all batches have one shape.
                index = np.minimum(np.arange(start, start + batch), total - 1)
                out = _evaluate(self._fn, self._args, jax.device_put(rows(index)))
                kept = min(batch, total - start)
                parts.append(jax.tree.map(lambda x, kept=kept: np.asarray(x)[:kept], out))
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


@ClosureJit
def _evaluate(fn: Callable[..., Any], args: Any, rows: Any) -> Any:
    return jax.vmap(lambda row: fn(args, row))(rows)
