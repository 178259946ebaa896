"""Training of the recipes on face lists."""

from kdlib_faces.training.fit import FitResult, LossCurve, fit
from kdlib_faces.training.run import TrainingSetup, open_training_images, train_on_faces
from kdlib_faces.training.settings import RunConfig, RunOptions, TrainingConfig

__all__ = [
    "FitResult",
    "LossCurve",
    "RunConfig",
    "RunOptions",
    "TrainingConfig",
    "TrainingSetup",
    "fit",
    "open_training_images",
    "train_on_faces",
]
