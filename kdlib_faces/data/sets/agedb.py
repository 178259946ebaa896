"""Data room: AgeDB's protocols of 5, 10, 20 and 30 years, and its file names. Touches the file system; decodes no image."""

import math
import re
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import read_whole
from kdlib_faces.data.formats.matlab import Cell, Struct, Value, matlab_variable
from kdlib_faces.data.image_pairs import ImagePairs, check_published, file_sha256, gather_pairs
from kdlib_faces.data.lists import MAX_AGE, FaceList
from kdlib_faces.data.sets.named_images import list_images

__all__ = ["AgeDBName", "parse_agedb_name", "read_agedb", "read_agedb_pairs"]

MAX_FILE = 64 * 2**20
_RAW = re.compile(r"(\d+)_(.+)_(\d{1,3})_([mfMF])")


class AgeDBName(NamedTuple):
    """What a file name of the raw set tells."""

    number: int
    name: str
    age: int
    """Years."""
    sex: str
    """`m` or `f`."""


def parse_agedb_name(name: str) -> AgeDBName | None:
    """`number_Name_age_sex`, with or without a suffix; None where a name has another form.

    This is how the raw set's files are commonly named; no published text that we know promises it, so a name that does not
    fit is no error.

    Examples:
        >>> parse_agedb_name("123_AnnaExample_34_f.jpg")
        AgeDBName(number=123, name='AnnaExample', age=34, sex='f')
        >>> parse_agedb_name("other.jpg") is None
        True
    """
    found = _RAW.fullmatch(re.sub(r"\.\w{1,5}$", "", name))
    if found is None or int(found[3]) > MAX_AGE:
        return None
    return AgeDBName(int(found[1][:18]), found[2], int(found[3]), found[4].lower())


def read_agedb(folder: str | PathLike[str]) -> FaceList:
    """The images of a folder (and of the folders in it) whose names `parse_agedb_name` reads, with their true ages.

    Raises:
        InputError: no such image, or fewer than two people.
    """

    def person(file: Path) -> tuple[str, float] | None:
        found = parse_agedb_name(file.name)
        return None if found is None else (found.name, float(found.age))

    return list_images(folder, person, "number_Name_age_sex")


def read_agedb_pairs(path: str | PathLike[str], *, published: bool = True) -> ImagePairs:
    """Read a protocol of AgeDB: `01_FINAL_protocol_5_years.mat` to `04_FINAL_protocol_30_years.mat`.

    The file's variable `splits` has ten cells, the folds; each holds a (2, 600) cell of images and 600 labels, 1 for one
    person and -1 for two. An image is a text, or a struct whose first field is its name (without suffix) and whose
    second is its age; ages are kept where they are there, or where the name tells them (`parse_agedb_name`). The years between
    the two images of a pair are nearly the same in all pairs of one file: a breakdown by age gap needs the four files.

    Args:
        path: the file, of MATLAB 5 to 7. A file of MATLAB 7.3 is refused with a word on how to convert it.
        published: there must be ten folds of 300 and 300 pairs; False takes a file of your own.

    Returns:
        ImagePairs called `AgeDB-30` and so on, after the years in the file's name. Who is on an image is told only
        where the parts of the names agree with every label.

    Raises:
        InputError: another file, another layout, a label that is neither 1 nor -1, other counts than published.
    """
    data = read_whole(path, "protocol of AgeDB", MAX_FILE)
    folds = _items(matlab_variable(data, "splits", str(path)))
    if not folds:
        raise InputError(f"{path}: splits must be a cell of folds")
    pairs: list[tuple[str, str, bool]] = []
    numbers: list[int] = []
    ages: dict[str, float] = {}
    for fold, value in enumerate(folds):
        where = f"{path} fold {fold + 1}"
        lefts, rights, labels = _fold(value, where)
        for left, right, label in zip(lefts, rights, labels, strict=True):
            if label not in (1, -1):
                raise InputError(f"{where}: labels must be 1 or -1, got {label}")
            names = []
            for image in (left, right):
                name, age = _image(image, where)
                ages[name] = age
                names.append(name)
            pairs.append((names[0], names[1], label == 1))
        numbers += [fold] * len(labels)
        if published:
            same = int((labels == 1).sum())
            counts = [("pairs of one person", same), ("pairs of two people", len(labels) - same)]
            check_published(where, "fold of AgeDB", counts, (300, 300))
    if published:
        check_published(path, "protocol of AgeDB", [("folds", len(folds))], (10,))
    years = re.search(r"(\d+)_years", Path(path).name)
    return gather_pairs(
        f"AgeDB-{years[1]}" if years else "AgeDB",
        pairs,
        folds=np.asarray(numbers, dtype=np.int64),
        identity=_identity(pairs),
        ages=ages.__getitem__,
        source=path,
        sha256=file_sha256(path, "protocol of AgeDB"),
    )


def _items(value: Value) -> list[Any]:
    return value.items if isinstance(value, Cell) else []


def _fold(value: Any, where: str) -> tuple[list[Any], list[Any], Any]:
    """Left images, right images and labels, out of the cells and structs of one item that are around them."""
    for _ in range(8):
        if isinstance(value, Cell) and len(value.items) == 1:
            value = value.items[0]
        elif isinstance(value, Struct) and len(value.items) == 1 and len(value.items[0]) == 1:
            value = next(iter(value.items[0].values()))
    inner = value.items if isinstance(value, Cell) else list(value.items[0].values()) if _is_single(value) else []
    if len(inner) >= 2 and isinstance(inner[0], Cell) and isinstance(inner[1], np.ndarray):
        images, labels = inner[0], inner[1].reshape(-1)
        if images.shape == (2, len(labels)):
            return images.items[0::2], images.items[1::2], labels
    raise InputError(f"{where}: must hold a (2, n) cell of images and n labels")


def _is_single(value: Any) -> bool:
    return isinstance(value, Struct) and len(value.items) == 1


def _image(value: Any, where: str) -> tuple[str, float]:
    """Name with suffix, and age or NaN."""
    age = math.nan
    for _ in range(8):
        if isinstance(value, Cell) and len(value.items) == 1:
            value = value.items[0]
        elif _is_single(value) and value.items[0]:
            fields = list(value.items[0].values())
            if len(fields) > 1 and isinstance(fields[1], np.ndarray) and fields[1].size == 1:
                age = float(fields[1].reshape(-1)[0])
            value = fields[0]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: an image must be a name, or a struct that starts with one")
    name = value.strip()
    if not 0 <= age <= MAX_AGE:
        told = parse_agedb_name(name)
        age = math.nan if told is None else float(told.age)
    return (name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.jpg"), age


def _identity(pairs: list[tuple[str, str, bool]]) -> Any:
    """The first way to read a person off a name that agrees with all labels; None if none does."""

    def raw(image: str) -> str | None:
        told = parse_agedb_name(image)
        return None if told is None else told.name

    for way in (raw, lambda image: image.split("_")[0] if "_" in image else None):
        if all(None not in (way(a), way(b)) and (way(a) == way(b)) == same for a, b, same in pairs):
            return way
    return None
