"""JSON-lines log of a training run."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from kdlib.training._checks import check_argument

__all__ = ["append_log", "read_log"]


def read_log(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a log of `train`; an incomplete last line is skipped.

    Returns:
        One dict per row, in order, with keys step, epoch, lr, total, terms, weights, seconds and speed (images_per_second,
        step_seconds, data_wait and memory, as in `TrainEvent`). Rows of evaluated steps also contain metrics and, with
        `TrainConfig.monitor`, improved.

    Raises:
        ValueError: A line other than the last is not a row of a training log.
    """
    return _good_rows(Path(path), last_step=None)[0]


@contextmanager
def append_log(path: str | PathLike[str] | None, *, last_step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
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

    def write(row: dict[str, Any]) -> None:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()

    with file:
        yield write


def _good_rows(path: Path, *, last_step: int | None) -> tuple[list[dict[str, Any]], int]:
    """Return the rows up to `last_step`, and the size in bytes of their lines."""
    rows: list[dict[str, Any]] = []
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
