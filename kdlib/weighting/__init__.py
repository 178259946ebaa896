"""Weighting: stage 4, losses of k teachers `(k, b)` to weights `(k, b)`. Imports only the losses' shared maths."""

from kdlib.weighting.centre_confidence import CentreConfidenceWeighting
from kdlib.weighting.fixed import FixedWeighting
from kdlib.weighting.uniform import UniformWeighting

__all__ = ["CentreConfidenceWeighting", "FixedWeighting", "UniformWeighting"]
