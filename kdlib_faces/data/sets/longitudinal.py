"""Lists of identities over years: `path,identity,age` or `path,identity,date`.

The format is ours: no longitudinal face set of this kind has been released with lists to follow.
"""

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
from kdlib_faces.data.identities import IdentityNumbers
from kdlib_faces.data.lists import warn
from kdlib_faces.data.sources.files import parse_age

__all__ = ["LongitudinalList", "read_longitudinal"]

_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2}))?)?")


@dataclass(frozen=True, eq=False)
class LongitudinalList:
    """Images of identities over years.

    Attributes:
        paths: `n` image files.
        identities: `(n,)` int64, an index into `identity_names`.
        identity_names: One name per identity, in the spelling that came first.
        years: `(n,)` float64, age or date in years; differences are the years between two images.
        kind: Whether `years` are ages or dates.
        source: The file.
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
        identities = len(self.identity_names)
        return f"<LongitudinalList: {len(self)} images, {identities} identities, up to {self.elapsed.max():.1f} years>"

    @property
    def elapsed(self) -> NDArray[np.float64]:
        """`(n,)` float64, the years since the first image of the same identity, at which it is 0."""
        first = np.full(len(self.identity_names), np.inf)
        np.minimum.at(first, self.identities, self.years)
        years: NDArray[np.float64] = self.years - first[self.identities]
        return years


def read_longitudinal(path: str | PathLike[str]) -> LongitudinalList:
    """Read a longitudinal list: a CSV file with a header that has `path`, `identity` and either `age` or `date`.

    `age` is in years and may have a fraction. `date` is `YYYY-MM-DD`, `YYYY-MM` or `YYYY` (the middle of the month or year
    is used) and becomes a year with a fraction. Other columns are ignored; paths start at the file's folder and are not
    opened. Names are compared as within one list of `read_faces`.

    Args:
        path: The file.

    Returns:
        LongitudinalList, in which at least one identity has two images.

    Raises:
        InputError: The header is another one or has both or neither of `age` and `date`, a cell is empty or has a wrong
            value, a path occurs twice, or no identity has two images.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "people.csv"
        >>> _ = file.write_text("path,identity,date\\na.jpg,Ann,1990-07-02\\nb.jpg,Ann,2010-07-02\\n")
        >>> read_longitudinal(file)
        <LongitudinalList: 2 images, 1 identities, up to 20.0 years>
    """
    known = ("path", "identity", "age", "date")
    columns, rows = read_table(path, what="longitudinal list", known=known, needed=("path", "identity"))
    if ("age" in columns) == ("date" in columns):
        raise InputError(
            f"{path}: exactly one of the columns 'age' and 'date' is needed, "
            f"got {'both' if 'age' in columns else 'neither'}"
        )
    kind: Literal["age", "date"] = "age" if "age" in columns else "date"
    seen: dict[str, str] = {}
    numbers = IdentityNumbers()
    identities: list[int] = []
    years: list[float] = []
    for where, cells in rows:
        file = cells["path"]
        if seen.setdefault(file, where) != where:
            raise InputError(f"{where}: the image {file!r} is listed already ({seen[file]})")
        identities.append(numbers.add(cells["identity"], where))
        years.append(parse_age(cells["age"], where) if kind == "age" else _year(cells["date"], where))
    for note in numbers.notes():
        warn(note)
    labels = np.asarray(identities, dtype=np.int64)
    if np.bincount(labels).max() < 2:
        raise InputError(f"{path}: no identity has two images; a longitudinal list needs identities over years")
    files = tuple(Path(path).parent / file for file in seen)
    return LongitudinalList(files, labels, tuple(numbers.names), np.asarray(years), kind, str(path))


def _year(text: str, where: str) -> float:
    """A date as a year with a fraction; a year has 365.2425 days."""
    match = _DATE.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        year, month, day = int(match[1]), int(match[2] or 7), int(match[3] or (15 if match[2] else 2))
        return date(year, month, day).toordinal() / 365.2425 + 1
    except ValueError:
        raise InputError(f"{where}: date must be YYYY-MM-DD, YYYY-MM or YYYY, got {text[:40]!r}") from None
