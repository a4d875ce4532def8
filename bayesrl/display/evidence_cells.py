"""The numbers of a fit as text: what each column of a table of evidence says, and which columns a table has."""

import math
from typing import TYPE_CHECKING

from bayesrl.display.formatting import (
    UNKNOWN,
    format_beta,
    format_bracket,
    format_distance,
    format_draws,
    format_estimate,
    format_gap,
    format_number,
    format_relative_gap,
    format_share,
    has_mean,
)
from bayesrl.display.tables import Table

if TYPE_CHECKING:
    from typing import Any as Evidence  # of a floor above


def evidence_cells(row: "Evidence") -> dict[str, str]:
    """Write every quantity at one temperature as text, by heading; D is the divergence in the place of KL."""
    error, scale = float(row.objective.se), 1.0 if row.beta is None else float(row.beta)
    # J itself is a lower end of J*, so a lower end says something only if it exceeds J.
    end_above = float(row.optimum.conservative_lower) > float(row.objective.mean)
    known = has_mean(row.optimum) or end_above or math.isfinite(float(row.optimum.conservative_upper))
    log_z = row.log_evidence if known or has_mean(row.log_evidence) else None
    limits = row.log_evidence or row.optimum * (1 / scale)
    told = row.best_of is None  # otherwise J is not what the fit maximises
    return {
        "β": format_beta(None if row.beta is None else scale),
        "J": format_estimate(row.objective) if told else UNKNOWN,
        "J*": format_bracket(row.optimum if known else None, error) if told else UNKNOWN,
        "gap": format_gap(row.gap, row.optimum, row.objective),
        "relative gap": format_relative_gap(row.relative_gap),
        "E[R]": UNKNOWN if row.beta is None else format_estimate(row.reward),
        "D": format_estimate(row.divergence),
        "KL": format_estimate(row.kl),
        "log p(y)": format_estimate(row.log_marginal),
        "log Z": format_bracket(log_z, error / scale),
        "from below": UNKNOWN if row.method == "draws" else format_number(float(limits.conservative_lower)),
        "from above": UNKNOWN if row.upper is None else format_number(float(limits.conservative_upper)),
        "KL(q‖p*)": format_distance(row.kl_reverse),
        "KL(p*‖q)": format_distance(row.kl_forward),
        "ESS": format_draws(float(row.ess)),
        "k̂": format_number(float(row.khat), 3),
        "of": f"{row.num_weighed:,}",
        "missed mass": format_share(float(row.missed_mass)),
    }


def objective_columns(evidence: "Evidence") -> Table:
    """One row per temperature: J, J* and the gap between them; for a fit to the best of n, its distance to that."""
    if evidence.best_of is not None:
        return _table(evidence, ("β", "gap", "relative gap", "E[R]", "KL"), {"gap": "β·KL(q‖pₙ)"})
    given = () if evidence.log_marginal is None else ("log p(y)",)
    other = () if evidence.regularizer == "kl" else ("D",)
    names = ("β", "J", "J*", "gap", "relative gap", "E[R]", *other, "KL", *given)
    return _table(evidence, names, {"D": evidence.symbol})


def weight_columns(evidence: "Evidence") -> Table:
    """One row per temperature: limits of log Z from both sides, the distance to p*, and the weights."""
    if evidence.best_of is not None:
        renamed = {"KL(q‖p*)": "KL(q‖pₙ)", "KL(p*‖q)": "KL(pₙ‖q)"}
        return _table(evidence, ("β", *renamed, "missed mass"), renamed)
    of_kl, both = ("log Z",) if evidence.regularizer == "kl" else (), ("from below", "from above")
    apart = ("KL(q‖p*)", "KL(p*‖q)") if evidence.regularizer == "kl" else ("KL(p*‖q)",)
    below = "from below" if evidence.log_evidence is not None else "J*/β from below"
    return _table(evidence, ("β", *of_kl, *both, *apart, "ESS", "k̂", "missed mass"), {"from below": below})


def _table(evidence: "Evidence", names: tuple[str, ...], renamed: dict[str, str]) -> Table:
    cells = [row.cells() for row in evidence.rows]
    headings = [renamed.get(name, name) for name in names]
    return Table(headings, [[row[name] for name in names] for row in cells])
