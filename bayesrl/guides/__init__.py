"""Guides: what a fit adapts until it is the posterior."""

from bayesrl.guides.auto_tilt import AutoTilt
from bayesrl.guides.base import GuideFamily, OwnProgram

__all__ = ["AutoTilt", "GuideFamily", "OwnProgram"]
