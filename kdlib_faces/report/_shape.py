"""Room: report. Small checks that describe the shape of JSON: each takes a value and its path, and names the path when it
refuses. Compose them as the data nests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdlib_faces._checks import InputError, report_key

__all__ = [
    "Check",
    "anything",
    "count",
    "each",
    "flag",
    "mapping",
    "number",
    "one_of",
    "or_null",
    "record",
    "same_length",
    "text",
    "values",
]

Check = Callable[[Any, str], None]


def text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise report_key(path, "text", value)


def number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise report_key(path, "a number", value)


def count(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise report_key(path, "a whole number >= 0", value)


def flag(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise report_key(path, "true or false", value)


def anything(value: Any, path: str) -> None:
    return None


def mapping(value: Any, path: str) -> None:
    if not isinstance(value, Mapping):
        raise report_key(path, "a mapping", value)


def one_of(*allowed: str) -> Check:
    def check(value: Any, path: str) -> None:
        if value not in allowed:
            raise report_key(path, "one of " + ", ".join(map(repr, allowed)), value)

    return check


def or_null(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if value is not None:
            inner(value, path)

    return check


def each(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, list | tuple):
            raise report_key(path, "a list", value)
        for index, item in enumerate(value):
            inner(item, f"{path}[{index}]")

    return check


def values(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        mapping(value, path)
        for key, item in value.items():
            inner(item, f"{path}[{key!r}]")

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    def check(value: Any, path: str) -> None:
        mapping(value, path)
        for key, inner in required.items():
            if key not in value:
                raise InputError(f"report: {path}.{key} is missing")
            inner(value[key], f"{path}.{key}")
        for key, inner in (optional or {}).items():
            if value.get(key) is not None:
                inner(value[key], f"{path}.{key}")

    return check


def same_length(inner: Check, first: str, second: str, extra: int = 0) -> Check:
    """`inner`, and the list under `second` is `extra` shorter than the one under `first`."""

    def check(value: Any, path: str) -> None:
        inner(value, path)
        lengths = len(value[first]), len(value[second])
        if lengths[0] - extra != lengths[1]:
            raise report_key(f"{path}.{second}", f"{lengths[0] - extra} long to fit {first}", f"{lengths[1]} values")

    return check
