"""Cache: run a teacher over the samples and write what it says. Touches the cache's directory alone.

Several processes may do so at once: each takes blocks that nobody has, writes their rows to where they belong, and marks
them. Whatever is killed, unmarked blocks are computed again, to the same bytes.
"""

import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdlib.cache._checks import (
    CacheError,
    another_process,
    another_thread,
    check_features,
    check_no_strays,
    check_row_bytes,
    check_rows,
    check_same_job,
    check_source,
    no_locks,
)
from kdlib.cache.blocks import NAME, Blocks
from kdlib.cache.codec import Errors, pack
from kdlib.cache.fingerprint import Fingerprint
from kdlib.cache.layout import Layout, read_header, shard_path, write_file, writing
from kdlib.cache.writer import Writer

__all__ = ["Job", "ask", "build_cache", "ids_digest"]

_BUILDING: set[tuple[int, int]] = set()
"""Directories that this process builds: its own locks would not keep it from itself."""
_PATIENCE = 0.05
"""Seconds between two looks at blocks that other processes compute."""


@dataclass
class Job:
    """What to compute, and how."""

    directory: Path
    teacher: nn.Module
    fetch: Callable[[Tensor, int], Any]
    ids: NDArray[np.int64]
    batch_size: int
    shard_bytes: int
    mark_seconds: float
    prefetch: int
    progress: Callable[[int, int], None] | None


def build_cache(job: Job, wanted: Layout, *, shared: bool) -> None:
    """Bring a cache to completion; `wanted` is its layout as far as it is known before a forward."""
    found = _continued(job.directory, wanted)
    if found is not None and found.complete:
        return  # also where nothing may be written
    if found is None and not (job.directory / NAME).exists():
        check_no_strays(job.directory, any(job.directory.glob("shard-*.bin")))
    with writing(job.directory):
        job.directory.mkdir(parents=True, exist_ok=True)
    with _presence(job.directory, shared=shared), _asleep(job.teacher):
        blocks = Blocks(job.directory)
        try:
            with blocks.alone():
                layout = _continued(job.directory, wanted)
                if layout is not None and layout.complete:
                    return
                first = None
                if layout is None or not layout.block:
                    layout, first = _begin(job, wanted, blocks)
                blocks.prepare(layout)
                _check_shards(job.directory, layout, blocks)
            _Run(job, layout, blocks, first).go()
        finally:
            blocks.close()


@contextmanager
def _presence(directory: Path, *, shared: bool) -> Iterator[None]:
    """Keep out who builds the same cache, or with `shared` who does not share it."""
    found = os.stat(directory)
    key = (found.st_dev, found.st_ino)
    if key in _BUILDING:
        raise another_thread(directory)
    lock = _lock(directory, shared=shared)
    _BUILDING.add(key)
    try:
        yield
    finally:
        _BUILDING.discard(key)
        if lock is not None:
            os.close(lock)


def _lock(directory: Path, *, shared: bool) -> int | None:
    if sys.platform == "win32":
        if shared:
            raise no_locks()
        return None  # two builds of one cache are not kept apart there
    import fcntl

    lock = os.open(directory, os.O_RDONLY)
    try:
        # The system lets go of it when the process dies, however it dies.
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise another_process(directory, shared=shared) from error
    return lock


@contextmanager
def _asleep(teacher: nn.Module) -> Iterator[None]:
    awake = [module for module in teacher.modules() if module.training]
    try:
        for module in awake:
            module.training = False
        yield
    finally:
        for module in awake:
            module.training = True


def _continued(directory: Path, wanted: Layout) -> Layout | None:
    """The layout of an earlier build, if it is the same job."""
    found = read_header(directory)
    if found is None:
        return None
    ours = Fingerprint(**wanted.parts, whole=wanted.fingerprint) if wanted.parts else wanted.fingerprint
    check_source(directory, found, ours, building=True)
    for name in ("ids", "views", "dtype"):
        check_same_job(directory, name, getattr(found, name), getattr(wanted, name))
    return found


_First = tuple[NDArray[np.uint8], Errors]


def _begin(job: Job, wanted: Layout, blocks: Blocks) -> tuple[Layout, _First]:
    """Compute the first block, which tells the shapes, and write the header; what lay here without one goes."""
    layout = replace(wanted, block=job.batch_size, features={})
    features = ask(job.teacher, job.fetch, job.ids[: job.batch_size], 0)
    layout = replace(layout, features={name: tuple(x.shape[1:]) for name, x in features.items()})
    layout = replace(layout, shard_rows=max(1, job.shard_bytes // layout.row_bytes))
    check_row_bytes(layout.row_bytes)
    first = _packed(job, layout, features, 0)
    blocks.forget()
    with writing(job.directory):
        for stale in job.directory.glob("shard-*.bin"):
            stale.unlink()
    write_file(job.directory / "samples.i64", job.ids.astype("<i8").tobytes())
    layout.write(job.directory)
    return layout, first


def _check_shards(directory: Path, layout: Layout, blocks: Blocks) -> None:
    """A block that is marked must have its rows: a file that was cut since cannot be completed."""
    view, number = np.divmod(np.flatnonzero(blocks.refresh()), -(-layout.samples // layout.block))
    start = view * layout.samples + number * layout.block
    stop = view * layout.samples + np.minimum((number + 1) * layout.block, layout.samples)
    opened = np.zeros(layout.shards + 1, np.int64)
    np.add.at(opened, start // layout.shard_rows, 1)
    np.add.at(opened, (stop - 1) // layout.shard_rows + 1, -1)
    for shard in np.flatnonzero(np.cumsum(opened)):
        path = shard_path(directory, int(shard))
        check_rows(path, path.exists() and path.stat().st_size >= layout.bytes_of(int(shard)))


@torch.no_grad()
def ask(
    teacher: nn.Module, fetch: Callable[[Tensor, int], Any], batch: NDArray[np.int64], view: int, inputs: Any = None
) -> dict[str, Tensor]:
    """What a teacher says of a batch, float32 on the CPU; `inputs` in place of fetching them."""
    inputs = fetch(torch.from_numpy(batch.copy()), view) if inputs is None else inputs
    features = teacher(*inputs) if isinstance(inputs, (tuple, list)) else teacher(inputs)
    check_features(features, len(batch))
    return {name: x.detach().float().cpu() for name, x in features.items()}


def _packed(job: Job, layout: Layout, features: Mapping[str, Tensor], start: int) -> _First:
    view, at = divmod(start, layout.samples)
    return pack(layout, features, lambda row: f"sample {job.ids[at + row]}, view {view}")


class _Run:
    """One process at work on a cache."""

    def __init__(self, job: Job, layout: Layout, blocks: Blocks, first: _First | None) -> None:
        self.job, self.layout, self.blocks, self.first = job, layout, blocks, first
        self.writer = Writer(job.directory, layout, blocks)

    def go(self) -> None:
        """Compute what nobody else does, until all is there."""
        pool = ThreadPoolExecutor(1) if self.job.prefetch else None
        try:
            self.writer.count(self.blocks.refresh())
            self._blocks(pool)
        except BaseException:
            # What is whole need not be computed again. A disk that is full fails once more here.
            with suppress(CacheError, OSError):
                self.writer.mark()
            raise
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
            self.writer.close()

    def _blocks(self, pool: ThreadPoolExecutor | None) -> None:
        ahead: deque[tuple[int, Future[Any] | None]] = deque()
        marked = time.monotonic()
        while True:
            while len(ahead) <= self.job.prefetch and (block := self.blocks.claim()) is not None:
                ready = self.first is not None and block == 0
                ahead.append((block, pool.submit(self._fetch, block) if pool and not ready else None))
            if not ahead:
                self.writer.mark()
                if self.writer.count(self.blocks.refresh()) == self.layout.total:
                    self.writer.complete()
                    return
                self._report()
                time.sleep(_PATIENCE)
                continue
            block, inputs = ahead.popleft()
            self._compute(block, inputs)
            if time.monotonic() - marked >= self.job.mark_seconds:
                self.writer.mark()
                marked = time.monotonic()
            self._report()

    def _report(self) -> None:
        if self.job.progress is not None:
            self.job.progress(self.writer.done, self.layout.total)

    def _parts(self, block: int) -> Iterator[tuple[NDArray[np.int64], int]]:
        """A block in batches: one, unless it was begun with a larger `batch_size` than ours."""
        start, stop = self.layout.rows_in(block)
        view, position = divmod(start, self.layout.samples)
        for at in range(position, position + stop - start, self.job.batch_size):
            yield self.job.ids[at : min(at + self.job.batch_size, position + stop - start)], view

    def _fetch(self, block: int) -> list[Any]:
        return [self.job.fetch(torch.from_numpy(ids.copy()), view) for ids, view in self._parts(block)]

    def _compute(self, block: int, inputs: "Future[list[Any]] | None") -> None:
        start, stop = self.layout.rows_in(block)
        if self.first is not None and block == 0:
            (rows, errors), self.first = self.first, None
        else:
            given = inputs.result() if inputs is not None else [None] * -(-(stop - start) // self.job.batch_size)
            parts = [
                ask(self.job.teacher, self.job.fetch, ids, view, each)
                for (ids, view), each in zip(self._parts(block), given, strict=True)
            ]
            features = parts[0] if len(parts) == 1 else _joined(parts)
            rows, errors = _packed(self.job, self.layout, features, start)
        self.writer.write(block, rows, errors)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def ids_digest(ids: NDArray[np.int64]) -> str:
    """SHA-256 of the ids as they lie on disk."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
