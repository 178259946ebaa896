"""Cache: rows to their places in the shards, and the word that they are there. Touches the cache's directory alone."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kdlib.cache.blocks import Blocks, block_digest
from kdlib.cache.codec import Errors
from kdlib.cache.layout import NO_LINK, Layout, read_header, shard_path, sync_directory, writing

__all__ = ["Writer"]


class Writer:
    """Writes blocks of one process, among others that write blocks of their own."""

    def __init__(self, directory: Path, layout: Layout, blocks: Blocks) -> None:
        self.directory, self.layout, self.blocks = directory, layout, blocks
        self.pending: dict[int, tuple[NDArray[np.uint8], Errors]] = {}
        self.files: dict[int, BinaryIO] = {}
        self.done = 0

    def write(self, block: int, rows: NDArray[np.uint8], errors: Errors) -> None:
        """Put the rows of a block where they belong; `mark` makes that certain."""
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
        """A shard has its full size from the start, and holes where nothing was written yet."""
        file: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666), "r+b")
        self.files[shard] = file
        if os.fstat(file.fileno()).st_size != self.layout.bytes_of(shard):
            file.truncate(self.layout.bytes_of(shard))
        file.seek(self.layout.rows_of(shard) * self.layout.row_bytes)
        file.write(self.layout.seal_of(shard))
        return file

    def mark(self) -> None:
        """The rows first, then the word that they are there, then the count in the header."""
        if not self.pending:
            return
        for shard, file in list(self.files.items()):
            with writing(shard_path(self.directory, shard)):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            del self.files[shard]
        sync_directory(self.directory)
        self.blocks.mark(self.pending)
        self.pending = {}
        with self.blocks.alone():
            rows = self.count(self.blocks.records()["done"] == 1)
            found = read_header(self.directory)
            if found is not None and not found.complete:
                replace(self.layout, rows=rows).write(self.directory)

    def complete(self) -> None:
        """Once all is there: the checksum of the checksums, and the errors of the whole."""
        with self.blocks.alone():
            found = read_header(self.directory)
            if found is not None and found.complete:
                return
            records = self.blocks.records()
            error = {
                name: {
                    "max_cosine": float(records["worst"][:, at].max()),
                    "mean_cosine": float(records["total"][:, at].sum() / self.layout.total),
                    "max_relative": float(records["relative"][:, at].max()),
                }
                for at, name in enumerate(self.layout.features)
            }
            checks = hashlib.sha256(records.tobytes()).hexdigest()
            replace(self.layout, rows=self.layout.total, checks=checks, error=error).write(self.directory)

    def _rows(self, done: NDArray[np.bool_]) -> int:
        """How many rows blocks hold."""
        layout = self.layout
        per_view = -(-layout.samples // layout.block)
        short = layout.samples - (per_view - 1) * layout.block
        views = done.reshape(layout.views, per_view)
        return int(views[:, :-1].sum()) * layout.block + int(views[:, -1].sum()) * short

    def count(self, done: NDArray[np.bool_]) -> int:
        """How many rows there are, of us and of others."""
        self.done = self._rows(done)
        return self.done

    def close(self) -> None:
        """Let go of the files; what was not marked may be lost."""
        for file in self.files.values():
            with suppress(OSError):
                file.close()
