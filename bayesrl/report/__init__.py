"""What a fit looks like: figures and tables; knows supports and shapes, and no domain."""

from bayesrl.report.figures import policy_figure, save_figures, training_figure

__all__ = ["policy_figure", "save_figures", "training_figure"]
