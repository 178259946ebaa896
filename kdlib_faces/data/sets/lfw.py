"""Lists of image pairs in LFW's format, and lists of two paths and a label."""

from os import PathLike
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import check_commas, is_number, read_lines, split_row
from kdlib_faces.data.image_pairs import ImagePairs, file_sha256, gather_pairs

__all__ = ["read_lfw_pairs"]

LABELS = {"1": True, "0": False, "-1": False, "1.0": True, "0.0": False, "true": True, "false": False}
PUBLISHED: dict[tuple[int, ...], str] = {
    (10, 300): "LFW View 2",
    (1100,): "LFW View 1 training",
    (500,): "LFW View 1 test",
}


def read_lfw_pairs(path: str | PathLike[str]) -> ImagePairs:
    """Read `pairs.txt`, `pairsDevTrain.txt`, `pairsDevTest.txt`, lists in their format, such as RFW's, and lists of paths.

    A line of three fields `name n1 n2` is a genuine pair, a line of four `name1 n1 name2 n2` an impostor pair. Fields are
    separated by tabs, or by blanks where a line has no tab, or by commas. The image is `name/name_%04d.jpg`; see
    `ImagePairs.locate` for images of other names. In a list of paths, a line is `path path label` or `label path path`, and
    the label is 1 or 0, `true` or `false`. The list may start with a header.

    A first line `folds n` announces folds of n genuine and n impostor pairs, in file order; a first line `n` announces n
    pairs of each kind. A file with other counts is truncated or edited, and rejected. Without announced folds, a file in
    equal runs of genuine and impostor pairs uses these as its folds; otherwise folds are assigned by `assign_folds`, so that
    each has both kinds.

    Args:
        path: The file.

    Returns:
        ImagePairs. Its name is `LFW View 2` (the 10 x 600 pairs that are published as LFW), `LFW View 1 training` or
        `LFW View 1 test` if the first line is that of the published list, else `LFW-type pairs`.

    Raises:
        InputError: A line has another form, an impostor pair names one identity twice, or the number of pairs differs from
            the first line; the message names the line or fold.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs.txt"
        >>> _ = file.write_text("2\\t1\\nAnn\\t1\\t2\\nAnn\\t1\\tBob\\t1\\nCy\\t1\\t2\\nCy\\t3\\tBob\\t2\\n")
        >>> pairs = read_lfw_pairs(file)
        >>> pairs
        <ImagePairs: LFW-type pairs, 4 pairs of 7 images, 2 genuine, 2 folds>
        >>> pairs.images[0], pairs.same.tolist()
        ('Ann/Ann_0001.jpg', [True, False, True, False])
    """
    pairs: list[tuple[str, str, bool]] = []
    announced: tuple[int, ...] = ()
    numbered = commas = False
    for row, (number, text) in enumerate(read_lines(path, what="pairs file")):
        where = f"{path} line {number}"
        commas = commas or (row == 0 and text.count(",") > 1)
        fields = _fields(text, where, commas=commas)
        if row == 0 and len(fields) in (1, 2) and all(is_number(field) for field in fields):
            announced = tuple(int(field) for field in fields)
            continue
        if row == 0 and _is_header(fields):
            continue
        pair = _numbered_pair(fields, where) or _pair_of_paths(fields)
        if pair is None or (pairs and numbered != is_number(fields[1])):
            check_commas(text, where, {"semicolons": ";"})
            form = "'path path 0' or 'path path 1'" if pairs and not numbered else "'name n1 n2' or 'name1 n1 name2 n2'"
            also = "" if pairs else ", or 'path path 0|1'"
            raise InputError(f"{where}: must be {form}{also}, got {text[:60]!r}")
        numbered = is_number(fields[1])
        pairs.append(pair)
    same = np.array([pair[2] for pair in pairs], dtype=bool)
    folds = _announced_folds(path, same, announced) if announced and pairs else _runs(same)
    parts = 1 if numbered else _distinct_parts([image for pair in pairs for image in pair[:2]])
    return gather_pairs(
        PUBLISHED.get(announced, "LFW-type pairs"),
        pairs,
        folds=folds,
        identity=_folder if all((_folder(a) == _folder(b)) == same for a, b, same in pairs) else None,
        source=path,
        sha256=file_sha256(path, "pairs file"),
        path_parts=parts,
    )


def _fields(text: str, where: str, *, commas: bool) -> list[str]:
    """Fields without the empty ones at the end."""
    if commas:
        fields = split_row(text, where)
    else:
        fields = [field.strip() for field in (text.strip().split("\t") if "\t" in text else text.split())]
    while fields and not fields[-1]:
        fields.pop()
    return fields


def _is_header(fields: list[str]) -> bool:
    words = (each for each in fields if "." not in each and not is_number(each) and each.casefold() not in LABELS)
    return len(fields) >= 3 and len(list(words)) == len(fields)


def _numbered_pair(fields: list[str], where: str) -> tuple[str, str, bool] | None:
    """The pair of `name n1 n2` or `name1 n1 name2 n2`; None for another form."""
    if len(fields) not in (3, 4) or not (is_number(fields[-1]) and is_number(fields[1])) or not all(fields):
        return None
    if len(fields) == 4 and fields[0] == fields[2]:
        raise InputError(f"{where}: four fields are an impostor pair, but both identities are {fields[0]!r}")
    other = fields[-2] if len(fields) == 4 else fields[0]
    return _image(fields[0], fields[1]), _image(other, fields[-1]), len(fields) == 3


def _pair_of_paths(fields: list[str]) -> tuple[str, str, bool] | None:
    """The pair of `path path label` or `label path path`, with or without a row number; None for another form."""
    if len(fields) == 4 and is_number(fields[0]):
        fields = fields[1:]
    if len(fields) != 3 or not all(fields):
        return None
    *paths, label = fields if fields[-1].casefold() in LABELS else [*fields[1:], fields[0]]
    return (paths[0], paths[1], LABELS[label.casefold()]) if label.casefold() in LABELS else None


def _folder(image: str) -> str:
    return PurePosixPath(image).parent.name or image


def _distinct_parts(images: list[str]) -> int:
    """The smallest number of trailing parts of the paths that identifies each image."""
    paths = {PurePosixPath(image).parts for image in images}
    depth = max(map(len, paths), default=1)
    return next((count for count in range(1, depth) if len({path[-count:] for path in paths}) == len(paths)), depth)


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
