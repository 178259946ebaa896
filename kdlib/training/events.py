"""Event, result and exceptions of a training run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Self, TypedDict

from torch import Tensor

__all__ = [
    "BestWeights",
    "CheckpointError",
    "Evaluation",
    "StepValues",
    "Hook",
    "Meter",
    "TrainEvent",
    "TrainResult",
    "TrainingDiverged",
]


@dataclass(frozen=True)
class Evaluation:
    """Result of one call of `TrainConfig.evaluate`.

    Args:
        step: Completed steps at the evaluation.
        epoch: Epoch of the last completed step, from 0.
        metrics: What `evaluate` returned, by name.
        improved: Whether the monitored metric is better than in all earlier evaluations; `False` without `monitor`.

    Examples:
        >>> Evaluation(step=20, epoch=1, metrics={"accuracy": 0.75}, improved=True).metrics["accuracy"]
        0.75
    """

    step: int
    epoch: int
    metrics: Mapping[str, float]
    improved: bool


class StepValues(TypedDict):
    """Values of one step, which checkpoints store; see :class:`TrainEvent`."""

    epoch: int
    total: float
    terms: dict[str, float]
    weights: dict[str, tuple[float, ...]]
    lr: float


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
        seconds: Training time of the run, including evaluations and earlier processes.
        evaluation: The evaluation after this step; `None` if there was none.
        step_seconds: Mean duration of a step since this process started training.
        data_wait: Share of that time, from 0 to 1, in which the first process waited for the loader.
        memory: Peak memory of tensors on the GPU in bytes; 0 on the CPU.

    Examples:
        >>> def hook(event: TrainEvent) -> None:
        ...     print(event.step, event.total)
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
    evaluation: Evaluation | None = None
    step_seconds: float = 0.0
    data_wait: float = 0.0
    memory: int = 0


class Meter:
    """What the times of a `TrainEvent` are computed from, since this process started training.

    Args:
        step: Steps completed before.
        seconds: Training time of earlier processes.
    """

    def __init__(self, step: int, seconds: float) -> None:
        self.images = 0
        """Images of the completed steps, over all processes."""
        self.seconds = seconds
        """Training time of the run up to the last `tick`, including earlier processes."""
        self._first_step, self._earlier, self._began = step, seconds, monotonic()
        self._elapsed = self._idle = self._waited = 0.0

    def tick(self) -> Self:
        """Add the time that has passed."""
        self._elapsed = monotonic() - self._began
        self.seconds = self._earlier + self._elapsed
        return self

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for the loader."""
        began = monotonic()
        yield
        self._waited += monotonic() - began

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The block does not train, so that speeds leave it out."""
        began = monotonic()
        yield
        self._idle += monotonic() - began

    def event(
        self, step: int, total_steps: int, last: StepValues, evaluation: Evaluation | None, *, memory: int
    ) -> TrainEvent:
        """Return the event of a step."""
        busy = max(self._elapsed - self._idle, 1e-9)
        return TrainEvent(
            step=step,
            total_steps=total_steps,
            **last,
            images_per_second=self.images / busy,
            seconds=self.seconds,
            evaluation=evaluation,
            step_seconds=busy / max(1, step - self._first_step),
            data_wait=min(1.0, self._waited / busy),
            memory=memory,
        )


Hook = Callable[[TrainEvent], object]
"""A callable that is called after every step on the first process."""


@dataclass(frozen=True)
class BestWeights:
    """The weights with the best value of `TrainConfig.monitor`.

    Args:
        evaluation: The evaluation of these weights: step, epoch and metrics.
        value: Value of the monitored metric.
        weights: State dict of the distiller as it was evaluated, on the CPU. With `ema_decay`, its student is the averaged
            one. `distiller.load_state_dict(result.best.weights)` restores it.
        checkpoint: The checkpoint of these weights; `None` without `checkpoint_dir`.

    Examples:
        >>> evaluation = Evaluation(step=20, epoch=1, metrics={"accuracy": 0.75}, improved=True)
        >>> BestWeights(evaluation, value=0.75, weights={}, checkpoint=None).evaluation.step
        20
    """

    evaluation: Evaluation
    value: float
    weights: Mapping[str, Any] = field(repr=False)
    checkpoint: Path | None


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
        evaluations: All evaluations of the run, including those of earlier processes.
        best: The best weights by `TrainConfig.monitor`; `None` without it.
        stopped_early: Whether the run ended because of `TrainConfig.patience`.

    Examples:
        >>> result = TrainResult(10, 1, 0.5, {"hint": 0.5}, ema=None, seconds=2.0, resumed_from=None, checkpoint=None)
        >>> result.step, result.stopped_early
        (10, False)
    """

    step: int
    epoch: int
    total: float
    terms: Mapping[str, float]
    ema: Mapping[str, Tensor] | None
    seconds: float
    resumed_from: int | None
    checkpoint: Path | None
    evaluations: tuple[Evaluation, ...] = ()
    best: BestWeights | None = None
    stopped_early: bool = False


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

    Examples:
        >>> error = TrainingDiverged("the loss is NaN", step=3, epoch=0, terms={"hint": float("nan")}, samples=(7, 9))
        >>> error.step, error.samples
        (3, (7, 9))
    """

    def __init__(
        self, message: str, *, step: int, epoch: int, terms: Mapping[str, float], samples: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.step = step
        self.epoch = epoch
        self.terms = terms
        self.samples = samples
