"""Show a posterior in a few lines and one table, in terminals and notebooks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bayesrl.display.formatting import pluralize
from bayesrl.display.tables import DisplayBlock, Line, estimates_table
from bayesrl.statistics.regularizer_names import learns_directly, regularizer_of, regularizer_symbol


def summary_blocks(posterior: Any) -> Sequence[DisplayBlock]:
    """Show the size of the fit, J, E[R] and KL, and the sites that it has draws of."""
    steps = posterior.history.get("step", np.zeros(0))
    done = int(steps[-1]) if len(steps) else 0
    fits = [pluralize(size, "temperature") for size in posterior._fit_shape[:-1]]
    fits.append(pluralize(posterior.num_restarts, "restart"))
    made = "trained elsewhere" if posterior.trained_elsewhere else pluralize(done, "step")
    told = f"Posterior: {' × '.join(fits)}, {made}"
    blocks: list[DisplayBlock] = [Line(told + (", stopped before it was done" if posterior.interrupted else ""))]
    if posterior.statistics:
        regularizer = regularizer_of(posterior.settings)
        blocks.append(estimates_table(posterior.beta, posterior.estimates, regularizer))
        formula = f"J = E[R] − β·{regularizer_symbol(*regularizer)}"
        units = f"{formula} and E[R] in reward units, KL in nats" if posterior.beta is not None else "all in nats"
        if (n := posterior.settings.get("best_of_n")) is not None:
            formula = f"the fit distils the best of {n}, and does not maximise {formula}"
            units = f"{formula} and E[R] in reward units, KL in nats"
        if (what := posterior.settings.get("direct")) is not None:
            blocks.append(Line(learns_directly(what)))
        of = f"means ± standard errors of the {pluralize(num_draws(posterior), 'draw')} that it carries"
        blocks.append(Line(f"({units}; {of}. bayesrl.evidence tells them of more, or exactly, beside J*)"))
    if posterior.draws:
        lead = len(posterior._fit_shape) + 1
        sites = (f"{name} {list(np.shape(values)[lead:]) or ''}".strip() for name, values in posterior.draws.items())
        blocks.append(Line(f"Draws: {', '.join(sites)}"))
    if posterior.programs is None:
        blocks.append(Line("Loaded without its policy: it shows what was saved, and cannot draw anew."))
    return blocks


def num_draws(posterior: Any) -> int:
    """Return how many draws per β and restart a posterior carries."""
    return int(np.shape(posterior.statistics["log_weight"])[len(posterior._fit_shape)])
