"""The cache of compiled programs: compile once on a machine, then read the program from a folder.

It is JAX's persistent compilation cache with our own files. Each file is written in one step, so that two processes can
share a folder. Each has a checksum, and a damaged one is compiled again and replaced. When the folder is full, the
least recently used files go. JAX's own files have only the last of these features, and need a further package for it.
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
"""A folder over its limit is emptied down to this share of the limit."""

_SUFFIX, _WRITING = ".compiled", ".writing-"
_HEAD = b"bayesrl1"
_ENTRY = re.compile(r".*-[0-9a-f]{64}(\.compiled|-cache|-atime)")
"""Names of our files, and of those of JAX's own cache."""

_JAX_FOLDER, _JAX_ENABLED = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
_ELSEWHERE = f"name another folder by bayesrl.use_cache(directory) or in ${CACHE}, or keep nothing by {_JAX_ENABLED}=0"
_STALE_SECONDS = 3600.0


class CacheWarning(UserWarning):
    """The cache of compiled programs does not work; the program continues without it."""


def cache_folder() -> Path:
    """The folder for files that can be made again: `$BAYESRL_CACHE`, or `bayesrl` in the user's cache folder."""
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
    """The default folder of compiled programs; JAX's own environment variable comes first."""
    own = os.environ.get(_JAX_FOLDER)
    return Path(own) if own else cache_folder() / "compiled"


@checked(CacheError)
def use_cache(directory: Location | None = None, *, max_bytes: Bytes = MAX_BYTES) -> Path | None:
    """Keep compiled programs in a folder, so that this machine compiles each program only once.

    The command line, the ready models and notebooks do this for you. A program that imports the library should call
    this before it first compiles. If you switched JAX's own cache on or off, by `JAX_COMPILATION_CACHE_DIR`,
    `JAX_ENABLE_COMPILATION_CACHE` or `jax.config`, your setting stays unless you pass a directory here. Your settings
    for the least time and size of JAX's entries also stay; otherwise they become 0.

    Args:
        directory: the folder, created if necessary; by default `compiled` in `$BAYESRL_CACHE`, or in `bayesrl` in the
            user's cache folder. Whoever can write to it can make this process run anything: share it with nobody.
        max_bytes: greatest size of the folder; beyond it, the least recently used programs go.

    Returns:
        The folder, or None if the cache is switched off or does not work; a `CacheWarning` then says why, once.

    Raises:
        CacheError: `max_bytes` is not an integer of at least 1.

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
    """Keep compiled programs, unless the user has configured JAX's cache."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        use_cache()


def use_in_notebooks() -> None:
    """Keep compiled programs in a Jupyter kernel; while JAX is not loaded, there is nothing to keep."""
    if "jax" in sys.modules and in_notebook():
        use_by_default()


class _Used:
    """The current folder and its greatest size."""

    folder: Path | None = None
    max_bytes = MAX_BYTES


def _install(folder: str) -> None:
    """Make JAX keep its compiled programs in the folder, through `Entries`."""
    import jax
    from jax._src import compilation_cache
    from jax.experimental.compilation_cache import compilation_cache as public

    for name, default, own in (
        ("jax_persistent_cache_min_compile_time_secs", 1.0, 0.0),
        # 0 lets JAX raise the limit for some file systems, −1 does not.
        ("jax_persistent_cache_min_entry_size_bytes", 0, -1),
        # XLA's own GPU caches have no size limit, and add little to the compiled programs.
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
            # The user may have set another folder since, which JAX's own cache then serves.
            if Path(path) != _Used.folder or jax.config.jax_compilation_cache_check_contents:
                return made_by_jax(path)
            return Entries(Path(path), _Used.max_bytes), path

        # JAX has no public way to name another store, so this replaces the function that opens it.
        get_file_cache.ours = True  # type: ignore[attr-defined]
        compilation_cache.get_file_cache = get_file_cache
    public.reset_cache()  # JAX opens its cache only once; the next compilation opens it again


class Entries:
    """Compiled programs in a folder, with JAX's cache interface. Failures give one warning and never raise.

    Args:
        folder: an existing folder.
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
        """Read a program, or return None if there is no usable one."""
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
            os.utime(path, follow_symlinks=False)  # the modification time counts as the last use
        return value

    def put(self, key: str, value: bytes) -> None:
        """Store a program, replacing an old one of the same key."""
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
        # Files of other processes count only when the folder is next read, in `_shrink`.
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
    """Warn once per folder."""
    if folder not in _told:
        _told.add(folder)
        warnings.warn(why, CacheWarning, stacklevel=2)


# ---- what a folder holds ----------------------------------------------------------------------


class CacheInfo(NamedTuple):
    """The number of compiled programs in a folder, and their size in bytes."""

    entries: int
    size: int


def cache_info(folder: Path) -> CacheInfo:
    """Count the compiled programs in a folder, ours and JAX's own; ignore other files."""
    found = list(_files(folder))
    return CacheInfo(sum(not entry.name.endswith("-atime") for entry, _ in found), sum(told[1] for _, told in found))


def clear(folder: Path) -> CacheInfo:
    """Delete the compiled programs in a folder, ours and JAX's own, and no other files.

    Returns:
        The number and size of the deleted programs.

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
    """Find the compiled programs in a folder, each with its time of last use and its size."""
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
    """Delete the least recently used programs of a folder over its limit, and return its size."""
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
        for left in folder.glob(f"{_WRITING}*"):  # left by processes that were killed while writing
            if time.time() - left.lstat().st_mtime > _STALE_SECONDS:
                left.unlink()
    return size
