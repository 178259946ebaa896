"""Cache: which blocks of rows are there, and which process computes which. Touches `blocks.bin` alone.

A record is written when its rows are on disk for certain. A process that computes a block holds a lock on the byte of the
file that has the block's number; the system lets go of it when the process dies, however it dies, and another takes over.
"""

import errno
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib.cache._checks import disk_full, unlockable
from kdlib.cache.codec import Errors
from kdlib.cache.layout import NO_LINK, Layout, writing

__all__ = ["Blocks", "block_digest", "record_type"]

NAME = "blocks.bin"
_ALONE = 1 << 61
"""Byte whose lock lets one process at a time begin the cache, or change its header. Far behind the records."""


def record_type(layout: Layout) -> np.dtype[Any]:
    """One block: whether it is there, its checksum, and its errors by feature."""
    count = len(layout.features)
    return np.dtype(
        [
            ("done", "u1"),
            ("digest", "u1", (16,)),
            ("worst", "<f4", (count,)),
            ("total", "<f8", (count,)),
            ("relative", "<f4", (count,)),
        ]
    )


def block_digest(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Checksum of the bytes of a block."""
    return np.frombuffer(hashlib.blake2b(np.ascontiguousarray(rows).data, digest_size=16).digest(), np.uint8)


class Blocks:
    """The blocks of a cache that is being built.

    POSIX locks belong to a process and are all lost when it closes any descriptor of the file: nothing else in a building
    process may open it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        with writing(self.path):
            opened = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        self.file = os.fdopen(opened, "r+b", buffering=0)
        self.todo: NDArray[np.int64] = np.zeros(0, np.int64)
        self.cursor = 0

    def close(self) -> None:
        """Let go of the file and of every lock."""
        self.file.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time."""
        self._lock(_ALONE, wait=True)
        try:
            yield
        finally:
            self._unlock(_ALONE)

    def forget(self) -> None:
        """No block is there."""
        with writing(self.path):
            self.file.truncate(0)
            os.fsync(self.file.fileno())

    def prepare(self, layout: Layout) -> None:
        """Make the file fit a layout; in one of another size no block is there."""
        self.kind, self.count = record_type(layout), layout.blocks
        size = self.count * self.kind.itemsize
        if os.fstat(self.file.fileno()).st_size != size:
            self.forget()
            with writing(self.path):
                self.file.truncate(size)

    def records(self) -> NDArray[Any]:
        """All records as they are now."""
        return np.frombuffer(self._read(0, self.count * self.kind.itemsize), self.kind)

    def refresh(self) -> NDArray[np.bool_]:
        """Look again from the first block on; returns which are there."""
        done: NDArray[np.bool_] = self.records()["done"] == 1
        self.todo, self.cursor = np.flatnonzero(~done), 0
        return done

    def claim(self) -> int | None:
        """The next block that is not there and that nobody computes; ours until it is marked."""
        while self.cursor < len(self.todo):
            block = int(self.todo[self.cursor])
            self.cursor += 1
            if self._lock(block, wait=False):
                # Another may have marked it since we looked.
                if self._read(block * self.kind.itemsize, 1) != b"\1":
                    return block
                self._unlock(block)
        return None

    def mark(self, blocks: Mapping[int, tuple[NDArray[np.uint8], Errors]]) -> None:
        """Say of blocks, whose rows must be on disk for certain, that they are there; and give up their locks."""
        with writing(self.path):
            for block, (digest, (worst, total, relative)) in blocks.items():
                record = np.zeros((), self.kind)
                for name, value in zip(record.dtype.names or (), (1, digest, worst, total, relative), strict=True):
                    record[name] = value
                self.file.seek(block * self.kind.itemsize)
                if self.file.write(record.tobytes()) != self.kind.itemsize:
                    raise disk_full()
            os.fsync(self.file.fileno())
        for block in blocks:
            self._unlock(block)

    def _read(self, start: int, size: int) -> bytes:
        self.file.seek(start)
        parts = []
        while size and (part := self.file.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _lock(self, at: int, *, wait: bool) -> bool:
        if sys.platform == "win32":
            return True  # there are no such locks there: a cache is built by one process
        import fcntl

        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, at)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise unlockable(self.path, error) from error
        return True

    def _unlock(self, at: int) -> None:
        if sys.platform != "win32":
            import fcntl

            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, at)
