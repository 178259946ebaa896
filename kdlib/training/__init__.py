"""A training loop with exact resume after interruption."""

from kdlib._arguments import prepare_arguments
from kdlib.training.checkpoint import CheckpointState, load_checkpoint
from kdlib.training.config import Evaluate, OptimizerFactory, SplitBatch, TrainConfig
from kdlib.training.events import (
    BestWeights,
    CheckpointError,
    Evaluation,
    Hook,
    StepValues,
    TrainEvent,
    TrainingDiverged,
    TrainResult,
)
from kdlib.training.log import LogRow, Speed, read_log
from kdlib.training.loop import train
from kdlib.training.stream import StreamState

__all__ = [
    "BestWeights",
    "CheckpointError",
    "CheckpointState",
    "Evaluate",
    "Evaluation",
    "Hook",
    "LogRow",
    "OptimizerFactory",
    "Speed",
    "SplitBatch",
    "StepValues",
    "StreamState",
    "TrainConfig",
    "TrainEvent",
    "TrainResult",
    "TrainingDiverged",
    "load_checkpoint",
    "read_log",
    "train",
]

prepare_arguments(globals(), __all__)
