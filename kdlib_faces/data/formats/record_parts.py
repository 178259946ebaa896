"""Data room: what a RecordIO face set is made of: an image's record, an identity's range, the `property` file."""

from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_lines

__all__ = ["EXACT", "IdentityRanges", "Record", "RecordProperties", "read_property"]

EXACT = 1 << 24
"""Labels are float32: whole numbers below this one are exact."""


class Record(NamedTuple):
    """One record of a set."""

    image: bytes
    """Encoded image; empty in the header and identity records."""
    label: float
    """The label, or the first of several."""
    labels: tuple[float, ...]
    key: int
    """Number of the record in the index."""
    number: int
    """Number that the record gives itself."""
    where: str = "record"

    def __repr__(self) -> str:
        label = self.labels if len(self.labels) > 1 else self.label
        return f"<Record: key {self.key}, label {label}, {len(self.image)} bytes>"

    @property
    def identity(self) -> int:
        """The label as a whole number; labels are float32, exact below 2^24 only, and refused above."""
        if not 0 <= self.label < EXACT or self.label != int(self.label):
            raise InputError(f"{self.where}: label {self.label!r} is no identity; whole numbers from 0 below 2^24 are")
        return int(self.label)


class RecordProperties(NamedTuple):
    """The `property` file beside a set."""

    num_identities: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class IdentityRanges:
    """Which images belong together: `keys[k]` is an identity record, its images are `starts[k]` to `ends[k]` - 1."""

    keys: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)


def read_property(path: str | PathLike[str]) -> RecordProperties:
    """Read a `property` file: one line, `number of identities,height,width`.

    Raises:
        InputError: another form, with what was found.
    """
    lines = [
        text for _, text in zip(range(2), (line for _, line in read_lines(path, what="property file")), strict=False)
    ]
    fields = [field.strip() for field in lines[0].split(",")] if len(lines) == 1 else []
    if len(fields) != 3 or not all(field.isascii() and field.isdigit() and 0 < len(field) < 10 for field in fields):
        raise InputError(f"{path}: must be one line 'identities,height,width', got {(lines or [''])[0][:60]!r}")
    count, height, width = (int(field) for field in fields)
    if not count or not height or not width:
        raise InputError(f"{path}: identities, height and width must be at least 1, got {lines[0]!r}")
    return RecordProperties(count, height, width)
