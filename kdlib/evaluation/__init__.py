"""Stage 7: is the student like its teacher? Reads tensors, returns numbers; knows no model and no file."""

from kdlib.evaluation.agreement import linear_cka, mean_cosine, top_agreement
from kdlib.evaluation.calibration import calibration_error

__all__ = ["calibration_error", "linear_cka", "mean_cosine", "top_agreement"]
