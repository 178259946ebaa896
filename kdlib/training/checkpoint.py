"""Atomic checkpoints on disk, each followed by a checksum."""

import hashlib
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from time import monotonic
from types import NoneType
from typing import Any, BinaryIO, NotRequired, TypedDict

import torch
from torch import Tensor

from kdlib._atomic import atomic_write
from kdlib.training._checks import check_content, checkpoint_error, read_failure
from kdlib.training.config import TrainConfig
from kdlib.training.events import CheckpointError, StepValues
from kdlib.training.sharded.files import Index, remove_shards
from kdlib.training.stream import StreamState

__all__ = ["CheckpointState", "CheckpointStore", "EvaluationRow", "RunState", "TensorState", "load_checkpoint"]

_log = logging.getLogger("kdlib.training")
_NAME = re.compile(r"(?:step|best)-(\d{9})\.pt")
_FORMAT = 3
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "step": int, "distiller": dict, "optimizer": dict, "scaler": dict, "ema": (dict, NoneType), "stream": list,
    "rng": list, "last": dict, "seconds": float, "evaluations": list, "fingerprint": dict,
}  # fmt: skip
_MARK = b"kdlibsum"
"""Precedes the SHA-256 at the end of a checkpoint; readers of zip files ignore both."""


class TensorState(TypedDict):
    """The entries of a checkpoint that may contain sharded tensors."""

    distiller: dict[str, Any]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None


class EvaluationRow(TypedDict):
    """Fields of an :class:`Evaluation`."""

    step: int
    epoch: int
    metrics: dict[str, float]
    improved: bool


class RunState(TensorState):
    """The state of a run after some step."""

    scaler: dict[str, Any]
    stream: list[StreamState]
    rng: list[dict[str, Tensor]]
    last: StepValues
    seconds: float
    evaluations: list[EvaluationRow]
    fingerprint: dict[str, object]
    shards: NotRequired[Index | None]


class CheckpointState(RunState):
    """Content of a checkpoint, with all tensors on the CPU.

    Attributes:
        format: Number of the format of the file.
        step: Completed steps.
        distiller: State dict of the distiller.
        optimizer: State dict of the optimizer.
        scaler: State dict of the gradient scaler.
        ema: The averages under the names of the student's state dict; `None` without `ema_decay`.
        stream: Position in the loader, one per process.
        rng: Random states, one per process.
        last: Epoch, total, terms, weights and lr of the step.
        seconds: Training time of the run in seconds.
        evaluations: Fields of each :class:`Evaluation`.
        fingerprint: Settings that determine the weights, by name.
        shards: Index of the sharded tensors, which are in a folder beside the file; `None` without any.
    """

    format: int
    step: int


def load_checkpoint(path: str | PathLike[str]) -> CheckpointState:
    """Read one checkpoint; only tensors and plain containers are accepted.

    Args:
        path: A checkpoint of `train`. A file that `torch.save` wrote has no checksum of the whole; it is checked entry by
            entry.

    Returns:
        Its content.

    Raises:
        CheckpointError: The file is truncated, damaged, or not a checkpoint of this format.

    Examples:
        >>> load_checkpoint("missing.pt")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
            ...
        kdlib.training.events.CheckpointError: train: checkpoint missing.pt cannot be read: ...
    """
    try:
        _check_content(Path(path))
        state: CheckpointState = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost any exception in the readers
        raise checkpoint_error(f"checkpoint {path} cannot be read: {read_failure(error)}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        got = f"format {state.get('format')!r}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise checkpoint_error(f"checkpoint {path} must have format {_FORMAT}, got {got}")
    wrong = [name for name, kind in _ENTRIES.items() if not isinstance(state.get(name), kind)]
    wrong += [] if isinstance(state.get("shards"), (dict, NoneType)) else ["shards"]
    if wrong:
        raise checkpoint_error(f"checkpoint {path} cannot be used: {', '.join(wrong)} missing or of a wrong type")
    return state


def _check_content(path: Path) -> None:
    """Compare a checkpoint with its checksum: torch.load ignores those of the archive, and its directory has none."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        unpacked = sum(entry.file_size for entry in archive.infolist())
        # torch.save does not compress.
        check_content(unpacked <= size, f"it would unpack to {unpacked} bytes from {size}")
        file.seek(max(0, size - 40))
        end = file.read()
        if end.startswith(_MARK):
            file.seek(0)
            digest, left = hashlib.sha256(), size - 40
            while left and (part := file.read(min(left, 1 << 20))):
                digest.update(part)
                left -= len(part)
            check_content(digest.digest() == end[8:], "its checksum does not match")
        else:
            check_content(end[-22:-18] == b"PK\5\6", "its end is damaged")  # the last record of an archive
            damaged = archive.testzip()
            check_content(damaged is None, f"the checksum of {damaged} does not match")


class _Hashed:
    """A stream that computes the checksum of what is written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Write and hash the content."""
        self.digest.update(content)
        return self.stream.write(content)

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


class CheckpointStore:
    """Checkpoints of one run in `checkpoint_dir`, or nowhere if that is `None`.

    The checkpoint of a step at which the monitored metric improved is named like `best-000000060.pt`, any other like
    `step-000000120.pt`; otherwise they are the same.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.directory = None if config.checkpoint_dir is None else Path(config.checkpoint_dir)
        self.newest: Path | None = None
        self._saved_at = monotonic()

    def check_writable(self) -> None:
        """Create the directory and a temporary file in it, so that a run does not fail at its first checkpoint."""
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
            except OSError as error:
                raise checkpoint_error(
                    f"checkpoint_dir must be a writable directory, got {self.directory}: {error.strerror or error}"
                ) from error

    def due_by_step(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps."""
        steps = self.config.checkpoint_every_steps
        return self.directory is not None and steps is not None and step % steps == 0

    def due_by_time(self) -> bool:
        """Return whether a checkpoint is due because of the time since the last one."""
        seconds = self.config.checkpoint_every_seconds
        return self.directory is not None and seconds is not None and monotonic() - self._saved_at >= seconds

    def load(self, check: Callable[[CheckpointState], None]) -> CheckpointState | None:
        """Return the newest readable checkpoint, or `None` if there are no checkpoints.

        `check` may raise a CheckpointError for the content of a checkpoint. An unreadable checkpoint is skipped with a
        warning to the logger `kdlib.training`.

        Raises:
            CheckpointError: There are checkpoints, but none can be read.
        """
        problem, paths = None, self._paths()
        for path in reversed(paths):
            try:
                state = load_checkpoint(path)
                check(state)
            except CheckpointError as error:
                _log.warning("%s; using the previous checkpoint", error)
                problem = problem or error
                continue
            self.newest = path
            return state
        if problem is not None:
            # A new run must not overwrite them.
            raise checkpoint_error(
                f"none of the {len(paths)} checkpoints in {self.directory} can be used; remove them to start from the "
                f"beginning; the newest: {str(problem).removeprefix('train: ')}"
            )
        return None

    def save(self, step: int, state: RunState, improved: Sequence[int]) -> None:
        """Write `state` atomically as the checkpoint of `step`, and remove old checkpoints.

        The newest `keep` are kept, and the best one before each of them: if the newest is damaged, the run resumes from an
        earlier one, whose best weights must still exist.

        Args:
            step: Completed steps.
            state: Content of the checkpoint.
            improved: Steps at which the monitored metric improved, in order.

        Raises:
            CheckpointError: The checkpoint cannot be written (full disk, missing permission). Earlier checkpoints are kept.
        """
        if self.directory is None:
            return
        path, other = self.path_of(step, improved), self._path(step, best=step not in improved)
        try:
            with atomic_write(path, durable=True, sole_writer=True) as file:
                hashed = _Hashed(file)
                torch.save({"format": _FORMAT, "step": step, **state}, hashed)  # type: ignore[arg-type]  # it only writes
                file.write(_MARK + hashed.digest.digest())
            other.unlink(missing_ok=True)  # a damaged one, before which the run resumed
            older = [old for old in self._paths() if _step(old) <= step]
            steps = {_step(old) for old in older[-self.config.keep :]}
            steps |= {max((best for best in improved if best <= each), default=each) for each in steps}
            for old in older:
                if _step(old) not in steps:
                    old.unlink(missing_ok=True)
            if (shards := state.get("shards")) is not None:
                remove_shards(self.directory, step, steps, shards["folder"])
        except (OSError, RuntimeError) as error:  # torch's archive writer raises RuntimeError for some write errors
            # The archive writer hides the system's error in the context.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = f"{self.newest} is kept" if self.newest else "there is no earlier checkpoint"
            raise checkpoint_error(f"checkpoint {path} cannot be written: {cause}; {kept}") from error
        self.newest = path
        self._saved_at = monotonic()

    def path_of(self, step: int, improved: Sequence[int]) -> Path:
        """Return the path of the checkpoint of `step`."""
        return self._path(step, best=step in improved)

    def _path(self, step: int, *, best: bool) -> Path:
        return Path(self.directory or "") / f"{'best' if best else 'step'}-{step:09d}.pt"

    def _paths(self) -> list[Path]:
        """Return the paths of all checkpoints, oldest first."""
        if self.directory is None or not self.directory.is_dir():
            return []
        return sorted((path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    """Return the step of a checkpoint."""
    return int(path.stem.split("-")[1])
