"""Training of the recipes on face lists."""

from kdlib_faces.training.fit import FitResult, LossCurve, fit

__all__ = ["FitResult", "LossCurve", "fit"]
