"""Stage 7: is the student like its teacher? Reads tensors, returns numbers; knows no model and no file."""

from kdlib.evaluation.agreement import linear_cka, mean_cosine

__all__ = ["linear_cka", "mean_cosine"]
