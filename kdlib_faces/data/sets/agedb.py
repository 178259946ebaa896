"""AgeDB's protocols of 5, 10, 20 and 30 years, and its raw images."""

import math
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import read_whole
from kdlib_faces.data.formats.matlab import Cell, Numbers, Value, matlab_variable
from kdlib_faces.data.image_pairs import ImagePairs, check_published, count_pairs, file_sha256, gather_pairs
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.sets.named_images import list_images
from kdlib_faces.data.sources.files import MAX_AGE

__all__ = ["AgeDBName", "parse_agedb_name", "read_agedb", "read_agedb_pairs"]

MAX_FILE = 64 * 2**20
FOLD_PAIRS = (300, 300)
_RAW = re.compile(r"(\d+)_(.+)_(\d{1,3})_([mfMF])")


class AgeDBName(NamedTuple):
    """Parts of a file name of the raw set."""

    number: int
    name: str
    age: int
    """Years."""
    sex: str
    """`m` or `f`."""


def parse_agedb_name(name: str) -> AgeDBName | None:
    """Parse `number_Name_age_sex`, with or without a suffix; None for a name of another form.

    The files of the raw set are commonly named in this way. We know of no published specification, so a name of another
    form is not an error.

    Returns:
        The parts, with the age in years and the sex `m` or `f`; None for a name of another form.

    Examples:
        >>> parse_agedb_name("123_AnnaExample_34_f.jpg")
        AgeDBName(number=123, name='AnnaExample', age=34, sex='f')
        >>> parse_agedb_name("other.jpg") is None
        True
    """
    match = _RAW.fullmatch(re.sub(r"\.\w{1,5}$", "", name))
    if match is None or int(match[3]) > MAX_AGE:
        return None
    return AgeDBName(int(match[1][:18]), match[2], int(match[3]), match[4].lower())


def read_agedb(folder: str | PathLike[str]) -> FaceList:
    """List the images below a folder whose names `parse_agedb_name` parses, with their true ages.

    Args:
        folder: The folder; images may lie at any depth.

    Returns:
        FaceList sorted by path, with ages in years.

    Raises:
        InputError: There is no such image, or fewer than two identities.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("1_AnnaExample_20_f.jpg", "2_AnnaExample_50_f.jpg", "3_BobExample_34_m.jpg"):
        ...     _ = (folder / name).write_bytes(b"")
        >>> faces = read_agedb(folder)
        >>> faces, faces.ages.tolist()
        (<FaceList: 3 images, 2 identities, 3 ages>, [20.0, 50.0, 34.0])
    """

    def parse(name: str) -> tuple[str, float] | None:
        parsed = parse_agedb_name(name)
        return None if parsed is None else (parsed.name, float(parsed.age))

    return list_images(folder, parse, "like number_Name_age_sex.jpg")


def read_agedb_pairs(path: str | PathLike[str], *, published: bool = True) -> ImagePairs:
    """Read a protocol of AgeDB: `01_FINAL_protocol_5_years.mat` to `04_FINAL_protocol_30_years.mat`.

    The file's variable `splits` has ten cells, the folds. Each holds a (2, 600) cell of images and 600 labels, 1 for genuine
    and -1 for impostor pairs. An image is a text, or a struct whose first field is its name (without suffix) and whose
    second is its age. Ages come from the struct, or from names that `parse_agedb_name` parses. The age gap is nearly the
    same in all pairs of one file, so a breakdown by age gap needs the four files.

    Args:
        path: The file, of MATLAB 5 to 7. For a file of MATLAB 7.3, the error explains how to convert it.
        published: Require ten folds of 300 genuine and 300 impostor pairs; False reads a file of your own.

    Returns:
        ImagePairs named `AgeDB-30` and so on, after the years in the file's name. Identities are set only if the names
        agree with every label.

    Raises:
        InputError: The file has another layout, a label is neither 1 nor -1, or the counts are not the published ones.
    """
    data = read_whole(path, "protocol of AgeDB", MAX_FILE)
    splits = matlab_variable(data, "splits", str(path))
    if not isinstance(splits, Cell) or not splits.items:
        raise InputError(f"{path}: splits must be a cell of folds")
    pairs: list[tuple[str, str, bool]] = []
    folds: list[int] = []
    ages: dict[str, float] = {}
    for fold, value in enumerate(splits.items):
        where = f"{path} fold {fold + 1}"
        images, labels = _fold(value, where)
        names = []
        for image in images:
            name, age = _image(image, where)
            ages[name] = age
            names.append(name)
        for left, right, label in zip(names[0::2], names[1::2], labels, strict=True):
            if label not in (1, -1):
                raise InputError(f"{where}: labels must be 1 or -1, got {label}")
            pairs.append((left, right, bool(label == 1)))
        folds += [fold] * len(labels)
        if published:
            check_published(where, "fold of AgeDB", count_pairs(labels == 1), FOLD_PAIRS)
    if published:
        check_published(path, "protocol of AgeDB", {"folds": len(splits.items)}, (10,))
    years = re.search(r"(\d+)_years", Path(path).name)
    return gather_pairs(
        f"AgeDB-{years[1]}" if years else "AgeDB",
        pairs,
        folds=np.asarray(folds, dtype=np.int64),
        identity=_identity(pairs),
        ages=ages.__getitem__,
        source=path,
        sha256=file_sha256(path, "protocol of AgeDB"),
    )


def _fold(value: Value, where: str) -> tuple[list[Value], Numbers]:
    """Images (left and right alternate) and labels, unwrapped from the cells and structs of one item around them."""
    for _ in range(9):
        items = _inner(value)
        if len(items) != 1:
            break
        value = items[0]
    if len(items) >= 2 and isinstance(items[0], Cell) and isinstance(items[1], np.ndarray):
        images, labels = items[0], items[1].reshape(-1)
        if images.shape == (2, len(labels)):
            return images.items, labels
    raise InputError(f"{where}: must hold a (2, n) cell of images and n labels")


def _inner(value: Value) -> list[Value]:
    """The items of a cell."""
    return value.items if isinstance(value, Cell) else []


def _image(value: Value, where: str) -> tuple[str, float]:
    """Name with suffix, and age or NaN."""
    age = math.nan
    for _ in range(8):
        items = _inner(value)
        if not items:
            break
        if len(items) > 1 and isinstance(items[1], np.ndarray) and items[1].size == 1:
            age = float(items[1].reshape(-1)[0])
        value = items[0]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: an image must be a name, or a struct that starts with one")
    name = value.strip()
    if not 0 <= age <= MAX_AGE:
        parsed = parse_agedb_name(name)
        age = math.nan if parsed is None else float(parsed.age)
    return (name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.jpg"), age


def _identity(pairs: list[tuple[str, str, bool]]) -> Callable[[str], str | None] | None:
    """The first rule to derive an identity from a name that agrees with all labels; None if none does."""

    def raw(image: str) -> str | None:
        parsed = parse_agedb_name(image)
        return None if parsed is None else parsed.name

    def prefix(image: str) -> str | None:
        return image.split("_")[0] if "_" in image else None

    for rule in (raw, prefix):
        if all(None not in (rule(a), rule(b)) and (rule(a) == rule(b)) == same for a, b, same in pairs):
            return rule
    return None
