"""What an answer is expected to tell: mutual information between outcomes and what is unknown."""

from typing import Any


def outcome_information(probs: Any, is_best: Any = None, weights: Any = None) -> Any:
    """Compute the mutual information between outcomes and all that is unknown, or which item is the best.

    About everything unknown θ: I(y; θ) = H(E p) − E H(p), with p the chances of the outcomes given θ. About the best
    item b: I(y; b) = H(E p) − Σ_b P(b)·H(E[p | b]), which is never more.

    Args:
        probs: chances of the outcomes in each draw of θ, [draws, ..., outcomes]; NumPy arrays give NumPy arrays.
        is_best: which item is the best in each draw, [draws, items]; None asks about θ.
        weights: of the draws, [draws], summing to 1; by default, all alike.

    Returns:
        Nats, [...].

    References:
        Houlsby, Huszár, Ghahramani & Lengyel (2011), "Bayesian active learning for classification and preference
        learning", equation 2; Hennig & Schuler (2012), "Entropy search for information-efficient global optimization",
        for the best.
    """
    xp = probs.__array_namespace__()
    weights = xp.full(probs.shape[0], 1.0 / probs.shape[0]) if weights is None else weights
    if is_best is None:
        rest = xp.tensordot(weights, _entropy(probs, xp), 1)
    else:
        shares = xp.where(is_best, weights[:, None], 0.0).T
        mass = shares.sum(1)
        # An item that is never the best has no share, and nothing to divide by.
        given = xp.tensordot(shares / xp.where(mass > 0, mass, 1.0)[:, None], probs, 1)
        rest = xp.tensordot(mass, _entropy(given, xp), 1)
    return xp.maximum(_entropy(xp.tensordot(weights, probs, 1), xp) - rest, 0.0)


def _entropy(probs: Any, xp: Any) -> Any:
    """H(p) = −Σ p·log p over the last axis, nats."""
    return -(probs * xp.log(xp.where(probs > 0, probs, 1.0))).sum(-1)
