"""Reading of variables from MATLAB 5 files (`.mat`, MATLAB 5 to 7): cells, structs, text and numbers.

Decompression stops at a limit, and counts are checked against the bytes that are available.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError

__all__ = ["Cell", "Numbers", "Value", "matlab_variable"]

MAX_UNPACKED = 64 * 2**20
MAX_ITEMS = 2_000_000
MAX_DEPTH = 32
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)


@dataclass(frozen=True)
class Cell:
    """A cell array: its shape, and its items with the first index varying fastest.

    A struct array is a cell of such cells, each of which holds the fields of one item in their order.
    """

    shape: tuple[int, ...]
    items: "list[Value]"


Numbers: TypeAlias = NDArray[Any]
Value: TypeAlias = Cell | str | Numbers


def matlab_variable(data: bytes, name: str, source: str) -> Value:
    """Return the variable `name` of a MATLAB 5 file; messages start with `source`.

    Raises:
        InputError: The file is of MATLAB 4 or 7.3, broken, or decompresses to more than 64 MiB; the variable does not
            exist or is of another kind (objects, sparse arrays, functions).
    """
    if data[:19] == b"MATLAB 7.3 MAT-file" or data[:8] == b"\x89HDF\r\n\x1a\n":
        raise InputError(
            f"{source}: MATLAB 7.3 files (HDF5) are not supported; in MATLAB, save(file, '-v7') writes a supported one"
        )
    orders: dict[bytes, Literal["<", ">"]] = {b"IM": "<", b"MI": ">"}
    order = orders.get(data[126:128])
    if order is None:
        raise InputError(f"{source}: not a MATLAB 5 file")
    return _Reader(order, source).find(memoryview(data), name)


class _Reader:
    def __init__(self, order: Literal["<", ">"], source: str) -> None:
        self.order, self.source = order, source
        self.tag = struct.Struct(order + "II")
        self.unpacked = self.items = 0

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.source}: unsupported or broken MATLAB 5 file: {what}")

    def element(self, data: memoryview, at: int) -> tuple[int, memoryview, int]:
        """Type and content of an element, and the position of the next one."""
        if at + 8 > len(data):
            self.fail("it ends inside an element")
        kind, length = self.tag.unpack_from(data, at)
        if kind >> 16:  # Up to four bytes are stored in the tag.
            kind, length, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if length > 4:
                self.fail(f"a short element of {length} bytes")
        else:
            start = at + 8
            end = start + length + (0 if kind == _COMPRESSED else -length % 8)
        if start + length > len(data):
            self.fail(f"an element of {length} bytes, {len(data) - start} are left")
        return kind, data[start : start + length], end

    def find(self, data: memoryview, name: str) -> Value:
        at, names = 128, []
        while at < len(data):
            kind, content, at = self.element(data, at)
            if kind == _COMPRESSED:
                kind, content, _ = self.element(memoryview(self.unpack(content)), 0)
            if kind != _MATRIX:
                self.fail(f"a variable of element type {kind}")
            names.append(self.parts(content)[2])
            if names[-1] == name:
                return self.value(content, 0)
        shown = ", ".join(repr(each[:40]) for each in names[:8]) or "none"
        raise InputError(f"{self.source}: no variable {name!r}; found {shown}")

    def unpack(self, content: memoryview) -> bytes:
        stream = zlib.decompressobj()
        try:
            out = stream.decompress(content, MAX_UNPACKED - self.unpacked + 1)
        except zlib.error as error:
            self.fail(f"compressed data that do not decompress ({error})")
        self.unpacked += len(out)
        if self.unpacked > MAX_UNPACKED:
            self.fail(f"it decompresses to more than {MAX_UNPACKED:,} bytes")
        return out

    def parts(self, content: memoryview) -> tuple[int, tuple[int, ...], str, int]:
        """Class, shape and name of a matrix, and the position of its data."""
        kind, flags, at = self.element(content, 0)
        if kind != 6 or len(flags) != 8:
            self.fail("a matrix without its flags")
        kind, lengths, at = self.element(content, at)
        if kind != 5 or len(lengths) % 4 or not 8 <= len(lengths) <= 32:
            self.fail("a matrix without its shape")
        shape = tuple(struct.unpack(f"{self.order}{len(lengths) // 4}i", lengths))
        if min(shape) < 0:
            self.fail(f"a matrix of {shape}")
        kind, name, at = self.element(content, at)
        if kind not in (1, 2):
            self.fail("a matrix without its name")
        word = self.tag.unpack(flags)[0]
        if word & 0x0800:
            self.fail("complex numbers")
        return word & 0xFF, shape, bytes(name).decode("latin-1"), at

    def value(self, content: memoryview, depth: int) -> Value:
        if not content:
            return np.zeros((0, 0))
        if depth > MAX_DEPTH:
            self.fail(f"cells more than {MAX_DEPTH} deep")
        kind, shape, _, at = self.parts(content)
        count = math.prod(shape)
        if kind == _CELL:
            return Cell(shape, self.values(content, at, count, depth))
        if kind == _STRUCT:
            width, at = self.fields(content, at)
            flat = self.values(content, at, count * width, depth)
            return Cell(shape, [Cell((1, width), flat[row : row + width]) for row in range(0, len(flat), width)])
        if kind == _CHAR:
            return self.text(*self.element(content, at)[:2], shape)
        if kind in _NUMERIC:
            return self.numbers(*self.element(content, at)[:2], shape, count)
        return self.fail(f"a variable of class {kind}")

    def values(self, content: memoryview, at: int, count: int, depth: int) -> list[Value]:
        self.items += count
        if self.items > MAX_ITEMS or count * 8 > len(content):
            self.fail(f"{count:,} items, more than its bytes can hold or than {MAX_ITEMS:,} in total")
        items: list[Value] = []
        for _ in range(count):
            kind, inner, at = self.element(content, at)
            if kind != _MATRIX:
                self.fail(f"an item of element type {kind}")
            items.append(self.value(inner, depth + 1))
        return items

    def fields(self, content: memoryview, at: int) -> tuple[int, int]:
        """Number of fields of a struct, and the position of their values."""
        kind, width, at = self.element(content, at)
        if kind != 5 or len(width) != 4:
            self.fail("a struct without the length of its names")
        length = struct.unpack(self.order + "i", width)[0]
        kind, names, at = self.element(content, at)
        if kind not in (1, 2) or length < 1 or len(names) % length or not names:
            self.fail("a struct without its names")
        return len(names) // length, at

    def text(self, kind: int, raw: memoryview, shape: tuple[int, ...]) -> str:
        if raw and (kind not in _TEXTS or (len(shape) > 1 and shape[0] > 1)):
            self.fail("text of more than one row, or of an unknown encoding")
        encoding = _TEXTS.get(kind, "latin-1")
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if self.order == "<" else "-be"
        try:
            return bytes(raw).decode(encoding)
        except UnicodeError:
            self.fail("text that does not decode")

    def numbers(self, kind: int, raw: memoryview, shape: tuple[int, ...], count: int) -> Numbers:
        if kind not in _NUMBERS:
            self.fail(f"numbers of element type {kind}")
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder(self.order)
        if len(raw) != count * dtype.itemsize:
            self.fail(f"{shape} numbers in {len(raw)} bytes")
        return np.frombuffer(raw, dtype).reshape(shape, order="F")
