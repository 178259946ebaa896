"""Data room: bounded reading of text files from outside. Touches the file system; imports nothing heavy."""

import csv
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from kdlib._checks import nearest
from kdlib_faces._checks import InputError

__all__ = ["read_lines", "read_table", "split_row"]

MAX_LINE = 8192
MAX_LINES = 20_000_000


def read_lines(path: str | PathLike[str], *, what: str = "list") -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 text file as `(line number, text)`, blank ones left out.

    The file may be anything: a line longer than 8,192 bytes, more than 20 million lines, a NUL byte and bytes that are
    no UTF-8 are refused with the line that holds them, before they cost memory.

    Args:
        path: the file.
        what: what the file is, for the messages.

    Raises:
        InputError: the file is missing, a folder, unreadable, or holds one of the above.
    """
    name = str(path)
    try:
        with Path(path).open("rb") as stream:
            number = 0
            while raw := stream.readline(MAX_LINE + 1):
                number += 1
                if len(raw) > MAX_LINE:
                    raise InputError(f"{name} line {number}: longer than {MAX_LINE} bytes; this is no {what}")
                if number > MAX_LINES:
                    raise InputError(f"{name}: more than {MAX_LINES:,} lines")
                if b"\0" in raw:
                    raise InputError(f"{name} line {number}: holds a NUL byte; this is no text file")
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = raw[error.start]
                    raise InputError(f"{name} line {number}: byte 0x{byte:02x} is not UTF-8 text") from None
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except FileNotFoundError:
        raise InputError(f"{what} not found: {name}") from None
    except IsADirectoryError:
        raise InputError(f"{what} must be a file, got the folder {name}") from None
    except OSError as error:
        raise InputError(f"{what} not readable: {name} ({error.strerror or error})") from None


def split_row(text: str, where: str) -> list[str]:
    """The fields of one CSV line, stripped; a quoted field may hold commas, not line ends.

    Raises:
        InputError: a quote that does not close, with `where` in front.
    """
    try:
        row = next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise InputError(f"{where}: not a CSV line ({error}), got {text[:60]!r}") from None
    return [field.strip() for field in row]


def read_table(
    path: Path, *, what: str, known: Sequence[str], needed: Sequence[str]
) -> tuple[str, list[str], Iterator[tuple[int, str, dict[str, str]]]]:
    """A CSV file with a header, row by row.

    Args:
        path: the file.
        what: it is, for errors.
        known: columns that are read, however they are cased; others are passed over.
        needed: those that must be there.

    Returns:
        Where the header stands, which known columns it has, and an iterator of line number, `"PATH line N"` and the
        cells of the known columns.

    Raises:
        InputError: an empty file, a needed column that is not there, a known one twice, a row of another width.
    """
    lines = read_lines(path, what=what)
    number, text = next(lines, (0, ""))
    head = f"{path} line {number}"
    header = [name.casefold() for name in split_row(text, head)] if number else []
    columns: dict[str, int] = {}
    for name in known if number else ():
        if header.count(name) > 1:
            raise InputError(f"{head}: the column {name!r} stands there {header.count(name)} times")
        if name in header:
            columns[name] = header.index(name)
        elif name in needed:
            raise InputError(f"{head}: no column named {name!r}{nearest(name, header)}")

    def rows() -> Iterator[tuple[int, str, dict[str, str]]]:
        for number, text in lines:
            where = f"{path} line {number}"
            row = split_row(text, where)
            if len(row) != len(header):
                raise InputError(
                    f"{where}: the header has {len(header)} columns, this line has {len(row)}: {text[:60]!r}"
                )
            yield number, where, {name: row[at] for name, at in columns.items()}

    return head, list(columns), rows()
