"""Training of the recipes on face lists."""

from kdlib_faces.training.fit import FitResult, LossCurve, fit
from kdlib_faces.training.run import RunConfig, RunOptions, TrainingConfig, TrainingSetup, train_on_faces

__all__ = [
    "FitResult",
    "LossCurve",
    "RunConfig",
    "RunOptions",
    "TrainingConfig",
    "TrainingSetup",
    "fit",
    "train_on_faces",
]
