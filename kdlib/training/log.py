"""JSON-lines log of a training run."""

import json
from os import PathLike
from pathlib import Path
from typing import Any, Self

from kdlib.training._checks import check_argument

__all__ = ["JsonLog", "read_log"]


def read_log(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a log of `train`; an incomplete last line is skipped.

    Returns:
        One dict per row, in order, with keys step, epoch, lr, total, terms, weights and seconds.

    Raises:
        ValueError: A line other than the last is not a row of a training log.
    """
    return _good_rows(Path(path), last_step=None)[0]


class JsonLog:
    """Appends one JSON object per line and flushes each line.

    Opening removes the rows after `last_step`: an interrupted run may have logged steps that its checkpoint does not
    contain, which are repeated and must appear only once.

    Args:
        path: The file, created with its directory if missing; `None` writes nothing.
        last_step: The last step to keep. 0 empties the log of an earlier run.

    Raises:
        ValueError: The file exists and is not a training log; it is left unchanged.
    """

    def __init__(self, path: str | PathLike[str] | None, *, last_step: int) -> None:
        self._file = None
        if path is None:
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            _, size = _good_rows(target, last_step=last_step)
            with target.open("r+b") as file:
                file.truncate(size)
        self._file = target.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append and flush one row."""
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file is not None:
            self._file.close()


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
