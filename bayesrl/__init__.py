"""KL-regularised reinforcement learning as Bayesian inference, on NumPyro."""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesrl import control, errors, guides, lm, objectives
    from bayesrl.cache import use_cache
    from bayesrl.certainty.bracket import evidence
    from bayesrl.certainty.comparison import compare
    from bayesrl.certainty.diagnosis import diagnose
    from bayesrl.certainty.ranks import Calibration
    from bayesrl.certainty.regions import Coverage, coverage
    from bayesrl.certainty.simulation import by_enumeration, by_fit, calibrate
    from bayesrl.certainty.sweeps import frontier
    from bayesrl.certainty.verdicts import Comparison, Diagnosis, Evidence, Frontier, Section
    from bayesrl.core.density import Density, log_density
    from bayesrl.core.estimates import Estimate, Estimates, Interval
    from bayesrl.core.handlers import tilt, whole
    from bayesrl.core.primitives import environment, reward
    from bayesrl.datatree import to_datatree
    from bayesrl.engines.enumeration import enumerate_posterior
    from bayesrl.engines.fitting import fit
    from bayesrl.engines.rejecting import rejection
    from bayesrl.engines.reopening import load, resume
    from bayesrl.engines.weighted import WeightedDraws
    from bayesrl.engines.weighting import importance
    from bayesrl.posterior import Posterior
    from bayesrl.problem import LearningProblem, Problem, ready_learning, ready_model
    from bayesrl.report.writing import write_report

__version__ = "0.1.0"

# A name is imported when it is first asked for, so that the command line answers before JAX is there.
_HOMES = {
    "bayesrl.cache": ("use_cache",),
    "bayesrl.certainty.bracket": ("evidence",),
    "bayesrl.certainty.comparison": ("compare",),
    "bayesrl.certainty.diagnosis": ("diagnose",),
    "bayesrl.certainty.ranks": ("Calibration",),
    "bayesrl.certainty.regions": ("Coverage", "coverage"),
    "bayesrl.certainty.simulation": ("by_enumeration", "by_fit", "calibrate"),
    "bayesrl.certainty.sweeps": ("frontier",),
    "bayesrl.certainty.verdicts": ("Comparison", "Diagnosis", "Evidence", "Frontier", "Section"),
    "bayesrl.core.density": ("Density", "log_density"),
    "bayesrl.core.estimates": ("Estimate", "Estimates", "Interval"),
    "bayesrl.core.handlers": ("tilt", "whole"),
    "bayesrl.core.primitives": ("environment", "reward"),
    "bayesrl.datatree": ("to_datatree",),
    "bayesrl.engines.enumeration": ("enumerate_posterior",),
    "bayesrl.engines.fitting": ("fit",),
    "bayesrl.engines.rejecting": ("rejection",),
    "bayesrl.engines.reopening": ("load", "resume"),
    "bayesrl.engines.weighted": ("WeightedDraws",),
    "bayesrl.engines.weighting": ("importance",),
    "bayesrl.posterior": ("Posterior",),
    "bayesrl.problem": ("LearningProblem", "Problem", "ready_learning", "ready_model"),
    "bayesrl.report.writing": ("write_report",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_KNOWN_TO = dict.fromkeys(("load", "resume"), ("control", "lm"))
"""What run folders may speak of: guides and objectives of the domains."""

__all__ = [
    "Calibration",
    "Comparison",
    "Coverage",
    "Density",
    "Diagnosis",
    "Estimate",
    "Estimates",
    "Evidence",
    "Frontier",
    "Interval",
    "LearningProblem",
    "Posterior",
    "Problem",
    "Section",
    "WeightedDraws",
    "by_enumeration",
    "by_fit",
    "calibrate",
    "compare",
    "control",
    "coverage",
    "diagnose",
    "enumerate_posterior",
    "environment",
    "errors",
    "evidence",
    "fit",
    "frontier",
    "guides",
    "importance",
    "lm",
    "load",
    "log_density",
    "objectives",
    "ready_learning",
    "ready_model",
    "rejection",
    "resume",
    "reward",
    "tilt",
    "to_datatree",
    "use_cache",
    "whole",
    "write_report",
]

if not TYPE_CHECKING:  # type checkers read the imports above, and so know which names there are

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the library, when it is first asked for."""
        whole = f"{__name__}.{name}"
        if name not in _HOME and (name.startswith("_") or importlib.util.find_spec(whole) is None):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for room in _KNOWN_TO.get(name, ()):
            importlib.import_module(f"{__name__}.{room}")
        found = getattr(importlib.import_module(_HOME[name]), name) if name in _HOME else importlib.import_module(whole)
        if "ipykernel" in sys.modules:
            importlib.import_module("bayesrl.cache").use_in_notebooks()
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
