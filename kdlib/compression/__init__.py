"""Compression: a narrower copy of a trained network, fitted to reproduce it without training."""

from kdlib._arguments import prepare_arguments
from kdlib.compression.shrink import ShrinkStep, shrink

__all__ = ["ShrinkStep", "shrink"]
prepare_arguments(globals(), __all__)
