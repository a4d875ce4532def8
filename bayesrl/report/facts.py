"""What the report knows of one fit: everything it shows, found once."""

from dataclasses import dataclass

import numpy as np

from bayesrl.diagnostics.evidence.result import Evidence
from bayesrl.diagnostics.interval_text import has_mean
from bayesrl.diagnostics.results import Diagnosis, Frontier
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.posterior.posterior import Posterior


@dataclass(frozen=True)
class ReportContents:
    """What is known of one fit; None where something is not.

    Attributes:
        name: of the fit.
        posterior: fitted or loaded.
        whole: its best restarts over all data, with draws.
        diagnosis: its verdict.
        frontier: of a fit at several β.
        target: p*, where it can be enumerated.
        training: the evidence on the data of the fit, that of the diagnosis where it has one, with metrics.
        held_out: the same on other data.
        gold: name of the metric that the reward stands for.
        missing: what is not there, and why; sentences.
        made: how it was made, as rows of (setting, value).
        command: what makes it again.
        about: one line on what the problem is.
    """

    name: str
    posterior: Posterior
    whole: Posterior | None = None
    diagnosis: Diagnosis | None = None
    frontier: Frontier | None = None
    target: WeightedDraws | None = None
    training: Evidence | None = None
    held_out: Evidence | None = None
    gold: str | None = None
    missing: tuple[str, ...] = ()
    made: tuple[tuple[str, str], ...] = ()
    command: str = ""
    about: str = ""

    @property
    def evidence(self) -> Evidence | None:
        """What the diagnosis rests on."""
        return None if self.diagnosis is None else self.diagnosis.evidence

    @property
    def optimum(self) -> np.ndarray | None:
        """J* of each β, reward units, [*beta] flat; None where it is not known on both sides."""
        rows = [] if self.evidence is None else self.evidence.rows
        if rows and all(row.gap is not None and has_mean(row.optimum) for row in rows):
            return np.asarray([float(row.optimum.mean) for row in rows])
        return None
