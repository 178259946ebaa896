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
from kdlib.training.config import TrainConfig
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
            _check_archive(archive, os.path.getsize(path))
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost any exception in the readers
        raise CheckpointError(f"train: checkpoint {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        got = f"format {state.get('format')!r}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"train: checkpoint {path} must have format {_FORMAT}, got {got}")
    return state


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Require matching checksums and, because torch.save does not compress, the size of the file."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise ValueError(f"it would unpack to {unpacked} bytes from {size}")
    if (damaged := archive.testzip()) is not None:
        raise ValueError(f"the checksum of {damaged} does not match")


class CheckpointStore:
    """Checkpoints of one run, such as `step-000000120.pt`, in `checkpoint_dir`, or nowhere if that is `None`."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.directory = None if config.checkpoint_dir is None else Path(config.checkpoint_dir)
        self.newest: Path | None = None
        self._saved_at = monotonic()

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        if self.directory is None:
            return False
        steps, seconds = self.config.checkpoint_every_steps, self.config.checkpoint_every_seconds
        by_step = steps is not None and step % steps == 0
        return by_step or (seconds is not None and monotonic() - self._saved_at >= seconds)

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
            # A new run must not overwrite them.
            raise CheckpointError(
                f"train: none of the {len(paths)} checkpoints in {self.directory} can be read; remove them to start from the beginning"
            )
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
            for old in [old for old in self._paths() if old <= path][: -self.config.keep]:
                old.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # torch's archive writer raises RuntimeError for some write errors
            # The archive writer hides the system's error in the context.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = f"{self.newest} is kept" if self.newest else "there is no earlier checkpoint"
            raise CheckpointError(f"train: checkpoint {path} cannot be written: {cause}; {kept}") from error
        self.newest = path
        self._saved_at = monotonic()

    def _paths(self) -> list[Path]:
        """Return the paths of all checkpoints, oldest first."""
        if self.directory is None or not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))
