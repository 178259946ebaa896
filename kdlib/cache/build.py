"""Cache: run a teacher over the samples and write what it says. Touches the cache's directory alone."""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.cache.layout import DTYPES, CacheError, Layout, read_header, shard_path, write_file

__all__ = ["build_cache"]


def build_cache(
    directory: Path,
    teacher: nn.Module,
    fetch: Callable[[Tensor, int], Any],
    ids: np.ndarray[Any, np.dtype[np.int64]],
    wanted: Layout,
    *,
    batch_size: int,
    shard_bytes: int,
    mark_seconds: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Bring the cache in `directory` to completion; `wanted` is its layout as far as it is known before a forward."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = _lock(directory)
    try:
        layout = _continued(directory, wanted)
        if layout is None:
            # A header comes last, so what lies here without one is the start of a build that never marked a row.
            write_file(directory / "samples.i64", ids.astype("<i8").tobytes())
        elif layout.complete:
            return
        _write_rows(directory, teacher, fetch, ids, layout or wanted, batch_size, shard_bytes, mark_seconds, progress)
    finally:
        if lock is not None:
            os.close(lock)


def _lock(directory: Path) -> int | None:
    if sys.platform == "win32":
        return None  # there is no such lock there: two builds of one cache are not kept apart
    import fcntl

    lock = os.open(directory, os.O_RDONLY)
    try:
        # The system lets go of it when the process dies, however it dies.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise CacheError(f"TeacherCache: {directory} is being built by another process") from error
    return lock


def _continued(directory: Path, wanted: Layout) -> Layout | None:
    """The layout of an earlier build, if it is the same job."""
    found = read_header(directory)
    if found is None:
        return None
    for name in ("fingerprint", "ids", "views", "dtype"):
        theirs, ours = getattr(found, name), getattr(wanted, name)
        if theirs != ours:
            what = {"fingerprint": "another teacher, preprocessing or data", "ids": "other samples"}.get(name, name)
            raise CacheError(
                f"TeacherCache: {directory} holds {what}: its {name} is {theirs!r}, asked for is {ours!r}; "
                "give another path, or delete it"
            )
    return found


@torch.no_grad()
def _write_rows(
    directory: Path,
    teacher: nn.Module,
    fetch: Callable[[Tensor, int], Any],
    ids: np.ndarray[Any, np.dtype[np.int64]],
    layout: Layout,
    batch_size: int,
    shard_bytes: int,
    mark_seconds: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    writer: _Writer | None = None
    at, marked = layout.rows, monotonic()
    awake = [module for module in teacher.modules() if module.training]
    try:
        for module in awake:
            module.training = False
        while at < layout.total:
            view, position = divmod(at, layout.samples)
            batch = ids[position : position + batch_size]
            features = _ask(teacher, fetch, batch, view)
            if not layout.features:
                layout = _with_features(layout, features, shard_bytes)
            writer = writer or _Writer(directory, layout)
            writer.write(_pack(layout, features, batch, view))
            at += len(batch)
            if monotonic() - marked >= mark_seconds or at == layout.total:
                writer.mark(at)
                marked = monotonic()
            if progress is not None:
                progress(at, layout.total)
    finally:
        for module in awake:
            module.training = True
        if writer is not None:
            writer.close()


class _Writer:
    """Appends rows to the shards, and marks in the header what is on disk for certain."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.directory, self.layout, self.at = directory, layout, layout.rows
        self.file: BinaryIO | None = None

    def write(self, rows: np.ndarray[Any, Any]) -> None:
        while len(rows):
            shard, inside = divmod(self.at, self.layout.shard_rows)
            if self.file is None:
                self.file = self._open(shard, inside * self.layout.row_bytes)
            now = rows[: self.layout.shard_rows - inside]
            self.file.write(now.tobytes())
            self.at += len(now)
            rows = rows[len(now) :]
            if self.at % self.layout.shard_rows == 0:
                self._sync()
                self.file.close()
                self.file = None

    def mark(self, rows: int) -> None:
        """The rows first, then the word that they are there."""
        self._sync()
        self.layout = replace(self.layout, rows=rows)
        self.layout.write(self.directory)

    def close(self) -> None:
        if self.file is not None:
            # After an error, such as a full disk, closing may fail once more; what was marked stays good.
            with suppress(OSError):
                self.file.close()

    def _open(self, shard: int, offset: int) -> BinaryIO:
        path = shard_path(self.directory, shard)
        path.touch()
        file = path.open("r+b")
        if os.fstat(file.fileno()).st_size < offset:
            file.close()
            raise CacheError(
                f"TeacherCache: {path} is shorter than its header says; delete the cache and build it anew"
            )
        file.truncate(offset)  # rows written but not marked before a kill
        file.seek(offset)
        return file

    def _sync(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())


def _ask(
    teacher: nn.Module, fetch: Callable[[Tensor, int], Any], batch: np.ndarray[Any, np.dtype[np.int64]], view: int
) -> dict[str, Tensor]:
    inputs = fetch(torch.from_numpy(batch.copy()), view)
    features = teacher(*inputs) if isinstance(inputs, (tuple, list)) else teacher(inputs)
    if not isinstance(features, Mapping) or not features:
        raise TypeError(f"TeacherCache: teacher must return named features, got {type(features).__name__}")
    for name, x in features.items():
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != len(batch) or not x.is_floating_point():
            shown = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"TeacherCache: feature {name!r} must be floating point ({len(batch)}, d, ...), got {shown}"
            )
    return {name: x.detach().float().cpu() for name, x in features.items()}


def _with_features(layout: Layout, features: Mapping[str, Tensor], shard_bytes: int) -> Layout:
    layout = replace(layout, features={name: tuple(x.shape[1:]) for name, x in features.items()})
    return replace(layout, shard_rows=max(1, shard_bytes // layout.row_bytes))


def _pack(
    layout: Layout, features: Mapping[str, Tensor], batch: np.ndarray[Any, np.dtype[np.int64]], view: int
) -> np.ndarray[Any, Any]:
    shapes = {name: tuple(x.shape[1:]) for name, x in features.items()}
    if shapes != layout.features:
        raise CacheError(f"TeacherCache: features must be {layout.features} as before, got {shapes}")
    rows = np.empty(len(batch), layout.row)
    for at, name in enumerate(layout.features):
        x = features[name].numpy()
        largest = np.abs(x.reshape(len(batch), -1)).max(axis=1)
        bad = np.flatnonzero(~(largest <= np.finfo(DTYPES[layout.dtype]).max))
        if len(bad):
            value = largest[bad[0]]
            remedy = '; use dtype="float32"' if np.isfinite(value) else ""
            raise ValueError(
                f"TeacherCache: feature {name!r} of sample {batch[bad[0]]}, view {view} must fit {layout.dtype}, "
                f"got {value:.4g}{remedy}"
            )
        rows[f"f{at}"] = x
    return rows


def ids_digest(ids: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    """SHA-256 of the ids as they lie on disk."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
