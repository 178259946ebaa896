"""Cache: how outputs lie on disk, and the header that says so. Touches the header file; the header may be hostile.

A cache is a directory:

- `header.json`: format, fingerprint, shapes, and how many rows are safely on disk; replaced in one step;
- `samples.i64`: the sample ids, ascending, little-endian;
- `shard-00000.bin` and on: rows of fixed length, all features of one (sample, view) side by side, and at the end a seal of
  32 bytes that says which cache and which shard this is;
- `blocks.bin`: for each block of rows that went through the teacher together, whether it is there, its checksum, and how
  far the rows on disk are from those of the teacher.

Row `view * samples + position` belongs to the sample at `position` of the ascending ids. A block holds `block` rows of one
view, the last of a view fewer. Nothing in the header names a file: names are made of numbers.
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

from kdlib.cache._checks import unreadable, unwritable
from kdlib.cache._header_checks import (
    HEADER_LIMIT,
    bad_header,
    check_header,
    check_header_size,
    check_layout,
    header_errors,
    header_shapes,
    header_text,
    header_texts,
    header_whole,
)

__all__ = ["Layout", "read_header", "write_file", "writing"]

DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "i1"}
SEAL_BYTES = 32
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""A link in a directory from elsewhere must not lead our writing out of it."""


@dataclass(frozen=True)
class Layout:
    """Content of the header.

    Args:
        fingerprint: what the outputs were computed from.
        samples: number of sample ids.
        views: number of views of each sample.
        ids: SHA-256 of `samples.i64`.
        first: the smallest id.
        dense: whether the ids are `first`, `first + 1`, ...
        dtype: `"float16"`, `"float32"` or `"int8"`.
        features: name to shape of one sample.
        shard_rows: rows of a full shard.
        rows: rows that are safely on disk.
        parts: the fingerprints of teacher, preprocessing and data each by itself, where they are known.
        block: rows of a full block; 0 in a cache of an earlier version, which has no seals and no `blocks.bin`.
        checks: SHA-256 of `blocks.bin`, empty until all rows are there.
        error: for each feature the cosine error (largest and mean over rows) and the largest relative error.
        notes: what the builder wished to be known of the cache.
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
    rows: int = 0
    parts: dict[str, str] = field(default_factory=dict)
    block: int = 0
    checks: str = ""
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows of the complete cache."""
        return self.samples * self.views

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return self.rows == self.total and (not self.block or bool(self.checks))

    @cached_property
    def scales(self) -> int:
        """Bytes at the head of a row that hold the scales of its features."""
        return 4 * len(self.features) if self.dtype == "int8" else 0

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.scales + sum(map(math.prod, self.features.values())) * np.dtype(DTYPES[self.dtype]).itemsize

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Name to the first byte of a feature in a row, and the byte after its last."""
        size, at, found = np.dtype(DTYPES[self.dtype]).itemsize, self.scales, {}
        for name, shape in self.features.items():
            found[name] = (at, at + size * math.prod(shape))
            at = found[name][1]
        return found

    @cached_property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.total // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Rows of one shard of the complete cache."""
        return min(self.shard_rows, self.total - shard * self.shard_rows)

    def bytes_of(self, shard: int) -> int:
        """Size of the file of one shard."""
        return self.rows_of(shard) * self.row_bytes + (SEAL_BYTES if self.block else 0)

    def seal_of(self, shard: int) -> bytes:
        """Last bytes of a shard: another cache, another place in it or another header has another seal."""
        told = {**asdict(self), **dict.fromkeys(("rows", "checks", "error", "notes", "parts"))}
        return hashlib.sha256(f"{json.dumps(told, sort_keys=True)} {shard}".encode()).digest()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.samples // self.block) * self.views

    def rows_in(self, block: int) -> tuple[int, int]:
        """First row of a block, and the row after its last."""
        view, number = divmod(block, -(-self.samples // self.block))
        start = view * self.samples
        return start + number * self.block, start + min((number + 1) * self.block, self.samples)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows `start` to `stop` as they lie in shards: shard, first row in it, and how many."""
        while start < stop:
            shard, inside = divmod(start, self.shard_rows)
            count = min(stop - start, self.shard_rows - inside)
            yield shard, inside, count
            start += count

    def write(self, directory: Path) -> None:
        """Replace the header in one step."""
        write_file(directory / "header.json", (json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n").encode())


def shard_path(directory: Path, shard: int) -> Path:
    """File of one shard."""
    return directory / f"shard-{shard:05d}.bin"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full, or a folder that may not be written to, is one clear error."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            part.unlink(missing_ok=True)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make names in a directory certain, where the system knows how."""
    with suppress(OSError):
        opened = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read_header(directory: Path) -> Layout | None:
    """The header of a cache, checked; `None` where there is none.

    Raises:
        CacheError: the header is not one of this format, or promises what cannot be.
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
        samples=header_whole("samples", header["samples"], 1, 2**48),
        views=header_whole("views", header["views"], 1, 2**31),
        ids=header_text("ids", header["ids"]),
        first=header_whole("first", header["first"], -(2**63), 2**63 - 1),
        dense=header["dense"] is True,
        dtype=header_text("dtype", header["dtype"]),
        features=features,
        shard_rows=header_whole("shard_rows", header["shard_rows"], 1, 2**48),
        rows=header_whole("rows", header["rows"], 0, 2**63),
        parts=header_texts("parts", header.get("parts", {})),
        block=header_whole("block", header.get("block", 0), 0, 2**31),
        checks=header_text("checks", header.get("checks", "")),
        error=header_errors(header.get("error", {}), features),
        notes=header_texts("notes", header.get("notes", {})),
    )
    check_layout(layout, DTYPES)
    return layout
