"""The byte layout of MXNet's RecordIO and of the image header inside a record.

A record is `magic, length and flag, data, padding to four bytes`, little endian. Where the data itself contains the magic at
a multiple of four bytes, the writer splits the record there and omits the four bytes; a reader inserts them between the parts.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import is_number, read_lines

__all__ = [
    "EXACT", "HEAD", "LENGTH_BITS", "MAGIC", "WHOLE", "IdentityRanges", "Record", "RecordProperties", "frame", "pack", "payload", "read_property",
    "unpack",
]  # fmt: skip

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
LENGTH_BITS = 29
MAX_RECORD = 256 * 2**20
MAX_LABELS = 1_000_000
WHOLE, FIRST, MIDDLE, LAST = range(4)
EXACT = 1 << 24
"""Labels are float32: whole numbers below this one are exact."""
_FRAME, _HEADER = struct.Struct("<II"), struct.Struct("<IfQQ")
HEAD = _HEADER.size + 4
"""Bytes of a record's data that `unpack` needs for the first label."""


class Record(NamedTuple):
    """One record of a set."""

    image: bytes
    """Encoded image; empty in header and identity records."""
    label: float
    """The label, or the first of several."""
    labels: tuple[float, ...]
    key: int
    """Key of the record in the index."""
    number: int
    """Number that the record stores itself."""
    where: str = "record"

    def __repr__(self) -> str:
        label = self.labels if len(self.labels) > 1 else self.label
        return f"<Record: key {self.key}, label {label}, {len(self.image)} bytes>"

    @property
    def identity(self) -> int:
        """The label as a whole number. Labels are float32, exact below 2^24; larger ones raise `InputError`."""
        if not 0 <= self.label < EXACT or self.label != int(self.label):
            raise InputError(
                f"{self.where}: an identity must be a whole number from 0 and below 2^24, got label {self.label!r}"
            )
        return int(self.label)


class RecordProperties(NamedTuple):
    """Contents of the `property` file beside a set."""

    num_identities: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class IdentityRanges:
    """Images of each identity: `keys[k]` is an identity record, its images are `starts[k]` to `ends[k]` - 1.

    Attributes:
        keys: `(k,)` int64, key of the record of each identity.
        starts: `(k,)` int64, key of its first image.
        ends: `(k,)` int64, key after its last image.
    """

    keys: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)


def read_property(path: str | PathLike[str]) -> RecordProperties:
    """Read a `property` file: one line `number of identities,height,width`.

    Returns:
        The number of identities, and height and width in pixels.

    Raises:
        InputError: The file has another form.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "property"
        >>> _ = file.write_text("85742,112,112\\n")
        >>> read_property(file)
        RecordProperties(num_identities=85742, height=112, width=112)
    """
    lines = [line for _, (_, line) in zip(range(2), read_lines(path, what="property file"), strict=False)]
    fields = [field.strip() for field in lines[0].split(",")] if len(lines) == 1 else []
    if len(fields) != 3 or not all(map(is_number, fields)):
        raise InputError(f"{path}: must be one line 'identities,height,width', got {(lines or [''])[0][:60]!r}")
    properties = RecordProperties(*map(int, fields))
    if not all(properties):
        raise InputError(f"{path}: identities, height and width must be at least 1, got {lines[0]!r}")
    return properties


def frame(data: bytes) -> bytes:
    """Encode `data` as a record, in as many parts as it needs.

    Examples:
        >>> frame(b"abc").hex(" ", 4)
        '0a23d7ce 03000000 61626300'
    """
    if len(data) > MAX_RECORD:
        raise ValueError(f"frame: data must be at most {MAX_RECORD:,} bytes, got {len(data):,}")
    cuts = [match.start() for match in re.finditer(re.escape(MAGIC_BYTES), data) if match.start() % 4 == 0]
    starts, ends = [0, *[cut + 4 for cut in cuts]], [*cuts, len(data)]
    out = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        flag = WHOLE if not cuts else FIRST if number == 0 else LAST if number == len(cuts) else MIDDLE
        part = data[start:end]
        out.append(_FRAME.pack(MAGIC, flag << LENGTH_BITS | len(part)) + part + bytes(-len(part) % 4))
    return b"".join(out)


def _part(data: bytes | mmap.mmap, at: int, where: str) -> tuple[int, int]:
    """`(flag, length)` of the part at `at`; its data start eight bytes later."""
    if at < 0 or at % 4 or at + 8 > len(data):
        raise InputError(f"{where}: no record can start at byte {at} of {len(data)}")
    magic, word = _FRAME.unpack_from(data, at)
    if magic != MAGIC:
        raise InputError(f"{where}: no record starts at byte {at}: found 0x{magic:08x}, expected 0x{MAGIC:08x}")
    flag, length = word >> LENGTH_BITS, word & (1 << LENGTH_BITS) - 1
    if flag > LAST:
        raise InputError(f"{where}: the record at byte {at} has part flag {flag}; 0 to 3 are known")
    if length > len(data) - at - 8:
        raise InputError(
            f"{where}: the record at byte {at} has {length} bytes, {len(data) - at - 8} are left: the file is truncated"
        )
    return flag, length


def payload(data: bytes | mmap.mmap, start: int, where: str, *, max_bytes: int = MAX_RECORD) -> tuple[bytes, int]:
    """Read the data of the record at byte `start`, its parts joined by the magic at which they were split.

    Returns the first `max_bytes` of the data, and the position of the next record.

    Raises:
        InputError: No record is there, its parts are out of order, or it has more than 256 MiB of data.
    """
    flag, length = _part(data, start, where)
    if flag not in (WHOLE, FIRST):
        raise InputError(f"{where}: the record at byte {start} starts with part flag {flag}, a part of another record")
    if flag == WHOLE and length <= MAX_RECORD:  # nearly every record
        return data[start + 8 : start + 8 + min(length, max_bytes)], start + 8 + length + -length % 4
    joined = bytearray()
    total, at, last = 0, start, flag == WHOLE
    while True:
        total += length
        if total > MAX_RECORD:
            raise InputError(f"{where}: the record at byte {start} is longer than {MAX_RECORD:,} bytes")
        joined += data[at + 8 : at + 8 + min(length, max(0, max_bytes - len(joined)))]
        at += 8 + length + -length % 4
        if last:
            return bytes(joined), at
        flag, length = _part(data, at, where)
        if flag not in (MIDDLE, LAST):
            raise InputError(f"{where}: the record at byte {start} is incomplete: byte {at} starts another one")
        joined += MAGIC_BYTES
        total += 4
        last = flag == LAST


def pack(image: bytes, label: float | tuple[float, ...], number: int = 0) -> bytes:
    """Prefix an image with its header: flag, label, id, id2; a tuple of labels follows as float32 numbers."""
    if isinstance(label, tuple):
        return _HEADER.pack(len(label), 0.0, number, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return _HEADER.pack(0, label, number, 0) + image


def unpack(data: bytes, where: str, *, max_labels: int | None = None) -> tuple[tuple[float, ...], int, int]:
    """Return the labels, at most `max_labels` of them, the id, and where the image starts in `data`.

    Raises:
        InputError: There are fewer bytes than the header announces.
    """
    if len(data) < _HEADER.size:
        raise InputError(f"{where}: an image record has at least {_HEADER.size} bytes, got {len(data)}")
    count, label, number, _ = _HEADER.unpack_from(data)
    if not count:
        return (label,), number, _HEADER.size
    wanted, available = min(count, max_labels or count), min(MAX_LABELS, (len(data) - _HEADER.size) // 4)
    if wanted > available:
        raise InputError(f"{where}: the header announces {count} labels, the record can hold {available}")
    return struct.unpack_from(f"<{wanted}f", data, _HEADER.size), number, _HEADER.size + 4 * count
