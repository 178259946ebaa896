"""Cache: how outputs lie on disk, and the header that says so. Touches the header file; the header may be hostile.

A cache is a directory:

- `header.json`: format, fingerprint, shapes, and how many rows are safely on disk; replaced in one step;
- `samples.i64`: the sample ids, ascending, little-endian;
- `shard-00000.bin` and on: rows of fixed length, all features of one (sample, view) side by side.

Row `view * samples + position` belongs to the sample at `position` of the ascending ids. Rows are written in that order,
so that one number says how far a build has come.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CacheError", "Layout", "read_header", "write_file"]

DTYPES = {"float16": "<f2", "float32": "<f4"}
_HEADER_LIMIT = 1 << 20


class CacheError(ValueError):
    """The cache on disk is not the one asked for, is not complete, or is damaged."""


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
        dtype: `"float16"` or `"float32"`.
        features: name to shape of one sample.
        shard_rows: rows of a full shard.
        rows: rows that are safely on disk.
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

    @property
    def total(self) -> int:
        """Rows of the complete cache."""
        return self.samples * self.views

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return self.rows == self.total

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(math.prod(shape) for shape in self.features.values()) * int(self.dtype[5:]) // 8

    @property
    def row(self) -> np.dtype[Any]:
        """One row as NumPy reads it; the fields are numbered as the features are."""
        kind = DTYPES[self.dtype]
        return np.dtype([(f"f{at}", kind, shape) for at, shape in enumerate(self.features.values())])

    def rows_of(self, shard: int) -> int:
        """Rows of one shard of the complete cache."""
        return min(self.shard_rows, self.total - shard * self.shard_rows)

    def write(self, directory: Path) -> None:
        """Replace the header in one step."""
        write_file(directory / "header.json", (json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n").encode())


def shard_path(directory: Path, shard: int) -> Path:
    """File of one shard."""
    return directory / f"shard-{shard:05d}.bin"


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_header(directory: Path) -> Layout | None:
    """The header of a cache, checked; `None` where there is none.

    Raises:
        CacheError: the header is not one of this format, or promises what cannot be.
    """
    path = directory / "header.json"
    try:
        with path.open("rb") as file:
            content = file.read(_HEADER_LIMIT + 1)
    except FileNotFoundError:
        return None
    try:
        if len(content) > _HEADER_LIMIT:
            raise ValueError("it is too long")
        header = json.loads(content)
        if not isinstance(header, dict) or header.pop("format", None) != 1:
            raise ValueError("its format is not 1")
        layout = _layout(header)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheError(f"TeacherCache: {path} is no header of a cache: {error}") from error
    return layout


def _layout(header: Mapping[str, Any]) -> Layout:
    if not isinstance(header["features"], dict):
        raise ValueError(f"features is {header['features']!r}")
    features = {}
    for name, shape in header["features"].items():
        if not isinstance(shape, list) or not shape or len(shape) > 8:
            raise ValueError(f"feature {name!r} has the shape {shape!r}")
        features[name] = tuple(_whole(f"a side of feature {name!r}", side, 1, 2**31) for side in shape)
    layout = Layout(
        fingerprint=_text("fingerprint", header["fingerprint"]),
        samples=_whole("samples", header["samples"], 1, 2**48),
        views=_whole("views", header["views"], 1, 2**31),
        ids=_text("ids", header["ids"]),
        first=_whole("first", header["first"], -(2**63), 2**63 - 1),
        dense=header["dense"] is True,
        dtype=_text("dtype", header["dtype"]),
        features=features,
        shard_rows=_whole("shard_rows", header["shard_rows"], 1, 2**48),
        rows=_whole("rows", header["rows"], 0, 2**63),
    )
    if layout.dtype not in DTYPES or not 1 <= len(features) <= 256 or layout.rows > layout.total:
        raise ValueError(f"dtype {layout.dtype!r}, {len(features)} features, {layout.rows} rows of {layout.total}")
    if layout.row_bytes >= 2**31:
        raise ValueError(f"a row has {layout.row_bytes} bytes")
    return layout


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}")
    return value
