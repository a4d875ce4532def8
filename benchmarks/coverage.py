"""Coverage of the intervals of `evidence` on random programs, enumeration used as truth only.

Programs of 2 to 5 dependent sites with supports of 2 to 5 values, in 0 or 3 contexts, a quarter of them
with nature, seen or hidden; β from .05 to 5; fits stopped between 3 and 400 steps. `evidence` may not
enumerate. Coverage of a calibrated interval is over the fits for which one was given; a wide interval
buys nothing, so that the median width stands beside it.
"""

import sys
from collections import defaultdict
from typing import Any

import jax
import numpy as np

from bayesrl.diagnostics.evidence.bounds import evidence
from bayesrl.diagnostics.evidence.result import Evidence
from benchmarks.random_fits import Fitted, Fitter
from benchmarks.random_programs import make_shape
from benchmarks.results import table, target

SHAPES, PER_SHAPE = 16, 125
WITH_NATURE = 4
NAMES = {
    "objective": "J",
    "reward": "E[R]",
    "kl": "KL(q‖π₀)",
    "log_evidence": "log Z",
    "kl_reverse": "KL(q‖p*)",
    "kl_forward": "KL(p*‖q)",
}


def run() -> str:
    """Fit, bracket, and compare with the truth."""
    found: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    draws: list[int] = []
    hindsight: list[bool] = []
    rng = np.random.default_rng(20)
    for s in range(SHAPES):
        nature = s < WITH_NATURE
        fitter = Fitter(jax.random.key(s), make_shape(rng, nature=nature), rng)
        for i, fitted in enumerate(fitter.fits(rng, PER_SHAPE)):
            key = jax.random.fold_in(jax.random.key(1000 + s), i)
            # Hindsight enumerates once per draw of nature, which is slow: one program of each shape has to do.
            options: dict[str, Any] = {"method": "hindsight", "max_count": 2**17 if i == 0 else 1}
            bracket = evidence(key, fitted.posterior, **(options if nature else {"method": "rejection"}))
            _compare(found, bracket, fitted)
            draws.append(bracket.num_samples)
            if nature and bracket.upper is not None:
                hindsight.append(fitted.truth.optimum <= float(bracket.optimum.conservative_upper) + 1e-5)
        print(f"{s + 1} of {SHAPES} shapes", file=sys.stderr, flush=True)
    return _told(found, draws, hindsight)


def _compare(found: dict[str, list[tuple[Any, ...]]], bracket: Evidence, fitted: Fitted) -> None:
    for name in NAMES:
        interval = getattr(bracket, name)
        if interval is None:
            continue
        truth = getattr(fitted.truth, name)
        calibrated = np.isfinite(interval.upper)
        inside = float(interval.lower) <= truth <= float(interval.upper) if calibrated else None
        safe = float(interval.conservative_lower) <= truth <= float(interval.conservative_upper)
        width = float(interval.upper - interval.lower)
        found[name].append((inside, width, safe, float(interval.conservative_upper - interval.conservative_lower)))


def _told(found: dict[str, list[tuple[Any, ...]]], draws: list[int], hindsight: list[bool]) -> str:
    rows, met = [], True
    for name, label in NAMES.items():
        inside, width, safe, wide = zip(*found[name], strict=True)
        given = [value for value in inside if value is not None]
        calibrated, conservative = float(np.mean(given)), float(np.mean(safe))
        met &= 0.93 <= calibrated <= 0.97 and conservative >= 0.94
        median = float(np.nanmedian(width))
        rows.append(
            [
                label,
                len(inside),
                f"{len(given) / len(inside):.0%}",
                f"{calibrated:.1%}",
                f"{median:.2g}",
                f"{conservative:.1%}",
                f"{float(np.median(wide)):.2g}",
            ]
        )
    header = [
        "quantity",
        "fits",
        "calibrated given",
        "it covers",
        "median width",
        "conservative covers",
        "median width",
    ]
    words = target("calibrated intervals cover in 93–97%, conservative ones in at least 94%", met=met)
    most = f"Draws: median {int(np.median(draws)):,}, most {max(draws):,}."
    below = f"The hindsight limit lies above the optimum of control in {sum(hindsight)} of {len(hindsight)} programs."
    return f"{table(header, rows)}\n\n{__doc__.partition('\n\n')[2].strip()}\n\n{most} {below}\n\n{words}"
