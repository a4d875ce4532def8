"""What a fit maximises: each objective is two pure parts, `draw` and `loss`."""

from bayesrl.objectives.clipped import ClippedKL
from bayesrl.objectives.forward import ForwardKL
from bayesrl.objectives.interface import Info, Objective
from bayesrl.objectives.reverse import ReverseKL
from bayesrl.objectives.stock import Stock

__all__ = ["ClippedKL", "ForwardKL", "Info", "Objective", "ReverseKL", "Stock"]
