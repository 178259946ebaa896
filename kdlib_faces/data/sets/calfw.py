"""The pair lists of CALFW and CPLFW, two lines per pair."""

import re
from os import PathLike

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import is_number, read_lines
from kdlib_faces.data.image_pairs import ImagePairs, check_published, count_pairs, file_sha256, gather_pairs

__all__ = ["read_calfw_pairs", "read_cplfw_pairs"]

_NUMBERED = re.compile(r"(.+)_\d+\.\w+")


def read_calfw_pairs(path: str | PathLike[str], *, published: bool = True, sha256: str | None = None) -> ImagePairs:
    """Read the pair list of CALFW (cross-age LFW).

    Two lines are a pair, `image.jpg label` each; a label other than 0 marks a genuine pair. All 3,000 genuine pairs come
    first, so contiguous folds would hold only one kind: fold k is pairs 300 k to 300 k + 299 of each kind.

    The list was replaced on 2018-09-19 and both versions look alike. The result's `sha256` identifies the version, and
    `sha256=` requires one of them.

    Args:
        path: The file.
        published: Require the published 3,000 genuine and 3,000 impostor pairs; False reads a list of your own.
        sha256: Required SHA-256 of the file.

    Returns:
        ImagePairs named `CALFW`, without ages.

    Raises:
        InputError: A line has another form, the number of lines is odd, the labels of a pair disagree, the counts are not
            the published ones, or the file does not match `sha256`.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs_CALFW.txt"
        >>> _ = file.write_text("Ann_0001.jpg 1\\nAnn_0002.jpg 1\\nAnn_0001.jpg 0\\nBob_0001.jpg 0\\n")
        >>> read_calfw_pairs(file, published=False)
        <ImagePairs: CALFW, 2 pairs of 3 images, 1 genuine, 1 folds>
    """
    note = "; the list of CALFW was replaced on 2018-09-19, results on the two versions are not comparable"
    return _read(path, "CALFW", published, sha256, note)


def read_cplfw_pairs(path: str | PathLike[str], *, published: bool = True, sha256: str | None = None) -> ImagePairs:
    """Read the pair list of CPLFW (cross-pose LFW); format, folds and arguments are those of `read_calfw_pairs`.

    Returns:
        ImagePairs named `CPLFW`, without ages.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs_CPLFW.txt"
        >>> _ = file.write_text("Ann_1.jpg 1\\nAnn_2.jpg 1\\nAnn_1.jpg 0\\nBob_1.jpg 0\\n")
        >>> read_cplfw_pairs(file, published=False)
        <ImagePairs: CPLFW, 2 pairs of 3 images, 1 genuine, 1 folds>
    """
    return _read(path, "CPLFW", published, sha256, "")


def _read(path: str | PathLike[str], name: str, published: bool, sha256: str | None, note: str) -> ImagePairs:
    digest = file_sha256(path, f"pair list of {name}", sha256, note)
    pairs: list[tuple[str, str, bool]] = []
    first: tuple[str, bool] | None = None
    number = 0
    for number, text in read_lines(path, what=f"pair list of {name}"):
        image, _, label = text.strip().rpartition("\t" if "\t" in text.strip() else " ")
        if number == 1 and image and not is_number(label) and "." not in image:
            continue  # a header, as in the list of CPLFW
        if not image.strip() or not is_number(label):
            raise InputError(f"{path} line {number}: must be 'image.jpg label', got {text[:60]!r}")
        second = image.strip(), int(label) != 0
        if first is None:
            first = second
            continue
        if first[1] != second[1]:
            raise InputError(
                f"{path} line {number}: both lines of a pair must have the same label, 0 or not 0; a line is missing"
            )
        pairs.append((first[0], *second))
        first = None
    if first is not None:
        raise InputError(f"{path} line {number}: the last pair has only one line")
    if published:
        counts = count_pairs(np.array([same for _, _, same in pairs], dtype=bool))
        check_published(path, f"pair list of {name}", counts, (3000, 3000))
    return gather_pairs(name, pairs, identity=_identity, source=path, sha256=digest)


def _identity(image: str) -> str | None:
    match = _NUMBERED.fullmatch(image)
    return match[1] if match else None
