"""Pairs of named images: the common form of all verification lists."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import opened
from kdlib_faces.data.identities import identity_key
from kdlib_faces.data.lists import FaceList

__all__ = [
    "ImagePairs", "PairList", "assign_folds", "check_images", "check_published", "count_pairs", "file_sha256", "gather_pairs",
    "is_inside",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class PairList:
    """Pairs of images of one face list.

    Attributes:
        left: `(p,)` int64, row of the first image in the list.
        right: `(p,)` int64, row of the second.
        same: `(p,)` bool, whether a pair is genuine.
        fold_ids: `(p,)` int64, the fold of each pair.
        missing: Number of pairs of the file that were dropped because an image is not in the list.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]
    fold_ids: NDArray[np.int64]
    missing: int

    def __len__(self) -> int:
        return len(self.same)

    def __repr__(self) -> str:
        return f"<PairList: {len(self)} pairs, {int(self.same.sum())} genuine, {self.missing} missing>"


@dataclass(frozen=True, eq=False)
class ImagePairs:
    """Pairs of images by name: embed `images` in order, and `left` and `right` are rows of the embeddings.

    Attributes:
        name: The set, such as `CALFW`.
        images: `n` distinct names, as paths relative to the set's images, in the order of their first occurrence.
        left: `(p,)` int64, index into `images`.
        right: `(p,)` int64, index into `images`.
        same: `(p,)` bool, whether a pair is genuine.
        fold_ids: `(p,)` int64, the fold of each pair.
        identities: The identity of each image, if the list defines it; else None.
        ages: `(n,)` float32 years, NaN where unknown, if the list defines them; else None.
        source: The file or folder.
        sha256: SHA-256 of the file, which identifies the version of the list in a report; empty for a folder.
        path_parts: Number of trailing parts of a path that identify an image.
        assigned_folds: Whether the list defines no folds, so that `assign_folds` defined them.
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
    path_parts: int = 1
    assigned_folds: bool = False

    def __len__(self) -> int:
        return len(self.same)

    def __repr__(self) -> str:
        return (
            f"<ImagePairs: {self.name}, {len(self)} pairs of {len(self.images)} images, "
            f"{int(self.same.sum())} genuine, {len(np.unique(self.fold_ids))} folds>"
        )

    def paths(self, folder: str | PathLike[str]) -> list[Path]:
        """Return the paths of the images when the set's images are in `folder`."""
        return [Path(folder, image) for image in self.images]

    def rows(self, faces: FaceList) -> NDArray[np.int64]:
        """Find the images in a face list: `(n,)` row of each, -1 for one that is not there; see `locate`."""
        rows: dict[tuple[str, ...], int] = {}
        repeated: set[tuple[str, ...]] = set()
        for row, file in enumerate(faces.paths):
            key = self._key(file.parts)
            if key in rows:
                repeated.add(key)
            rows[key] = row
        keys = [self._key(PurePosixPath(image).parts) for image in self.images]
        for key, image in zip(keys, self.images, strict=True):
            if key in repeated:
                where = self.source or self.name
                raise InputError(f"{where}: the face list has more than one image named {image!r}")
        if self.path_parts == 1 and not any(key in rows for key in keys):
            rows, keys = _numbered(faces.paths), [_number_of(PurePosixPath(image)) for image in self.images]
        return np.array([rows.get(key, -1) for key in keys], dtype=np.int64)

    def locate(self, faces: FaceList) -> PairList:
        """Find the images in a face list; names are compared as identities are, without suffixes.

        If the list has none of the names, images are found by identity and number: `Ann_0007.jpg` may be `Ann/7.png`.
        Pairs with an image that is not in the list are dropped and counted. The other pairs keep their folds, except
        assigned folds, which are assigned again.

        Args:
            faces: The list.

        Returns:
            PairList with indices into `faces`.

        Raises:
            InputError: The list holds an image twice, or no pair has both its images in the list.

        Examples:
            >>> import tempfile
            >>> from kdlib_faces.data import read_faces, read_lfw_pairs
            >>> folder = Path(tempfile.mkdtemp())
            >>> for name in ("Ann/1.png", "Ann/2.png", "Bob/1.png"):
            ...     (folder / "faces" / name).parent.mkdir(exist_ok=True, parents=True)
            ...     _ = (folder / "faces" / name).write_bytes(b"")
            >>> _ = (folder / "pairs.txt").write_text("Ann 1 2\\nAnn 1 Bob 1\\nBob 1 2\\nBob 2 Ann 1\\n")
            >>> read_lfw_pairs(folder / "pairs.txt").locate(read_faces(folder / "faces"))
            <PairList: 2 pairs, 1 genuine, 2 missing>
        """
        indices = self.rows(faces)
        left, right = indices[self.left], indices[self.right]
        present = (left >= 0) & (right >= 0)
        if not present.any():
            where, first = self.source or self.name, self.images[int(np.flatnonzero(indices < 0)[0])]
            raise InputError(f"{where}: no pair has both its images in the face list; {first!r} is missing")
        same = self.same[present]
        folds = assign_folds(same) if self.assigned_folds else self.fold_ids[present]
        return PairList(left[present], right[present], same, folds, int((~present).sum()))

    def _key(self, parts: Sequence[str]) -> tuple[str, ...]:
        *folders, file = parts[-self.path_parts :]
        return (*(identity_key(folder) for folder in folders), identity_key(PurePosixPath(file).stem))


def _number_of(path: PurePath) -> tuple[str, ...]:
    """Name and number of an image such as `Ann_0007.jpg`; without a name in it, that of its folder: `Ann/7.jpg`."""
    name, number = re.fullmatch(r"(.*?)(\d*)", path.stem, re.DOTALL).groups()  # type: ignore[union-attr]
    key = identity_key(name).strip("_") or identity_key(path.parent.name)
    return (key, number.lstrip("0")) if number else (key,)


def _numbered(paths: Sequence[Path]) -> dict[tuple[str, ...], int]:
    """Rows of images by their names and numbers, for lists in which files are named in another way; none twice."""
    rows: dict[tuple[str, ...], int] = {}
    for row, path in enumerate(paths):
        for key in {_number_of(path), (identity_key(path.parent.name), *_number_of(path)[1:])}:
            rows[key] = -1 if key in rows else row
    return rows


def assign_folds(same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Assign a fold to each pair: equal slices of the genuine and of the impostor pairs, so that each fold has both.

    At most ten folds are made. Lists that hold all pairs of one kind first thereby get the folds of their reference
    evaluations: with 3,000 pairs of each kind, fold k is pairs 300 k to 300 k + 299 of both.

    Examples:
        >>> assign_folds(np.array([True, True, False, False])).tolist()
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
    path_parts: int = 1,
) -> ImagePairs:
    """Build `ImagePairs` from `(left, right, same)` by image name; folds are assigned where none are given.

    Raises:
        InputError: There is no pair, or an image name is not a relative path inside the set.
    """
    if not pairs:
        raise InputError(f"{source}: the pairs file contains no pairs")
    numbers: dict[str, int] = {}
    for pair in pairs:
        for image in pair[:2]:
            if image not in numbers:
                if not is_inside(image):
                    hint = "; write slashes instead of backslashes" if "\\" in image else ""
                    raise InputError(f"{source}: an image must be a path inside the set, got {image[:80]!r}{hint}")
                numbers[image] = len(numbers)
    table = np.array([(numbers[left], numbers[right], same) for left, right, same in pairs], dtype=np.int64)
    same = table[:, 2] == 1
    identities = [identity(image) for image in numbers] if identity is not None else [None]
    years = np.array([ages(image) for image in numbers], dtype=np.float32) if ages is not None else None
    return ImagePairs(
        name=name,
        images=tuple(numbers),
        left=table[:, 0].copy(),
        right=table[:, 1].copy(),
        same=same,
        fold_ids=assign_folds(same) if folds is None else folds.astype(np.int64),
        identities=tuple(each for each in identities if each is not None) if None not in identities else None,
        ages=years if years is not None and np.isfinite(years).any() else None,
        source=str(source),
        sha256=sha256,
        path_parts=path_parts,
        assigned_folds=folds is None,
    )


def is_inside(image: str) -> bool:
    """Whether a name from a list is a relative path that stays inside the set's folder."""
    path = PurePosixPath(image)
    return (
        image.isprintable()
        and "\\" not in image
        and bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and ":" not in path.parts[0]
    )


def check_images(path: str | PathLike[str], images: Sequence[str]) -> None:
    """Check that a list holds images, distinct paths inside the set.

    Raises:
        InputError: It does not; the message gives the number of the image.
    """
    if not images:
        raise InputError(f"{path}: the list is empty")
    seen: set[str] = set()
    for row, image in enumerate(images, 1):
        if not is_inside(image):
            raise InputError(f"{path} image {row}: must be a path inside the set, got {image[:80]!r}")
        if image in seen:
            raise InputError(f"{path} image {row}: {image[:80]!r} occurs twice")
        seen.add(image)


def count_pairs(same: NDArray[np.bool_]) -> dict[str, int]:
    """Count the pairs of each kind, for `check_published`."""
    genuine = int(same.sum())
    return {"genuine pairs": genuine, "impostor pairs": len(same) - genuine}


def check_published(source: str | PathLike[str], what: str, counts: dict[str, int], published: Sequence[int]) -> None:
    """Compare the counts of a list with the published ones.

    Raises:
        InputError: A count differs; the message lists all of them.
    """
    if list(counts.values()) != list(published):
        expected = ", ".join(f"{count:,} {name}" for name, count in zip(counts, published, strict=True))
        got = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        raise InputError(
            f"{source}: the published {what} has {expected}, got {got}. "
            f"The file is truncated or another version; published=False reads a list of your own"
        )


def file_sha256(path: str | PathLike[str], what: str, expected: str | None = None, note: str = "") -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits.

    Raises:
        InputError: The file is missing, or its digest is not `expected`.
    """
    with opened(path, what) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected is not None and digest != expected.strip().lower():
        raise InputError(f"{path}: another version of the {what}: SHA-256 {digest}, expected {expected}{note}")
    return digest
