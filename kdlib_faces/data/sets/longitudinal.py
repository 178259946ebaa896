"""Data room: one person over years: lists `path,identity,age` or `path,identity,date`. Touches the file system; decodes no image.

The format is ours: no longitudinal face set of this kind has been released with lists that could be followed.
"""

import math
import re
from dataclasses import dataclass
from datetime import date
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_table
from kdlib_faces.data.lists import MAX_AGE, identity_key

__all__ = ["LongitudinalList", "read_longitudinal"]

_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2}))?)?")


@dataclass(frozen=True, eq=False)
class LongitudinalList:
    """Images of people over years.

    Attributes:
        paths: `n` image files.
        identities: `(n,)` int64, an index into `identity_names`.
        identity_names: one name an identity, in the spelling that came first.
        years: `(n,)` float64, age or date in years; the years between two images are the difference.
        kind: whether `years` are ages or dates.
        source: the file that was read.
    """

    paths: tuple[Path, ...]
    identities: NDArray[np.int64]
    identity_names: tuple[str, ...]
    years: NDArray[np.float64]
    kind: Literal["age", "date"]
    source: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        people = len(self.identity_names)
        return f"<LongitudinalList: {len(self)} images, {people} identities, {self.elapsed.max():.1f} years at most>"

    @property
    def elapsed(self) -> NDArray[np.float64]:
        """`(n,)` float64, the years since the first image of the same person; 0 at that one."""
        first = np.full(len(self.identity_names), np.inf)
        np.minimum.at(first, self.identities, self.years)
        years: NDArray[np.float64] = self.years - first[self.identities]
        return years


def read_longitudinal(path: str | PathLike[str]) -> LongitudinalList:
    """Read a longitudinal list: a CSV file with a header that has `path`, `identity` and either `age` or `date`.

    `age` is in years, with or without a fraction. `date` is `YYYY-MM-DD`, `YYYY-MM` (its middle is taken) or `YYYY` (likewise), and
    becomes a year with a fraction. Further columns are ignored; paths start at the file's folder and are not opened.
    Names are compared as in `read_faces`.

    Args:
        path: the file.

    Returns:
        LongitudinalList, at least one of whose people has two images.

    Raises:
        InputError: another header, both or neither of `age` and `date`, a cell that is empty or no such value, a path
            twice, nobody with two images.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "people.csv"
        >>> _ = file.write_text("path,identity,date\\na.jpg,Ann,1990-07-02\\nb.jpg,ann,2010-07-02\\n")
        >>> read_longitudinal(file)
        <LongitudinalList: 2 images, 1 identities, 20.0 years at most>
    """
    head, columns, rows = read_table(
        Path(path), what="longitudinal list", known=("path", "identity", "age", "date"), needed=("path", "identity")
    )
    if not columns:
        raise InputError(f"{path}: the list is empty; its first line must be path,identity,age or path,identity,date")
    if ("age" in columns) == ("date" in columns):
        both = "both are" if "age" in columns else "neither is"
        raise InputError(f"{head}: one of the columns 'age' and 'date' is needed, {both} there")
    kind: Literal["age", "date"] = "age" if "age" in columns else "date"
    files: list[Path] = []
    seen: dict[str, int] = {}
    numbers: dict[str, int] = {}
    names: list[str] = []
    identities: list[int] = []
    years: list[float] = []
    for number, where, cell in rows:
        file, identity = cell["path"], cell["identity"]
        if not file:
            raise InputError(f"{where}: path is empty")
        if seen.setdefault(file, number) != number:
            raise InputError(f"{where}: the image {file!r} is listed already (line {seen[file]})")
        key = identity_key(identity)
        if not key.strip("_"):
            raise InputError(f"{where}: identity must hold a letter or a digit, got {identity!r}")
        if key not in numbers:
            numbers[key] = len(names)
            names.append(identity)
        files.append(Path(path).parent / file)
        identities.append(numbers[key])
        years.append(_age(cell["age"], where) if kind == "age" else _year(cell["date"], where))
    if not files:
        raise InputError(f"{path}: the list has a header and no rows")
    people = np.asarray(identities, dtype=np.int64)
    if np.bincount(people).max() < 2:
        raise InputError(f"{path}: nobody has two images; a longitudinal list needs people over years")
    return LongitudinalList(tuple(files), people, tuple(names), np.asarray(years), kind, str(path))


def _age(text: str, where: str) -> float:
    try:
        age = float(text)
    except ValueError:
        age = math.nan
    if not 0 <= age <= MAX_AGE:
        raise InputError(f"{where}: age must be a number from 0 to {MAX_AGE:.0f} (years), got {text!r}")
    return age


def _year(text: str, where: str) -> float:
    """The date as a year with a fraction, so that 365.2425 days are one."""
    found = _DATE.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        year, month, day = int(found[1]), int(found[2] or 7), int(found[3] or (15 if found[2] else 2))
        return date(year, month, day).toordinal() / 365.2425 + 1
    except ValueError:
        raise InputError(f"{where}: date must be YYYY-MM-DD, YYYY-MM or YYYY, got {text[:40]!r}") from None
