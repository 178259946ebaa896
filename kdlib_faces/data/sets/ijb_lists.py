"""The lists of IJB-B and IJB-C: templates, pairs, landmarks, galleries and probes."""

from array import array
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.columns import read_integers
from kdlib_faces.data.formats.text import is_number, read_lines, split_row
from kdlib_faces.data.image_pairs import check_images, check_published, count_pairs

__all__ = [
    "IJBLandmarks", "IJBPairs", "IJBSubjects", "IJBTemplates", "read_ijb_landmarks", "read_ijb_pairs",
    "read_ijb_subjects", "read_ijb_templates",
]  # fmt: skip

Published = Literal["IJB-B", "IJB-C"] | None
MAX_PAIRS = 200_000_000
MAX_PIXEL = 1e9
MAX_TABLE = 1_000_000
MAX_DIGITS = 18
IMAGES = {"IJB-B": 227_630, "IJB-C": 469_375}
# IJB-C: 15,658,489 lines, of which 19,557 are genuine, as several public evaluations report.
PAIRS = {"IJB-B": (10_270, 8_000_000), "IJB-C": (19_557, 15_638_932)}
TEMPLATES = {"IJB-B": 12_115, "IJB-C": 1772 + 1759 + 19_593}
SUBJECTS = {"IJB-C G1": 1772, "IJB-C G2": 1759, "IJB-C probes": 19_593}


@dataclass(frozen=True, eq=False)
class IJBTemplates:
    """Template and medium (a still, or a video whose frames are pooled) of each image.

    Attributes:
        images: `n` file names, in the folder `loose_crop` of the set.
        template_ids: `(n,)` int64; not contiguous, so they cannot be used as indices.
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
    """Five points and a detector score of each image.

    Attributes:
        images: `n` file names.
        points: `(n, 5, 2)` float32, x and y in pixels.
        scores: `(n,)` float32, the confidence of the detector.
    """

    images: tuple[str, ...]
    points: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class IJBSubjects:
    """Templates of a gallery or of the probes, with their subjects.

    Attributes:
        template_ids: `(m,)` int64, without repetition, in the order of the file.
        subject_ids: `(m,)` int64.
    """

    template_ids: NDArray[np.int64]
    subject_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.template_ids)


def read_ijb_templates(path: str | PathLike[str], *, published: Published = None) -> IJBTemplates:
    """Read `ijbc_face_tid_mid.txt`: lines `image template medium`, separated by blanks.

    Args:
        path: The file.
        published: The set whose published counts the file must have; None accepts any counts.

    Returns:
        IJBTemplates of n images, in the order of the file.

    Raises:
        InputError: A line has another form, an image occurs twice, the file is empty, or the counts are not the published
            ones.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "ijbc_face_tid_mid.txt"
        >>> _ = file.write_text("1.jpg 10 70\\n2.jpg 10 71\\n3.jpg 25 72\\n")
        >>> templates = read_ijb_templates(file)
        >>> templates.images, templates.template_ids.tolist()
        (('1.jpg', '2.jpg', '3.jpg'), [10, 10, 25])
    """
    check_choice("ijb", "published", published or "IJB-C", tuple(IMAGES))
    images: list[str] = []
    numbers: list[int] = []
    for number, text in read_lines(path, what="template list"):
        fields = text.split()
        if len(fields) != 3 or not all(is_number(field, MAX_DIGITS) for field in fields[1:]):
            raise InputError(f"{path} line {number}: must be 'image template medium', got {text[:60]!r}")
        images.append(fields[0])
        numbers += int(fields[1]), int(fields[2])
    check_images(path, images)
    table = np.array(numbers, dtype=np.int64).reshape(-1, 2)
    if published is not None:
        counts = {"images": len(images), "templates": len(np.unique(table[:, 0]))}
        check_published(path, f"template list of {published}", counts, (IMAGES[published], TEMPLATES[published]))
    return IJBTemplates(tuple(images), table[:, 0].copy(), table[:, 1].copy())


def read_ijb_pairs(
    path: str | PathLike[str], *, templates: IJBTemplates | None = None, published: Published = None
) -> IJBPairs:
    """Read `ijbc_template_pair_label.txt`: lines `template template label`, 15 million of them, in bounded memory.

    Args:
        path: The file.
        templates: The set's templates; a pair with another one is then an error. (Tools that look up ids in a table of
            zeros silently compare such pairs with an empty template.)
        published: The set whose published counts the file must have; None accepts any counts.

    Returns:
        IJBPairs of p pairs, in the order of the file.

    Raises:
        InputError: A line has another form (the message gives its number), a label is neither 0 nor 1, a template is
            unknown, or the counts are not the published ones.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "ijbc_template_pair_label.txt"
        >>> _ = file.write_text("10 25 0\\n10 31 1\\n")
        >>> pairs = read_ijb_pairs(file)
        >>> pairs.left.tolist(), pairs.right.tolist(), pairs.same.tolist()
        ([10, 10], [25, 31], [False, True])
    """
    check_choice("ijb", "published", published or "IJB-C", tuple(IMAGES))
    known = None if templates is None else np.unique(templates.template_ids)

    def check(block: NDArray[np.int64], row: int) -> None:
        if block[:, 2].max(initial=0) > 1:
            at = int((block[:, 2] > 1).argmax())
            raise InputError(f"{path} pair {row + at + 1}: the label must be 0 or 1, got {block[at, 2]}")
        if known is not None:
            _check_known(path, block[:, :2], known, row)

    dtypes = (np.int64, np.int64, np.bool_)
    left, right, same = read_integers(path, dtypes, what="list of template pairs", max_rows=MAX_PAIRS, check=check)
    if published is not None:
        check_published(path, f"pair list of {published}", count_pairs(same), PAIRS[published])
    return IJBPairs(left, right, same)


def _check_known(path: str | PathLike[str], ids: NDArray[np.int64], known: NDArray[np.int64], row: int) -> None:
    """`known` are sorted ids; where they are small enough, a lookup table is faster than a search."""
    if known[-1] < MAX_TABLE:
        table = np.zeros(int(known[-1]) + 2, dtype=bool)
        table[known] = True
        unknown = ~table.take(ids, mode="clip")  # Ids above the largest are clipped to the last entry, which is False.
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
        path: The file.
        templates: The set's templates, whose images must then be the same in the same order.
        published: The set whose published counts the file must have; None accepts any counts.

    Returns:
        IJBLandmarks: points `(n, 5, 2)` in pixels and scores `(n,)`.

    Raises:
        InputError: A line has another form, a number is not finite, an image occurs twice, the images are not those of
            `templates`, or the counts are not the published ones.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "ijbc_name_5pts_score.txt"
        >>> _ = file.write_text("1.jpg 38 52 74 52 56 72 42 92 71 92 0.99\\n")
        >>> landmarks = read_ijb_landmarks(file)
        >>> landmarks.points.shape, landmarks.points[0, 0].tolist()
        ((1, 5, 2), [38.0, 52.0])
    """
    check_choice("ijb", "published", published or "IJB-C", tuple(IMAGES))
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
    valid = (np.abs(table) < MAX_PIXEL).all(axis=1)
    if not valid.all():
        at = int((~valid).argmax())
        raise InputError(f"{path} image {at + 1}: {images[at]!r} must have 11 finite numbers, got {table[at].tolist()}")
    check_images(path, images)
    if published is not None:
        check_published(path, f"landmark list of {published}", {"images": len(images)}, [IMAGES[published]])
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

    A header, then rows that start with template id and subject id, separated by commas; a template may have many rows.

    Args:
        path: The file.
        templates: The set's templates; another one is then an error.
        published: The list whose published count the file must have; None accepts any count.

    Returns:
        IJBSubjects of m templates, each once.

    Raises:
        InputError: There is no header, a row has another form, a template has two subjects or is unknown, or the count is
            not the published one.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "ijbc_1N_gallery_G1.csv"
        >>> _ = file.write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME\\n10,1,1.jpg\\n10,1,2.jpg\\n25,2,3.jpg\\n")
        >>> gallery = read_ijb_subjects(file)
        >>> gallery.template_ids.tolist(), gallery.subject_ids.tolist()
        ([10, 25], [1, 2])
    """
    check_choice("read_ijb_subjects", "published", published or "IJB-C G1", tuple(SUBJECTS))
    subjects: dict[int, int] = {}
    lines = read_lines(path, what="list of subjects")
    head, text = next(lines, (0, ""))
    if not head or is_number(split_row(text, f"{path} line {head}")[0], MAX_DIGITS):
        raise InputError(f"{path}: must start with a header line, got {text[:60]!r}")
    for number, text in lines:
        fields = split_row(text, f"{path} line {number}")
        if len(fields) < 2 or not all(is_number(field, MAX_DIGITS) for field in fields[:2]):
            raise InputError(f"{path} line {number}: must start with 'template,subject', got {text[:60]!r}")
        template, subject = int(fields[0]), int(fields[1])
        if subjects.setdefault(template, subject) != subject:
            raise InputError(
                f"{path} line {number}: template {template} has two subjects, {subjects[template]} and {subject}"
            )
    if not subjects:
        raise InputError(f"{path}: a header and no rows")
    if published is not None:
        check_published(path, f"list of {published}", {"templates": len(subjects)}, [SUBJECTS[published]])
    ids = np.array(list(subjects), dtype=np.int64)
    if templates is not None:
        unknown = ~np.isin(ids, templates.template_ids)
        if unknown.any():
            raise InputError(f"{path}: no image belongs to template {ids[unknown.argmax()]}")
    return IJBSubjects(ids, np.array(list(subjects.values()), dtype=np.int64))
