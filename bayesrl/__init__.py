"""KL-regularised reinforcement learning as Bayesian inference, on NumPyro."""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesrl import control, errors, guides, lm, objectives, preferences, rewards
    from bayesrl.cache import use_cache
    from bayesrl.core.density import log_density
    from bayesrl.core.handlers import full_data, power, tilt
    from bayesrl.core.primitives import environment, reward
    from bayesrl.diagnostics.comparison import compare
    from bayesrl.diagnostics.diagnosis import diagnose
    from bayesrl.diagnostics.engines.side_by_side import compare_engines
    from bayesrl.diagnostics.evidence.bounds import evidence
    from bayesrl.diagnostics.evidence.result import Evidence
    from bayesrl.diagnostics.hpd_coverage import coverage
    from bayesrl.diagnostics.proxy_trust import overoptimisation
    from bayesrl.diagnostics.reward_kl_frontier import frontier
    from bayesrl.diagnostics.simulation_based_calibration import (
        calibrate,
        exact_inference,
        nuts_inference,
        svi_inference,
    )
    from bayesrl.display.section import Section
    from bayesrl.exact.enumeration import enumerate_posterior
    from bayesrl.exact.weighted_draws import WeightedDraws
    from bayesrl.moments.constraints import ConstrainedPolicy, constrain
    from bayesrl.monte_carlo.best_of_draws import best_of
    from bayesrl.monte_carlo.importance_sampling import importance
    from bayesrl.monte_carlo.rejection_sampling import rejection
    from bayesrl.monte_carlo.sequential_monte_carlo import smc
    from bayesrl.posterior.datatree import to_datatree
    from bayesrl.posterior.posterior import Posterior
    from bayesrl.problem import LearningProblem, Problem, load_learning_problem, load_problem
    from bayesrl.report.write import write_report
    from bayesrl.statistics.estimates import Estimate, Interval
    from bayesrl.svi.fitting import fit, init
    from bayesrl.svi.replayed_draws import ReplayDraws
    from bayesrl.svi.reused_draws import ReuseDraws
    from bayesrl.svi.saved_fits import load, resume
    from bayesrl.svi.step import State, step
    from bayesrl.twists.learning import fit_twist

__version__ = "0.1.0"

# Import each name at its first use, so that the command line can answer before JAX is loaded.
_HOMES = {
    "bayesrl.cache": ("use_cache",),
    "bayesrl.diagnostics.evidence.bounds": ("evidence",),
    "bayesrl.diagnostics.comparison": ("compare",),
    "bayesrl.diagnostics.diagnosis": ("diagnose",),
    "bayesrl.diagnostics.engines.side_by_side": ("compare_engines",),
    "bayesrl.diagnostics.hpd_coverage": ("coverage",),
    "bayesrl.diagnostics.simulation_based_calibration": (
        "exact_inference",
        "nuts_inference",
        "svi_inference",
        "calibrate",
    ),
    "bayesrl.diagnostics.proxy_trust": ("overoptimisation",),
    "bayesrl.diagnostics.reward_kl_frontier": ("frontier",),
    "bayesrl.diagnostics.evidence.result": ("Evidence",),
    "bayesrl.display.section": ("Section",),
    "bayesrl.core.density": ("log_density",),
    "bayesrl.statistics.estimates": ("Estimate", "Interval"),
    "bayesrl.core.handlers": ("full_data", "power", "tilt"),
    "bayesrl.core.primitives": ("environment", "reward"),
    "bayesrl.posterior.datatree": ("to_datatree",),
    "bayesrl.exact.enumeration": ("enumerate_posterior",),
    "bayesrl.svi.fitting": ("fit", "init"),
    "bayesrl.twists.learning": ("fit_twist",),
    "bayesrl.svi.step": ("State", "step"),
    "bayesrl.svi.replayed_draws": ("ReplayDraws",),
    "bayesrl.svi.reused_draws": ("ReuseDraws",),
    "bayesrl.monte_carlo.best_of_draws": ("best_of",),
    "bayesrl.monte_carlo.rejection_sampling": ("rejection",),
    "bayesrl.svi.saved_fits": ("load", "resume"),
    "bayesrl.exact.weighted_draws": ("WeightedDraws",),
    "bayesrl.monte_carlo.importance_sampling": ("importance",),
    "bayesrl.monte_carlo.sequential_monte_carlo": ("smc",),
    "bayesrl.moments.constraints": ("ConstrainedPolicy", "constrain"),
    "bayesrl.posterior.posterior": ("Posterior",),
    "bayesrl.problem": ("LearningProblem", "Problem", "load_learning_problem", "load_problem"),
    "bayesrl.report.write": ("write_report",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_KNOWN_TO = dict.fromkeys(("load", "resume"), ("control", "lm"))
"""What run folders may speak of: guides and objectives of the domains."""

__all__ = [
    "ConstrainedPolicy",
    "Estimate",
    "Evidence",
    "Interval",
    "LearningProblem",
    "Posterior",
    "Problem",
    "ReplayDraws",
    "ReuseDraws",
    "Section",
    "State",
    "WeightedDraws",
    "best_of",
    "calibrate",
    "compare",
    "compare_engines",
    "constrain",
    "control",
    "coverage",
    "diagnose",
    "enumerate_posterior",
    "environment",
    "errors",
    "evidence",
    "exact_inference",
    "fit",
    "fit_twist",
    "frontier",
    "full_data",
    "guides",
    "importance",
    "init",
    "lm",
    "load",
    "load_learning_problem",
    "load_problem",
    "log_density",
    "nuts_inference",
    "objectives",
    "overoptimisation",
    "power",
    "preferences",
    "rejection",
    "resume",
    "reward",
    "rewards",
    "smc",
    "step",
    "svi_inference",
    "tilt",
    "to_datatree",
    "use_cache",
    "write_report",
]

if not TYPE_CHECKING:  # type checkers read the imports above, and so know which names there are

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the library, at its first use."""
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
