"""JSON-lines log of a training run."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NotRequired, TypedDict

from kdlib.training._checks import check_argument

__all__ = ["LogRow", "Speed", "append_log", "read_log"]


class Speed(TypedDict):
    """Speed of a run since its process started training, as in `TrainEvent`.

    Attributes:
        images_per_second: Throughput of all processes.
        step_seconds: Mean duration of a step.
        data_wait: Share of that time in which the first process waited for the loader.
        memory: Peak memory of tensors on the GPU in bytes; 0 on the CPU.

    Examples:
        >>> Speed(images_per_second=640.0, step_seconds=0.1, data_wait=0.02, memory=0)["step_seconds"]
        0.1
    """

    images_per_second: float
    step_seconds: float
    data_wait: float
    memory: int


class LogRow(TypedDict):
    """Values of one step in a log.

    Attributes:
        step: Completed steps, including this one.
        epoch: Epoch of the batches of this step, from 0.
        lr: Learning rate of the first parameter group.
        total: Loss.
        terms: Value of each term before its weight is applied; `None` if it is not finite.
        weights: Mean weight of each teacher, for each term with teachers; absent without such a term.
        metrics: Result of the evaluation after this step; absent if there was none.
        improved: Whether the monitored metric is the best so far; absent if there was no evaluation.
        seconds: Training time of the run in seconds.
        speed: Speed of the run.

    Examples:
        >>> def losses(rows: list[LogRow]) -> list[float]:
        ...     return [row["total"] for row in rows]
    """

    step: int
    epoch: int
    lr: float
    total: float
    terms: dict[str, float | None]
    weights: NotRequired[dict[str, list[float]]]
    metrics: NotRequired[dict[str, float]]
    improved: NotRequired[bool]
    seconds: float
    speed: Speed


def read_log(path: str | PathLike[str]) -> list[LogRow]:
    """Read the rows of a log of `train`; an incomplete last line is skipped.

    Returns:
        The rows in order.

    Raises:
        ValueError: A line other than the last is not a row of a training log.

    Examples:
        >>> import tempfile
        >>> from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term
        >>> from kdlib.training import TrainConfig, train
        >>> from torch import nn, zeros
        >>> student, teacher = (kind(nn.Linear(4, 2), {"out": OUTPUT}) for kind in (StudentAdapter, TeacherAdapter))
        >>> objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out")})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = TrainConfig(epochs=2, log_path=f"{folder}/log.jsonl")
        ...     result = train(Distiller(student, {"teacher": teacher}, objective), [(zeros(8, 4), {})], config)
        ...     [row["step"] for row in read_log(f"{folder}/log.jsonl")]
        [1, 2]
    """
    return _good_rows(Path(path), last_step=None)[0]


@contextmanager
def append_log(path: str | PathLike[str] | None, *, last_step: int) -> Iterator[Callable[[LogRow], None]]:
    """Yield a function that appends one row and flushes it; `None` as the path writes nothing.

    The rows after `last_step` are removed first (0 empties the log of an earlier run): an interrupted run may have logged
    steps that its checkpoint does not contain, which are repeated and must appear only once.

    Raises:
        ValueError: The file cannot be written, or it exists and is not a training log and is left unchanged.
    """
    if path is None:
        yield lambda row: None
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            _, size = _good_rows(target, last_step=last_step)
            os.truncate(target, size)
        file = target.open("a", encoding="utf-8")
    except OSError as error:
        check_argument(False, f"log_path must be a writable file, got {path}: {error.strerror or error}")

    def write(row: LogRow) -> None:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()

    with file:
        yield write


def _good_rows(path: Path, *, last_step: int | None) -> tuple[list[LogRow], int]:
    """Return the rows up to `last_step`, and the size in bytes of their lines."""
    rows: list[LogRow] = []
    size = 0
    with path.open("rb") as file:
        lines = file.read().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        incomplete = number == len(lines) and not line.endswith(b"\n")
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError):
            if incomplete and (rows or line.startswith(b"{")):
                break
            check_argument(False, f"{path} must be a training log, got something else in line {number}")
        if incomplete or (last_step is not None and step > last_step):
            break
        rows.append(row)
        size += len(line)
    return rows, size
