"""Log Z from both kinds of runs: free ones, and those that hold a draw of p*."""

from typing import NamedTuple

import numpy as np
from scipy.special import expit

_HALVINGS = 60


class Bridge(NamedTuple):
    """Log Z of each context, [contexts], and how much each run moves it, [runs, contexts] of both kinds, nats."""

    log_z: np.ndarray
    of_forward: np.ndarray
    of_backward: np.ndarray


def bridge(forward: np.ndarray, backward: np.ndarray) -> Bridge:
    """Estimate log Z from log Ẑ of free and of conditional runs.

    Conditional runs have the law of free ones times Ẑ/Z, so E[Z/(Ẑ + Z)] over them is E[Ẑ/(Ẑ + Z)] over free ones:
    the root in Z is Bennett's estimate, and its noise is least where both kinds are equally many.

    Args:
        forward: of free runs, [runs, contexts], nats.
        backward: of conditional runs, [each, runs, contexts], nats; those of one chain stand along the first axis.

    References:
        Bennett (1976), "Efficient estimation of free energy differences from Monte Carlo data"; Meng & Wong (1996),
        "Simulating ratios of normalizing constants via a simple identity".
    """
    low = np.minimum(forward.min(0), backward.min((0, 1)))
    high = np.maximum(forward.max(0), backward.max((0, 1)))
    low = np.where(np.isfinite(low), low, high - 1e3)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = expit(forward - middle).mean(0) > expit(middle - backward).mean((0, 1))
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    root = (low + high) / 2
    ours, theirs = expit(forward - root), expit(root - backward)
    slope = (ours * (1 - ours)).mean(0) + (theirs * (1 - theirs)).mean((0, 1))
    own = (ours - ours.mean(0)) / slope
    # Runs of one chain depend on one another, so their mean is one number.
    chained = -(theirs.mean(0) - theirs.mean((0, 1))) / slope
    return Bridge(root, own, chained)
