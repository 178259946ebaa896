"""Data room: the lists of IJB-B and IJB-C: templates, pairs, landmarks, galleries and probes. Touches the file system and NumPy."""

from array import array
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.columns import read_integers
from kdlib_faces.data.formats.text import read_lines, split_row
from kdlib_faces.data.image_pairs import check_published

__all__ = [
    "IJBLandmarks",
    "IJBPairs",
    "IJBSubjects",
    "IJBTemplates",
    "read_ijb_landmarks",
    "read_ijb_pairs",
    "read_ijb_subjects",
    "read_ijb_templates",
]

Published = Literal["IJB-B", "IJB-C"] | None
MAX_PAIRS = 200_000_000
MAX_PIXEL = 1e9
MAX_TABLE = 1_000_000
IMAGES = {"IJB-B": 227_630, "IJB-C": 469_375}
# IJB-C's: 15,658,489 lines, 19,557 of them of one person, as several public evaluations print them.
PAIRS = {"IJB-B": (10_270, 8_000_000), "IJB-C": (19_557, 15_638_932)}
TEMPLATES = {"IJB-B": 12_115, "IJB-C": 1772 + 1759 + 19_593}
SUBJECTS = {"IJB-C G1": 1772, "IJB-C G2": 1759, "IJB-C probes": 19_593}


@dataclass(frozen=True, eq=False)
class IJBTemplates:
    """Which template and medium (a still, or a video whose frames are pooled) each image belongs to.

    Attributes:
        images: `n` file names, in the folder `loose_crop` of the set.
        template_ids: `(n,)` int64; not contiguous, so never an index.
        media_ids: `(n,)` int64.
    """

    images: tuple[str, ...]
    template_ids: NDArray[np.int64]
    media_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class IJBPairs:
    """Pairs of templates to compare.

    Attributes:
        left: `(p,)` int64 template ids.
        right: `(p,)` int64 template ids.
        same: `(p,)` bool.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.same)


@dataclass(frozen=True, eq=False)
class IJBLandmarks:
    """Five points and a detector's score an image.

    Attributes:
        images: `n` file names.
        points: `(n, 5, 2)` float32, x and y in pixels.
        scores: `(n,)` float32, how sure the detector was of a face.
    """

    images: tuple[str, ...]
    points: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class IJBSubjects:
    """Templates of a gallery or of the probes, and who they are of.

    Attributes:
        template_ids: `(m,)` int64, each once, in the order of the file.
        subject_ids: `(m,)` int64.
    """

    template_ids: NDArray[np.int64]
    subject_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.template_ids)


def read_ijb_templates(path: str | PathLike[str], *, published: Published = None) -> IJBTemplates:
    """Read `ijbc_face_tid_mid.txt`: lines `image template medium`, separated by blanks.

    Args:
        path: the file.
        published: the set whose published counts the file must have; None takes any file of this format.

    Raises:
        InputError: a line of another form, an image twice, an empty file, other counts than published.
    """
    _check(published)
    images: list[str] = []
    numbers: list[int] = []
    for number, text in read_lines(path, what="template list"):
        fields = text.split()
        if len(fields) != 3 or not all(_is_id(field) for field in fields[1:]):
            raise InputError(f"{path} line {number}: must be 'image template medium', got {text[:60]!r}")
        images.append(fields[0])
        numbers += int(fields[1]), int(fields[2])
    _once(path, images)
    table = np.array(numbers, dtype=np.int64).reshape(-1, 2)
    if published is not None:
        got = [("images", len(images)), ("templates", len(np.unique(table[:, 0])))]
        check_published(path, f"template list of {published}", got, (IMAGES[published], TEMPLATES[published]))
    return IJBTemplates(tuple(images), table[:, 0].copy(), table[:, 1].copy())


def read_ijb_pairs(
    path: str | PathLike[str], *, templates: IJBTemplates | None = None, published: Published = None
) -> IJBPairs:
    """Read `ijbc_template_pair_label.txt`: lines `template template label`, 15 million of them, in bounded memory.

    Args:
        path: the file.
        templates: the set's templates; a pair with another one is then an error. Tools that look ids up in a table of
            zeros compare such pairs with an empty template and say nothing.
        published: the set whose published counts the file must have; None takes any file of this format.

    Raises:
        InputError: a line of another form (its number is named), a label that is neither 0 nor 1, an unknown template,
            other counts than published.
    """
    _check(published)
    known = None if templates is None else np.unique(templates.template_ids)

    def check(block: NDArray[np.int64], row: int) -> None:
        if block[:, 2].max(initial=0) > 1:
            at = int((block[:, 2] > 1).argmax())
            raise InputError(f"{path} pair {row + at + 1}: the label must be 0 or 1, got {block[at, 2]}")
        if known is not None:
            _check_known(path, block[:, :2], known, row)

    kinds = (np.int64, np.int64, np.bool_)
    left, right, same = read_integers(path, kinds, what="list of template pairs", most=MAX_PAIRS, check=check)
    if published is not None:
        positive = int(same.sum())
        got = [("pairs of one person", positive), ("pairs of two people", len(same) - positive)]
        check_published(path, f"pair list of {published}", got, PAIRS[published])
    return IJBPairs(left, right, same)


def _check_known(path: str | PathLike[str], ids: NDArray[np.int64], known: NDArray[np.int64], row: int) -> None:
    """`known` are sorted ids; a table of them is faster than a search, where it is small enough."""
    if known[-1] < MAX_TABLE:
        table = np.zeros(int(known[-1]) + 2, dtype=bool)
        table[known] = True
        unknown = ~table.take(ids, mode="clip")  # whatever is above the largest meets the last entry, False
    else:
        unknown = known.take(np.searchsorted(known, ids), mode="clip") != ids
    if unknown.any():
        pair, side = (int(each[0]) for each in np.nonzero(unknown))
        raise InputError(f"{path} pair {row + pair + 1}: no image belongs to template {ids[pair, side]}")


def read_ijb_landmarks(
    path: str | PathLike[str], *, templates: IJBTemplates | None = None, published: Published = None
) -> IJBLandmarks:
    """Read `ijbc_name_5pts_score.txt`: lines `image x1 y1 ... x5 y5 score`.

    Args:
        path: the file.
        templates: the set's templates; images must then be the same in the same order, as evaluations rely on.
        published: the set whose published counts the file must have; None takes any file of this format.

    Raises:
        InputError: a line of another form, a number that is not finite, an image twice, other images than `templates`,
            other counts than published.
    """
    _check(published)
    images: list[str] = []
    numbers = array("d")
    for number, text in read_lines(path, what="landmark list"):
        name, *fields = text.split()
        try:
            numbers.extend(map(float, fields))
        except ValueError:
            fields = []
        if len(fields) != 11:
            raise InputError(f"{path} line {number}: must be 'image' and 11 numbers, got {text[:60]!r}")
        images.append(name)
    table = np.array(numbers).reshape(-1, 11)
    wild = ~(np.abs(table) < MAX_PIXEL).all(axis=1)
    if wild.any():
        at = int(wild.argmax())
        raise InputError(f"{path} image {at + 1}: {images[at]!r} must have 11 finite numbers, got {table[at].tolist()}")
    _once(path, images)
    if published is not None:
        check_published(path, f"landmark list of {published}", [("images", len(images))], [IMAGES[published]])
    if templates is not None and tuple(images) != templates.images:
        if len(images) != len(templates):
            raise InputError(f"{path}: {len(images):,} images, the template list has {len(templates):,}")
        at = next(at for at, (a, b) in enumerate(zip(images, templates.images, strict=True)) if a != b)
        raise InputError(f"{path} image {at + 1}: {images[at]!r}, the template list has {templates.images[at]!r} there")
    values = table.astype(np.float32)
    return IJBLandmarks(tuple(images), values[:, :10].reshape(-1, 5, 2), values[:, 10].copy())


def read_ijb_subjects(
    path: str | PathLike[str],
    *,
    templates: IJBTemplates | None = None,
    published: Literal["IJB-C G1", "IJB-C G2", "IJB-C probes"] | None = None,
) -> IJBSubjects:
    """Read `ijbc_1N_gallery_G1.csv`, `_G2.csv` or `ijbc_1N_probe_mixed.csv` (IJB-B: S1 and S2).

    A header, then rows that start with template id and subject id, separated by commas; a template may take many rows.

    Args:
        path: the file.
        templates: the set's templates; another one is then an error.
        published: the list whose published count the file must have; None takes any file of this format.

    Raises:
        InputError: no header, a row of another form, a template of two subjects, an unknown one, another count than
            published.
    """
    if published is not None:
        check_choice("read_ijb_subjects", "published", published, tuple(SUBJECTS))
    subjects: dict[int, int] = {}
    lines = read_lines(path, what="list of subjects")
    head, text = next(lines, (0, ""))
    if not head or _is_id(split_row(text, f"{path} line {head}")[0]):
        raise InputError(f"{path}: must start with a header line, got {text[:60]!r}")
    for number, text in lines:
        fields = split_row(text, f"{path} line {number}")
        if len(fields) < 2 or not all(_is_id(field) for field in fields[:2]):
            raise InputError(f"{path} line {number}: must start with 'template,subject', got {text[:60]!r}")
        template, subject = int(fields[0]), int(fields[1])
        if subjects.setdefault(template, subject) != subject:
            raise InputError(
                f"{path} line {number}: template {template} is of two subjects, {subjects[template]} and {subject}"
            )
    if not subjects:
        raise InputError(f"{path}: a header and no rows")
    if published is not None:
        check_published(path, f"list of {published}", [("templates", len(subjects))], [SUBJECTS[published]])
    ids = np.array(list(subjects), dtype=np.int64)
    if templates is not None:
        unknown = ~np.isin(ids, templates.template_ids)
        if unknown.any():
            raise InputError(f"{path}: no image belongs to template {ids[unknown.argmax()]}")
    return IJBSubjects(ids, np.array(list(subjects.values()), dtype=np.int64))


def _check(published: Published) -> None:
    if published is not None:
        check_choice("ijb", "published", published, ("IJB-B", "IJB-C"))


def _is_id(field: str) -> bool:
    return field.isascii() and field.isdigit() and len(field) < 19


def _once(path: str | PathLike[str], images: list[str]) -> None:
    if not images:
        raise InputError(f"{path}: the list is empty")
    for row, image in enumerate(images):
        if ".." in image or image.startswith("/") or "\\" in image:
            raise InputError(f"{path} image {row + 1}: must be named by a path inside the set, got {image[:60]!r}")
    if len(set(images)) != len(images):
        seen: set[str] = set()
        for row, image in enumerate(images):
            if image in seen:
                raise InputError(f"{path} image {row + 1}: {image!r} stands there twice")
            seen.add(image)
