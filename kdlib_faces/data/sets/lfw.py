"""Data room: lists of image pairs in LFW's format. Touches the file system and NumPy; decodes no image."""

from os import PathLike

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_lines
from kdlib_faces.data.image_pairs import ImagePairs, PairList, file_sha256, gather_pairs
from kdlib_faces.data.lists import FaceList

__all__ = ["PairList", "read_lfw_pairs", "read_pairs"]

PUBLISHED: dict[tuple[int, ...], str] = {
    (10, 300): "LFW View 2",
    (1100,): "LFW View 1 training",
    (500,): "LFW View 1 test",
}


def read_lfw_pairs(path: str | PathLike[str]) -> ImagePairs:
    """Read `pairs.txt`, `pairsDevTrain.txt`, `pairsDevTest.txt` and lists in their format, such as RFW's without a first line.

    A line of three fields `name n1 n2` is a pair of one person, a line of four `name1 n1 name2 n2` of two people; fields
    are separated by tabs, or by blanks where a line has no tab. The image is `name/name_%04d.jpg`. A first line `folds n`
    promises folds of n pairs of one person and n of two, in file order; a first line `n` promises n pairs of each. A
    file that breaks its promise is cut or edited, and refused. Without folds, a file in even runs of pairs of one person and
    of two keeps those as its folds, any other is dealt to ten (`dealt_folds`), so that each holds both kinds.

    Args:
        path: the file.

    Returns:
        ImagePairs. Its name is `LFW View 2` (the 10 x 600 pairs that are published as LFW), `LFW View 1 training` or
        `LFW View 1 test` where the first line is theirs, else `LFW-type pairs`.

    Raises:
        InputError: a line of another form, one person named twice in a line for two, or another number of pairs than
            the first line promises; the line or fold is named.
    """
    pairs: list[tuple[str, str, bool]] = []
    promise: tuple[int, ...] = ()
    for at, (number, text) in enumerate(read_lines(path, what="pairs file")):
        fields = [field.strip() for field in (text.strip().split("\t") if "\t" in text else text.split())]
        where = f"{path} line {number}"
        if at == 0 and len(fields) in (1, 2) and all(_is_number(field) for field in fields):
            promise = tuple(int(field) for field in fields)
            continue
        if len(fields) not in (3, 4) or not (_is_number(fields[-1]) and _is_number(fields[1])) or not all(fields):
            raise InputError(f"{where}: must be 'name n1 n2' or 'name1 n1 name2 n2', got {text[:60]!r}")
        if len(fields) == 4 and fields[0] == fields[2]:
            raise InputError(f"{where}: four fields are a pair of two people, and both are {fields[0]!r}")
        other = fields[-2] if len(fields) == 4 else fields[0]
        pairs.append((_image(fields[0], fields[1]), _image(other, fields[-1]), len(fields) == 3))
    if not pairs:
        raise InputError(f"{path}: the pairs file holds no pairs")
    same = np.array([pair[2] for pair in pairs])
    folds = _promised(path, same, promise) if promise else _runs(same)
    return gather_pairs(
        PUBLISHED.get(promise, "LFW-type pairs"),
        pairs,
        folds=folds,
        identity=lambda image: image.split("/")[0],
        source=path,
        sha256=file_sha256(path, "pairs file"),
    )


def _is_number(field: str) -> bool:
    return field.isascii() and field.isdigit() and len(field) < 10


def _image(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}.jpg"


def _promised(path: str | PathLike[str], same: NDArray[np.bool_], promise: tuple[int, ...]) -> NDArray[np.int64] | None:
    """The folds of the first line; None where it only says how many pairs there are of each kind."""
    folds, each = (1, *promise)[-2:]
    if len(same) != 2 * folds * each:
        raise InputError(
            f"{path}: the first line promises {2 * folds * each:,} pairs, the file holds {len(same):,}; it is cut or edited"
        )
    counts = same.reshape(folds, 2 * each).sum(axis=1)
    if (counts != each).any():
        fold = int((counts != each).argmax())
        raise InputError(
            f"{path}: the first line promises {each} pairs of one person in each fold, fold {fold} has {counts[fold]}"
        )
    return np.arange(len(same)) // (2 * each) if len(promise) == 2 else None


def _runs(same: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Folds of a list in even runs of one kind and the other, as LFW's are; None for any other."""
    edges = np.flatnonzero(np.diff(same, prepend=~same[:1], append=~same[-1:]))
    lengths = np.diff(edges)
    if len(lengths) < 4 or len(lengths) % 2 or (lengths != lengths[0]).any():
        return None
    return np.arange(len(same)) // (2 * int(lengths[0]))


def read_pairs(path: str | PathLike[str], faces: FaceList) -> PairList:
    """`read_lfw_pairs`, its images found in a face list by `ImagePairs.locate`.

    Args:
        path: the file.
        faces: the list to find the images in.

    Returns:
        PairList with indices into `faces`.

    Raises:
        InputError: as there, both kinds of pair not there, or no pair whose images are both in the list.
    """
    pairs = read_lfw_pairs(path).locate(faces)
    if pairs.same.all() or not pairs.same.any():
        raise InputError(f"{path}: both pairs of one person and pairs of two people are needed, got one kind only")
    return pairs
