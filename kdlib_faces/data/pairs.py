"""Data room: lists of image pairs for verification. Touches the file system and NumPy; decodes no image."""

from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data._text import read_lines
from kdlib_faces.data.listing import FaceList, identity_key

__all__ = ["PairList", "read_pairs"]


@dataclass(frozen=True, eq=False)
class PairList:
    """Pairs of images of one face list.

    Attributes:
        left: `(p,)` int64, row of the first image in the list.
        right: `(p,)` int64, row of the second.
        same: `(p,)` bool, whether both are of one person.
        fold_ids: `(p,)` int64, the fold of each pair.
        missing: pairs of the file left out, because one of their images is not in the list.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]
    fold_ids: NDArray[np.int64]
    missing: int

    def __len__(self) -> int:
        return len(self.same)

    def __repr__(self) -> str:
        return f"<PairList: {len(self)} pairs, {int(self.same.sum())} of one person, {self.missing} left out>"


def read_pairs(path: str | PathLike[str], faces: FaceList) -> PairList:
    """Read `pairs.txt` in the format of LFW and find its images in a face list.

    A line of three fields `name n1 n2` is a pair of one person, a line of four `name1 n1 name2 n2` of two people;
    fields are separated by tabs, or by blanks where a line has no tab. The image is the one whose file is called
    `name_%04d`, names compared as identities are. A first line `folds pairs` gives folds of `pairs` pairs of one person
    and `pairs` of two, in file order, and pairs that are left out do not move the others' folds. A file with another
    first line, or none, holds no folds: its pairs are dealt to ten, in slices of the same pairs and of the different
    ones, so that each fold holds both kinds also where all pairs of one kind come first.

    Args:
        path: the file.
        faces: the list to find the images in.

    Returns:
        PairList with indices into `faces`.

    Raises:
        InputError: a line of another form, both kinds of pair not there, or no pair whose images are both in the list.
    """
    rows = {identity_key(file.stem): row for row, file in enumerate(faces.paths)}
    pairs: list[tuple[int, int, bool]] = []
    size = 0
    missing: list[str] = []
    for at, (number, text) in enumerate(read_lines(path, what="pairs file")):
        fields = [field.strip() for field in (text.strip().split("\t") if "\t" in text else text.split())]
        where = f"{path} line {number}"
        if at == 0 and len(fields) in (1, 2) and all(field.isdecimal() for field in fields):
            size = 2 * int(fields[1]) if len(fields) == 2 else 0
            continue
        if len(fields) not in (3, 4) or not (fields[-1].isdecimal() and fields[1].isdecimal()):
            raise InputError(f"{where}: must be 'name n1 n2' or 'name1 n1 name2 n2', got {text[:60]!r}")
        ends = (fields[0], fields[1]), (fields[-2] if len(fields) == 4 else fields[0], fields[-1])
        keys = [identity_key(f"{name}_{int(image):04d}") for name, image in ends]
        missing += [f"{name} {image}" for (name, image), key in zip(ends, keys, strict=True) if key not in rows][:1]
        pairs.append((rows.get(keys[0], -1), rows.get(keys[1], -1), len(fields) == 3))
    if not pairs:
        raise InputError(f"{path}: the pairs file holds no pairs")
    table = np.asarray(pairs, dtype=np.int64)
    found = (table[:, :2] >= 0).all(axis=1)
    if not found.any():
        raise InputError(f"{path}: no pair has both its images in the face list, not even {missing[0]!r}")
    same = table[found, 2] == 1
    if same.all() or not same.any():
        raise InputError(f"{path}: both pairs of one person and pairs of two people are needed, got one kind only")
    folds = np.flatnonzero(found) // size if size else _dealt(same)
    return PairList(table[found, 0], table[found, 1], same, folds.astype(np.int64), int((~found).sum()))


def _dealt(same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A fold for each pair: slices of the same pairs, and of the different ones, at most ten and none of one kind."""
    folds = np.zeros(len(same), dtype=np.int64)
    count = min(10, int(same.sum()), int((~same).sum()))
    for kind in (same, ~same):
        folds[kind] = np.arange(int(kind.sum())) * count // int(kind.sum())
    return folds
