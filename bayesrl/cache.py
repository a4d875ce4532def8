"""The cache of compiled programs: what was compiled once on a machine is read from a folder afterwards.

It is JAX's persistent compilation cache, with files of our own. Each is written in one step, so that two processes may
share a folder; each has a checksum, and one that is damaged is compiled anew and replaced; those not used for the
longest time go when the folder is full. JAX's own files have none of that but the last, which takes a further package.
"""

import os
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bayesrl.arguments import Bytes, Location, checked
from bayesrl.compilation.status import in_notebook
from bayesrl.errors import CacheError, RunFolderError
from bayesrl.files.regular_files import read_file

CACHE = "BAYESRL_CACHE"
"""The environment variable that names another cache folder."""

MAX_BYTES = 2**30
_KEPT_SHARE = 0.8
"""A folder that is over its limit is emptied to this share of it."""

_SUFFIX, _WRITING = ".compiled", ".writing-"
_HEAD = b"bayesrl1"
_ENTRY = re.compile(r".*-[0-9a-f]{64}(\.compiled|-cache|-atime)")
"""Our files, and those of JAX's own cache."""

_JAX_FOLDER, _JAX_ENABLED = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
_ELSEWHERE = f"name another folder by bayesrl.use_cache(directory) or in ${CACHE}, or keep nothing by {_JAX_ENABLED}=0"
_STALE_SECONDS = 3600.0


class CacheWarning(UserWarning):
    """The cache of compiled programs does not work as it should; the work goes on without it."""


def cache_folder() -> Path:
    """Where bayesrl keeps what can be made again: `$BAYESRL_CACHE`, or `bayesrl` in the user's cache folder."""
    if own := os.environ.get(CACHE):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "bayesrl"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "bayesrl"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "bayesrl"
    return Path.home() / ".cache" / "bayesrl"


def compiled_folder() -> Path:
    """Where compiled programs are kept unless told otherwise; JAX's own environment variable is heard first."""
    own = os.environ.get(_JAX_FOLDER)
    return Path(own) if own else cache_folder() / "compiled"


@checked(CacheError)
def use_cache(directory: Location | None = None, *, max_bytes: Bytes = MAX_BYTES) -> Path | None:
    """Keep compiled programs in a folder, so that whatever was compiled once on this machine is read from there.

    The command line, the ready models and notebooks do so by themselves; programs that import the library call this
    before they first compile. Where JAX's own cache was switched on or off, by `JAX_COMPILATION_CACHE_DIR`,
    `JAX_ENABLE_COMPILATION_CACHE` or `jax.config`, it stays so unless a directory is given here; and so do the
    least time and size of what JAX keeps, which are 0 otherwise.

    Args:
        directory: the folder, which is made; by default `compiled` in `$BAYESRL_CACHE`, or in `bayesrl` in the user's
            cache folder. Whoever can write to it can make this process run anything: share it with nobody.
        max_bytes: greatest size of the folder; what was not used for the longest time goes.

    Returns:
        The folder, or None where the cache is switched off or cannot be had: a `CacheWarning` says why, once.

    Raises:
        CacheError: `max_bytes` is no integer of at least 1.

    Example:
        >>> import tempfile, jax, bayesrl
        >>> folder = bayesrl.use_cache(tempfile.mkdtemp())
        >>> float(jax.jit(lambda x: 3 * x)(2.0))
        6.0
        >>> len(list(folder.iterdir())) > 0
        True
    """
    import jax

    before = jax.config.jax_compilation_cache_dir
    if directory is None:
        if not jax.config.jax_enable_compilation_cache:
            return None
        if before is not None and Path(before) != _Used.folder:
            return Path(before)
    folder = Path(directory).absolute() if directory is not None else compiled_folder().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        _tell(folder, f"compiled programs cannot be kept in {folder} ({error.strerror}); {_ELSEWHERE}")
        return None
    _Used.folder, _Used.max_bytes = folder, max_bytes
    _install(str(folder))
    return folder


def use_by_default() -> None:
    """Keep compiled programs, unless somebody has said where to keep them or that none be kept."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        use_cache()


def use_in_notebooks() -> None:
    """Keep compiled programs where the process is a Jupyter kernel; without JAX there is nothing to keep yet."""
    if "jax" in sys.modules and in_notebook():
        use_by_default()


class _Used:
    """Which folder is used, and how large it may get."""

    folder: Path | None = None
    max_bytes = MAX_BYTES


def _install(folder: str) -> None:
    """Let JAX keep what it compiles in the folder, by way of `Entries`."""
    import jax
    from jax._src import compilation_cache
    from jax.experimental.compilation_cache import compilation_cache as public

    for name, default, own in (
        ("jax_persistent_cache_min_compile_time_secs", 1.0, 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", 0, -1),
        # XLA's own caches on GPUs have no limit, and hold little that the compiled programs do not.
        ("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir", "none"),
    ):
        if name.upper() not in os.environ and getattr(jax.config, name) == default:
            jax.config.update(name, own)
    if not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    made_by_jax: Callable[[str], Any] = compilation_cache.get_file_cache
    if not hasattr(made_by_jax, "ours"):

        def get_file_cache(path: str) -> Any:
            if Path(path) != _Used.folder or jax.config.jax_compilation_cache_check_contents:
                return made_by_jax(path)
            return Entries(Path(path), _Used.max_bytes), path

        get_file_cache.ours = True  # type: ignore[attr-defined]
        compilation_cache.get_file_cache = get_file_cache
    public.reset_cache()  # JAX opens a cache once; it is opened anew when something is next compiled


class Entries:
    """Compiled programs in a folder, as JAX reads and writes them. What fails is told once, and never raised.

    Args:
        folder: which exists.
        max_bytes: its greatest size.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from bayesrl.cache import Entries
        >>> entries = Entries(Path(tempfile.mkdtemp()), 1000)
        >>> entries.put("jit_f-" + 64 * "0", b"a program")
        >>> entries.get("jit_f-" + 64 * "0"), entries.get("jit_f-" + 64 * "1")
        (b'a program', None)
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._path, self.max_bytes = folder, max_bytes
        self._writes = True
        self._size = _shrink(folder, max_bytes)

    def get(self, key: str) -> bytes | None:
        """Read a program, or give None where there is none that can be used."""
        path = self._file(key)
        try:
            content = read_file(path)
        except RunFolderError as error:
            self._give_up(f"compiled programs cannot be read from {self._path} ({error}); {_ELSEWHERE}")
            return None
        if content is None:
            return None
        value = content[len(_HEAD) + 4 :]
        if content[: len(_HEAD)] != _HEAD or content[len(_HEAD) : len(_HEAD) + 4] != _checksum(value):
            _tell(
                self._path,
                f"the compiled program {path.name} in {self._path} is damaged, and is compiled anew; "
                "`bayesrl cache --clear` empties the folder",
            )
            return None
        with suppress(OSError):
            os.utime(path, follow_symlinks=False)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a program, in the place of what was there."""
        if not self._writes:
            return
        content = b"".join((_HEAD, _checksum(value), value))
        if len(content) > self.max_bytes:
            self._give_up(
                f"a compiled program of {len(content):,} bytes is too large for {self._path}, which may hold "
                f"{self.max_bytes:,}; allow more by bayesrl.use_cache(max_bytes=...)"
            )
            return
        temporary = None
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self._path, prefix=_WRITING)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, self._file(key))
        except OSError as error:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)
            self._give_up(f"compiled programs cannot be kept in {self._path} ({error.strerror}); {_ELSEWHERE}")
            return
        self._size += len(content)
        if self._size > self.max_bytes:
            self._size = _shrink(self._path, self.max_bytes)

    def _file(self, key: str) -> Path:
        name, digest = (re.sub(r"[^A-Za-z0-9_.]", "_", part) for part in key.rpartition("-")[::2])
        return self._path / f"{name[:80]}-{digest[:80]}{_SUFFIX}"

    def _give_up(self, why: str) -> None:
        self._writes = False
        _tell(self._path, why)


def _checksum(value: bytes) -> bytes:
    return zlib.crc32(value).to_bytes(4, "big")


_told: set[Path] = set()


def _tell(folder: Path, why: str) -> None:
    """Warn once of each folder."""
    if folder not in _told:
        _told.add(folder)
        warnings.warn(why, CacheWarning, stacklevel=2)


# ---- what a folder holds ----------------------------------------------------------------------


class CacheInfo(NamedTuple):
    """How many compiled programs a folder holds, and their size in bytes."""

    entries: int
    size: int


def cache_info(folder: Path) -> CacheInfo:
    """Tell what a folder holds: files of ours and of JAX's own cache, nothing else that may lie there."""
    found = list(_files(folder))
    return CacheInfo(sum(not entry.name.endswith("-atime") for entry, _ in found), sum(told[1] for _, told in found))


def clear(folder: Path) -> CacheInfo:
    """Delete the compiled programs in a folder, ours and JAX's own, and nothing else that may lie there.

    Returns:
        What was deleted.

    Raises:
        CacheError: a file cannot be deleted.
    """
    entries = size = 0
    for entry, (_, own) in list(_files(folder)):
        try:
            os.unlink(entry.path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CacheError(
                f"cannot delete {entry.path}: {error.strerror}; the folder must be one that you may write to"
            ) from error
        entries, size = entries + (not entry.name.endswith("-atime")), size + own
    return CacheInfo(entries, size)


def _files(folder: Path) -> Iterator[tuple[os.DirEntry[str], tuple[float, int]]]:
    """Find the compiled programs in a folder, each with its time of use and its size."""
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if _ENTRY.fullmatch(entry.name):
                    with suppress(OSError):
                        told = entry.stat(follow_symlinks=False)
                        yield entry, (told.st_mtime, told.st_size)
    except OSError:
        return


def _shrink(folder: Path, max_bytes: int) -> int:
    """Delete what was not used for the longest time where a folder is over its limit, and give its size."""
    found = [(told, entry.path) for entry, told in _files(folder) if entry.name.endswith(_SUFFIX)]
    size = sum(told[1] for told, _ in found)
    if size > max_bytes:
        for (_, own), path in sorted(found):
            if size <= _KEPT_SHARE * max_bytes:
                break
            with suppress(OSError):
                os.unlink(path)
                size -= own
    with suppress(OSError):
        for left in folder.glob(f"{_WRITING}*"):  # by processes that were killed as they wrote
            if time.time() - left.lstat().st_mtime > _STALE_SECONDS:
                left.unlink()
    return size
