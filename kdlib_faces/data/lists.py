"""Data room: lists of images with identities and ages. Touches the file system and NumPy; decodes no image."""

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_table

__all__ = ["FaceList", "identity_key", "read_faces"]

MAX_AGE = 130.0
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True, eq=False)
class FaceList:
    """Images, who is on them, and how old they are; one row an image.

    Attributes:
        paths: `n` image files.
        identities: `(n,)` int64, an index into `identity_names`.
        identity_names: one name an identity, in the spelling that came first.
        ages: `(n,)` float32 years, NaN where unknown; None when no age is known at all.
        age_groups: `(n,)` int64, an index into `group_names`, -1 where unknown; None when no group is known at all.
        group_names: names of the age groups, sorted.
        sources: the lists and folders that were read.
    """

    paths: tuple[Path, ...]
    identities: NDArray[np.int64]
    identity_names: tuple[str, ...]
    ages: NDArray[np.float32] | None = None
    age_groups: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.paths)
        for name in ("identities", "ages", "age_groups"):
            column = getattr(self, name)
            if column is not None and column.shape != (count,):
                raise ValueError(f"FaceList: {name} must be (n,) = ({count},), got {column.shape}")

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        known = "" if self.ages is None else f", {int(np.isfinite(self.ages).sum())} ages"
        groups = f", groups {', '.join(self.group_names)}" if self.group_names else ""
        return f"<FaceList: {len(self)} images, {self.num_identities} identities{known}{groups}>"

    @property
    def num_identities(self) -> int:
        """How many identities there are."""
        return len(self.identity_names)

    def subset(self, indices: ArrayLike) -> "FaceList":
        """The rows `indices` ((m,) whole numbers, or an (n,) bool mask), in that order.

        Identities are numbered anew from 0 without gaps, in the order of their old numbers, so that a head of
        `num_identities` classes fits; age groups keep their numbers, so that subsets of one list can be compared.
        """
        rows = np.asarray(indices)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise ValueError(f"FaceList.subset: a mask must be (n,) = ({len(self)},), got {rows.shape}")
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64) if rows.size else np.zeros(0, np.int64)
        if rows.ndim != 1 or (rows.size and (rows.min() < 0 or rows.max() >= len(self))):
            raise ValueError(f"FaceList.subset: indices must be (m,) numbers from 0 to {len(self) - 1}")
        kept, numbers = np.unique(self.identities[rows], return_inverse=True)
        return FaceList(
            paths=tuple(self.paths[row] for row in rows),
            identities=numbers.astype(np.int64).reshape(-1),
            identity_names=tuple(self.identity_names[number] for number in kept),
            ages=None if self.ages is None else self.ages[rows],
            age_groups=None if self.age_groups is None else self.age_groups[rows],
            group_names=self.group_names,
            sources=self.sources,
        )

    def filter(self, *, min_images: int = 1, max_identities: int | None = None, age_known: bool = False) -> "FaceList":
        """Keep the identities with at least `min_images` images, at most `max_identities` of them (the first ones).

        With `age_known`, images without an age and without an age group are dropped first.
        """
        keep = np.ones(len(self), dtype=bool)
        if age_known:
            keep &= self.age_known
        counts = np.bincount(self.identities[keep], minlength=self.num_identities)
        chosen = counts >= max(min_images, 1)
        if max_identities is not None:
            chosen &= np.cumsum(chosen) <= max_identities
        return self.subset(keep & chosen[self.identities])

    @property
    def age_known(self) -> NDArray[np.bool_]:
        """`(n,)` bool: images that have an age or an age group."""
        known = np.zeros(len(self), dtype=bool)
        if self.ages is not None:
            known |= np.isfinite(self.ages)
        if self.age_groups is not None:
            known |= self.age_groups >= 0
        return known


def identity_key(name: str) -> str:
    """The form in which two names are compared: casefolded, each run of other than letters and digits as one `_`.

    Examples:
        >>> identity_key("Halle_Berry") == identity_key("halle berry") == "halle_berry"
        True
    """
    folded = unicodedata.normalize("NFKC", name.strip()).casefold()
    return re.sub(r"[\W_]+", "_", folded)


def read_faces(paths: Sequence[str | PathLike[str]] | str | PathLike[str]) -> FaceList:
    """Read lists of faces and merge them.

    An entry is a CSV file with a header `path,identity` and optionally `age` (years, 0 to 130), `age_group` (any
    name) or both; further columns are ignored, empty age cells are unknown ages, and relative image paths start at the
    CSV's folder. Or it is a folder with one subfolder an identity. The same person in two lists becomes one identity:
    names are compared by `identity_key`, so that `Halle_Berry` and `halle_berry` are one. Lists that merely number
    their identities must be told apart by the caller (`a_001`, `b_001`), or they merge too.

    Args:
        paths: one or more CSV files and folders.

    Returns:
        FaceList with every image of every list, in their order.

    Raises:
        InputError: a missing list, column or image, an age that is no number or out of range, an image named twice,
            fewer than two identities, or a file that is no CSV; the message names file, line and value.

    Examples:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a.jpg", "b.jpg"):
        ...     _ = (folder / name).write_bytes(b"")
        >>> _ = (folder / "faces.csv").write_text("path,identity,age\\na.jpg,Ann,7\\nb.jpg,Bob,\\n")
        >>> read_faces([folder / "faces.csv"])
        <FaceList: 2 images, 2 identities, 1 ages>
    """
    entries = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    if not entries:
        raise InputError("read_faces: at least one face list is needed, got none")
    seen: dict[str, str] = {}
    numbers: dict[str, int] = {}
    names: list[str] = []
    files: list[Path] = []
    identities: list[int] = []
    ages: list[float] = []
    groups: list[str] = []
    for entry in entries:
        rows = _folder_rows(Path(entry)) if Path(entry).is_dir() else _csv_rows(Path(entry))
        for where, file, identity, age, group in rows:
            key = os.path.abspath(file)
            if key in seen:
                raise InputError(f"{where}: the image {str(file)!r} is listed already ({seen[key]})")
            seen[key] = where
            person = identity_key(identity)
            if person.strip("_") == "":
                raise InputError(f"{where}: identity must hold a letter or a digit, got {identity!r}")
            if person not in numbers:
                numbers[person] = len(names)
                names.append(identity)
            files.append(file)
            identities.append(numbers[person])
            ages.append(age)
            groups.append(group)
    sources = tuple(str(entry) for entry in entries)
    _check_files(files, sources)
    if len(names) < 2:
        raise InputError(f"{', '.join(sources)}: at least two identities are needed, got one ({names[0]!r})")
    group_names = tuple(sorted({group for group in groups if group}))
    codes = {name: code for code, name in enumerate(group_names)} | {"": -1}
    years = np.asarray(ages, dtype=np.float32)
    return FaceList(
        paths=tuple(files),
        identities=np.asarray(identities, dtype=np.int64),
        identity_names=tuple(names),
        ages=years if np.isfinite(years).any() else None,
        age_groups=np.asarray([codes[group] for group in groups], dtype=np.int64) if group_names else None,
        group_names=group_names,
        sources=sources,
    )


Row = tuple[str, Path, str, float, str]


def _csv_rows(path: Path) -> Iterator[Row]:
    _, columns, rows = read_table(
        path, what="face list", known=("path", "identity", "age", "age_group"), needed=("path", "identity")
    )
    if not columns:
        raise InputError(f"{path}: the face list is empty; its first line must be path,identity[,age][,age_group]")
    empty = True
    for _, where, cell in rows:
        for name in ("path", "identity"):
            if not cell[name]:
                raise InputError(f"{where}: {name} is empty")
        yield where, path.parent / cell["path"], cell["identity"], _age(cell.get("age", ""), where), _group(cell)
        empty = False
    if empty:
        raise InputError(f"{path}: the face list has a header and no rows")


def _age(text: str, where: str) -> float:
    if not text:
        return math.nan
    try:
        age = float(text)
    except ValueError:
        age = math.nan
    if not 0 <= age <= MAX_AGE:
        raise InputError(f"{where}: age must be a number from 0 to {MAX_AGE:.0f} (years) or empty, got {text!r}")
    return age


def _group(cell: dict[str, str]) -> str:
    return cell.get("age_group", "").casefold()


def _folder_rows(folder: Path) -> Iterator[Row]:
    empty = True
    for person in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        for file in sorted(person.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                yield str(folder), file, person.name, math.nan, ""
                empty = False
    if empty:
        raise InputError(f"{folder}: no images found; a folder of faces holds one subfolder of images an identity")


def _check_files(files: Iterable[Path], sources: Sequence[str]) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        shown = ", ".join(str(file) for file in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        plural = "file" if len(missing) == 1 else "files"
        raise InputError(f"{', '.join(sources)}: {len(missing)} image {plural} not found: {shown}{more}")
