"""A command keeps its memory, and other processes are left alone."""

import subprocess
import sys

_SCRIPT = """
import resource, sys
{before}
from bayesrl.cli.memory import keep_memory
keep_memory()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(before: str = "") -> int:
    script = _SCRIPT.format(before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_is_used_again_without_asking_the_system() -> None:
    if not sys.platform.startswith("linux"):
        return
    assert _faults() < 100


def test_who_has_set_the_library_of_c_is_heard() -> None:
    if not sys.platform.startswith("linux"):
        return
    assert _faults("import os; os.environ['MALLOC_ARENA_MAX'] = '4'") > 100
