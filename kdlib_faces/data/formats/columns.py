"""Fast, strict parsing of columns of whole numbers from text of millions of rows.

Eight digits are one 64-bit word. The bytes before the end of each number are read as a word, the bytes of its neighbors are
shifted out, and three multiplications add up the digits, for all numbers of a block at once.
"""

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
PAD = 16
_U = np.uint64
_ZEROS, _ABOVE_NINE, _HIGH = _U(0x3030303030303030), _U(0x7676767676767676), _U(0x8080808080808080)
_BYTES, _SUM_1, _SUM_2 = _U(0x000000FF000000FF), _U(0x000F424000000064), _U(0x0000271000000001)
# Bits by which a word is shifted to isolate a number of that many digits; numbers above 8 digits fill the word.
_SHIFTS = np.array([64 - 8 * min(length, 8) for length in range(PAD + 1)], dtype=np.uint64)
_BLANKS = (9, 10, 13, 32)


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
    padded = np.empty(PAD + len(block), dtype=np.uint8)
    padded[:PAD] = 32
    padded[PAD:] = np.frombuffer(block, np.uint8)
    breaks = np.flatnonzero(padded < 33)
    ends = breaks[PAD:]
    lengths = ends - breaks[PAD - 1 : -1] - 1
    marks = padded.take(ends)
    line_ends = marks == 10
    if not (line_ends | (marks == 32)).all() and not np.isin(marks, _BLANKS).all():
        raise ValueError
    count = int(np.count_nonzero(line_ends))
    if lengths.min() > 0:
        if len(ends) != count * columns or not line_ends[columns - 1 :: columns].all():
            raise ValueError
    else:
        row = np.cumsum(line_ends) - line_ends
        full = lengths > 0
        ends, lengths, row = ends[full], lengths[full], row[full].reshape(-1, columns)
        if (row != row[:, :1]).any() or (row[1:, 0] == row[:-1, 0]).any():
            raise ValueError
        if not len(ends):
            return np.zeros((0, columns), dtype=np.int64), count
    longest = int(lengths.max())
    if longest > PAD:
        raise ValueError
    words: NDArray[np.uint64] = np.ndarray((len(padded) - 7,), dtype=np.dtype("<u8"), buffer=padded.data, strides=(1,))
    numbers = _digits(words.take(ends - 8), lengths)
    if longest > 8:
        long = np.flatnonzero(lengths > 8)
        numbers[long] += _digits(words.take(ends[long] - 16), lengths[long] - 8) * 100_000_000
    return numbers.reshape(-1, columns), count


def _digits(words: NDArray[np.uint64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers in the last `lengths` (at least 1) of the eight characters of each word."""
    shift = _SHIFTS.take(lengths)
    words ^= _ZEROS
    words >>= shift
    words <<= shift
    if (((words + _ABOVE_NINE) | words) & _HIGH).any():
        raise ValueError
    words = words * _U(10) + (words >> _U(8))
    low = (words & _BYTES) * _SUM_1
    words >>= _U(16)
    words &= _BYTES
    words *= _SUM_2
    words += low
    words >>= _U(32)
    return words.view(np.int64)


def _raise_line(block: bytes, columns: int, lines: int, path: str | PathLike[str], what: str) -> NoReturn:
    """Name the first wrong line of a block."""
    for number, line in enumerate(block.split(b"\n"), lines + 1):
        fields = line.split()
        if fields and (len(fields) != columns or not all(field.isdigit() and len(field) <= 16 for field in fields)):
            shown = line[:60].decode("utf-8", "replace")
            raise InputError(
                f"{path} line {number}: must be {columns} whole numbers, got {shown!r}; this is not a {what}"
            )
    raise InputError(f"{path}: after line {lines}: control characters between the numbers; this is not a {what}")
