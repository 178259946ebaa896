"""Training room: what a run tells (event, result) and how it fails. Touches nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["CheckpointError", "Hook", "TrainEvent", "TrainResult", "TrainingDiverged"]


@dataclass(frozen=True)
class TrainEvent:
    """One step, as a hook sees it.

    Args:
        step: Steps done, this one included: 1 to `total_steps`.
        total_steps: Steps of the whole run.
        epoch: Of this step's batches, from 0.
        total: The loss.
        terms: The value of each term, before its weight.
        weights: For each term with teachers, the mean weight of each teacher.
        lr: Learning rate of the first parameter group.
        images_per_second: Since this process began to train; of all processes under DDP.
        seconds: Since the run began, those of earlier processes included.
    """

    step: int
    total_steps: int
    epoch: int
    total: float
    terms: Mapping[str, float]
    weights: Mapping[str, tuple[float, ...]]
    lr: float
    images_per_second: float
    seconds: float


Hook = Callable[[TrainEvent], object]
"""Called after every step on the first process."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves; the distiller itself holds the final weights.

    Args:
        step: Steps done.
        epoch: Of the last step, from 0.
        total: The last step's loss.
        terms: The last step's terms.
        ema: The averaged student, a state dict for `distiller.student`; `None` without `ema_decay`.
        seconds: Of the whole run, those of earlier processes included.
        resumed_from: The step of the checkpoint that this call began from; `None` for a fresh start.
        checkpoint: The newest checkpoint; `None` without `checkpoint_dir`.
    """

    step: int
    epoch: int
    total: float
    terms: Mapping[str, float]
    ema: Mapping[str, Tensor] | None
    seconds: float
    resumed_from: int | None
    checkpoint: Path | None


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none of those there can be read."""


class TrainingDiverged(RuntimeError):
    """The loss, or a weight, is NaN or infinite.

    Args:
        message: The whole story.
        step: The step that failed, from 1.
        epoch: From 0.
        terms: The value of each term.
        samples: The sample ids of the step's batches, where the targets have `"sample"`.
    """

    def __init__(
        self, message: str, *, step: int, epoch: int, terms: Mapping[str, float], samples: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.step = step
        self.epoch = epoch
        self.terms = terms
        self.samples = samples
