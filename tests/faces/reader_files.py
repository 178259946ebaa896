"""Files for the tests of readers: write and damage any file, and make those of some published formats."""

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from tests.faces.matlab_file import Grid, Record, Writer


class Shown(list):
    """A display of progress that keeps its labels."""

    def __call__(self, items, label):
        self.append(label)
        return items


def put(folder: Path, content: str | bytes, name: str = "list.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def encoded(pixels: ArrayLike, codec: str = "PNG", **options: object) -> bytes:
    """An image file of pixels `(h, w)` or `(h, w, c)`."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, codec, **options)
    return stream.getvalue()


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        put(folder, b"", name)
    return folder


def lfw_text(folds, each, first, mark="\t"):
    rows = [first] if first else []
    for fold in range(folds):
        rows += [mark.join((f"Same_{fold}", str(pair + 1), str(pair + 2))) for pair in range(each)]
        rows += [mark.join((f"Left_{fold}", str(pair + 1), f"Right_{fold}", str(pair + 2))) for pair in range(each)]
    return "\n".join(rows) + "\n"


def _image(name, age=None, form="struct"):
    if form == "text":
        return name
    fields = {"name": name} if age is None else {"name": name, "age": np.array([[float(age)]])}
    return Record(fields)


def agedb_file(
    folds=10, each=300, form="struct", name="Name_{p}_x_{k}_{s}", packed=True, order="<", labels=None, **kwargs
):
    cells = []
    for fold in range(folds):
        left, right, found = [], [], []
        for k in range(2 * each):
            same = k < each
            for side, column in enumerate((left, right)):
                who = f"{fold}{k}" if same or not side else f"{fold}{k}other"
                text = name.format(p=who, k=k, s=side, age=20 + 30 * side)
                column.append(_image(text, 20 + 30 * side if form == "aged" else None, form))
            found.append(1.0 if same else -1.0)
        flags = np.array([found if labels is None else labels(found)])
        cells.append([Grid([[Record(pairs=Grid([left, right]), labels=flags)]])])
    return Writer(order).file(packed=packed, other=np.arange(3.0), splits=Grid(cells), **kwargs)


def points_text(points):
    return f"version: 1\nn_points: {len(points)}\n{{\n" + "".join(f"{x} {y}\n" for x, y in points) + "}\n"


def feature_head(rows, columns=1, stride=4, kind=5):
    return struct.pack("<4i", rows, columns, stride, kind)
