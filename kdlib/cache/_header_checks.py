"""Checks of a cache header, which is untrusted input."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kdlib.cache._checks import CacheError

__all__ = [
    "HEADER_LIMIT",
    "bad_header",
    "check_header",
    "check_header_size",
    "check_layout",
    "header_errors",
    "header_shapes",
    "header_text",
    "header_texts",
    "header_integer",
]

HEADER_LIMIT = 1 << 20
"""Maximum size of a header in bytes."""
_ERRORS = ("max_cosine", "mean_cosine", "max_relative")


def bad_header(path: Path, error: Exception) -> CacheError:
    """Error for a header of another format or with impossible values."""
    return CacheError(f"TeacherCache: {path} is not a valid cache header: {error}")


def check_header_size(size: int) -> None:
    """A header must not exceed `HEADER_LIMIT`."""
    if size > HEADER_LIMIT:
        raise ValueError("it is too long")


def check_header(header: object, known: Collection[str]) -> dict[str, Any]:
    """Return the entries of a header, except the format, after checking that all are known."""
    if not isinstance(header, dict) or header.get("format") != 1:
        raise ValueError("its format is not 1")
    entries = {name: value for name, value in header.items() if name != "format"}
    unknown = sorted(set(entries) - set(known))
    if unknown:
        raise ValueError(f"it has the unknown entry {unknown[0]!r}")
    return entries


def header_shapes(features: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the features."""
    if not isinstance(features, dict):
        raise ValueError(f"features is {features!r}")
    shapes = {}
    for name, shape in features.items():
        if not isinstance(shape, list) or not shape or len(shape) > 8:
            raise ValueError(f"feature {name!r} has the shape {shape!r}")
        shapes[name] = tuple(header_integer(f"a side of feature {name!r}", side, 1, 2**31) for side in shape)
    return shapes


def check_layout(layout: Any, dtypes: Collection[str]) -> None:
    """The values of a header must be possible."""
    count = len(layout.features)
    if layout.dtype not in dtypes or not 1 <= count <= 256 or layout.rows > layout.total:
        raise ValueError(f"dtype {layout.dtype!r}, {count} features, {layout.rows} rows of {layout.total}")
    if layout.total > 2**62 or layout.row_bytes >= 2**31:
        raise ValueError(f"it has {layout.total} rows of {layout.row_bytes} bytes")


def header_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer within bounds."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}")
    return value


def header_text(name: str, value: Any) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}")
    return value


def header_texts(name: str, value: Any) -> dict[str, str]:
    """Return a mapping of strings to strings."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}")
    return {key: header_text(f"{name}[{key!r}]", entry) for key, entry in value.items()}


def header_errors(value: Any, features: Collection[str]) -> dict[str, dict[str, float]]:
    """Return the errors of each feature."""
    good = isinstance(value, dict) and set(value) <= set(features)
    for entry in value.values() if good else ():
        good = good and isinstance(entry, dict) and set(entry) == set(_ERRORS)
        good = good and all(type(each) is float and 0 <= each < math.inf for each in entry.values())
    if not good:
        raise ValueError(f"error is {value!r}")
    return {name: dict(entry) for name, entry in value.items()}
