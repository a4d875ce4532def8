"""Guides: the programs that a fit trains to approximate the posterior."""

from bayesrl.guides.auto_tilt import AutoTilt
from bayesrl.guides.base import AutoGuide, PolicyGuide

__all__ = ["AutoGuide", "AutoTilt", "PolicyGuide"]
