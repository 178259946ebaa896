"""A training loop with exact resume after interruption."""

from kdlib.training.checkpoint import load_checkpoint
from kdlib.training.config import OptimizerFactory, SplitBatch, TrainConfig
from kdlib.training.events import CheckpointError, Hook, TrainEvent, TrainingDiverged, TrainResult
from kdlib.training.log import read_log
from kdlib.training.loop import train

__all__ = [
    "CheckpointError",
    "Hook",
    "OptimizerFactory",
    "SplitBatch",
    "TrainConfig",
    "TrainEvent",
    "TrainResult",
    "TrainingDiverged",
    "load_checkpoint",
    "read_log",
    "train",
]
