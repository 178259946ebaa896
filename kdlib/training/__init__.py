"""A training loop with exact resume after interruption."""

from kdlib.training.checkpoint import load_checkpoint
from kdlib.training.config import Evaluate, OptimizerFactory, SplitBatch, TrainConfig
from kdlib.training.events import (
    BestWeights,
    CheckpointError,
    Evaluation,
    Hook,
    TrainEvent,
    TrainingDiverged,
    TrainResult,
)
from kdlib.training.log import read_log
from kdlib.training.loop import train

__all__ = [
    "BestWeights",
    "CheckpointError",
    "Evaluate",
    "Evaluation",
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
