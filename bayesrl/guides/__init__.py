"""Guides: what a fit adapts until it is the posterior."""

from bayesrl.guides.auto_tilt import AutoTilt
from bayesrl.guides.base import AutoGuide, PolicyGuide

__all__ = ["AutoGuide", "AutoTilt", "PolicyGuide"]
