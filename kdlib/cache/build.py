"""Run a teacher over all samples and write its outputs, in one or several processes.

Each process locks free blocks, writes their rows and records them as complete. After an interruption, blocks without a
record are computed again and give the same bytes.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdlib._modes import eval_mode
from kdlib.cache._checks import CacheError, cache_error, check_argument, check_cache, check_features
from kdlib.cache.blocks import NAME, Blocks
from kdlib.cache.codec import Errors, pack
from kdlib.cache.fingerprint import Fingerprint, check_source
from kdlib.cache.layout import Layout, read_header, shard_path, write_file, writing
from kdlib.cache.writer import Writer

__all__ = ["Job", "teacher_outputs", "build_cache", "ids_digest"]

_BUILDING: set[tuple[int, int]] = set()
"""Directories that this process is building."""
_POLL_SECONDS = 0.05
"""Seconds between checks for blocks that other processes compute."""


@dataclass
class Job:
    """Arguments of a build."""

    directory: Path
    teacher: nn.Module
    fetch: Callable[[Tensor, int], Any]
    ids: NDArray[np.int64]
    batch_size: int
    shard_bytes: int
    sync_seconds: float
    prefetch: int
    progress: Callable[[int, int], None] | None


def build_cache(job: Job, wanted: Layout) -> None:
    """Complete a cache; `wanted` is the part of its layout that is known before the first forward pass."""
    header = _existing(job.directory, wanted)
    if header is not None and header.complete:
        return  # before anything is written: the directory may be read-only
    if header is None and not (job.directory / NAME).exists():
        # Such files are not ours to delete.
        stray = any(job.directory.glob("shard-*.bin"))
        check_cache(not stray, f"{job.directory} contains shard files without a header; use another path")
    with writing(job.directory):
        job.directory.mkdir(parents=True, exist_ok=True)
    with _only_builder(job.directory), eval_mode(job.teacher), closing(Blocks(job.directory)) as blocks:
        with blocks.header_lock():
            layout = _existing(job.directory, wanted)
            if layout is not None and layout.complete:
                return
            first = None
            if layout is None:
                layout, first = _start(job, wanted, blocks)
            blocks.prepare(layout)
            run = _Run(job, layout, blocks, first)
        run.compute_all()


@contextmanager
def _only_builder(directory: Path) -> Iterator[None]:
    """Exclude a second build in this process, which the locks of blocks do not: they belong to the process."""
    status = os.stat(directory)
    key = (status.st_dev, status.st_ino)
    if key in _BUILDING:
        raise cache_error(f"{directory} is being built by another thread of this process")
    _BUILDING.add(key)
    try:
        yield
    finally:
        _BUILDING.discard(key)


def _existing(directory: Path, wanted: Layout) -> Layout | None:
    """Return the layout of an existing cache after checking that it belongs to this build."""
    header = read_header(directory)
    if header is None:
        return None
    fingerprint = Fingerprint(**wanted.parts) if wanted.parts else wanted.fingerprint
    check_source(directory, header.fingerprint, header.parts, fingerprint, building=True)
    for name in ("ids", "views", "dtype"):
        stored, expected = getattr(header, name), getattr(wanted, name)
        what = "other samples" if name == "ids" else f"another {name.removesuffix('s')}"
        check_cache(
            stored == expected,
            f"{directory} contains {what}: its {name} is {stored!r}, expected {expected!r}; use another path, or delete it",
        )
    return header


_Packed = tuple[NDArray[np.uint8], Errors]
"""Rows of a block and their errors."""


def _start(job: Job, wanted: Layout, blocks: Blocks) -> tuple[Layout, _Packed]:
    """Compute the first block to get the shapes, and write the header; shards without a header are removed."""
    ids = job.ids[: job.batch_size]
    inputs = job.fetch(torch.from_numpy(ids.copy()), 0)
    with naming_samples(job, 0, len(ids), 0):
        features = teacher_outputs(job.teacher, inputs, len(ids))
    layout = replace(wanted, features={name: tuple(x.shape[1:]) for name, x in features.items()})
    layout = replace(layout, shard_rows=max(1, job.shard_bytes // layout.row_bytes))
    size = layout.row_bytes
    check_argument(size < 2**31, f"TeacherCache: features of one sample must take less than 2 GiB, got {size} bytes")
    first = _packed(job, layout, features, 0)
    blocks.clear()
    with writing(job.directory):
        for stale in job.directory.glob("shard-*.bin"):
            stale.unlink()
    write_file(job.directory / "samples.i64", job.ids.astype("<i8").tobytes())
    layout.write(job.directory)
    return layout, first


@contextmanager
def naming_samples(job: Job, at: int, count: int, view: int) -> Iterator[None]:
    """Add to an error of the teacher the samples of its batch."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"in the batch of {count} samples from sample {job.ids[at]} to {job.ids[at + count - 1]}, view {view}"
        )
        raise


@torch.no_grad()
def teacher_outputs(teacher: nn.Module, inputs: Any, count: int) -> dict[str, Tensor]:
    """Return the outputs of a teacher for `count` samples, float32 on the CPU."""
    features = teacher(*inputs) if isinstance(inputs, (tuple, list)) else teacher(inputs)
    check_features(features, count)
    return {name: x.detach().float().cpu() for name, x in features.items()}


def _packed(job: Job, layout: Layout, features: Mapping[str, Tensor], start: int) -> _Packed:
    view, at = divmod(start, layout.samples)
    return pack(layout, features, lambda row: f"sample {job.ids[at + row]}, view {view}")


class _Run:
    """The work of one process on a cache; `first` is block 0 if this process has started the cache."""

    def __init__(self, job: Job, layout: Layout, blocks: Blocks, first: _Packed | None) -> None:
        self.job, self.layout, self.blocks = job, layout, blocks
        self.writer = Writer(job.directory, layout, blocks)
        done = blocks.refresh()
        self.writer.count(done)
        complete = (layout.rows_in(int(block)) for block in np.flatnonzero(done))
        for shard in {shard for start, stop in complete for shard, _, _ in layout.pieces(start, stop)}:
            path = shard_path(job.directory, shard)
            check_cache(
                path.exists() and path.stat().st_size >= layout.bytes_of(shard),
                f"{path} is shorter than its header states; delete the cache and build it again",
            )
        self.first = None if first is None else (blocks.claim() or 0, *first)

    def compute_all(self) -> None:
        """Compute free blocks until all blocks are complete."""
        pool = ThreadPoolExecutor(1) if self.job.prefetch else None
        try:
            if self.first is not None:
                self.writer.write(*self.first)
                self._report()
            self._blocks(pool)
        except BaseException:
            # Keep the complete blocks. On a full disk this fails again.
            with suppress(CacheError, OSError):
                self.writer.sync()
            raise
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
            self.writer.close()

    def _blocks(self, pool: ThreadPoolExecutor | None) -> None:
        ahead: deque[tuple[int, Callable[[], list[tuple[int, Any]]]]] = deque()
        synced = time.monotonic()
        while True:
            while len(ahead) <= self.job.prefetch and (block := self.blocks.claim()) is not None:
                fetch = pool.submit(self._fetch, block).result if pool else partial(self._fetch, block)
                ahead.append((block, fetch))
            if not ahead:
                self.writer.sync()
                if self.writer.count(self.blocks.refresh()) == self.layout.total:
                    self.writer.complete()
                    return
                self._report()
                time.sleep(_POLL_SECONDS)
                continue
            self._compute(*ahead.popleft())
            if time.monotonic() - synced >= self.job.sync_seconds:
                self.writer.sync()
                synced = time.monotonic()
            self._report()

    def _report(self) -> None:
        if self.job.progress is not None:
            self.job.progress(self.writer.done, self.layout.total)

    def _fetch(self, block: int) -> list[tuple[int, Any]]:
        """Return size and inputs of the batches of a block: one, unless the cache was started with a larger batch."""
        start, stop = self.layout.rows_in(block)
        view, position = divmod(start, self.layout.samples)
        ids = torch.from_numpy(self.job.ids[position : position + stop - start].copy())
        return [(len(part), self.job.fetch(part, view)) for part in torch.split(ids, self.job.batch_size)]

    def _compute(self, block: int, fetch: Callable[[], list[tuple[int, Any]]]) -> None:
        start = self.layout.rows_in(block)[0]
        view, at = divmod(start, self.layout.samples)
        parts = []
        for count, inputs in fetch():
            with naming_samples(self.job, at, count, view):
                parts.append(teacher_outputs(self.job.teacher, inputs, count))
            at += count
        features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.writer.write(block, *_packed(self.job, self.layout, features, start))


def ids_digest(ids: NDArray[np.int64]) -> str:
    """Return the SHA-256 of the ids in their format on disk."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
