"""Python functions that compiled programs call on the host, and their errors in original form."""

import contextlib
import itertools
import logging
import re
import signal
import socket
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from bayesrl.errors import BayesRLError

_MOST_REMEMBERED = 64
"""How many errors to remember; the oldest are forgotten first."""

_remembered: OrderedDict[int, BaseException] = OrderedDict()
_lock = threading.Lock()
_numbers = itertools.count(1)
_handles = itertools.count(1)


class Interrupts:
    """Tells threads that Ctrl-C was pressed.

    Python raises KeyboardInterrupt in the main thread only, and not before that thread returns from JAX. But JAX may
    wait for a function on the host in another thread. All threads can see the signal's byte in a socket.
    """

    def __init__(self) -> None:
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._listening = False

    def check(self) -> None:
        """Raise an error if Ctrl-C was pressed.

        Raises:
            KeyboardInterrupt: it was pressed, and this is not the main thread, where Python raises it.
        """
        if not self._listening or threading.current_thread() is threading.main_thread():
            return
        assert self._pair is not None
        try:
            heard = self._pair[0].recv(64, socket.MSG_PEEK)  # the byte stays in the socket for other threads
        except BlockingIOError:
            return
        if signal.SIGINT in heard:
            raise KeyboardInterrupt
        # Bytes of other signals must go, or the socket stays readable.
        self._pair[0].recv(len(heard))

    @property
    def sources(self) -> list[socket.socket]:
        """Sockets that become readable when it is time to `check`, for code that waits."""
        elsewhere = threading.current_thread() is not threading.main_thread()
        return [self._pair[0]] if self._listening and elsewhere and self._pair is not None else []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen, in the main thread; elsewhere, and inside another `listening`, this does nothing."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        if self._pair is None:
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
        before = signal.set_wakeup_fd(self._pair[1].fileno(), warn_on_full_buffer=False)
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            signal.set_wakeup_fd(before)
            # Empty the socket, or the next context would hear this Ctrl-C.
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._pair[0].recv(4096)


INTERRUPTS = Interrupts()
"""One instance, since the process has one Ctrl-C."""


class _OnHostError(Exception):
    """The error that JAX sees instead of a remembered one; its number survives in JAX's own message."""


def host_call(fn: Callable[..., Any], shape_dtype: Any, *args: Any) -> Any:
    """Call a Python function on the host, inside compiled code.

    Under `jax.vmap` the function receives the whole batch in one call, with the batch axes in front of every argument.
    No derivative flows through it: its result is a constant.

    The function must not call JAX. On a CPU with few cores such a call may wait for ever for threads that themselves
    wait for the function. Let it return the inputs for JAX instead, and use them in compiled code.

    Args:
        fn: pure function from NumPy arrays to arrays; it may be called more than once, or not at all.
        shape_dtype: pytree of `jax.ShapeDtypeStruct`: the result of one call without a batch.
        *args: pytrees of arrays.

    Returns:
        The function's result, as JAX arrays.

    Raises:
        jax.errors.JaxRuntimeError: the function failed; inside `host_errors`, errors of bayesrl are raised unchanged.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> scalar = jax.ShapeDtypeStruct((), jnp.float32)
        >>> def twice(x):
        ...     return host_call(lambda x: np.float32(2) * x, scalar, x)
        >>> jax.jit(jax.vmap(twice))(jnp.arange(3.0)).tolist()
        [0.0, 2.0, 4.0]
    """
    # JAX logs every failure of a callback with its traceback, which the error itself shows already.
    logging.getLogger("jax._src.callback").addFilter(_is_news)
    # JAX refuses to differentiate through a callback.
    held = jax.lax.stop_gradient(args)
    shapes, tree = jax.tree.flatten(shape_dtype)
    call = _Call(tree, tuple((tuple(shape.shape), np.dtype(shape.dtype)) for shape in shapes))
    return jax.pure_callback(call, shape_dtype, _handle(fn), *held, vmap_method="broadcast_all")


@dataclass(frozen=True)
class _Call:
    """Calls the function that a handle stands for.

    The handle is an argument of the compiled program, not a part of it. So programs that differ only in the functions
    they call on the host are equal.
    """

    tree: Any
    shapes: tuple[tuple[tuple[int, ...], Any], ...]

    def __call__(self, handle: Any, *arrays: Any) -> Any:
        numbers = np.asarray(handle)
        if numbers.size == 0:  # a batch of no draws
            empty = [np.zeros((*numbers.shape[:-1], *shape), dtype) for shape, dtype in self.shapes]
            return jax.tree.unflatten(self.tree, empty)
        try:
            INTERRUPTS.check()
            return _functions[int(numbers.flat[0])](*jax.tree.map(np.asarray, arrays))
        except (BayesRLError, KeyboardInterrupt) as error:
            raise _OnHostError(f"{error} [host error {_remember(error)}]") from error


_functions: weakref.WeakValueDictionary[int, partial[Any]] = weakref.WeakValueDictionary()
_recent: deque[partial[Any]] = deque(maxlen=4096)
"""Functions must outlive the tracing of their callers; the library's compiled programs keep theirs alive themselves."""
_holders: list[list[partial[Any]]] = []
_unnumbered: ContextVar[bool] = ContextVar("comparable_callbacks", default=False)


def _handle(fn: Callable[..., Any]) -> np.ndarray:
    """Return the handle that stands for a function in a program."""
    if _unnumbered.get():
        return np.zeros(1, np.int32)
    held, number = partial(fn), next(_handles)
    _functions[number] = held
    _recent.append(held)
    for holder in _holders:
        holder.append(held)
    # An array and not a number: the canonical form would leave 1 and 2 in the program.
    return np.asarray([number], np.int32)


@contextmanager
def comparable_callbacks() -> Iterator[None]:
    """Trace without numbers for functions on the host, so that programs can be compared; such traces must not run."""
    token = _unnumbered.set(True)
    try:
        yield
    finally:
        _unnumbered.reset(token)


@contextmanager
def callbacks_kept_alive() -> Iterator[list[Any]]:
    """Collect references that keep alive the host functions of everything traced inside."""
    held: list[partial[Any]] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders[:] = [other for other in _holders if other is not held]


@contextmanager
def host_errors() -> Iterator[None]:
    """Raise errors of functions on the host in their original form, not as JAX reports them.

    JAX dispatches asynchronously: wait inside for everything computed inside (`jax.block_until_ready`), or its error
    comes later.

    Ctrl-C takes effect at the next call on the host, even while the main thread waits inside JAX.

    Raises:
        BayesRLError: the function's own error; the same holds for KeyboardInterrupt.
        jax.errors.JaxRuntimeError: any other failure.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesrl.errors import LanguageModelError
        >>> def refuse(x):
        ...     raise LanguageModelError("it was too long")
        >>> try:
        ...     with host_errors():
        ...         jax.block_until_ready(host_call(refuse, jax.ShapeDtypeStruct((), jnp.float32), 1.0))
        ... except LanguageModelError as error:
        ...     print(error)
        it was too long
    """
    try:
        with INTERRUPTS.listening():
            yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # a function that was called before raises ValueError
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
    """Whether a line of JAX's log concerns anything but a remembered error."""
    return record.exc_info is None or not isinstance(record.exc_info[1], _OnHostError)
