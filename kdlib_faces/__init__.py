"""Lightweight age-invariant face recognition by distillation, built on kdlib."""

from kdlib import __version__

__all__ = ["__version__"]
