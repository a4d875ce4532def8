"""One writer per folder: a lock that the system releases when the process ends, however it ends."""

import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from bayesrl.errors import RunFolderError
from bayesrl.files.regular_files import file_kind

LOCK = ".lock"
_HOLDER = re.compile(r"process \d+ on [\w.-]{1,100}")
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""Folders that this thread has locked already."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock an existing folder against other processes and other threads of this process.

    The holder may lock it again inside. If the system or the disk has no locks, this does nothing.

    Raises:
        RunFolderError: somebody else has locked it; the message says who.
    """
    place = folder.resolve()
    if place in _held.get():
        yield
        return
    descriptor = _locked(folder)
    token = _held.set(_held.get() | {place})
    try:
        yield
    finally:
        _held.reset(token)
        if descriptor is not None:
            with suppress(OSError):
                os.unlink(folder / LOCK)  # before unlocking: afterwards it could be another process's lock
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """Make and lock a folder's lock file, or return None if the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    path = folder / LOCK
    while True:
        try:
            # A link under this name must not be followed, nor a pipe waited for.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            _check(path)
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if isinstance(error, RunFolderError):
                raise
            raise RunFolderError(f"cannot write into {folder}: {error.strerror}; choose another directory") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, descriptor):  # the last holder has just removed it, so we locked a deleted file
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError:
            told = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            who = told if _HOLDER.fullmatch(told) else "another process"
            raise RunFolderError(
                f"{folder} is in use by {who}; wait until that has ended, stop it, or choose another directory"
            ) from None
        except OSError:
            os.close(descriptor)
            return None  # the disk has no locks
        return descriptor


def _check(path: Path) -> None:
    with suppress(FileNotFoundError):
        kind = file_kind(path.lstat().st_mode)
        if kind:
            raise RunFolderError(f"{path} is {kind}, and only plain files are written; remove it")


def _is_still(path: Path, descriptor: int) -> bool:
    own = os.fstat(descriptor)
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(there.st_mode) and (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)
