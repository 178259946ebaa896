"""Weightings: modules that map the losses `(k, b)` of k teachers to weights `(k, b)`."""

from kdlib.weighting.center_confidence import CenterConfidenceWeighting
from kdlib.weighting.confidence import ConfidenceWeighting
from kdlib.weighting.entropy import EntropyWeighting
from kdlib.weighting.fixed import FixedWeighting
from kdlib.weighting.gate import GateWeighting
from kdlib.weighting.gradient import GradientWeighting
from kdlib.weighting.uncertainty import UncertaintyWeighting
from kdlib.weighting.uniform import UniformWeighting

__all__ = [
    "CenterConfidenceWeighting", "ConfidenceWeighting", "EntropyWeighting", "FixedWeighting", "GateWeighting",
    "GradientWeighting", "UncertaintyWeighting", "UniformWeighting",
]  # fmt: skip
