"""Data room: the pair lists of CALFW and CPLFW, two lines a pair. Touches the file system; decodes no image."""

import re
from os import PathLike

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_lines
from kdlib_faces.data.image_pairs import ImagePairs, check_published, file_sha256, gather_pairs

__all__ = ["read_calfw_pairs", "read_cplfw_pairs"]

_NUMBERED = re.compile(r"(.+)_\d+\.\w+")


def read_calfw_pairs(path: str | PathLike[str], *, published: bool = True, sha256: str | None = None) -> ImagePairs:
    """Read the pair list of CALFW (cross-age LFW).

    Two lines are a pair, `image.jpg label` each; a label other than 0 says that both are of one person. All 3,000 pairs of one
    person come first, so contiguous folds would hold one kind: fold k is pairs 300 k to 300 k + 299 of each kind.

    The list was replaced on 2018-09-19 and both versions look alike: the result's `sha256` says which one was used, and
    `sha256=` holds a run to one of them.

    Args:
        path: the file.
        published: the counts must be the published ones, 3,000 and 3,000; False reads a list of your own in this format.
        sha256: SHA-256 that the file must have.

    Raises:
        InputError: a line of another form, an odd number of lines, labels of a pair that disagree, other counts
            than the published ones, or another file than `sha256` says.
    """
    note = "; the list of CALFW was replaced on 2018-09-19, results on both do not compare"
    return _two_lines(path, "CALFW", published, sha256, note)


def read_cplfw_pairs(path: str | PathLike[str], *, published: bool = True, sha256: str | None = None) -> ImagePairs:
    """Read the pair list of CPLFW (cross-pose LFW); the format, folds and arguments of `read_calfw_pairs`."""
    return _two_lines(path, "CPLFW", published, sha256, "")


def _two_lines(path: str | PathLike[str], name: str, published: bool, sha256: str | None, note: str) -> ImagePairs:
    digest = file_sha256(path, f"pair list of {name}", sha256, note)
    pairs: list[tuple[str, str, bool]] = []
    first: tuple[str, bool] | None = None
    number = 0
    for number, text in read_lines(path, what=f"pair list of {name}"):
        image, _, label = text.strip().rpartition("\t" if "\t" in text.strip() else " ")
        if not image.strip() or not re.fullmatch(r"[0-9]{1,9}", label):
            raise InputError(f"{path} line {number}: must be 'image.jpg label', got {text[:60]!r}")
        found = image.strip(), int(label) != 0
        if first is None:
            first = found
            continue
        if first[1] != found[1]:
            raise InputError(
                f"{path} line {number}: both lines of a pair must have the same label, 0 or not 0; a line is missing before"
            )
        pairs.append((first[0], found[0], found[1]))
        first = None
    if first is not None:
        raise InputError(f"{path} line {number}: the last pair has one line only")
    same = sum(pair[2] for pair in pairs)
    if published:
        counts = [("pairs of one person", same), ("pairs of two people", len(pairs) - same)]
        check_published(path, f"pair list of {name}", counts, (3000, 3000))
    return gather_pairs(name, pairs, identity=_person, source=path, sha256=digest)


def _person(image: str) -> str | None:
    found = _NUMBERED.fullmatch(image)
    return found[1] if found else None
