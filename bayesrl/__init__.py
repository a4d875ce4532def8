"""KL-regularised reinforcement learning as Bayesian inference, on NumPyro."""

from bayesrl import control, errors, guides, lm, objectives
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
    "whole",
    "write_report",
]
