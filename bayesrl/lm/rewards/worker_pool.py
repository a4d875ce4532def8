"""`WorkerPool`: processes that call a function, and are killed when it takes too long."""

import atexit
import contextlib
import math
import os
import runpy
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection as connections
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from bayesrl.compilation.callbacks import INTERRUPTS
from bayesrl.errors import LanguageModelError

type Call = tuple[Any, ...] | dict[str, Any]
"""Arguments of one call, by place or by name."""

_SCRIPT = str(Path(__file__).with_name("worker_main.py"))
_MOST_AT_ONCE = 64
"""The most calls that a worker gets in one message."""


@dataclass(frozen=True)
class Failure:
    """The outcome of a call that returned no value."""

    what: str  # a clause to follow the function's name: "raised ValueError: ..."
    error: str = ""  # the name of the exception, if there was one
    said: str = ""  # its message
    traceback: str = ""
    cause: BaseException | None = None  # the exception itself, if it was raised in this process

    @classmethod
    def of(cls, error: str, said: str, traceback: str = "", cause: BaseException | None = None) -> "Failure":
        """Describe an exception."""
        return cls(f"raised {error}: {said}" if said else f"raised {error}", error, said, traceback, cause)


@dataclass(eq=False)
class _Worker:
    process: Any
    connection: Any
    ready: bool = False
    pending: deque[int] = field(default_factory=deque)
    since: float = 0.0


class WorkerPool:
    """Processes that call one function with many arguments; they start when needed, also after a `close`.

    They are spawned, not forked, because JAX's threads do not survive a fork, so the function must be picklable. The
    process of a call that takes more than `time_limit` seconds is killed, whatever it does, with all that it started.

    Example:
        >>> workers = WorkerPool(len, "len", 1, None)
        >>> workers.run([("four",), ("",)])
        [4, 0]
        >>> workers.close()
    """

    def __init__(self, fn: Callable[..., Any], name: str, count: int, time_limit: float | None) -> None:
        self._fn, self._name, self._count, self._time_limit = fn, name, count, time_limit
        self._workers: list[_Worker] = []
        # Reentrant, because `run` calls `close` while it holds the lock.
        self._lock = threading.RLock()
        try:
            ForkingPickler.dumps(fn)
        except Exception as error:
            raise LanguageModelError(
                f"reward {name!r} cannot be sent to a worker process ({error}); define it with `def` at the top level "
                "of a module (not as a lambda, nor inside another function), or leave num_workers and time_limit out"
            ) from error

    def run(self, calls: Sequence[Call], *, keep_going: bool = False) -> list[Any]:
        """Return the function's result, or a `Failure`, for each tuple of arguments, or dictionary of those by name.

        Without `keep_going`, the first failure ends the round, and unanswered calls stay None.
        """
        with self._lock:
            try:
                return self._run(calls, keep_going)
            except BaseException:
                self.close()  # otherwise pending answers would arrive for the next call
                raise

    def close(self) -> None:
        """Kill the processes."""
        with self._lock:
            for worker in self._workers:
                _kill(worker)
            self._workers.clear()
            _open.discard(self)

    # ---- one round ---------------------------------------------------------------------------

    def _run(self, calls: Sequence[Call], keep_going: bool) -> list[Any]:
        answers: list[Any] = [None] * len(calls)
        # At least four chunks for each worker, so that one slow chunk does not leave the others idle.
        size = max(1, min(_MOST_AT_ONCE, len(calls) // (4 * self._count)))
        queue = deque(list(range(at, min(at + size, len(calls)))) for at in range(0, len(calls), size))
        left = len(calls)
        while left:
            self._hand_out(queue, calls)
            for index, answer in self._collect(queue):
                answers[index] = answer
                left -= 1
                if isinstance(answer, Failure) and not keep_going:
                    self.close()
                    return answers
        return answers

    def _hand_out(self, queue: deque[list[int]], calls: Sequence[Call]) -> None:
        """Give each idle worker a chunk of calls, and start missing workers."""
        for worker in [worker for worker in self._workers if worker.ready and not worker.pending]:
            if not queue:
                return
            # It leaves the queue only once it is sent.
            chunk = queue[0]
            try:
                worker.connection.send([calls[index] for index in chunk])
            except OSError:  # it died while idle, so no call is to blame
                self._drop(worker)
                continue
            except Exception as error:
                call = calls[chunk[0]]
                given = tuple(call.values()) if isinstance(call, dict) else call
                raise LanguageModelError(
                    f"the example {str(given[1:])[:80]} cannot be sent to a worker process ({error}); keep "
                    "to texts, numbers, lists and dictionaries in examples, or leave num_workers and time_limit out"
                ) from error
            worker.pending, worker.since = deque(queue.popleft()), time.monotonic()
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self._count - len(self._workers), len(queue) - starting)):
            self._workers.append(self._start())

    def _collect(self, queue: deque[list[int]]) -> list[tuple[int, Any]]:
        """Wait until something happens, and return the answers that arrived."""
        busy = {worker.connection: worker for worker in self._workers if worker.pending or not worker.ready}
        limit = math.inf if self._time_limit is None else self._time_limit
        first = min((worker.since for worker in busy.values() if worker.pending), default=math.inf) + limit
        # A millisecond more, so that the wait does not end just before the limit.
        patience = None if first == math.inf else max(0.0, first - time.monotonic()) + 0.001
        answers = []
        for ready in connections.wait([*busy, *INTERRUPTS.sources], patience):
            INTERRUPTS.check()
            if ready in busy:
                answers += self._receive(busy[ready], queue)
        for worker in list(self._workers):
            if worker.pending and time.monotonic() - worker.since > limit:
                answers.append((worker.pending.popleft(), Failure(f"took more than {limit:g} seconds")))
                self._requeue(worker, queue)
        return answers

    def _receive(self, worker: _Worker, queue: deque[list[int]]) -> list[tuple[int, Any]]:
        try:
            told = worker.connection.recv()
        except (EOFError, OSError):
            return self._bury(worker, queue)
        if not worker.ready:
            fine, reason = told[0]
            if not fine:
                raise LanguageModelError(
                    f"reward {self._name!r} could not be loaded in a worker process ({reason[0]}: {reason[1]}); define "
                    "it in a module that can be imported (a .py file, not a notebook), or leave num_workers and "
                    "time_limit out"
                )
            worker.ready = True
            return []
        # With a limit every answer comes at once, and the clock of the next call starts here.
        worker.since = time.monotonic()
        return [(worker.pending.popleft(), value if fine else Failure.of(*value)) for fine, value in told]

    def _bury(self, worker: _Worker, queue: deque[list[int]]) -> list[tuple[int, Any]]:
        """Find which call ended a worker; if that is unclear, queue its calls again one by one."""
        # The pipe may close a little before the process has an exit code.
        worker.process.join(5)
        code = worker.process.exitcode
        if not worker.ready:
            raise LanguageModelError(
                f"reward {self._name!r}: a worker process ended with exit code {code} before it was ready; in a "
                'script, put what runs under `if __name__ == "__main__":`, since every worker imports the script'
            )
        if self._time_limit is not None or len(worker.pending) == 1:
            index = worker.pending.popleft()
            self._requeue(worker, queue)
            return [(index, Failure(f"ended its worker process (exit code {code})"))]
        self._drop(worker)
        queue.extendleft([index] for index in reversed(worker.pending))
        return []

    def _requeue(self, worker: _Worker, queue: deque[list[int]]) -> None:
        self._drop(worker)
        if worker.pending:
            queue.appendleft(list(worker.pending))

    # ---- processes ---------------------------------------------------------------------------

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        options = {"init_globals": {"CONNECTION": theirs}}
        process = context.Process(target=runpy.run_path, args=(_SCRIPT,), kwargs=options, daemon=True)
        process.start()
        # While we held this end too, the death of the worker would not close the pipe.
        theirs.close()
        _open.add(self)
        ours.send((self._fn, self._time_limit is not None))
        return _Worker(process, ours)

    def _drop(self, worker: _Worker) -> None:
        _kill(worker)
        self._workers.remove(worker)


def _kill(worker: _Worker) -> None:
    worker.connection.close()
    # Kill its whole group, which has its children; before it has a group, or on systems without, kill it alone.
    with contextlib.suppress(OSError, AttributeError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.kill()
    worker.process.join()
    worker.process.close()


_open: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
"""Pools with running processes. At exit we kill these before multiprocessing would ask them to end and wait."""


@atexit.register
def _close_all() -> None:
    for workers in list(_open):
        workers.close()
