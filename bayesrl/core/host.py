"""Python functions that compiled programs call on the host, and their errors as they were raised."""

import itertools
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from bayesrl.errors import BayesRLError

_MOST_REMEMBERED = 64
"""Errors that nobody asks for are forgotten, the oldest first."""

_remembered: OrderedDict[int, BaseException] = OrderedDict()
_lock = threading.Lock()
_numbers = itertools.count(1)


class _OnHostError(Exception):
    """What JAX sees in the place of an error that is remembered; its number survives in JAX's own message."""


def on_host(fn: Callable[..., Any], shape_dtype: Any, *args: Any) -> Any:
    """Call a Python function on the host, inside of compiled code.

    Under `jax.vmap` the function gets all of the batch in one call, every argument with the batch's axes in front.
    No derivative flows through it: its result is a constant.

    The function must not call JAX: on a CPU with few cores, such a call may wait for the very threads that wait for
    the function, for ever. Let it return what JAX is to work on instead, and work on that in the compiled code.

    Args:
        fn: from NumPy arrays to arrays; pure, for it may be called more often than once, or not at all.
        shape_dtype: pytree of `jax.ShapeDtypeStruct`: what it returns for one call without a batch.
        *args: pytrees of arrays.

    Returns:
        what the function returns, as JAX arrays.

    Raises:
        jax.errors.JaxRuntimeError: the function failed; inside of `host_errors`, errors of bayesrl come as they were.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> scalar = jax.ShapeDtypeStruct((), jnp.float32)
        >>> def twice(x):
        ...     return on_host(lambda x: np.float32(2) * x, scalar, x)
        >>> jax.jit(jax.vmap(twice))(jnp.arange(3.0)).tolist()
        [0.0, 2.0, 4.0]
    """

    def run(*arrays: Any) -> Any:
        try:
            return fn(*jax.tree.map(np.asarray, arrays))
        except (BayesRLError, KeyboardInterrupt) as error:
            raise _OnHostError(f"{error} [host error {_remember(error)}]") from error

    # JAX logs every failure of a callback with its traceback, which the error itself tells too.
    logging.getLogger("jax._src.callback").addFilter(_is_news)
    held = jax.lax.stop_gradient(args)
    return jax.pure_callback(run, shape_dtype, *held, vmap_method="broadcast_all")


@contextmanager
def host_errors() -> Iterator[None]:
    """Raise the errors of functions on the host as these raised them, not as JAX reports them.

    JAX runs ahead: what is computed inside must also be waited for inside (`jax.block_until_ready`), lest its error
    come later.

    Raises:
        BayesRLError: what the function raised; likewise KeyboardInterrupt.
        jax.errors.JaxRuntimeError: any other failure.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl.errors import LanguageModelError
        >>> def refuse(x):
        ...     raise LanguageModelError("it was too long")
        >>> try:
        ...     with host_errors():
        ...         jax.block_until_ready(on_host(refuse, jax.ShapeDtypeStruct((), jnp.float32), 1.0))
        ... except LanguageModelError as error:
        ...     print(error)
        it was too long
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        original = _recall(str(error))
        if original is None:
            raise
        raise original from original.__cause__


def _remember(error: BaseException) -> int:
    number = next(_numbers)
    with _lock:
        _remembered[number] = error
        while len(_remembered) > _MOST_REMEMBERED:
            _remembered.popitem(last=False)
    return number


def _recall(message: str) -> BaseException | None:
    found = re.findall(r"\[host error (\d+)\]", message)
    with _lock:
        return _remembered.pop(int(found[-1]), None) if found else None


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a line of JAX's log is about anything but an error that is remembered."""
    return record.exc_info is None or not isinstance(record.exc_info[1], _OnHostError)
