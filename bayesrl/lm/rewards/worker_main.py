"""The main program of a worker process: it scores the texts that come through a pipe.

It is run by its path, not imported, and uses only the standard library: a worker that scores texts needs no JAX, which
the import of any module of bayesrl would load.
"""

import os
import signal
import traceback
from typing import Any


def serve(connection: Any) -> None:
    """Answer until the other end hangs up.

    The first message is (function, whether to send each answer at once); lists of arguments follow, each a tuple or a
    dictionary. The answers
    are lists of (True, value) or (False, (name of the exception, its message, its traceback)).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    if hasattr(os, "setsid"):
        os.setsid()  # a new process group, so that processes which the function starts are killed with the worker
    try:
        fn, at_once = connection.recv()
    except EOFError:
        return
    except BaseException as error:  # noqa: BLE001  (whatever the import of a user's module raises)
        connection.send([(False, _told(error))])
        return
    connection.send([(True, None)])
    while True:
        try:
            calls = connection.recv()
        except (EOFError, OSError):
            return
        answers = []
        for arguments in calls:
            answers.append(_answer(fn, arguments))
            if at_once:
                _send(connection, answers)
                answers = []
        if answers:
            _send(connection, answers)


def _answer(fn: Any, arguments: Any) -> tuple[bool, Any]:
    try:
        return True, fn(**arguments) if isinstance(arguments, dict) else fn(*arguments)
    except Exception as error:  # noqa: BLE001  (the parent raises it)
        return False, _told(error)


def _send(connection: Any, answers: list[tuple[bool, Any]]) -> None:
    """Send answers; a value that cannot be sent is not a number, so its type and repr are sent instead."""
    try:
        connection.send(answers)
    except Exception:  # noqa: BLE001  (a user's value may fail in any way)
        connection.send([(sent, _sendable(value)) for sent, value in answers])


def _sendable(value: Any) -> Any:
    plain = (int, float, str, bool, tuple, type(None))
    return value if type(value) in plain else f"<{type(value).__name__}> {value!r:.100}"


def _told(error: BaseException) -> tuple[str, str, str]:
    return type(error).__name__, str(error), "".join(traceback.format_exception(error))


# Only `runpy.run_path` in the pool sets this name; a plain import serves nobody.
if "CONNECTION" in globals():
    serve(globals()["CONNECTION"])
