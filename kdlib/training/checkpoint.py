"""Training room: checkpoints on disk, written whole or not at all. Touches one directory."""

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from kdlib.training._checks import check_checksum, check_format, check_stored, none_readable, unreadable, unwritable
from kdlib.training.events import CheckpointError

__all__ = ["CheckpointStore", "load_checkpoint"]

_log = logging.getLogger("kdlib.training")
_NAME = re.compile(r"step-(\d{9})\.pt")
_FORMAT = 1


def load_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read one checkpoint, whole and with tensors and plain containers alone.

    Args:
        path: A file that `train` has written.

    Returns:
        `format`, `step`, `distiller` (its state dict), `optimizer`, `scaler`, `ema`, `stream`, `rng`, `last`, `seconds`
        and `fingerprint`; all tensors on the CPU.

    Raises:
        CheckpointError: The file is cut short, altered, or no checkpoint of this format.
    """
    try:
        # torch.load does not compare the checksums that torch.save wrote: a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            check_stored(archive, os.path.getsize(path))
            check_checksum(archive.testzip())
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise unreadable(path, error) from error
    check_format(path, state, _FORMAT)
    return state


class CheckpointStore:
    """The checkpoints of one run: `step-000000120.pt` and the like in a directory of its own.

    Args:
        directory: Made if absent; `None` for a store that keeps nothing.
        keep: How many stay.
        every_steps: Steps from one to the next, or `None`.
        every_seconds: Seconds from one to the next, or `None`.
    """

    def __init__(
        self,
        directory: str | PathLike[str] | None,
        *,
        keep: int,
        every_steps: int | None = None,
        every_seconds: float | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.keep = keep
        self.every_steps = every_steps
        self.every_seconds = every_seconds
        self.newest: Path | None = None
        self._saved_at = monotonic()

    def due(self, step: int) -> bool:
        """Is it time, after `step` steps?"""
        if self.directory is None:
            return False
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_step or (self.every_seconds is not None and monotonic() - self._saved_at >= self.every_seconds)

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or `None` where there is none.

        An unreadable one is passed over with a warning to the logger `kdlib.training`.

        Raises:
            CheckpointError: There are checkpoints and none can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                state = load_checkpoint(path)
            except CheckpointError as error:
                _log.warning("%s; going back to the one before", error)
                continue
            self.newest = path
            return state
        if paths:
            raise none_readable(self.directory, len(paths))
        return None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write `state` as the checkpoint of `step`; a reader sees it whole or does not see it.

        Raises:
            CheckpointError: It cannot be written (a full disk, a directory without leave to write). What had been
                written before stays.
        """
        if self.directory is None:
            return
        path = self.directory / f"step-{step:09d}.pt"
        part = self.directory / "step.part"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save({"format": _FORMAT, "step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_directory(self.directory)
            for old in [old for old in self._paths() if old <= path][: -self.keep]:
                old.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch's archive writer turns some write errors into RuntimeError
            part.unlink(missing_ok=True)
            raise unwritable(path, error, self.newest) from error
        self.newest = path
        self._saved_at = monotonic()

    def _paths(self) -> list[Path]:
        """Oldest first."""
        if self.directory is None or not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))


def _sync_directory(directory: Path) -> None:
    """Make the new name itself outlive a power cut; not every system lets a directory be opened."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
