"""What limits the speed of a training run, and its figures for TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kdlib.distiller import Distiller
from kdlib.training import TrainEvent
from kdlib_faces._checks import InputError
from kdlib_faces.training.settings import TrainingConfig

__all__ = ["SpeedAdvice", "check_tensorboard", "write_tensorboard"]

MIN_DATA_WAIT, MIN_TEACHERS = 0.1, 0.3
"""Shares of a step from which on the loader or the teachers limit the speed."""
MIN_FREE_MEMORY = 0.5
"""Share of the device's memory that is free if a larger batch is recommended."""
MEASURED_EVERY = 50
"""Calls of a teacher between two measurements on an accelerator, each of which waits for the device."""


class SpeedAdvice:
    """A hook of `kdlib.train` that describes, after the last step, what limits the speed and what to change.

    Args:
        distiller: The distiller in training; within the block, the time of its teachers is measured.
        settings: Settings of the run.
        workers: Number of workers of the loader.
    """

    def __init__(self, distiller: Distiller, settings: TrainingConfig, workers: int) -> None:
        self.settings, self.workers = settings, workers
        self.text = ""
        # Hooks would break the graph of a compiled teacher.
        reading = [each for each in distiller.teachers.values() if each.inputs is None and not settings.compile]
        self._teachers = [each for each in reading if isinstance(each, nn.Module)]
        self._handles: list[RemovableHandle] = []
        self._calls = self._measured = 0
        self._seconds = self._began = 0.0

    def __enter__(self) -> Self:
        for teacher in self._teachers:
            self._handles += [
                teacher.register_forward_pre_hook(self._begin),
                teacher.register_forward_hook(self._end),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: object) -> None:
        self._calls += 1
        self._began = self._now()

    def _end(self, module: nn.Module, inputs: object, output: object) -> None:
        if self._began:
            self._seconds += self._now() - self._began
            self._measured += 1

    def _now(self) -> float:
        """Return the time after all work of the device; 0 for a call that is not measured."""
        if torch.accelerator.is_available():
            if self._calls % MEASURED_EVERY != 1:
                return 0.0
            torch.accelerator.synchronize()
        return perf_counter()

    def __call__(self, event: TrainEvent) -> None:
        """Describe the limit after the last step."""
        if event.step < event.total_steps:
            return
        batches = self.settings.accumulate * len(self._teachers)
        teachers = self._seconds / max(1, self._measured) * batches / max(event.step_seconds, 1e-9)
        self.text = f"speed: {event.images_per_second:.0f} images/s, limited by {self._limit(event, teachers)}"

    def _limit(self, event: TrainEvent, teachers: float) -> str:
        if event.data_wait >= MIN_DATA_WAIT:
            return f"the loader, for which steps waited {event.data_wait:.0%} of the time: raise --workers ({self.workers})"
        if teachers >= MIN_TEACHERS:
            return f"the teachers, {min(teachers, 1):.0%} of a step: cache their outputs with kdlib-faces cache build"
        faster = ["--amp bfloat16"] if self.settings.amp == "none" else []
        faster += [] if self.settings.compile else ["--compile"]
        if event.memory:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            free = 1 - event.memory / total
            if free >= MIN_FREE_MEMORY:
                return f"the student, with {free:.0%} of the memory free: raise training.batch_size{_or(faster)}"
        return f"the student: {' or '.join([*faster, 'more processes'])} may help"


def _or(options: list[str]) -> str:
    return "".join(f", or try {each}" for each in options[:1])


def check_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        InputError: It is not.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError("train: --tensorboard needs TensorBoard; pip install tensorboard") from error


@contextmanager
def write_tensorboard(folder: Path | None) -> Iterator[Callable[[TrainEvent], None]]:
    """Yield a hook that writes each step for TensorBoard; None as the folder writes nothing.

    Raises:
        InputError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda event: None
        return
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(event: TrainEvent) -> None:
            values = {"loss": event.total, "lr": event.lr, "speed/images_per_second": event.images_per_second}
            values |= {"speed/step_seconds": event.step_seconds, "speed/data_wait": event.data_wait}
            values |= {f"terms/{name}": value for name, value in event.terms.items()}
            for name, value in values.items():
                writer.add_scalar(name, value, event.step)

        yield write
