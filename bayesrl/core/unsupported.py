"""Refuse, by name, what NumPyro lets a program do but the library cannot follow, when a program is first read."""

import inspect
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.primitives import Messenger

from bayesrl.core.handlers import watch_body
from bayesrl.core.primitives import site_kind, unwrapped
from bayesrl.errors import BayesRLError, PolicyError
from bayesrl.typing import Program

_DECIDED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Refusals(Messenger):
    """Refuses sites that are not drawn freely; it sees a program before any other handler of the library does.

    A fit cannot draw a site whose value or key another handler has set. A scan hides its sites from `handlers.do`.

    Args:
        fn: a program, called once.

    Raises:
        PolicyError: naming the site and the remedy.
    """

    def __init__(self, fn: Program) -> None:
        super().__init__(fn)
        self.drawing: dict[str, Any] | None = None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Name the site whose distribution has no sampler."""
        super().__exit__(kind, error, trace)
        if self.drawing is not None and isinstance(error, NotImplementedError | ImportError):
            _refuse_undrawn(self.drawing, error)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Note that the site has been drawn."""
        self.drawing = None

    def process_message(self, msg: dict[str, Any]) -> None:
        """Check a site as the program and its own handlers made it."""
        self.drawing = msg if msg["type"] == "sample" else None
        if msg["type"] in ("sample", "deterministic", "param"):
            _refuse_name(msg["name"])
        if msg["type"] == "control_flow":
            for kind, held in msg["kwargs"].get("substitute_stack", ()):
                if kind != "condition":
                    watch_body(msg, partial(_refuse_held_in_scan, held=held))
        elif msg["type"] == "sample":
            _refuse_empty(msg)
            _refuse_repeated(msg)
            if msg.get("_control_flow_done"):
                _refuse_intervened(msg)
            elif not msg["is_observed"] and site_kind(msg) in ("action", "environment"):
                _refuse_held(msg)


def _refuse_name(name: Any) -> None:
    """Refuse names that no file can store, before anything is fitted."""
    if not isinstance(name, str) or "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise PolicyError(
            f"the program has a site of the name {name!r}, which no file of draws can hold; use a text without zero "
            "bytes and halves of characters"
        )


def _refuse_empty(msg: dict[str, Any]) -> None:
    shape = tuple(msg["fn"].shape()) if hasattr(msg["fn"], "shape") else ()
    if 0 in shape and not msg["is_observed"]:
        raise PolicyError(
            f"site {msg['name']!r} has shape {shape}, so that nothing is drawn there; leave it out, or give its "
            "distribution at least one element"
        )


def _refuse_undrawn(msg: dict[str, Any], cause: BaseException) -> None:
    kind = type(unwrapped(msg["fn"]))
    says = f"NumPyro says: {cause}" if str(cause) else "it has no sampler"
    raise PolicyError(
        f"site {msg['name']!r} cannot be drawn from {kind.__name__} ({says}); write a distribution in its place that "
        "can, or give the site a value by obs="
    ) from cause


def _refuse_repeated(msg: dict[str, Any]) -> None:
    shape = tuple(msg["kwargs"].get("sample_shape") or ())
    if shape and not msg["is_observed"]:
        raise PolicyError(
            f"site {msg['name']!r} is drawn with sample_shape={shape}, of which its distribution knows nothing; "
            f"write distribution.expand({list(shape)}), or draw it in numpyro.plate(name, {shape[0]})"
        )


def _refuse_intervened(msg: dict[str, Any]) -> None:
    if msg.get("_intervener_id") is not None:
        raise PolicyError(
            f"handlers.do intervenes on site {msg['name']!r}, which a scan hides from it: NumPyro would go on with the "
            "value drawn; write the value into the body of the scan"
        )


def _refuse_held(msg: dict[str, Any]) -> None:
    if msg["value"] is not None:
        raise PolicyError(_held(msg["name"]))
    if msg["kwargs"].get("rng_key") is not None:
        raise PolicyError(
            f"site {msg['name']!r} brings a random key of its own (handlers.seed, or rng_key=...), so that all draws "
            "of it would be the same one; pass the program itself: the key of the call seeds it"
        )


def _held(name: str) -> str:
    return (
        f"site {name!r} is held at a value (by handlers.substitute or replay), and is still to be drawn as far as "
        "NumPyro knows; use handlers.condition where the value is data, handlers.do where it is set from outside"
    )


def _refuse_held_in_scan(msg: dict[str, Any], *, held: Any) -> None:
    given = _given(held, msg)
    if given is not None and not msg["is_observed"] and site_kind(msg) in ("action", "environment"):
        raise PolicyError(_held(msg["name"]))


def _given(held: Any, msg: dict[str, Any]) -> Any:
    """Return the value that a handler around a scan sets for a site inside it, or None."""
    if msg["type"] != "sample":
        return None
    found = held(msg) if callable(held) else held.get(msg["name"])
    return found["value"] if isinstance(found, dict) else found


def check_scan(msg: dict[str, Any], length: int) -> None:
    """Watch the body of a scan for what cannot be replayed: nested scans, and sites conditioned at only some steps.

    Raises:
        PolicyError: naming the site and the remedy, when the body runs.
    """
    watch_body(msg, _refuse_nested)
    for kind, held in msg["kwargs"].get("substitute_stack", ()):
        if kind == "condition":
            watch_body(msg, partial(_refuse_partly, held=held, length=length))


def refuse_branches(msg: dict[str, Any]) -> None:
    """Refuse NumPyro's `cond`, because only one branch has its sites.

    Raises:
        PolicyError: the message is of a `cond`.
    """
    if msg["fn"] is cond_wrapper:
        raise PolicyError(
            "numpyro.contrib.control_flow.cond draws the sites of one branch only, and what was not drawn has no "
            "density; draw the sites of both branches outside, and choose between their values by jnp.where"
        )


def _refuse_nested(msg: dict[str, Any]) -> None:
    if msg["type"] == "control_flow":
        raise PolicyError(
            "a scan stands inside of a scan, and one axis of time is all that a site can have; "
            "put both loops into one scan (carry the inner counter), or write the inner one as a plate"
        )


def _refuse_partly(msg: dict[str, Any], *, held: Any, length: int) -> None:
    value = _given(held, msg)
    if value is None:
        return
    name, ndim, shape = msg["name"], len(msg["fn"].shape(msg["kwargs"].get("sample_shape", ()))), jnp.shape(value)
    if len(shape) == ndim + 1 and shape[0] < length:
        raise PolicyError(
            f"site {name!r} is conditioned at {shape[0]} of the {length} steps of its scan, and NumPyro takes what is "
            f"drawn at the others for observed too; make two scans of it: one over the first {shape[0]} steps, "
            "conditioned, and from its carry another over the rest, whose sites bear other names"
        )
    if len(shape) not in (ndim, ndim + 1) or (len(shape) == ndim + 1 and shape[0] > length):
        raise PolicyError(
            f"site {name!r} is conditioned on a value of shape {shape} in a scan of {length} steps, where one step has "
            f"shape {msg['fn'].shape()}; give one value per step, [{length}, ...]"
        )


@contextmanager
def explain_errors(role: str, error: type[BayesRLError]) -> Iterator[None]:
    """Turn the errors that JAX and NumPyro raise while tracing a program into errors about the program itself.

    Args:
        role: what the program is, such as "the policy".
        error: the class of error to raise.

    Raises:
        BayesRLError: of that class, naming the line and what to write instead.
    """
    try:
        yield
    except _DECIDED as cause:
        raise error(
            f"{role} asks in Python for a number that is only known when it runs{_line(cause)}: a program is read once "
            "and run for many draws side by side; write jnp.where(draw, a, b) or jax.lax.cond for `if`, "
            "jnp.array(values)[draw] for list[draw], numpyro's scan for a loop, and jnp for float(), int() and np"
        ) from cause
    except NotImplementedError as cause:
        # NumPyro has no error class for this, so go by its words.
        if "control flow primitive under a `plate`" not in str(cause):
            raise
        raise error(
            f"{role} has a scan inside of a plate, which NumPyro cannot align{_line(cause)}; write the plate "
            "inside of the scan's body: `plate = numpyro.plate(...)` before the scan, `with plate:` in the body"
        ) from cause
    except AssertionError as cause:
        if "size of plate should be positive" not in str(cause):
            raise
        raise error(
            f"{role} has a plate of size 0{_line(cause)}, in which nothing is drawn; leave such a plate out where "
            "there are no data: `if len(data): ...`"
        ) from cause


def refuse_stray(name: str) -> None:
    """Refuse a site whose value has leaked from the JAX function that it was drawn in.

    Raises:
        PolicyError: always.
    """
    raise PolicyError(
        f"site {name!r} is drawn inside of jax.lax.scan, cond, while_loop, vmap or jit, where NumPyro sees it once and "
        "JAX not at all; use numpyro.contrib.control_flow.scan or a plate, or draw the site outside"
    )


def check_arguments(program: Program, args: tuple[Any, ...], role: str, error: type[BayesRLError]) -> None:
    """Refuse arguments that a program does not take.

    Args:
        program: with or without handlers around it.
        args: the arguments of the call.
        role: what the program is, such as "the policy".
        error: the class of error to raise.

    Raises:
        BayesRLError: of that class, naming what the program takes.
    """
    inner: Any = program
    # A handler takes any arguments, so look at the program inside.
    while isinstance(inner, Messenger) and inner.fn is not None:
        inner = inner.fn
    try:
        signature = inspect.signature(inner)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args)
    except TypeError as cause:
        name = getattr(inner, "__name__", type(inner).__name__)
        count = f"{len(args)} argument" + "s" * (len(args) != 1)
        raise error(
            f"{role} is called with {count}, and takes {name}{signature}: {cause}; arguments that follow the policy "
            "go to policy and guide alike (def guide(*args) takes any), keywords are bound by functools.partial"
        ) from cause


_LIBRARIES = tuple(
    str(Path(module.__file__).parent)
    for name in ("jax", "numpyro", "equinox", "optax", "bayesrl")
    if (module := sys.modules.get(name)) is not None and module.__file__
)


def _line(error: BaseException) -> str:
    """Describe the line of the user's own code that an error came from."""
    found, trace = "", error.__traceback__
    # Go on to the end: the innermost line of the user's code says most.
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((*_LIBRARIES, "<frozen")) and Path(name).suffix in ("", ".py"):
            text = linecache.getline(name, trace.tb_lineno).strip()
            found = f" (line {trace.tb_lineno} of {Path(name).name}" + (f": {text})" if text else ")")
        trace = trace.tb_next
    return found
