"""kdlib_faces: light age-invariant face recognition by distillation. Imports kdlib, never the reverse.

data, backbones, heads -> losses -> teachers -> evaluation -> report -> recipes -> command line
"""

from kdlib import __version__

__all__ = ["__version__"]
