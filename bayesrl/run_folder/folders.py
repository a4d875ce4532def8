"""Make, claim, lock and release the folders of runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayesrl.errors import RunFolderError
from bayesrl.files import locking
from bayesrl.files.regular_files import remove_unfinished
from bayesrl.run_folder.json_files import MODEL, PROBLEM, check_same, is_begun


@contextmanager
def hold_folder(directory: str | Path | None) -> Iterator[None]:
    """Make or open a folder for a run, and lock it; a second process or thread gets an error that names the first.

    If this call made the folder and no run began in it, it removes the folder at the end. None is no folder.

    Raises:
        RunFolderError: the folder cannot be made, has other files, or is locked by somebody else.
    """
    if directory is None:
        yield
        return
    there = Path(directory).exists()
    folder = claim(directory)
    try:
        with locking.lock_folder(folder):
            remove_unfinished(folder)
            yield
    finally:
        if not there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def open_folder(directory: str | Path, problem: Mapping[str, Any]) -> Path:
    """Make a run folder, or open one of the same problem, without changing anything in it.

    Raises:
        RunFolderError: the folder cannot be made, has other files, or has another problem; the
            message says what differs.
    """
    folder = claim(directory)
    if is_begun(folder):
        check_same(folder, problem)
    return folder


def claim(directory: str | Path) -> Path:
    """Make a folder for a run, or accept one that is empty or has a run.

    Raises:
        RunFolderError: the folder cannot be made, or has other files.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    except ValueError as error:  # a name with a zero byte
        raise RunFolderError(f"cannot make the run folder {str(folder)!r}: {error}; choose another directory") from None
    except OSError as error:
        raise RunFolderError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another directory"
        ) from error
    # Hidden files do not count: a lock, or what a killed process left unfinished.
    strangers = [name for name in names if not name.startswith(".") and name != MODEL]
    if strangers and PROBLEM not in names:
        raise RunFolderError(
            f"{folder} is not a run folder, and not empty ({', '.join(strangers[:3])}); "
            f"choose another directory, empty it, or put its {PROBLEM} back"
        )
    return folder


def release(folder: Path) -> None:
    """Release a claimed folder in which no run began: remove it if it has no other files."""
    if not is_begun(folder):
        (folder / MODEL).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
