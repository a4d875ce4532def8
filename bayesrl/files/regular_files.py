"""Read regular files up to a bound and replace them in one step, without following links or waiting on pipes."""

import os
import secrets
import stat
from pathlib import Path

from bayesrl.errors import RunFolderError

WRITING = ".writing"
"""Suffix of the names of unfinished files; these names begin with a dot."""

_LONGEST = 200
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _flags(*names: str) -> int:
    """Join flags of `os.open`, leaving out those that this system lacks."""
    joined = 0
    for name in names:
        joined |= getattr(os, name, 0)
    return joined


def file_kind(mode: int) -> str:
    """Name the kind of a folder's entry by its mode; empty for a regular file."""
    return "" if stat.S_ISREG(mode) else next((told for is_one, told in _KINDS if is_one(mode)), "not a plain file")


def read_file(path: Path, *, most: int | None = None, linked: bool = False) -> bytes | None:
    """Read a regular file, or return None if it does not exist.

    Args:
        path: of the file.
        most: greatest number of bytes; None means the size of the machine's memory.
        linked: whether the path may be a link, as in folders that other programs build from links.

    Raises:
        RunFolderError: it is not a regular file, is too large, or cannot be read.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | _flags("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY", *([] if linked else ["O_NOFOLLOW"]))
    most = most if most is not None else _memory()
    try:
        _check_plain(path, os.stat(path, follow_symlinks=linked), most)  # first, since just opening a device can act
        with os.fdopen(os.open(path, flags), "rb") as file:
            told = os.fstat(file.fileno())
            _check_plain(path, told, most)  # again, since the path may have changed in between
            # One byte more than its size shows a file that grows.
            content = file.read(told.st_size + 1)
    except FileNotFoundError:
        if not linked or not path.is_symlink():
            return None
        raise RunFolderError(f"cannot read {path}: it is a link to a file that is gone; copy the file anew") from None
    except RunFolderError:
        raise
    except ValueError as error:  # a name with a zero byte
        raise RunFolderError(f"cannot read {str(path)!r}: {error}; name another file") from error
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}; it must be a file that you may read") from error
    if len(content) > told.st_size:
        raise RunFolderError(f"cannot read {path}: it grows while it is read; wait until it is written")
    return content


def _check_plain(path: Path, told: os.stat_result, most: int) -> None:
    kind = file_kind(told.st_mode)
    if kind:
        raise RunFolderError(f"cannot read {path}: it is {kind}, and only plain files are read; put a plain file there")
    if told.st_size > most:
        raise RunFolderError(
            f"cannot read {path}: it has {told.st_size:,} bytes, over the {most:,} that are read; it is damaged or "
            "belongs to something else"
        )


def _memory() -> int:
    """Return the machine's memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no such call on this system
        return 2**40


def write_file(path: str | Path, content: bytes, *, before: Path | None = None) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a part.

    Args:
        path: of the file.
        content: the new content.
        before: where to keep the old file.

    Raises:
        RunFolderError: the disk is full, the folder cannot be written, or the path is not a regular file;
            the old content is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:_LONGEST]}.{secrets.token_hex(4)}{WRITING}")
    try:
        check_writable(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flags("O_CLOEXEC", "O_BINARY"), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a crash could leave an empty file under the new name
            if before is not None and path.exists():
                check_writable(before)
                path.replace(before)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except RunFolderError:
        raise
    except ValueError as error:  # a name with a zero byte
        raise RunFolderError(f"cannot write {str(path)!r}: {error}; name another file") from error
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror}; what it held before is intact") from error


def check_writable(path: Path) -> None:
    """Refuse to replace anything but a regular file.

    Raises:
        RunFolderError: the path is a folder, a link, a pipe or a device.
    """
    try:
        kind = file_kind(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if kind:
        remedy = "remove it, or name what it leads to" if kind == "a link" else "remove it, or name another file"
        raise RunFolderError(f"cannot write {path}: it is {kind}, and only plain files are written; {remedy}")


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files of processes that were killed while writing; call this only under the folder's lock."""
    for path in folder.glob(f".*{WRITING}"):
        if not file_kind(path.lstat().st_mode):
            path.unlink(missing_ok=True)


def file_name(text: str) -> str:
    """Turn any text, such as a user's name for something, into a file name that stays in its folder.

    Example:
        >>> from bayesrl.files.regular_files import file_name
        >>> file_name("../../x"), file_name("agent/arm"), file_name("θ")
        ('.._.._x', 'agent_arm', 'θ')
    """
    name = "".join(c if c.isalnum() or c in " ._-+=()[]" else "_" for c in text).strip()
    return name[:80] if name.strip(".") else "_"
