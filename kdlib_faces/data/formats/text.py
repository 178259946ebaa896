"""Bounded reading of text files and CSV tables."""

import codecs
import csv
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike

from kdlib._checks import nearest
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import opened

__all__ = ["check_commas", "is_number", "read_lines", "read_table", "split_row"]

MAX_LINE = 8192
MAX_LINES = 20_000_000
OTHER_MARKS = {"semicolons": ";", "tabs": "\t"}


def is_number(field: str, max_digits: int = 9) -> bool:
    """Whether `field` is a whole number of 1 to `max_digits` ASCII digits."""
    return field.isascii() and field.isdigit() and len(field) <= max_digits


def read_lines(path: str | PathLike[str], *, what: str = "list") -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 text file as `(line number, text)`, without blank lines.

    Memory stays bounded whatever the file holds.

    Raises:
        InputError: The file is missing, a folder or unreadable, or it holds a line longer than 8,192 bytes, more than 20
            million lines, a NUL byte, a CR inside a line, or bytes that are not UTF-8; the message names the line and what
            to change.
    """
    with opened(path, what) as stream:
        number = 0
        while raw := stream.readline(MAX_LINE + 1):
            number += 1
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(f"{path}: the file is UTF-16 text; save it as UTF-8")
            if b"\r" in raw.rstrip(b"\r\n"):
                raise InputError(
                    f"{path} line {number}: lines end with CR only; save the file with LF or CRLF line ends"
                )
            if len(raw) > MAX_LINE:
                raise InputError(f"{path} line {number}: longer than {MAX_LINE} bytes; this is not a {what}")
            if number > MAX_LINES:
                raise InputError(f"{path}: more than {MAX_LINES:,} lines")
            if b"\0" in raw:
                raise InputError(f"{path} line {number}: contains a NUL byte; the file must be UTF-8 text")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise InputError(
                    f"{path} line {number}: byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8"
                ) from None
            if text.strip():
                yield number, text.rstrip("\r\n")


def split_row(text: str, where: str) -> list[str]:
    """Split one CSV line into stripped fields; a quoted field may contain commas but no line ends.

    Raises:
        InputError: A quote does not close; the message starts with `where`.
    """
    try:
        row = next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise InputError(f"{where}: not a CSV line ({error}), got {text[:60]!r}") from None
    return [field.strip() for field in row]


def check_commas(text: str, where: str, marks: Mapping[str, str] = OTHER_MARKS) -> None:
    """Check that the columns of a line are not separated by other marks than commas, by default semicolons and tabs.

    Raises:
        InputError: They are; the message starts with `where`.
    """
    for name, mark in marks.items():
        if mark in text and "," not in text:
            raise InputError(
                f"{where}: the columns are separated by {name}; separate them by commas, got {text[:60]!r}"
            )


def read_table(
    path: str | PathLike[str], *, what: str, known: Sequence[str], needed: Sequence[str]
) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """Read a CSV file with a header, row by row.

    Columns are named in any case; those that are not `known` are ignored. Returns the known columns of the file, and an
    iterator of `"PATH line N"` and the cells of those columns.

    Raises:
        InputError: The file has no rows, lacks a needed column or has a known one twice, or a row has another width or an
            empty needed cell.
    """
    lines = read_lines(path, what=what)
    number, text = next(lines, (0, ""))
    if not number:
        raise InputError(f"{path}: the {what} is empty; its first line must name the columns {', '.join(known)}")
    head = f"{path} line {number}"
    check_commas(text, head)
    header = [name.casefold() for name in split_row(text, head)]
    columns: dict[str, int] = {}
    for name in known:
        if header.count(name) > 1:
            raise InputError(f"{head}: the column {name!r} occurs {header.count(name)} times")
        if name in header:
            columns[name] = header.index(name)
        elif name in needed:
            raise InputError(f"{head}: no column named {name!r}{nearest(name, header)}")

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        where = ""
        for number, text in lines:
            where = f"{path} line {number}"
            row = split_row(text, where)
            if len(row) != len(header):
                raise InputError(
                    f"{where}: the header has {len(header)} columns, this line has {len(row)}: {text[:60]!r}"
                )
            cells = {name: row[column] for name, column in columns.items()}
            if missing := [name for name in needed if not cells[name]]:
                raise InputError(f"{where}: {missing[0]} is empty")
            yield where, cells
        if not where:
            raise InputError(f"{path}: the {what} has a header and no rows")

    return list(columns), rows()
