"""Compression: a narrower copy of a trained network, fitted to reproduce it without training."""

from kdlib._arguments import prepare_arguments
from kdlib.compression.rebuild import narrow_like
from kdlib.compression.shrink import ShrinkStep, shrink

__all__ = ["ShrinkStep", "narrow_like", "shrink"]
prepare_arguments(globals(), __all__)
