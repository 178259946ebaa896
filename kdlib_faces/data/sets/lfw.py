"""Lists of image pairs in LFW's format."""

from os import PathLike

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import is_number, read_lines
from kdlib_faces.data.image_pairs import ImagePairs, file_sha256, gather_pairs

__all__ = ["read_lfw_pairs"]

PUBLISHED: dict[tuple[int, ...], str] = {
    (10, 300): "LFW View 2",
    (1100,): "LFW View 1 training",
    (500,): "LFW View 1 test",
}


def read_lfw_pairs(path: str | PathLike[str]) -> ImagePairs:
    """Read `pairs.txt`, `pairsDevTrain.txt`, `pairsDevTest.txt` and lists in their format, such as RFW's.

    A line of three fields `name n1 n2` is a genuine pair, a line of four `name1 n1 name2 n2` an impostor pair. Fields are
    separated by tabs, or by blanks where a line has no tab. The image is `name/name_%04d.jpg`. A first line `folds n`
    announces folds of n genuine and n impostor pairs, in file order; a first line `n` announces n pairs of each kind. A
    file with other counts is truncated or edited, and rejected. Without announced folds, a file in equal runs of genuine
    and impostor pairs uses these as its folds; otherwise folds are assigned by `assign_folds`, so that each has both kinds.

    Args:
        path: The file.

    Returns:
        ImagePairs. Its name is `LFW View 2` (the 10 x 600 pairs that are published as LFW), `LFW View 1 training` or
        `LFW View 1 test` if the first line is that of the published list, else `LFW-type pairs`.

    Raises:
        InputError: A line has another form, an impostor pair names one identity twice, or the number of pairs differs from
            the first line; the message names the line or fold.
    """
    pairs: list[tuple[str, str, bool]] = []
    announced: tuple[int, ...] = ()
    for row, (number, text) in enumerate(read_lines(path, what="pairs file")):
        fields = [field.strip() for field in (text.strip().split("\t") if "\t" in text else text.split())]
        where = f"{path} line {number}"
        if row == 0 and len(fields) in (1, 2) and all(is_number(field) for field in fields):
            announced = tuple(int(field) for field in fields)
            continue
        if len(fields) not in (3, 4) or not (is_number(fields[-1]) and is_number(fields[1])) or not all(fields):
            raise InputError(f"{where}: must be 'name n1 n2' or 'name1 n1 name2 n2', got {text[:60]!r}")
        if len(fields) == 4 and fields[0] == fields[2]:
            raise InputError(f"{where}: four fields are an impostor pair, but both identities are {fields[0]!r}")
        other = fields[-2] if len(fields) == 4 else fields[0]
        pairs.append((_image(fields[0], fields[1]), _image(other, fields[-1]), len(fields) == 3))
    same = np.array([pair[2] for pair in pairs], dtype=bool)
    folds = _announced_folds(path, same, announced) if announced and pairs else _runs(same)
    return gather_pairs(
        PUBLISHED.get(announced, "LFW-type pairs"),
        pairs,
        folds=folds,
        identity=lambda image: image.split("/")[0],
        source=path,
        sha256=file_sha256(path, "pairs file"),
    )


def _image(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}.jpg"


def _announced_folds(
    path: str | PathLike[str], same: NDArray[np.bool_], announced: tuple[int, ...]
) -> NDArray[np.int64] | None:
    """The folds of the first line; None where it only gives the number of pairs of each kind."""
    folds, each = (1, *announced)[-2:]
    if len(same) != 2 * folds * each:
        raise InputError(
            f"{path}: the first line announces {2 * folds * each:,} pairs, the file holds {len(same):,}; "
            f"it is truncated or edited"
        )
    counts = same.reshape(folds, 2 * each).sum(axis=1)
    if (counts != each).any():
        fold = int((counts != each).argmax())
        raise InputError(
            f"{path}: the first line announces {each} genuine pairs in each fold, fold {fold} has {counts[fold]}"
        )
    return np.arange(len(same)) // (2 * each) if len(announced) == 2 else None


def _runs(same: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Folds of a list in equal runs of one kind and the other, as LFW's are; None for any other."""
    edges = np.flatnonzero(np.diff(same, prepend=~same[:1], append=~same[-1:]))
    lengths = np.diff(edges)
    if len(lengths) < 4 or len(lengths) % 2 or (lengths != lengths[0]).any():
        return None
    return np.arange(len(same)) // (2 * int(lengths[0]))
