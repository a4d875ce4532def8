"""Guides: what a fit adapts until it is the posterior."""

from bayesrl.guides.auto import AutoTilt
from bayesrl.guides.interface import GuideFamily, OwnProgram

__all__ = ["AutoTilt", "GuideFamily", "OwnProgram"]
