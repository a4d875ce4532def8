"""Python functions that compiled programs call on the host, and their errors as they were raised."""

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
"""How many errors are remembered; the oldest are forgotten first."""

_remembered: OrderedDict[int, BaseException] = OrderedDict()
_lock = threading.Lock()
_numbers = itertools.count(1)
_handles = itertools.count(1)


class Interrupts:
    """Tells threads that Ctrl-C was pressed.

    Python raises KeyboardInterrupt in the main thread alone, and not before that thread comes back from JAX, which
    may wait for a function on the host in another thread. The signal's byte in a socket is seen by all.
    """

    def __init__(self) -> None:
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._listening = False

    def check(self) -> None:
        """Raise an error if Ctrl-C was pressed.

        Raises:
            KeyboardInterrupt: it was, and this is not the main thread, where Python sees to it.
        """
        if not self._listening or threading.current_thread() is threading.main_thread():
            return
        assert self._pair is not None
        try:
            heard = self._pair[0].recv(64, socket.MSG_PEEK)  # left there, for other threads to see
        except BlockingIOError:
            return
        if signal.SIGINT in heard:
            raise KeyboardInterrupt
        self._pair[0].recv(len(heard))

    @property
    def sources(self) -> list[socket.socket]:
        """What becomes readable when it is time to `check`: for those who wait."""
        elsewhere = threading.current_thread() is not threading.main_thread()
        return [self._pair[0]] if self._listening and elsewhere and self._pair is not None else []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen, in the main thread; elsewhere, and inside of another `listening`, this does nothing."""
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
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._pair[0].recv(4096)


INTERRUPTS = Interrupts()
"""The process has one Ctrl-C."""


class _OnHostError(Exception):
    """What JAX sees in the place of an error that is remembered; its number survives in JAX's own message."""


def host_call(fn: Callable[..., Any], shape_dtype: Any, *args: Any) -> Any:
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
        ...     return host_call(lambda x: np.float32(2) * x, scalar, x)
        >>> jax.jit(jax.vmap(twice))(jnp.arange(3.0)).tolist()
        [0.0, 2.0, 4.0]
    """
    # JAX logs every failure of a callback with its traceback, which the error itself shows, too.
    logging.getLogger("jax._src.callback").addFilter(_is_news)
    held = jax.lax.stop_gradient(args)
    shapes, tree = jax.tree.flatten(shape_dtype)
    call = _Call(tree, tuple((tuple(shape.shape), np.dtype(shape.dtype)) for shape in shapes))
    return jax.pure_callback(call, shape_dtype, _handle(fn), *held, vmap_method="broadcast_all")


@dataclass(frozen=True)
class _Call:
    """Calls the function that a handle stands for.

    The handle is an argument of the compiled program and not a part of it, so that programs that differ in what they
    call on the host alone are the same.
    """

    tree: Any
    shapes: tuple[tuple[tuple[int, ...], Any], ...]

    def __call__(self, handle: Any, *arrays: Any) -> Any:
        numbers = np.asarray(handle)
        if numbers.size == 0:  # of no draws at all
            empty = [np.zeros((*numbers.shape[:-1], *shape), dtype) for shape, dtype in self.shapes]
            return jax.tree.unflatten(self.tree, empty)
        try:
            INTERRUPTS.check()
            return _functions[int(numbers.flat[0])](*jax.tree.map(np.asarray, arrays))
        except (BayesRLError, KeyboardInterrupt) as error:
            raise _OnHostError(f"{error} [host error {_remember(error)}]") from error


_functions: weakref.WeakValueDictionary[int, partial[Any]] = weakref.WeakValueDictionary()
_recent: deque[partial[Any]] = deque(maxlen=4096)
"""Functions outlive the tracing of who calls them; compiled programs of the library keep theirs by themselves."""
_holders: list[list[partial[Any]]] = []
_unnumbered: ContextVar[bool] = ContextVar("comparable_callbacks", default=False)


def _handle(fn: Callable[..., Any]) -> np.ndarray:
    """Give what stands for a function in a program."""
    if _unnumbered.get():
        return np.zeros(1, np.int32)
    held, number = partial(fn), next(_handles)
    _functions[number] = held
    _recent.append(held)
    for holder in _holders:
        holder.append(held)
    return np.asarray([number], np.int32)


@contextmanager
def comparable_callbacks() -> Iterator[None]:
    """Let functions on the host have no numbers in what is traced inside, which is never to run: so it compares."""
    token = _unnumbered.set(True)
    try:
        yield
    finally:
        _unnumbered.reset(token)


@contextmanager
def callbacks_kept_alive() -> Iterator[list[Any]]:
    """Collect what keeps alive the functions that are called by what is traced inside."""
    held: list[partial[Any]] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders[:] = [other for other in _holders if other is not held]


@contextmanager
def host_errors() -> Iterator[None]:
    """Raise the errors of functions on the host as these raised them, not as JAX reports them.

    JAX runs ahead: what is computed inside must also be waited for inside (`jax.block_until_ready`), or its error
    would come later.

    Ctrl-C is heard at the next call on the host, even while the main thread waits inside of JAX.

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
        ...         jax.block_until_ready(host_call(refuse, jax.ShapeDtypeStruct((), jnp.float32), 1.0))
        ... except LanguageModelError as error:
        ...     print(error)
        it was too long
    """
    try:
        with INTERRUPTS.listening():
            yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # a function that was called before raises the latter
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
    """Whether a line of JAX's log is about something other than an error that is remembered."""
    return record.exc_info is None or not isinstance(record.exc_info[1], _OnHostError)
