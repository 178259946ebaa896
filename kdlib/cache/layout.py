"""File layout of a cache and its header.

A cache is a directory:

- `header.json`: format, fingerprint, shapes and the number of complete rows; written atomically;
- `samples.i64`: the sample ids, ascending, little-endian;
- `shard-00000.bin` ...: rows of fixed length, each with all features of one (sample, view); the last 32 bytes, the
  trailer, identify the cache and the shard;
- `blocks.bin`: for each block of rows, whether it is complete, its checksum, and the error of the stored rows.

Row `view * samples + position` belongs to the sample at `position` of the ascending ids. A block contains `block` rows of
one view; the last block of a view may be shorter. The header is untrusted input and contains no file names: file names
are derived from numbers.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib._atomic import atomic_write
from kdlib.cache._checks import cache_error, check_argument, check_cache

__all__ = ["Layout", "read_header", "write_file", "writing"]

DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "i1"}
TRAILER_BYTES = 32
_HEADER_LIMIT = 1 << 20
"""Maximum size of a header in bytes."""
_BOUNDS = {
    "samples": (1, 2**48), "views": (1, 2**31), "first": (-(2**63), 2**63 - 1), "shard_rows": (1, 2**48),
    "rows": (0, 2**63), "block": (1, 2**31),
}  # fmt: skip
"""Bounds of the integers in a header."""
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Symbolic links are not followed, so that a prepared directory cannot redirect writing."""


@dataclass(frozen=True)
class Layout:
    """Content of the header; see `TeacherCache` for what is not explained here.

    Args:
        fingerprint: fingerprint of teacher, preprocessing and data.
        samples: number of sample ids.
        views: number of views per sample.
        ids: SHA-256 of `samples.i64`.
        first: the smallest id.
        dense: whether the ids are `first`, `first + 1`, ...
        dtype: type on disk.
        features: name to shape of one sample.
        shard_rows: rows of a full shard.
        block: rows of a full block.
        rows: number of complete rows.
        parts: separate fingerprints of teacher, preprocessing and data, if known.
        checks: SHA-256 of `blocks.bin`, empty until all rows are complete.
        error: errors of the stored rows.
        notes: texts given by the builder.

    Examples:
        >>> layout = Layout("", 5, 2, "", 0, True, "float16", {"embedding": (4,)}, shard_rows=10, block=10)
        >>> layout.total, layout.complete
        (10, False)
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
    def places(self) -> dict[str, tuple[int, int]]:
        """Feature name to its first byte in a row and the byte after its last; int8 rows begin with the scales."""
        start, places = 4 * len(self.features) if self.dtype == "int8" else 0, {}
        for name, shape in self.features.items():
            places[name] = (start, start + np.dtype(DTYPES[self.dtype]).itemsize * math.prod(shape))
            start = places[name][1]
        return places

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return max(stop for _, stop in self.places.values())

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.total // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Number of rows of a shard of the complete cache."""
        return min(self.shard_rows, self.total - shard * self.shard_rows)

    def bytes_of(self, shard: int) -> int:
        """File size of a shard."""
        return self.rows_of(shard) * self.row_bytes + TRAILER_BYTES

    def trailer_of(self, shard: int) -> bytes:
        """The last bytes of a shard, which depend on the header and the number of the shard."""
        header = {**asdict(self), **dict.fromkeys(("rows", "checks", "error", "notes", "parts"))}
        return hashlib.sha256(f"{json.dumps(header, sort_keys=True)} {shard}".encode()).digest()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.samples // self.block) * self.views

    @cached_property
    def block_rows(self) -> NDArray[np.int64]:
        """Number of rows of each block."""
        starts = np.arange(0, self.samples, self.block)
        return np.tile(np.minimum(self.block, self.samples - starts), self.views)

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


def check_size(path: Path, size: int) -> None:
    """A file must exist with the size that follows from the header."""
    got = path.stat().st_size if path.is_file() else 0
    check_cache(got == size, f"{path} must have {size} bytes, got {got}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError while writing `path` to a CacheError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise cache_error(
            f"cannot write {path}: {reason}; complete blocks are kept, and the same build resumes from there"
        ) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically and durably."""
    with writing(path), atomic_write(path, durable=True, sole_writer=True) as file:
        file.write(content)


def read_header(directory: Path) -> Layout | None:
    """Read and check the header of a cache; return `None` if there is no header.

    Raises:
        CacheError: the header has another format or impossible values.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(read_header(Path(folder)))
        None
    """
    path = directory / "header.json"
    try:
        with path.open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, _HEADER_LIMIT) + 1)
        check_argument(len(content) <= _HEADER_LIMIT, "it is too long")
        return _layout(json.loads(content))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise cache_error(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise cache_error(f"{path} is not a valid cache header: {error}") from error


def _layout(header: Any) -> Layout:
    check_argument(isinstance(header, dict) and header.get("format") == 1, "its format is not 1")
    entries = {name: value for name, value in header.items() if name != "format"}
    unknown = sorted(set(entries) - set(Layout.__dataclass_fields__))
    check_argument(not unknown, f"it has the unknown entries {unknown[:4]}")
    for name, (low, high) in _BOUNDS.items():
        _check_integer(name, entries[name], low, high)
    for name in ("fingerprint", "ids", "dtype", "checks"):
        check_argument(isinstance(entries[name], str), f"{name} is {entries[name]!r}")
    for name in ("parts", "notes"):
        check_argument(isinstance(entries[name], dict), f"{name} is {entries[name]!r}")
        for key, text in entries[name].items():
            check_argument(isinstance(text, str), f"{name}[{key!r}] is {text!r}")
    features = _shapes(entries["features"])
    _check_errors(entries["error"], features)
    layout = Layout(**{**entries, "features": features, "dense": entries["dense"] is True})
    possible = layout.dtype in DTYPES and layout.rows <= layout.total <= 2**62 and layout.row_bytes < 2**31
    check_argument(possible, f"dtype {layout.dtype!r}, {layout.rows} rows of {layout.total}")
    return layout


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    check_argument(type(value) is int and low <= value <= high, f"{name} is {value!r}")


def _shapes(features: Any) -> dict[str, tuple[int, ...]]:
    check_argument(isinstance(features, dict) and 1 <= len(features) <= 256, f"features is {features!r}")
    for name, shape in features.items():
        good = isinstance(shape, list) and 1 <= len(shape) <= 8
        check_argument(good, f"feature {name!r} has the shape {shape!r}")
        for side in shape:
            _check_integer(f"a side of feature {name!r}", side, 1, 2**31)
    return {name: tuple(shape) for name, shape in features.items()}


def _check_errors(value: Any, features: Collection[str]) -> None:
    good = isinstance(value, dict) and set(value) <= set(features)
    for entry in value.values() if good else ():
        good = good and isinstance(entry, dict) and set(entry) == {"max_cosine", "mean_cosine", "max_relative"}
        good = good and all(type(each) is float and 0 <= each < math.inf for each in entry.values())
    check_argument(good, f"error is {value!r}")
