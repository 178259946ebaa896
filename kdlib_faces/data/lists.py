"""Lists of images with identities and ages, read from CSV files and folders."""

import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_table

__all__ = ["FaceList", "IdentityNumbers", "identity_key", "parse_age", "read_faces"]

MAX_AGE = 130.0
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True, eq=False)
class FaceList:
    """Images with their identities and ages, one row per image.

    Attributes:
        paths: `n` image files.
        identities: `(n,)` int64, an index into `identity_names`.
        identity_names: One name per identity, in the spelling that came first.
        ages: `(n,)` float32 years, NaN where unknown; None if no age is known.
        age_groups: `(n,)` int64, an index into `group_names`, -1 where unknown; None if no group is known.
        group_names: Names of the age groups, sorted.
        sources: The lists and folders that were read.
    """

    paths: tuple[Path, ...]
    identities: NDArray[np.int64]
    identity_names: tuple[str, ...]
    ages: NDArray[np.float32] | None = None
    age_groups: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = {"identities": self.identities, "ages": self.ages, "age_groups": self.age_groups}
        for name, column in columns.items():
            if column is not None and column.shape != (len(self),):
                raise ValueError(f"FaceList: {name} must be (n,) = ({len(self)},), got {column.shape}")

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        known = "" if self.ages is None else f", {int(np.isfinite(self.ages).sum())} ages"
        groups = f", groups {', '.join(self.group_names)}" if self.group_names else ""
        return f"<FaceList: {len(self)} images, {self.num_identities} identities{known}{groups}>"

    @property
    def num_identities(self) -> int:
        """Number of identities."""
        return len(self.identity_names)

    def subset(self, indices: ArrayLike) -> "FaceList":
        """Return the rows `indices` ((m,) whole numbers, or an (n,) bool mask), in that order.

        Identities are renumbered from 0 without gaps, in the order of their old numbers, so that a head of
        `num_identities` classes fits. Age groups keep their numbers, so that subsets of one list stay comparable.
        """
        rows = np.asarray(indices)
        if rows.dtype == bool and rows.shape == (len(self),):
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or rows.dtype == bool or (rows.size and (rows.min() < 0 or rows.max() >= len(self))):
            raise ValueError(
                f"FaceList.subset: indices must be (m,) numbers from 0 to {len(self) - 1}, or an (n,) = ({len(self)},) "
                f"mask, got {rows.shape} {rows.dtype}"
            )
        rows = rows.astype(np.int64)
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


def identity_key(name: str) -> str:
    """Normalize a name for comparison: casefolded, each run of characters other than letters and digits as one `_`.

    Examples:
        >>> identity_key("Halle_Berry") == identity_key("halle berry") == "halle_berry"
        True
    """
    folded = unicodedata.normalize("NFKC", name.strip()).casefold()
    return re.sub(r"[\W_]+", "_", folded)


class IdentityNumbers:
    """Numbers identities from 0 in the order in which their names occur; names are compared by `identity_key`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(self, name: str, where: str) -> int:
        """Return the number of an identity.

        Raises:
            InputError: The name contains no letter and no digit; the message starts with `where`.
        """
        key = identity_key(name)
        if not key.strip("_"):
            raise InputError(f"{where}: identity must contain a letter or a digit, got {name!r}")
        if key not in self._numbers:
            self._numbers[key] = len(self.names)
            self.names.append(name)
        return self._numbers[key]


def parse_age(text: str, where: str) -> float:
    """Parse an age in years.

    Raises:
        InputError: It is not a number from 0 to 130; the message starts with `where`.
    """
    try:
        age = float(text)
    except ValueError:
        age = math.nan
    if not 0 <= age <= MAX_AGE:
        raise InputError(f"{where}: age must be a number from 0 to {MAX_AGE:.0f} (years), got {text!r}")
    return age


def read_faces(paths: Sequence[str | PathLike[str]] | str | PathLike[str]) -> FaceList:
    """Read lists of faces and merge them.

    An entry is a CSV file or a folder. A CSV file has a header `path,identity` and optionally `age` (years, 0 to 130),
    `age_group` (any name) or both. Other columns are ignored, empty age cells are unknown ages, and relative image paths
    start at the CSV's folder. A folder has one subfolder per identity. An identity that occurs in two lists is merged:
    names are compared by `identity_key`, so `Halle_Berry` and `halle_berry` are the same. Lists that only number their
    identities need distinct names (`a_001`, `b_001`), or they are merged too.

    Args:
        paths: One or more CSV files and folders.

    Returns:
        FaceList with every image of every list, in their order.

    Raises:
        InputError: A list, column or image is missing; an age is not a number or out of range; an image is listed twice;
            there are fewer than two identities; or a file is not a CSV file. The message names file, line and value.

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
    numbers = IdentityNumbers()
    rows: list[tuple[Path, int, float, str]] = []
    for entry in map(Path, entries):
        for where, file, identity, age, group in _folder_rows(entry) if entry.is_dir() else _csv_rows(entry):
            key = os.path.abspath(file)
            if key in seen:
                raise InputError(f"{where}: the image {str(file)!r} is listed already ({seen[key]})")
            seen[key] = where
            rows.append((file, numbers.add(identity, where), age, group))
    files, identities, ages, groups = zip(*rows, strict=True)
    sources = tuple(str(entry) for entry in entries)
    _check_files(files, sources)
    if len(numbers.names) < 2:
        raise InputError(f"{', '.join(sources)}: at least two identities are needed, got one ({numbers.names[0]!r})")
    group_names = tuple(sorted({group for group in groups if group}))
    codes = {name: code for code, name in enumerate(group_names)} | {"": -1}
    years = np.asarray(ages, dtype=np.float32)
    return FaceList(
        paths=files,
        identities=np.asarray(identities, dtype=np.int64),
        identity_names=tuple(numbers.names),
        ages=years if np.isfinite(years).any() else None,
        age_groups=np.asarray([codes[group] for group in groups], dtype=np.int64) if group_names else None,
        group_names=group_names,
        sources=sources,
    )


_Row = tuple[str, Path, str, float, str]


def _csv_rows(path: Path) -> Iterator[_Row]:
    known = ("path", "identity", "age", "age_group")
    _, rows = read_table(path, what="face list", known=known, needed=("path", "identity"))
    for where, cells in rows:
        age = parse_age(cells["age"], where) if cells.get("age") else math.nan
        yield where, path.parent / cells["path"], cells["identity"], age, cells.get("age_group", "").casefold()


def _folder_rows(folder: Path) -> Iterator[_Row]:
    empty = True
    for inner in sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")):
        for file in sorted(inner.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                yield str(folder), file, inner.name, math.nan, ""
                empty = False
    if empty:
        raise InputError(f"{folder}: no images found; a folder of faces needs one subfolder of images per identity")


def _check_files(files: Sequence[Path], sources: Sequence[str]) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        shown = ", ".join(str(file) for file in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        plural = "file" if len(missing) == 1 else "files"
        raise InputError(f"{', '.join(sources)}: {len(missing)} image {plural} not found: {shown}{more}")
