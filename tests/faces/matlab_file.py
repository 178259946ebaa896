"""MATLAB 5 files made for tests, byte by byte: cells, structs, text and numbers, plain or packed, in both byte orders."""

import struct
import zlib

import numpy as np

CODES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9}
CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13}


class Record(dict):
    """A 1 x 1 struct."""


class Grid(list):
    """A cell: rows of items."""


class Writer:
    def __init__(self, order="<"):
        self.order = order

    def element(self, kind, data):
        if len(data) <= 4 and data:  # the short form
            word = struct.pack(self.order + "I", len(data) << 16 | kind)
            return word + data.ljust(4, b"\0")
        return struct.pack(self.order + "II", kind, len(data)) + data + bytes(-len(data) % 8)

    def matrix(self, klass, shape, body, name=""):
        content = self.element(6, struct.pack(self.order + "II", klass, 0))
        content += self.element(5, struct.pack(f"{self.order}{len(shape)}i", *shape))
        content += self.element(1, name.encode())
        return self.element(14, content + body)

    def value(self, value, name=""):
        if isinstance(value, str):
            data = value.encode("utf-16" + ("-le" if self.order == "<" else "-be"))
            return self.matrix(4, (1, len(value)), self.element(4, data), name)
        if isinstance(value, Grid):
            shape = len(value), len(value[0]) if value else 0
            items = [value[row][column] for column in range(shape[1]) for row in range(shape[0])]
            return self.matrix(1, shape, b"".join(self.value(item) for item in items), name)
        if isinstance(value, Record):
            names = b"".join(key.encode().ljust(32, b"\0") for key in value)
            body = self.element(5, struct.pack(self.order + "i", 32)) + self.element(1, names)
            return self.matrix(2, (1, 1), body + b"".join(self.value(item) for item in value.values()), name)
        array = np.atleast_2d(value)
        code = array.dtype.str[1:]
        code = "i4" if code == "i8" else code
        data = array.astype(self.order + code).tobytes(order="F")
        return self.matrix(CLASSES[code], array.shape, self.element(CODES[code], data), name)

    def file(self, packed=False, **variables):
        out = b"MATLAB 5.0 MAT-file, made by a test".ljust(124, b" ") + struct.pack(self.order + "H", 0x0100)
        out += struct.pack(self.order + "H", 0x4D49)
        for name, value in variables.items():
            element = self.value(value, name)
            if packed:
                data = zlib.compress(element)
                element = struct.pack(self.order + "II", 15, len(data)) + data
            out += element
        return out
