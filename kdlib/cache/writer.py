"""Writer of rows into the shards of a cache."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kdlib._atomic import sync_folder
from kdlib.cache.blocks import Blocks, block_digest
from kdlib.cache.codec import Errors
from kdlib.cache.layout import NO_LINK, Layout, read_header, shard_path, writing

__all__ = ["Writer"]


class Writer:
    """Writes the blocks of one process; other processes may write other blocks."""

    def __init__(self, directory: Path, layout: Layout, blocks: Blocks) -> None:
        self.directory, self.layout, self.blocks = directory, layout, blocks
        self.pending: dict[int, tuple[NDArray[np.uint8], Errors]] = {}
        self.files: dict[int, BinaryIO] = {}
        self.done = 0

    def write(self, block: int, rows: NDArray[np.uint8], errors: Errors) -> None:
        """Write the rows of a block; `sync` makes them durable."""
        start, stop = self.layout.rows_in(block)
        digest = block_digest(rows)
        for shard, inside, count in self.layout.pieces(start, start + len(rows)):
            path = shard_path(self.directory, shard)
            with writing(path):
                file = self.files.get(shard) or self._open(shard, path)
                file.seek(inside * self.layout.row_bytes)
                file.write(rows[:count].data)
                file.flush()
            rows = rows[count:]
        self.pending[block] = digest, errors
        self.done += stop - start

    def _open(self, shard: int, path: Path) -> BinaryIO:
        """Open a shard, which is created at full size with holes for missing rows."""
        file: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666), "r+b")
        self.files[shard] = file
        if os.fstat(file.fileno()).st_size != self.layout.bytes_of(shard):
            file.truncate(self.layout.bytes_of(shard))
        file.seek(self.layout.rows_of(shard) * self.layout.row_bytes)
        file.write(self.layout.trailer_of(shard))
        return file

    def sync(self) -> None:
        """Sync the rows to disk, then record their blocks, then update the header."""
        if not self.pending:
            return
        for shard, file in list(self.files.items()):
            with writing(shard_path(self.directory, shard)):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            del self.files[shard]
        with writing(self.directory):
            sync_folder(self.directory)
        self.blocks.mark(self.pending)
        self.pending = {}
        with self.blocks.header_lock():
            rows = self.count(self.blocks.records()["done"] == 1)
            header = read_header(self.directory)
            if header is not None and not header.complete:
                replace(self.layout, rows=rows).write(self.directory)

    def complete(self) -> None:
        """Write the checksum of the records and the errors of the whole cache into the header."""
        with self.blocks.header_lock():
            header = read_header(self.directory)
            if header is not None and header.complete:
                return
            records = self.blocks.records()
            error = {
                name: {
                    "max_cosine": float(records["max_cosine"][:, at].max()),
                    "mean_cosine": float(records["sum_cosine"][:, at].sum() / self.layout.total),
                    "max_relative": float(records["max_relative"][:, at].max()),
                }
                for at, name in enumerate(self.layout.features)
            }
            checks = hashlib.sha256(records.tobytes()).hexdigest()
            replace(self.layout, rows=self.layout.total, checks=checks, error=error).write(self.directory)

    def count(self, done: NDArray[np.bool_]) -> int:
        """Return the number of rows in complete blocks, and continue counting from there."""
        self.done = int(self.layout.block_rows[done].sum())
        return self.done

    def close(self) -> None:
        """Close the files; rows that were not synced may be lost."""
        for file in self.files.values():
            with suppress(OSError):
                file.close()
