"""Data room: pairs of named images, the common form of every verification list. Touches NumPy and file names only."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import opened
from kdlib_faces.data.lists import FaceList, identity_key

__all__ = ["ImagePairs", "PairList", "check_published", "dealt_folds", "file_sha256", "gather_pairs"]


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


@dataclass(frozen=True, eq=False)
class ImagePairs:
    """Pairs of images by name: embed `images` in their order, and `left` and `right` are rows of the embeddings.

    Attributes:
        name: the set, such as `CALFW`.
        images: `n` names, each once, as paths relative to the set's images; in the order they first appear.
        left: `(p,)` int64, index into `images`.
        right: `(p,)` int64, index into `images`.
        same: `(p,)` bool, whether both images are of one person.
        fold_ids: `(p,)` int64, the fold of each pair.
        identities: one name an image, where the list tells who is on it; else None.
        ages: `(n,)` float32 years, NaN where unknown, where the list tells; else None.
        source: the file or folder that was read.
        sha256: of the file, so that a report can say which list it was; empty for a folder.
        parts: how many parts of its path, from the end, tell an image from the others.
        dealt: whether the list has no folds of its own and they were dealt.
    """

    name: str
    images: tuple[str, ...]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]
    fold_ids: NDArray[np.int64]
    identities: tuple[str, ...] | None = None
    ages: NDArray[np.float32] | None = None
    source: str = ""
    sha256: str = ""
    parts: int = 1
    dealt: bool = False

    def __len__(self) -> int:
        return len(self.same)

    def __repr__(self) -> str:
        return (
            f"<ImagePairs: {self.name}, {len(self)} pairs of {len(self.images)} images, "
            f"{int(self.same.sum())} of one person, {len(np.unique(self.fold_ids))} folds>"
        )

    def paths(self, folder: str | PathLike[str]) -> list[Path]:
        """Where the images are when the set's images are in `folder`."""
        return [Path(folder, image) for image in self.images]

    def locate(self, faces: FaceList) -> PairList:
        """Find the images in a face list, names compared as identities are and without their suffix.

        Args:
            faces: the list.

        Returns:
            PairList with indices into `faces`; pairs with an image that is not there are counted, never guessed, and do
            not move the others' folds, except where folds were dealt: those are dealt anew.

        Raises:
            InputError: an image that the list has twice, or no pair whose images are both there.
        """
        rows: dict[tuple[str, ...], int] = {}
        twice: set[tuple[str, ...]] = set()
        for row, file in enumerate(faces.paths):
            key = _key(file.parts, self.parts)
            if key in rows:
                twice.add(key)
            rows[key] = row
        keys = [_key(PurePosixPath(image).parts, self.parts) for image in self.images]
        for key, image in zip(keys, self.images, strict=True):
            if key in twice:
                raise InputError(f"{self.source or self.name}: the face list has more than one image called {image!r}")
        at = np.array([rows.get(key, -1) for key in keys], dtype=np.int64)
        left, right = at[self.left], at[self.right]
        found = (left >= 0) & (right >= 0)
        if not found.any():
            first = self.images[int(np.flatnonzero(at < 0)[0])]
            raise InputError(
                f"{self.source or self.name}: no pair has both its images in the face list, not even {first!r}"
            )
        same = self.same[found]
        folds = dealt_folds(same) if self.dealt else self.fold_ids[found]
        return PairList(left[found], right[found], same, folds, int((~found).sum()))


def _key(parts: Sequence[str], count: int) -> tuple[str, ...]:
    *folders, file = parts[-count:]
    return (*(identity_key(folder) for folder in folders), identity_key(PurePosixPath(file).stem))


def dealt_folds(same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A fold for each pair: slices of the same pairs, and of the different ones, at most ten and none of one kind.

    Lists that hold all pairs of one kind first get the folds that their evaluators build: with 3,000 of each, slice k takes
    pairs 300 k to 300 k + 299 of both.

    Examples:
        >>> dealt_folds(np.array([True, True, False, False])).tolist()
        [0, 1, 0, 1]
    """
    folds = np.zeros(len(same), dtype=np.int64)
    count = max(1, min(10, int(same.sum()), int((~same).sum())))
    for kind in (same, ~same):
        folds[kind] = np.arange(int(kind.sum())) * count // max(1, int(kind.sum()))
    return folds


def gather_pairs(
    name: str,
    pairs: Sequence[tuple[str, str, bool]],
    *,
    folds: NDArray[np.int64] | None = None,
    identity: Callable[[str], str | None] | None = None,
    ages: Callable[[str], float] | None = None,
    source: str | PathLike[str] = "",
    sha256: str = "",
    parts: int = 1,
) -> ImagePairs:
    """`ImagePairs` of `(left, right, same)` by image name; folds are dealt where none are given.

    Raises:
        InputError: no pair, or an image name that is no relative path inside the set.
    """
    if not pairs:
        raise InputError(f"{source}: the pairs file holds no pairs")
    numbers: dict[str, int] = {}
    for pair in pairs:
        for image in pair[:2]:
            if image not in numbers:
                _check_image(image, str(source))
                numbers[image] = len(numbers)
    table = np.array([(numbers[left], numbers[right], same) for left, right, same in pairs], dtype=np.int64)
    same = table[:, 2] == 1
    people = [identity(image) for image in numbers] if identity is not None else [None]
    years = np.array([ages(image) for image in numbers], dtype=np.float32) if ages is not None else None
    return ImagePairs(
        name,
        tuple(numbers),
        table[:, 0].copy(),
        table[:, 1].copy(),
        same,
        dealt_folds(same) if folds is None else folds.astype(np.int64),
        tuple(each for each in people if each is not None) if None not in people else None,
        years if years is not None and np.isfinite(years).any() else None,
        str(source),
        sha256,
        parts,
        folds is None,
    )


def _check_image(image: str, source: str) -> None:
    path = PurePosixPath(image)
    strange = not image.isprintable() or "\\" in image
    if strange or not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise InputError(f"{source}: an image must be named by a path inside the set, got {image[:80]!r}")


def check_published(
    source: str | PathLike[str], what: str, got: Iterable[tuple[str, int]], published: Iterable[int]
) -> None:
    """The counts of a list that says it is the published one must be the published ones.

    Raises:
        InputError: another count, each named.
    """
    found, wanted = list(got), list(published)
    if [count for _, count in found] != wanted:
        expected = ", ".join(f"{count:,} {name}" for (name, _), count in zip(found, wanted, strict=True))
        here = ", ".join(f"{count:,} {name}" for name, count in found)
        raise InputError(
            f"{source}: the published {what} has {expected}; here are {here}. "
            f"The file is cut or another version; published=False reads a list of your own"
        )


def file_sha256(path: str | PathLike[str], what: str, expected: str | None = None, note: str = "") -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        InputError: the file is missing, or `expected` is given and another one.
    """
    with opened(path, what) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected is not None and found != expected.strip().lower():
        raise InputError(f"{path}: another version of the {what}: SHA-256 {found}, expected {expected}{note}")
    return found
