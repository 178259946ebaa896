"""Event, result and exceptions of a training run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["CheckpointError", "Hook", "TrainEvent", "TrainResult", "TrainingDiverged"]


@dataclass(frozen=True)
class TrainEvent:
    """Numbers of one step, passed to hooks.

    Args:
        step: Completed steps, including this one: 1 to `total_steps`.
        total_steps: Number of steps of the run.
        epoch: Epoch of the batches of this step, from 0.
        total: Loss.
        terms: Value of each term before its weight is applied.
        weights: Mean weight of each teacher, for each term with teachers.
        lr: Learning rate of the first parameter group.
        images_per_second: Throughput since this process started training, summed over processes under DDP.
        seconds: Training time of the run, including earlier processes.
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
"""A callable that is called after every step on the first process."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished run; the distiller contains the final weights.

    Args:
        step: Completed steps.
        epoch: Epoch of the last step, from 0.
        total: Loss of the last step.
        terms: Value of each term in the last step.
        ema: State dict of the averaged student, for `distiller.student`; `None` without `ema_decay`.
        seconds: Training time of the run, including earlier processes.
        resumed_from: Step of the checkpoint that this call resumed from; `None` for a new run.
        checkpoint: Path of the newest checkpoint; `None` without `checkpoint_dir`.
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
    """A checkpoint cannot be written, or no existing checkpoint can be read."""


class TrainingDiverged(RuntimeError):
    """The loss or a weight is NaN or infinite.

    Args:
        message: Full error message.
        step: Failed step, from 1.
        epoch: Epoch of the step, from 0.
        terms: Value of each term.
        samples: Sample ids of the step's batches, if the targets contain `"sample"`.
    """

    def __init__(
        self, message: str, *, step: int, epoch: int, terms: Mapping[str, float], samples: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.step = step
        self.epoch = epoch
        self.terms = terms
        self.samples = samples
