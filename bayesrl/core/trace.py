"""Run a program once and record each of its sites."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from bayesrl.compilation.callbacks import comparable_callbacks
from bayesrl.compilation.determinism import COMPARED_FIELDS, Reading, check_deterministic
from bayesrl.compilation.jit import cached_analysis, has_tracers
from bayesrl.compilation.random_keys import split
from bayesrl.core.handlers import scan_length, watch_body
from bayesrl.core.primitives import SiteKind, is_hidden, log_prob_of_draw, site_kind
from bayesrl.core.rng import FoldedKeys, QuickDraws
from bayesrl.core.unsupported import check_scan, refuse_branches
from bayesrl.errors import PolicyError
from bayesrl.typing import PRNGKey


class Frame(NamedTuple):
    """A plate around a site: its name, axis (negative), size in this run and full size."""

    name: str
    dim: int
    size: int
    full_size: int


class TraceSite(NamedTuple):
    """One sample or deterministic site of one run.

    Inside a `scan` of T steps, `value` and the parameters of `fn` have a leading axis of length T,
    and `scan` numbers the scan; elsewhere `scan` is None. A distribution may also have its own time axis, as one over
    sentences does: it then has a method `log_prob_by_step`, from a value to [*batch, T], and `num_steps`, which is T.
    """

    name: str
    kind: SiteKind
    hidden: bool
    fn: Any
    value: Any
    scale: Any
    frames: tuple[Frame, ...]
    intermediates: Any
    scan: int | None
    length: int


class Trace(NamedTuple):
    """All sites of one run in program order, with its parameters and the indices of its plates."""

    sites: dict[str, TraceSite]
    params: dict[str, Any]
    plates: dict[str, Array]


class _TraceHandler(Messenger):
    """Keeps the messages themselves, not copies, so that later changes by other handlers show too."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__(fn)
        self.messages: list[tuple[dict[str, Any], int | None, int]] = []
        self.plates: dict[str, tuple[int, Any]] = {}
        self.num_scans = 0
        self.length = 1

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            refuse_branches(msg)
            if msg["args"][-1]:
                raise PolicyError(
                    "a scan with reverse=True cannot be replayed: NumPyro records its sites in one order and "
                    "reads them in the other; flip xs along time and scan forwards"
                )
            self.length = scan_length(msg)
            check_scan(msg, self.length)
            watch_body(msg, self._watch_body)
            _seed_steps(msg, self.length)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            self.num_scans += 1
        elif msg["type"] == "plate":
            self.plates[msg["name"]] = (int(msg["args"][0]), msg["value"])
        elif msg.get("_control_flow_done"):
            # NumPyro sends the stacked sites of a scan after the scan itself, so they are of the last one counted.
            self.messages.append((msg, self.num_scans - 1, self.length))
        elif msg["type"] == "param":
            # Copy now: a plate around the parameter is about to replace the whole array by its mini-batch.
            self.messages.append((msg.copy(), None, 1))
        else:
            self.messages.append((msg, None, steps_of(msg.get("fn"))))

    def _watch_body(self, msg: dict[str, Any]) -> None:
        name = msg.get("name")
        if msg["type"] == "sample" and steps_of(msg["fn"]) > 1:
            raise PolicyError(
                f"site {name!r} draws a sequence of {steps_of(msg['fn'])} steps inside of a scan; one axis of time is "
                "all that a site can have: draw the sequence outside of the scan"
            )
        if msg["type"] == "param":
            raise PolicyError(
                f"numpyro.param({name!r}) stands inside a scan, where it would be stacked over time and "
                "never trained; declare it before the scan and close over it"
            )
        if msg["type"] == "plate":
            size, subsample = msg["args"]
            if subsample is not None and subsample != size:
                raise PolicyError(
                    f"plate {name!r} takes a new subsample at every step of a scan; write "
                    f"`plate = numpyro.plate({name!r}, ...)` before the scan and `with plate:` inside it"
                )
            # No handler outside the scan sees this plate, so note it here.
            self.plates[str(name)] = (int(size), jnp.arange(size))


def steps_of(fn: Any) -> int:
    """Count the steps of a distribution with its own time axis; 1 for all others."""
    return int(fn.num_steps) if hasattr(fn, "log_prob_by_step") else 1


def _seed_steps(msg: dict[str, Any], length: int) -> None:
    """Split the keys of all steps before the scan, which replaces NumPyro's chain of splits inside it."""
    key = msg["kwargs"].get("rng_key")
    if key is None:
        return
    body, init, xs, *rest = msg["args"]

    def seeded(carry: Any, x_and_key: tuple[Any, Any]) -> Any:
        x, own_key = x_and_key
        with QuickDraws():
            return FoldedKeys(body, own_key)(carry, x)

    msg["args"] = (seeded, init, (xs, split(key, length)), *rest)
    # Without a key, NumPyro leaves it to us to seed the body.
    msg["kwargs"]["rng_key"] = None


def trace_program(program: Callable[..., Any], *args: Any) -> Trace:
    """Run a seeded program and return its `Trace`.

    Raises:
        PolicyError: two sites share a name, or a parameter is declared inside a scan.
    """
    handler = _TraceHandler(QuickDraws(program))
    handler(*args)
    messages = handler.messages
    _refuse_repeated_names(messages)
    sites, params = {}, {}
    for msg, scan, length in messages:
        if msg["type"] == "param":
            params[msg["name"]] = msg
        elif msg["type"] in ("sample", "deterministic"):
            frames = tuple(
                Frame(f.name, f.dim, f.size, handler.plates[f.name][0]) for f in msg.get("cond_indep_stack", [])
            )
            sites[msg["name"]] = TraceSite(
                msg["name"],
                site_kind(msg),
                is_hidden(msg),
                msg["fn"] if msg["type"] == "sample" else None,
                msg["value"],
                msg.get("scale"),
                frames,
                msg.get("intermediates"),
                scan,
                length,
            )
    return Trace(sites, params, {name: indices for name, (_, indices) in handler.plates.items()})


def trace_abstractly(make: Callable[[], Trace]) -> Trace:
    """Make a trace without computing anything.

    Read only what JAX knows without values: names, kinds, plates, shapes, dtypes.
    """
    made: list[Trace] = []
    # The trace leaves by a list, because a traced function may return arrays only.
    jax.make_jaxpr(lambda: _traced_values(made, make))()
    return made[0]


class AbstractTrace(NamedTuple):
    """A trace without values, and the key that made it, since a parameter's initial value may be a draw."""

    trace: Trace
    key: PRNGKey


def abstract_trace(
    key: PRNGKey, program: Callable[..., Any], args: tuple[Any, ...], known: Trace | None = None
) -> AbstractTrace:
    """Trace a program without computing anything, once per program inside `trace_cache`.

    Args:
        key: used only if the program has no cached trace yet.
        program: without a key.
        args: of the program.
        known: its trace, if you already have it.
    """

    def trace() -> AbstractTrace:
        made = known or trace_abstractly(lambda: trace_program(FoldedKeys(program, key), *args))
        return AbstractTrace(made, key)

    return cached_analysis(trace, program, args)


def trace_abstractly_twice(make: Callable[[], Trace]) -> tuple[Trace, list[str]]:
    """Trace as `trace_abstractly` does, and name the sites whose values come from outside this run of the program.

    Raises:
        PolicyError: a second run computes something else.
    """
    trace, first = _reading(make)
    # Without rewards the parameters are trained, so a random initial value does not make the program random:
    # give the second run the values of the first.
    learned = all(site.kind != "reward" for site in trace.sites.values())
    values = {name: msg["value"] for name, msg in trace.params.items()}
    start = {name: value for name, value in values.items() if learned and not has_tracers(value)}
    check_deterministic(first, _reading(handlers.substitute(make, data=start))[1])
    jaxpr = first.trace
    # A tracer among the constants belongs to another trace, such as that of a `jax.lax.scan` in the program.
    strays = {
        id(var)
        for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
        if isinstance(const, jax.core.Tracer)
    }
    outputs = zip(first.outputs, jaxpr.jaxpr.outvars, strict=True)
    return trace, [name for (name, part), var in outputs if part == "value" and id(var) in strays]


def _reading(make: Callable[[], Trace]) -> tuple[Trace, Reading]:
    made: list[Trace] = []
    # Each reading would number the functions on the host anew, and then no two would agree.
    with comparable_callbacks():
        jaxpr, values = jax.make_jaxpr(lambda: _traced_values(made, make), return_shape=True)()
    outputs = [(name, part) for name, parts in values.items() for part, leaves in parts.items() for _ in leaves]
    return made[0], Reading(made[0].sites, jaxpr, outputs)


def _traced_values(made: list[Trace], make: Callable[[], Trace]) -> dict[str, dict[str, list[Any]]]:
    made.append(make())
    return {
        name: {
            # What is known without a run is compared directly, in `check_deterministic`.
            part: [leaf for leaf in jax.tree.leaves(getattr(site, part)) if isinstance(leaf, jax.core.Tracer)]
            for part in COMPARED_FIELDS
        }
        for name, site in made[-1].sites.items()
    }


def _refuse_repeated_names(messages: list[tuple[dict[str, Any], int | None, int]]) -> None:
    names = Counter(m["name"] for m, _, _ in messages if m["type"] in ("sample", "deterministic"))
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise PolicyError(
            f"site {repeated[0]!r} appears {names[repeated[0]]} times; give every site its own name, "
            "or put the repetition into numpyro.contrib.control_flow.scan"
        )
    places: dict[str, set[tuple[int, int]]] = {}
    for m, _, _ in messages:
        for frame in m.get("cond_indep_stack", []):
            places.setdefault(frame.name, set()).add((frame.dim, frame.size))
    for name, found in places.items():
        if len(found) > 1:
            (dim, size), (other_dim, other_size) = sorted(found)[:2]
            raise PolicyError(
                f"plate {name!r} stands at axis {dim} (size {size}) and at axis {other_dim} (size {other_size}); its "
                "elements cannot be told one by one: give it one dim=... throughout, or give the plates two names"
            )
    if shared := sorted(set(places) & set(names)):
        raise PolicyError(f"site {shared[0]!r} bears the name of a plate; give every site and plate its own name")


def site_log_prob(site: TraceSite) -> Array:
    """Log-probability of a site's value, of shape [T?, *batch] or [*batch, T?], with the scale of handlers, in nats.

    The time of a scan comes first; a distribution's own time comes last.
    """
    return scale_log_prob(raw_log_prob(site), site)


def scaled_and_raw_log_prob(site: TraceSite, contexts: tuple[Frame, ...]) -> tuple[Array, Array]:
    """Log-probability of a site's value, with the scale of handlers and without it.

    Returns:
        Both, reduced as `per_context` does, in nats.
    """
    raw = raw_log_prob(site)
    return per_context(scale_log_prob(raw, site), site, contexts), per_context(raw, site, contexts, scaled=False)


def raw_log_prob(site: TraceSite) -> Array:
    """Log-probability of a site's value without the scale of handlers, in nats."""
    if hasattr(site.fn, "log_prob_by_step"):
        by_step: Array = site.fn.log_prob_by_step(site.value)
        return by_step
    return log_prob_of_draw(site.fn, site.value, site.intermediates)


def scale_log_prob(log_prob: Array, site: TraceSite) -> Array:
    """Apply the scale that handlers gave a site."""
    if site.scale is None:
        return log_prob
    # The scale has batch axes alone, and a distribution's own time comes after those.
    own_time = hasattr(site.fn, "log_prob_by_step")
    return log_prob * (jnp.asarray(site.scale)[..., None] if own_time else site.scale)


def per_context(values: Array, site: TraceSite, contexts: tuple[Frame, ...], *, scaled: bool = True) -> Array:
    """Reduce the values of `site_log_prob` to [*contexts, T]: keep the contexts, sum over other plates.

    Time comes last and has length 1 outside scans. A site that all contexts share counts in each. This
    divides out the scale that subsampling gives to context plates, because contexts are averaged, not summed.
    """
    if hasattr(site.fn, "log_prob_by_step"):
        by_time = values
    else:
        by_time = jnp.moveaxis(values, 0, -1) if site.scan is not None else values[..., None]
    own = {frame.dim for frame in site.frames if frame.name in {context.name for context in contexts}}
    depth = max([-frame.dim for frame in contexts], default=0)
    # Plates count their axes from the right, so a site outside some of them gets axes of size 1 on the left.
    by_time = by_time.reshape((1,) * max(depth + 1 - by_time.ndim, 0) + by_time.shape)
    batch = by_time.ndim - 1
    by_time = by_time.sum([axis for axis in range(batch) if axis - batch not in own], keepdims=True)
    others = [axis for axis in range(batch) if axis - batch not in {frame.dim for frame in contexts}]
    result = jnp.squeeze(by_time, others)
    shape = tuple(frame.size for frame in sorted(contexts, key=lambda frame: frame.dim))
    factor = math.prod(frame.full_size / frame.size for frame in contexts if frame.dim in own)
    return jnp.broadcast_to(result if factor == 1 or not scaled else result / factor, (*shape, by_time.shape[-1]))
