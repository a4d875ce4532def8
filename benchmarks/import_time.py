"""Time of importing every public name of bayesrl against `import numpyro`.

`import bayesrl` itself imports a name when it is asked for. Fresh interpreters in turn; the time is that of the whole
process, the median of the pairs' ratios.
"""

import statistics
import subprocess
import sys
import time

from benchmarks.results import table, target
from benchmarks.timing import median_ratio

REPEATS = 9
LIMIT = 1.3
OWN, STOCK = "from bayesrl import *", "import numpyro"
LEFT_OUT = ("arviz", "matplotlib", "sklearn")


def run() -> str:
    """Import in fresh interpreters, and check what else was imported."""
    _seconds(STOCK), _seconds(OWN)  # fill the disk's cache
    pairs = [(_seconds(OWN), _seconds(STOCK)) for _ in range(REPEATS)]
    own, stock = ([pair[i] for pair in pairs] for i in (0, 1))
    ratio = median_ratio(own, stock)
    loaded = _loaded()
    rows = [
        [f"`{STOCK}`", f"{statistics.median(stock):.2f} s", ""],
        [f"`{OWN}`", f"{statistics.median(own):.2f} s", f"{ratio:.2f}×"],
    ]
    what = f"at most {LIMIT}× `import numpyro`, without {', '.join(LEFT_OUT)}"
    words = target(what, met=ratio <= LIMIT and not loaded, why_not=f"{ratio:.2f}×, and {loaded or 'none'} came along")
    return f"{table(['', 'median', 'ratio'], rows)}\n\n{__doc__.partition('\n\n')[2].strip()}\n\n{words}"


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout  # noqa: S603


def _seconds(code: str) -> float:
    start = time.perf_counter()
    _python(code)
    return time.perf_counter() - start


def _loaded() -> list[str]:
    """Name modules that should not have been imported."""
    return _python(f"import sys; {OWN}; print(*[m for m in {LEFT_OUT!r} if m in sys.modules])").split()
