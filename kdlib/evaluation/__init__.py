"""Measures of how similar student and teacher outputs are, and of calibration."""

from kdlib._arguments import prepare_arguments
from kdlib.evaluation.agreement import linear_cka, mean_cosine, top_agreement
from kdlib.evaluation.calibration import calibration_error

__all__ = ["calibration_error", "linear_cka", "mean_cosine", "top_agreement"]

prepare_arguments(globals(), __all__)
