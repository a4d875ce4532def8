"""The best, the median and the worst draws of a fit, as rows of text."""

from collections.abc import Callable, Iterable

import numpy as np

from bayesrl.display.formatting import format_number, truncate
from bayesrl.display.tables import Table
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.site_values import site_values, value_text

SHOWN = 3
_LOOKED_AT = 500


def extreme_draws(one: Posterior, sites: Iterable[str]) -> Table:
    """List the best, the median and the worst draws with their rewards and how far they are from the prior.

    Without rewards the best are those that explain the data best.

    Of draws that read alike one is listed. Where there are contexts, a draw is of one context.

    Args:
        one: a posterior of one β and restart, with its draws.
        sites: whose values are shown.
    """
    held = one.statistics
    shape = np.shape(held["total_reward"])
    contexts = int(np.prod(shape[2:], dtype=int))
    rewarded = one.beta is not None
    score = np.asarray(held["total_reward"] if rewarded else _log_likelihood(one), float).ravel()
    ratio = (np.asarray(held["log_q"], float) - np.asarray(held["log_prior"], float)).ravel()
    values = {name: site_values(one, name).values for name in sites}

    def read(place: int) -> tuple[str, ...]:
        draw, context = divmod(place, contexts)
        where = [f"{context:,}"] if contexts > 1 else []
        read_as = [(own[draw, context], value_text(one, name, own[draw, context])) for name, own in values.items()]
        cells = [truncate(value if text is None else text) for value, text in read_as]
        return (format_number(float(score[place])), format_number(float(ratio[place]), 3), *where, *cells)

    order = np.argsort(-score, kind="stable")
    rows = []
    best = _distinct(order, read, SHOWN)
    worst = [cells for cells in _distinct(order[::-1], read, SHOWN) if cells not in best]
    for rank, found in (("best", best), ("median", [read(int(order[len(order) // 2]))]), ("worst", worst[::-1])):
        rows += [(rank, *cells) for cells in found]
    headings = ("", "reward" if rewarded else "log p(y|x)", "log q/π₀", *(["context"] if contexts > 1 else []), *values)
    return Table(headings, rows, "lrr" + "r" * (contexts > 1) + "l" * len(values))


def _log_likelihood(one: Posterior) -> np.ndarray:
    """Give log p(y|x) of the draws of a program without rewards: what its weights hold beside log π₀ − log q."""
    weight, log_prior, log_q = (np.asarray(one.statistics[k], float) for k in ("log_weight", "log_prior", "log_q"))
    return weight - log_prior + log_q


def _distinct(places: np.ndarray, read: Callable[[int], tuple[str, ...]], wanted: int) -> list[tuple[str, ...]]:
    found: dict[tuple[str, ...], None] = {}
    for place in places[:_LOOKED_AT]:
        found.setdefault(read(int(place)))
        if len(found) == wanted:
            break
    return list(found)
