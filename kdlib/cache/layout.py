"""File layout of a cache and its header.

A cache is a directory:

- `header.json`: format, fingerprint, shapes and the number of complete rows; written atomically;
- `samples.i64`: the sample ids, ascending, little-endian;
- `shard-00000.bin` ...: rows of fixed length, each with all features of one (sample, view); the last 32 bytes are a seal
  that identifies the cache and the shard;
- `blocks.bin`: for each block of rows, whether it is complete, its checksum, and the error of the stored rows.

Row `view * samples + position` belongs to the sample at `position` of the ascending ids. A block contains `block` rows of
one view; the last block of a view may be shorter. The header is untrusted input and contains no file names: file names
are derived from numbers.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdlib._atomic import atomic_write
from kdlib.cache._checks import unreadable, unwritable
from kdlib.cache._header_checks import (
    HEADER_LIMIT,
    bad_header,
    check_header,
    check_header_size,
    check_layout,
    header_errors,
    header_integer,
    header_shapes,
    header_text,
    header_texts,
)

__all__ = ["Layout", "read_header", "write_file", "writing"]

DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "i1"}
SEAL_BYTES = 32
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Symbolic links are not followed, so that a foreign directory cannot redirect writing."""


@dataclass(frozen=True)
class Layout:
    """Content of the header.

    Args:
        fingerprint: fingerprint of teacher, preprocessing and data.
        samples: number of sample ids.
        views: number of views per sample.
        ids: SHA-256 of `samples.i64`.
        first: the smallest id.
        dense: whether the ids are `first`, `first + 1`, ...
        dtype: `"float16"`, `"float32"` or `"int8"`.
        features: name to shape of one sample.
        shard_rows: rows of a full shard.
        rows: number of complete rows.
        parts: separate fingerprints of teacher, preprocessing and data, if known.
        block: rows of a full block.
        checks: SHA-256 of `blocks.bin`, empty until all rows are complete.
        error: for each feature the cosine error (maximum and mean over rows) and the maximum relative error.
        notes: texts given by the builder.
    """

    fingerprint: str
    samples: int
    views: int
    ids: str
    first: int
    dense: bool
    dtype: str
    features: dict[str, tuple[int, ...]]
    shard_rows: int
    block: int
    rows: int = 0
    parts: dict[str, str] = field(default_factory=dict)
    checks: str = ""
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of rows of the complete cache."""
        return self.samples * self.views

    @property
    def complete(self) -> bool:
        """Whether all rows are complete."""
        return self.rows == self.total and bool(self.checks)

    @cached_property
    def scales(self) -> int:
        """Number of bytes at the start of a row that contain the scales of its features."""
        return 4 * len(self.features) if self.dtype == "int8" else 0

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return self.scales + sum(map(math.prod, self.features.values())) * np.dtype(DTYPES[self.dtype]).itemsize

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Feature name to its first byte in a row and the byte after its last."""
        size, start, places = np.dtype(DTYPES[self.dtype]).itemsize, self.scales, {}
        for name, shape in self.features.items():
            places[name] = (start, start + size * math.prod(shape))
            start = places[name][1]
        return places

    @cached_property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.total // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Number of rows of a shard of the complete cache."""
        return min(self.shard_rows, self.total - shard * self.shard_rows)

    def bytes_of(self, shard: int) -> int:
        """File size of a shard in bytes."""
        return self.rows_of(shard) * self.row_bytes + SEAL_BYTES

    def seal_of(self, shard: int) -> bytes:
        """The last bytes of a shard, which depend on the header and the number of the shard."""
        header = {**asdict(self), **dict.fromkeys(("rows", "checks", "error", "notes", "parts"))}
        return hashlib.sha256(f"{json.dumps(header, sort_keys=True)} {shard}".encode()).digest()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.samples // self.block) * self.views

    def rows_in(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        view, number = divmod(block, -(-self.samples // self.block))
        start = view * self.samples
        return start + number * self.block, start + min((number + 1) * self.block, self.samples)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Split rows `start` to `stop` by shard: shard, first row within it, number of rows."""
        while start < stop:
            shard, inside = divmod(start, self.shard_rows)
            count = min(stop - start, self.shard_rows - inside)
            yield shard, inside, count
            start += count

    def write(self, directory: Path) -> None:
        """Write the header atomically."""
        write_file(directory / "header.json", (json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n").encode())


def shard_path(directory: Path, shard: int) -> Path:
    """Path of a shard."""
    return directory / f"shard-{shard:05d}.bin"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError while writing `path` to a CacheError."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically and durably."""
    with writing(path), atomic_write(path, durable=True, sole_writer=True) as file:
        file.write(content)


def sync_directory(directory: Path) -> None:
    """Flush the directory entries to disk where the system supports it."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_header(directory: Path) -> Layout | None:
    """Read and check the header of a cache; return `None` if there is no header.

    Raises:
        CacheError: the header has another format or impossible values.
    """
    path = directory / "header.json"
    try:
        with path.open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, HEADER_LIMIT) + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        check_header_size(len(content))
        layout = _layout(check_header(json.loads(content), Layout.__dataclass_fields__))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise bad_header(path, error) from error
    return layout


def _layout(header: Mapping[str, Any]) -> Layout:
    features = header_shapes(header["features"])
    layout = Layout(
        fingerprint=header_text("fingerprint", header["fingerprint"]),
        samples=header_integer("samples", header["samples"], 1, 2**48),
        views=header_integer("views", header["views"], 1, 2**31),
        ids=header_text("ids", header["ids"]),
        first=header_integer("first", header["first"], -(2**63), 2**63 - 1),
        dense=header["dense"] is True,
        dtype=header_text("dtype", header["dtype"]),
        features=features,
        shard_rows=header_integer("shard_rows", header["shard_rows"], 1, 2**48),
        rows=header_integer("rows", header["rows"], 0, 2**63),
        parts=header_texts("parts", header["parts"]),
        block=header_integer("block", header["block"], 1, 2**31),
        checks=header_text("checks", header["checks"]),
        error=header_errors(header["error"], features),
        notes=header_texts("notes", header["notes"]),
    )
    check_layout(layout, DTYPES)
    return layout
