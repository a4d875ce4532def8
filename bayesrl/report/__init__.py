"""What a fit looks like: figures, tables, and one HTML file; it knows supports and shapes, but no domain."""

from bayesrl.report.evidence_figures import frontier_figure, trust_figure, weights_figure
from bayesrl.report.fit_figures import policy_figure, save_figures, training_figure

__all__ = [
    "frontier_figure",
    "policy_figure",
    "save_figures",
    "training_figure",
    "trust_figure",
    "weights_figure",
]
