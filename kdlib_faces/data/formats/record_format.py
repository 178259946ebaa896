"""Data room: the bytes of RecordIO and of the image header inside it. Touches memory only.

A record is `magic, length and flag, data, padding to four bytes`, little endian. Where the data itself holds the magic at a
multiple of four bytes, the writer splits there and leaves the four bytes out: a reader puts them back between the parts.
"""

import mmap
import struct
from collections.abc import Iterator

from kdlib_faces._checks import InputError

__all__ = ["Buffer", "frame", "header", "pack", "payload", "peek", "unpack"]

Buffer = bytes | mmap.mmap
MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
LENGTH_BITS = 29
MAX_LENGTH = (1 << LENGTH_BITS) - 1
MAX_RECORD = 256 * 2**20
MAX_LABELS = 1_000_000
WHOLE, FIRST, MIDDLE, LAST = range(4)
_FRAME, _HEADER = struct.Struct("<II"), struct.Struct("<IfQQ")


def frame(data: bytes) -> bytes:
    """The record that holds `data`, in as many parts as it needs.

    Examples:
        >>> frame(b"abc").hex(" ", 4)
        '0a23d7ce 03000000 61626300'
    """
    if len(data) > min(MAX_RECORD, MAX_LENGTH):
        raise ValueError(f"frame: data must be at most {min(MAX_RECORD, MAX_LENGTH):,} bytes, got {len(data):,}")
    cuts = [at for at in _occurrences(data) if at % 4 == 0]
    starts, ends = [0, *[cut + 4 for cut in cuts]], [*cuts, len(data)]
    out = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        flag = WHOLE if not cuts else FIRST if number == 0 else LAST if number == len(cuts) else MIDDLE
        part = data[start:end]
        out.append(_FRAME.pack(MAGIC, flag << LENGTH_BITS | len(part)) + part + bytes(-len(part) % 4))
    return b"".join(out)


def _occurrences(data: bytes) -> Iterator[int]:
    at = data.find(MAGIC_BYTES)
    while at >= 0:
        yield at
        # An aligned one is cut out whole; after one that is not, another may begin inside it.
        at = data.find(MAGIC_BYTES, at + (4 if at % 4 == 0 else 1))


def header(data: Buffer, at: int, where: str) -> tuple[int, int]:
    """`(flag, length)` of the part that starts at `at`; its data start eight bytes later.

    Raises:
        InputError: no record there, or its data do not fit into the file.
    """
    if at < 0 or at % 4 or at + 8 > len(data):
        raise InputError(f"{where}: no record can start at byte {at} of {len(data)}")
    magic, length = _FRAME.unpack_from(data, at)
    if magic != MAGIC:
        raise InputError(f"{where}: no record starts at byte {at}: found 0x{magic:08x}, expected 0x{MAGIC:08x}")
    flag, length = length >> LENGTH_BITS, length & MAX_LENGTH
    if flag > LAST:
        raise InputError(f"{where}: the record at byte {at} has part flag {flag}; 0 to 3 are known")
    if length > len(data) - at - 8:
        raise InputError(
            f"{where}: the record at byte {at} has {length} bytes, {len(data) - at - 8} are left: the file is cut"
        )
    return flag, length


def payload(data: Buffer, at: int, where: str, *, most: int | None = None) -> tuple[bytes, int]:
    """The data of the record at `at`, its parts joined by the magic they were split at, and where the next one starts.

    Args:
        data: the file.
        at: where the record starts.
        where: file and record, for messages.
        most: bytes of the data that are enough; the rest is passed over.

    Raises:
        InputError: no record there, parts out of order, or more than 256 MiB of data.
    """
    flag, length = header(data, at, where)
    if flag not in (WHOLE, FIRST):
        raise InputError(f"{where}: the record at byte {at} starts with part flag {flag}, a part of another record")
    joined = bytearray()
    total, start, more = 0, at, flag == FIRST
    while True:
        total += length
        if total > MAX_RECORD:
            raise InputError(f"{where}: the record at byte {start} is longer than {MAX_RECORD:,} bytes")
        if most is None or len(joined) < most:
            joined += data[at + 8 : at + 8 + (length if most is None else min(length, most - len(joined)))]
        at += 8 + length + -length % 4
        if not more:
            return bytes(joined), at
        flag, length = header(data, at, where)
        if flag not in (MIDDLE, LAST):
            raise InputError(f"{where}: the record at byte {start} breaks off: byte {at} starts another one")
        joined += MAGIC_BYTES
        total += 4
        more = flag == MIDDLE


def pack(image: bytes, label: float | tuple[float, ...], number: int = 0) -> bytes:
    """The image header and the image: flag, label, id, id2, and with more than one label as many float32 behind them."""
    if isinstance(label, tuple):
        return _HEADER.pack(len(label), 0.0, number, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return _HEADER.pack(0, label, number, 0) + image


def peek(data: bytes, where: str) -> tuple[float, int]:
    """First label and id, from the first 28 bytes of a record's data.

    Raises:
        InputError: too few bytes.
    """
    if len(data) < _HEADER.size:
        raise InputError(f"{where}: an image record has at least {_HEADER.size} bytes, got {len(data)}")
    count, label, number, _ = _HEADER.unpack_from(data)
    if count:
        if len(data) < _HEADER.size + 4:
            raise InputError(f"{where}: {count} labels are announced, none is there")
        label = struct.unpack_from("<f", data, _HEADER.size)[0]
    return label, number


def unpack(data: bytes, where: str) -> tuple[tuple[float, ...], int, int]:
    """Labels, id, and where the image starts in `data`.

    Raises:
        InputError: fewer bytes than the header announces.
    """
    if len(data) < _HEADER.size:
        raise InputError(f"{where}: an image record has at least {_HEADER.size} bytes, got {len(data)}")
    count, label, number, _ = _HEADER.unpack_from(data)
    if not count:
        return (label,), number, _HEADER.size
    if count > MAX_LABELS or len(data) < _HEADER.size + 4 * count:
        raise InputError(f"{where}: {count} labels are announced, {(len(data) - _HEADER.size) // 4} can be there")
    labels = struct.unpack_from(f"<{count}f", data, _HEADER.size)
    return labels, number, _HEADER.size + 4 * count
