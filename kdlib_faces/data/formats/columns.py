"""Data room: columns of whole numbers from text of millions of rows, fast and strict. Touches the file system and NumPy.

Eight digits are one 64-bit word: the bytes before the end of each number are taken as a word, what is not its own is shifted
out, and three multiplications add the digits up, for all numbers of a block at once.
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

__all__ = ["integer_blocks", "read_integers"]

BLOCK = 1 << 18
PAD = 16
_U = np.uint64
_ZEROS, _ABOVE_NINE, _HIGH = _U(0x3030303030303030), _U(0x7676767676767676), _U(0x8080808080808080)
_BYTES, _SUM_1, _SUM_2 = _U(0x000000FF000000FF), _U(0x000F424000000064), _U(0x0000271000000001)
# By how much a word is shifted so that a number of so many digits stands alone; lengths above 8 fill the word.
_SHIFTS = np.array([64 - 8 * min(length, 8) for length in range(PAD + 1)], dtype=np.uint64)
_BLANKS = (9, 10, 13, 32)


def read_integers(
    path: str | PathLike[str],
    kinds: Sequence[type[np.generic]],
    *,
    what: str,
    most: int,
    check: Callable[[NDArray[np.int64], int], None] | None = None,
) -> list[NDArray[Any]]:
    """All rows of `integer_blocks`, each column an array of its kind, with room made once for the whole file.

    Args:
        path: the file.
        kinds: a NumPy scalar type a column.
        what: what the file is, for the messages.
        most: rows that are too many.
        check: called with each block and the number of rows before it; raises where it finds something wrong.

    Raises:
        InputError: as there.
    """
    columns: list[NDArray[Any]] = []
    rows = 0
    for block in integer_blocks(path, len(kinds), what=what, most=most):
        if check is not None:
            check(block, rows)
        end = rows + len(block)
        if not columns:
            # Lines are about as long throughout; what is not needed is never touched, and so costs nothing.
            room = int(1.1 * len(block) * max(1.0, Path(path).stat().st_size / BLOCK)) + len(block)
            columns = [np.empty(min(room, most + len(block)), dtype=kind) for kind in kinds]
        elif end > len(columns[0]):
            columns = [np.concatenate([column[:rows], np.empty(end, column.dtype)]) for column in columns]
        for column, values in zip(columns, block.T, strict=True):
            column[rows:end] = values
        rows = end
    return [column[:rows] for column in columns]


def integer_blocks(path: str | PathLike[str], columns: int, *, what: str, most: int) -> Iterator[NDArray[np.int64]]:
    """Rows of `columns` whole numbers from 0, separated by blanks or tabs; blank lines are left out.

    Args:
        path: the file.
        columns: numbers a row.
        what: what the file is, for the messages.
        most: rows that are too many.

    Yields:
        `(m, columns)` int64, a quarter of a megabyte of text at a time.

    Raises:
        InputError: anything else in the file, a number of more than 16 digits, more than `most` rows, or none; the line
            is named.
    """
    rows = lines = 0
    for block in _blocks(path, what):
        try:
            table, ended = _parse(block, columns)
        except ValueError:
            _blame(block, columns, lines, path, what)
        rows += len(table)
        lines += ended
        if rows > most:
            raise InputError(f"{path}: more than {most:,} rows; this is no {what}")
        yield table
    if not rows:
        raise InputError(f"{path}: the {what} is empty")


def _blocks(path: str | PathLike[str], what: str) -> Iterator[bytes]:
    """Whole lines, each block ending with a line end."""
    with opened(Path(path), what) as stream:
        rest = b""
        while chunk := stream.read(BLOCK):
            rest += chunk
            end = rest.rfind(b"\n") + 1
            if end:
                yield rest[:end]
                rest = rest[end:]
            if len(rest) > MAX_LINE:
                raise InputError(f"{path}: a line is longer than {MAX_LINE} bytes; this is no {what}")
        if rest:
            yield rest + b"\n"


def _parse(block: bytes, columns: int) -> tuple[NDArray[np.int64], int]:
    """The numbers of whole lines, and how many lines they are; ValueError where there is anything else."""
    padded = np.empty(PAD + len(block), dtype=np.uint8)
    padded[:PAD] = 32
    padded[PAD:] = np.frombuffer(block, np.uint8)
    breaks = np.flatnonzero(padded < 33)
    ends = breaks[PAD:]
    lengths = ends - breaks[PAD - 1 : -1] - 1
    kinds = padded.take(ends)
    line_ends = kinds == 10
    if not (line_ends | (kinds == 32)).all() and not np.isin(kinds, _BLANKS).all():
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
    words: NDArray[Any] = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded.data, strides=(1,))
    numbers = _digits(words.take(ends - 8), lengths)
    if longest > 8:
        long = np.flatnonzero(lengths > 8)
        numbers[long] += _digits(words.take(ends[long] - 16), lengths[long] - 8) * 100_000_000
    return numbers.reshape(-1, columns), count


def _digits(words: NDArray[np.uint64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers that the last `lengths` (at least 1) of the eight characters of each word spell."""
    away = _SHIFTS.take(lengths)
    words ^= _ZEROS
    words >>= away
    words <<= away
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


def _blame(block: bytes, columns: int, lines: int, path: str | PathLike[str], what: str) -> NoReturn:
    """Which line of the block it was."""
    for number, line in enumerate(block.split(b"\n"), lines + 1):
        fields = line.split()
        if fields and (len(fields) != columns or not all(field.isdigit() and len(field) <= 16 for field in fields)):
            shown = line[:60].decode("utf-8", "replace")
            raise InputError(f"{path} line {number}: must be {columns} whole numbers, got {shown!r}; this is no {what}")
    raise InputError(f"{path}: after line {lines}: control characters between the numbers; this is no {what}")
