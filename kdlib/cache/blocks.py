"""Records of complete blocks in `blocks.bin`, and locks that assign blocks to processes.

A record is written after its rows are on disk. A process that computes a block locks the byte of the file whose offset is
the number of the block. The operating system releases the lock when the process ends, and another process can take over.
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

from kdlib.cache._checks import cache_error, check_cache
from kdlib.cache.codec import Errors
from kdlib.cache.layout import NO_LINK, Layout, writing

if sys.platform != "win32":
    import fcntl

__all__ = ["Blocks", "block_digest", "record_type"]

NAME = "blocks.bin"
_HEADER_LOCK = 1 << 61
"""Byte that a process locks while it starts the cache or changes its header; far beyond the records."""


def record_type(layout: Layout) -> np.dtype[Any]:
    """Record of one block: whether it is complete, its checksum, and its errors by feature."""
    count = len(layout.features)
    return np.dtype(
        [
            ("done", "u1"),
            ("digest", "u1", (16,)),
            ("max_cosine", "<f4", (count,)),
            ("sum_cosine", "<f8", (count,)),
            ("max_relative", "<f4", (count,)),
        ]
    )


def block_digest(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the checksum of the bytes of a block."""
    return np.frombuffer(hashlib.blake2b(np.ascontiguousarray(rows).data, digest_size=16).digest(), np.uint8)


class Blocks:
    """Blocks of a cache that is being built.

    A process loses all its POSIX locks when it closes any descriptor of the file, so nothing else in a building process
    may open the file.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        with writing(self.path):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        self.file = os.fdopen(handle, "r+b", buffering=0)
        self.todo: NDArray[np.int64] = np.zeros(0, np.int64)
        self.cursor = 0

    def close(self) -> None:
        """Close the file and release all locks."""
        self.file.close()

    @contextmanager
    def header_lock(self) -> Iterator[None]:
        """Hold the lock of the header within the block."""
        self._lock(_HEADER_LOCK, wait=True)
        try:
            yield
        finally:
            self._unlock(_HEADER_LOCK)

    def clear(self, size: int = 0) -> None:
        """Remove all records and leave `size` zero bytes."""
        with writing(self.path):
            self.file.truncate(0)
            self.file.truncate(size)
            os.fsync(self.file.fileno())

    def prepare(self, layout: Layout) -> None:
        """Set the layout; a file of another size is cleared."""
        self.kind, self.count = record_type(layout), layout.blocks
        size = self.count * self.kind.itemsize
        if os.fstat(self.file.fileno()).st_size != size:
            self.clear(size)

    def records(self) -> NDArray[Any]:
        """Read all records."""
        return np.frombuffer(self._read(0, self.count * self.kind.itemsize), self.kind)

    def refresh(self) -> NDArray[np.bool_]:
        """Read the records again, restart at the first block, and return which blocks are complete."""
        done: NDArray[np.bool_] = self.records()["done"] == 1
        self.todo, self.cursor = np.flatnonzero(~done), 0
        return done

    def claim(self) -> int | None:
        """Lock and return the next free block; the lock is held until `mark`."""
        while self.cursor < len(self.todo):
            block = int(self.todo[self.cursor])
            self.cursor += 1
            if self._lock(block, wait=False):
                # Another process may have completed it since `refresh`.
                if self._read(block * self.kind.itemsize, 1) != b"\1":
                    return block
                self._unlock(block)
        return None

    def mark(self, blocks: Mapping[int, tuple[NDArray[np.uint8], Errors]]) -> None:
        """Record blocks whose rows have been synced to disk as complete, and release their locks."""
        with writing(self.path):
            for block, (digest, errors) in blocks.items():
                record = np.zeros((), self.kind)
                for name, value in zip(record.dtype.names or (), (1, digest, *errors), strict=True):
                    record[name] = value
                self.file.seek(block * self.kind.itemsize)
                written = self.file.write(record.tobytes())
                check_cache(written == self.kind.itemsize, f"cannot write {self.path}: {os.strerror(errno.ENOSPC)}")
            os.fsync(self.file.fileno())
        for block in blocks:
            self._unlock(block)

    def _read(self, start: int, size: int) -> bytes:
        self.file.seek(start)
        return self.file.read(size) or b""

    def _lock(self, at: int, *, wait: bool) -> bool:
        if sys.platform == "win32":
            return True  # there are no such locks, so only one process may build a cache
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, at)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            reason = error.strerror or error
            raise cache_error(f"{self.path} cannot be locked ({reason}); build on a local disk") from error
        return True

    def _unlock(self, at: int) -> None:
        if sys.platform != "win32":
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, at)
