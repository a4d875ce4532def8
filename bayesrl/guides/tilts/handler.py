"""The handler that turns a policy into its own guide."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bayesrl.core.handlers import IntoScans, SiteHooks, scan_length
from bayesrl.core.primitives import is_hidden, site_kind
from bayesrl.core.trace import Frame
from bayesrl.errors import GuideError
from bayesrl.guides.network_inputs import VisibleState
from bayesrl.guides.networks import time_features
from bayesrl.guides.parameterization import Parameterization, SiteSpec, SummarySpec, TableSpec
from bayesrl.guides.plate_alignment import concatenate_aligned, num_plate_axes, unalign
from bayesrl.guides.policy_analysis import PriorMoments
from bayesrl.guides.tilts.families import tilt_distribution, tilt_shape
from bayesrl.typing import Program


@dataclass(frozen=True, eq=False)
class TiltParams:
    """The trainable parameters: tables by site, networks by site, summaries by name."""

    tables: dict[str, Any]
    networks: dict[str, Any]
    summaries: dict[str, Any]


@dataclass
class _Moment:
    """One time step of a scan, or everything outside scans.

    The tables of its sites are [*plates, histories, outputs], the features of its time [features], and the states of
    the summaries [*plates, width].
    """

    plan: Parameterization
    weights: TiltParams
    view: VisibleState
    tables: dict[str, Array]
    time: Array
    states: dict[str, Array] = field(default_factory=dict)

    def before(self, msg: dict[str, Any]) -> None:
        """Tilt an action site."""
        if msg["type"] != "sample" or site_kind(msg) != "action":
            return
        plan = self.plan.sites.get(msg["name"])
        if plan is None:
            raise GuideError(f"site {msg['name']!r} was not there when the guide was built; build it again")
        if plan.num_outputs:
            fn, support = msg["fn"], plan.site.support
            self.view.prior = fn
            reach = self.plan.reaches.get(msg["name"])
            tail = tilt_shape(msg["name"], fn, support, reach)
            theta = unalign(self._theta(plan), fn.batch_shape, plan.dims, tail)
            msg["fn"] = tilt_distribution(fn, theta, support, reach)

    def after(self, msg: dict[str, Any]) -> None:
        """Remember what the agent has seen."""
        if msg["type"] == "sample" and site_kind(msg) in ("action", "environment") and not is_hidden(msg):
            self.view.sites[msg["name"]] = (msg["value"], msg["fn"])

    def summarise(self) -> dict[str, Array]:
        """Return the states of the summaries after this step."""
        return {
            name: _rows(self.weights.summaries[name], self._features(self.plan.summaries[name], state), state)
            for name, state in self.states.items()
        }

    def _theta(self, plan: SiteSpec) -> Array:
        """Return the tilt in aligned form, [*plates, outputs]."""
        theta = jnp.zeros((*(1,) * num_plate_axes(plan.dims), plan.num_outputs))
        if plan.table is not None:
            theta = theta + _look_up(self.tables[plan.site.name], plan.table, self.view)
        if plan.network:
            state = self.states.get(plan.summary) if plan.summary is not None else None
            theta = theta + _rows(self.weights.networks[plan.site.name], self._features(plan, state, read=True))
        return theta

    def _features(self, plan: SiteSpec | SummarySpec, state: Array | None, *, read: bool = False) -> Array:
        """Join the inputs; a site also reads the summary's state, which a summary itself gets separately."""
        ones = (1,) * num_plate_axes(plan.dims)
        parts = [source.features(self.view) for source in plan.sources]
        parts.append(self.time.reshape((*ones, -1)))
        if state is not None:
            parts.append(state if read else state[..., :0])
        return concatenate_aligned(parts)


def _rows(network: Any, *inputs: Array) -> Array:
    """Apply a network along the last axis."""
    signature = ",".join(f"(n{i})" for i in range(len(inputs))) + "->(m)"
    result: Array = jnp.vectorize(network, signature=signature)(*inputs)
    return result


def _look_up(table: Array, plan: TableSpec, view: VisibleState) -> Array:
    """Pick the rows of a table [*plates, histories, outputs] at the current history."""
    if not plan.sources:
        return table[..., 0, :]
    code = jnp.zeros((), jnp.int32)
    for source, radix in zip(plan.sources, plan.radices, strict=True):
        code = code * radix + source.codes(view)
    if math.prod(table.shape[:-2]) == 1:
        # One table for all elements: read it in place, without a copy for each element.
        return table.reshape(table.shape[-2:])[code]
    shape = jnp.broadcast_shapes(code.shape, table.shape[:-2])
    index = jnp.broadcast_to(code, shape)[..., None, None]
    return jnp.take_along_axis(jnp.broadcast_to(table, (*shape, *table.shape[-2:])), index, -2)[..., 0, :]


class TiltHandler(IntoScans):
    """Replaces the distribution of each action site by a tilted one, inside scans too; `width` is of the summaries."""

    def __init__(
        self, fn: Program, plan: Parameterization, weights: TiltParams, moments: dict[str, PriorMoments], width: int
    ) -> None:
        super().__init__(fn)
        self.plan, self.weights, self.moments, self.width = plan, weights, moments, width
        self.plates: dict[str, tuple[int, Array]] = {}
        self.num_scans = 0
        self.flat = _Moment(plan, weights, VisibleState(moments=moments), {}, jnp.zeros(0))

    def process_site(self, msg: dict[str, Any]) -> None:
        """Tilt a site outside scans."""
        plan = self.plan.sites.get(str(msg.get("name")))
        if plan is not None and plan.site.scan is not None:
            raise GuideError(
                f"site {msg['name']!r} stands in a scan, and its tilt reads the steps before: it is not drawn alone; "
                "to ask for single actions fit with a guide of bayesrl.control"
            )
        if msg["type"] == "sample" and site_kind(msg) == "action" and msg["name"] in self.weights.tables:
            # Not before now, because the plates around the site have drawn the mini-batch whose rows to take.
            self.flat.tables[msg["name"]] = self._table(msg["name"])
        self.flat.before(msg)

    def finish_site(self, msg: dict[str, Any]) -> None:
        """Remember values and plates outside scans."""
        if msg["type"] == "plate":
            self.plates[msg["name"]] = (int(msg["args"][0]), msg["value"])
        self.flat.after(msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Take the summaries out of a scan's final carry, and remember the values that were seen in the scan."""
        super().postprocess_message(msg)
        if msg["type"] == "control_flow":
            # NumPyro puts its own step count and key before the carry.
            (steps, key, (carry, _)), rest = msg["value"]
            msg["value"] = (steps, key, carry), rest
        elif msg.get("_control_flow_done"):
            self.flat.after(msg)

    def enter_scan(self, msg: dict[str, Any]) -> None:
        """Thread tables, time and summaries through a scan."""
        body, init, xs, length, *rest = msg["args"]
        number = self.num_scans
        self.num_scans += 1
        steps = scan_length(msg)
        names = [name for name, plan in self.plan.sites.items() if plan.site.scan == number]
        for name in names:
            built = self.plan.sites[name].site.length
            if built != steps:
                raise GuideError(
                    f"the scan of site {name!r} had {built} steps when the guide was built and has {steps} now; "
                    "fit a guide for this length"
                )
        tables = {name: self._table(name) for name in names if name in self.weights.tables}
        # Tables with a row for each step go through the scan as inputs; the others are constants of its loop.
        timed = {name: table for name, table in tables.items() if getattr(self.plan.sites[name].table, "timed", False)}
        fixed = {name: table for name, table in tables.items() if name not in timed}
        states = {
            name: jnp.zeros((*self._plate_shape(plan.frames), self.width))
            for name, plan in self.plan.summaries.items()
            if plan.scan == number
        }

        def wrapped(both: Any, x: Any) -> Any:
            carry, states = both
            x, now, time = x
            # A copy, so that no tracer of this step outlives the scan.
            view = VisibleState(dict(self.flat.view.sites), jax.tree.leaves(carry), moments=self.moments)
            moment = _Moment(self.plan, self.weights, view, fixed | now, time, states)
            with SiteHooks(moment.before, moment.after):
                new, y = body(carry, x)
            return (new, moment.summarise()), y

        msg["args"] = (wrapped, (init, states), (xs, timed, time_features(steps)), length, *rest)

    def _table(self, name: str) -> Array:
        """Bring a table to [T?, *plates, histories, outputs], with the plates subsampled as in this run."""
        plan = self.plan.sites[name].table
        assert plan is not None
        table = jnp.asarray(self.weights.tables[name])
        start = int(plan.timed)
        sizes = [1] * num_plate_axes(tuple(frame.dim for frame in plan.frames))
        for axis, frame in enumerate(plan.frames, start):
            full, indices = self.plates.get(frame.name, (frame.full_size, None))
            if full != frame.full_size:
                raise GuideError(
                    f"plate {frame.name!r} had {frame.full_size} elements when the guide was built and has {full} now, "
                    f"but site {name!r} has a tilt for each element; use AutoTilt(tilt='network') to carry over"
                )
            if indices is not None and len(indices) != full:
                table = jnp.take(table, indices, axis=axis)
            sizes[frame.dim] = table.shape[axis]
        return table.reshape((*table.shape[:start], *sizes, math.prod(plan.radices), plan.num_outputs))

    def _plate_shape(self, frames: tuple[Frame, ...]) -> tuple[int, ...]:
        sizes = [1] * max((-frame.dim for frame in frames), default=0)
        for frame in frames:
            sizes[frame.dim] = len(self.plates[frame.name][1]) if frame.name in self.plates else frame.size
        return tuple(sizes)
