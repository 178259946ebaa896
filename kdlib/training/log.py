"""Training room: the JSON-lines log of a run. Touches one file, no tensor."""

import json
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kdlib.training._checks import no_row

__all__ = ["JsonLog", "read_log"]


def read_log(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a kill has torn is left out.

    Args:
        path: A file that `train` has written, with keys step, epoch, lr, total, terms, weights and seconds.

    Returns:
        One dict a row, in the order of the file.

    Raises:
        ValueError: A line other than the last is no row of a training log.
    """
    rows, _ = _good_rows(Path(path), last_step=None)
    return rows


class JsonLog:
    """Appends one JSON object a line, and gives each line to the system at once.

    Opening drops the rows after `last_step`: the steps that a killed run had logged and its checkpoint does not hold
    are taken again, and each must stand in the log once.

    Args:
        path: The file; made with its directory if absent; `None` for a log that keeps nothing.
        last_step: The last step that stays. 0 empties a log of an earlier run.

    Raises:
        ValueError: The file exists and is no training log; it is left as it is.
    """

    def __init__(self, path: str | PathLike[str] | None, *, last_step: int) -> None:
        self._file = None
        if path is None:
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            _, size = _good_rows(place, last_step=last_step)
            with place.open("r+b") as file:
                file.truncate(size)
        self._file = place.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, flushed."""
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _good_rows(path: Path, *, last_step: int | None) -> tuple[list[dict[str, Any]], int]:
    """The rows up to `last_step`, and the size in bytes of the lines that hold them."""
    rows: list[dict[str, Any]] = []
    size = 0
    with path.open("rb") as file:
        lines = file.read().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        torn = number == len(lines) and not line.endswith(b"\n")
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError):
            if torn and (rows or line.startswith(b"{")):
                break
            raise no_row(path, number) from None
        if torn or (last_step is not None and step > last_step):
            break
        rows.append(row)
        size += len(line)
    return rows, size
