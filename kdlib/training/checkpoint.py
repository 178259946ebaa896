"""Atomic checkpoints on disk."""

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

from kdlib._atomic import atomic_write
from kdlib.training._checks import check_checksum, check_format, check_stored, none_readable, unreadable, unwritable
from kdlib.training.events import CheckpointError

__all__ = ["CheckpointStore", "load_checkpoint"]

_log = logging.getLogger("kdlib.training")
_NAME = re.compile(r"step-(\d{9})\.pt")
_FORMAT = 1


def load_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read one checkpoint; only tensors and plain containers are accepted.

    Args:
        path: A checkpoint of `train`.

    Returns:
        `format`, `step`, `distiller` (its state dict), `optimizer`, `scaler`, `ema`, `stream`, `rng`, `last`, `seconds`
        and `fingerprint`, with all tensors on the CPU.

    Raises:
        CheckpointError: The file is truncated, damaged, or not a checkpoint of this format.
    """
    try:
        # torch.load ignores the checksums of the archive, so a flipped bit would change a weight silently.
        with zipfile.ZipFile(path) as archive:
            check_stored(archive, os.path.getsize(path))
            check_checksum(archive.testzip())
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost any exception in the readers
        raise unreadable(path, error) from error
    check_format(path, state, _FORMAT)
    return state


class CheckpointStore:
    """Checkpoints of one run, such as `step-000000120.pt`, in their own directory.

    Args:
        directory: Created if missing; `None` stores nothing.
        keep: Number of checkpoints to keep.
        every_steps: Steps between checkpoints, or `None`.
        every_seconds: Seconds between checkpoints, or `None`.
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
        """Return whether a checkpoint is due after `step` steps."""
        if self.directory is None:
            return False
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_step or (self.every_seconds is not None and monotonic() - self._saved_at >= self.every_seconds)

    def load(self) -> dict[str, Any] | None:
        """Return the newest readable checkpoint, or `None` if there are no checkpoints.

        An unreadable checkpoint is skipped with a warning to the logger `kdlib.training`.

        Raises:
            CheckpointError: There are checkpoints, but none can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                state = load_checkpoint(path)
            except CheckpointError as error:
                _log.warning("%s; using the previous checkpoint", error)
                continue
            self.newest = path
            return state
        if paths:
            raise none_readable(self.directory, len(paths))
        return None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write `state` atomically as the checkpoint of `step`.

        Raises:
            CheckpointError: The checkpoint cannot be written (full disk, missing permission). Earlier checkpoints are kept.
        """
        if self.directory is None:
            return
        path = self.directory / f"step-{step:09d}.pt"
        try:
            with atomic_write(path, durable=True, sole_writer=True) as file:
                torch.save({"format": _FORMAT, "step": step, **state}, file)
            for old in [old for old in self._paths() if old <= path][: -self.keep]:
                old.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch's archive writer raises RuntimeError for some write errors
            raise unwritable(path, error, self.newest) from error
        self.newest = path
        self._saved_at = monotonic()

    def _paths(self) -> list[Path]:
        """Return the paths of all checkpoints, oldest first."""
        if self.directory is None or not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))
