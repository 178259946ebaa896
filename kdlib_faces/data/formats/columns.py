"""Strict parsing of columns of whole numbers from text of millions of rows."""

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import opened
from kdlib_faces.data.formats.text import MAX_LINE

__all__ = ["read_integers"]

BLOCK = 1 << 18
MAX_DIGITS = 16
_ALLOWED = b"0123456789 \t\r\n"


def read_integers(
    path: str | PathLike[str],
    dtypes: Sequence[type[np.generic]],
    *,
    what: str,
    max_rows: int,
    check: Callable[[NDArray[np.int64], int], None] | None = None,
) -> list[NDArray[Any]]:
    """Read rows of whole numbers from 0, separated by blanks or tabs, to one array per column; blank lines are skipped.

    `check` is called with each block of rows, `(m, columns)` int64, and the number of rows before it, and raises for wrong
    values.

    Raises:
        InputError: The file holds anything else, a number of more than 16 digits, more than `max_rows` rows, or no row;
            the message names the line.
    """
    columns: list[NDArray[Any]] = []
    rows = lines = 0
    for text in _blocks(path, what):
        try:
            block, ended = _parse(text, len(dtypes))
        except ValueError:
            _raise_line(text, len(dtypes), lines, path, what)
        lines += ended
        end = rows + len(block)
        if end > max_rows:
            raise InputError(f"{path}: more than {max_rows:,} rows; this is not a {what}")
        if check is not None:
            check(block, rows)
        if not columns:
            # One allocation for the whole file, estimated from the length of its lines; untouched memory costs nothing.
            estimate = int(1.1 * len(block) * max(1.0, Path(path).stat().st_size / BLOCK)) + len(block)
            columns = [np.empty(min(estimate, max_rows + len(block)), dtype=dtype) for dtype in dtypes]
        elif end > len(columns[0]):
            columns = [np.concatenate([column[:rows], np.empty(end, column.dtype)]) for column in columns]
        for column, values in zip(columns, block.T, strict=True):
            column[rows:end] = values
        rows = end
    if not rows:
        raise InputError(f"{path}: the {what} is empty")
    return [column[:rows] for column in columns]


def _blocks(path: str | PathLike[str], what: str) -> Iterator[bytes]:
    """Whole lines, about 256 KiB at a time; each block ends with a line end."""
    with opened(path, what) as stream:
        rest = b""
        while chunk := stream.read(BLOCK):
            rest += chunk
            end = rest.rfind(b"\n") + 1
            if end:
                yield rest[:end]
                rest = rest[end:]
            if len(rest) > MAX_LINE:
                raise InputError(f"{path}: a line is longer than {MAX_LINE} bytes; this is not a {what}")
        if rest:
            yield rest + b"\n"


def _parse(block: bytes, columns: int) -> tuple[NDArray[np.int64], int]:
    """The numbers of whole lines and the number of lines; ValueError for anything else."""
    if block.translate(None, _ALLOWED) or block.count(b"\r") != block.count(b"\r\n"):
        raise ValueError
    characters = np.frombuffer(block, dtype=np.uint8)
    digit = characters >= ord("0")
    first = digit.copy()
    first[1:] &= ~digit[:-1]  # the first digit of each number
    ends = np.flatnonzero(characters == ord("\n"))
    per_line = np.diff(np.cumsum(first, dtype=np.int32)[ends], prepend=0)
    rows = int(np.count_nonzero(per_line))
    if not (per_line[per_line > 0] == columns).all():
        raise ValueError
    if not rows:
        return np.zeros((0, columns), dtype=np.int64), len(ends)
    numbers = np.fromstring(block, dtype=np.int64, sep=" ")
    if len(numbers) != rows * columns or numbers.max() >= 10**MAX_DIGITS:
        raise ValueError
    return numbers.reshape(rows, columns), len(ends)


def _raise_line(block: bytes, columns: int, lines: int, path: str | PathLike[str], what: str) -> NoReturn:
    """Name the first wrong line of a block."""
    for number, line in enumerate(block.split(b"\n"), lines + 1):
        fields = line.split()
        if fields and (
            len(fields) != columns or not all(field.isdigit() and len(field) <= MAX_DIGITS for field in fields)
        ):
            shown = line[:60].decode("utf-8", "replace")
            raise InputError(
                f"{path} line {number}: must be {columns} whole numbers, got {shown!r}; this is not a {what}"
            )
    raise InputError(f"{path}: after line {lines}: control characters between the numbers; this is not a {what}")
