"""Lists of images with identities and ages, read from CSV files and folders."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_table
from kdlib_faces.data.identities import IdentityNumbers
from kdlib_faces.data.image_files import open_rgb, scan_folder

__all__ = ["FaceDataWarning", "FaceList", "parse_age", "read_faces", "warn"]

MAX_AGE = 130.0
MAX_PARTS = 5
"""So few folders may be parts of a set, such as training and test images, and not identities."""


class FaceDataWarning(UserWarning):
    """Face data that were read otherwise than may be expected, such as merged identities or skipped files."""


def warn(note: str) -> None:
    """Issue a `FaceDataWarning`, if there is a note."""
    if note:
        warnings.warn(note, FaceDataWarning, stacklevel=3)


@dataclass(frozen=True, eq=False)
class FaceList:
    """Images with their identities and ages, one row per image.

    Attributes:
        paths: `n` image files.
        identities: `(n,)` int64, an index into `identity_names`, -1 where unknown.
        identity_names: One name per identity, in the spelling that came first.
        ages: `(n,)` float32 years, NaN where unknown; None if no age is known.
        age_groups: `(n,)` int64, an index into `group_names`, -1 where unknown; None if no group is known.
        group_names: Names of the age groups, sorted.
        sources: The lists and folders that were read.
        notes: Identities that were merged, and files that were skipped.
    """

    paths: tuple[Path, ...]
    identities: NDArray[np.int64]
    identity_names: tuple[str, ...]
    ages: NDArray[np.float32] | None = None
    age_groups: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        columns = {"identities": self.identities, "ages": self.ages, "age_groups": self.age_groups}
        for name, column in columns.items():
            if column is not None and column.shape != (len(self),):
                raise ValueError(f"FaceList: {name} must be (n,) = ({len(self)},), got {column.shape}")

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        unknown = int((self.identities < 0).sum())
        labels = f", {unknown} without identity" if unknown else ""
        known = "" if self.ages is None else f", {int(np.isfinite(self.ages).sum())} ages"
        groups = f", groups {', '.join(self.group_names)}" if self.group_names else ""
        return f"<FaceList: {len(self)} images, {self.num_identities} identities{labels}{known}{groups}>"

    @property
    def num_identities(self) -> int:
        """Number of identities."""
        return len(self.identity_names)

    @property
    def all_labeled(self) -> bool:
        """Whether the identity of every image is known."""
        return bool((self.identities >= 0).all())

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
        kept = np.unique(self.identities[rows])
        kept = kept[kept >= 0]
        numbers = np.where(self.identities[rows] < 0, -1, np.searchsorted(kept, self.identities[rows]))
        return FaceList(
            paths=tuple(self.paths[row] for row in rows),
            identities=numbers.astype(np.int64),
            identity_names=tuple(self.identity_names[number] for number in kept),
            ages=None if self.ages is None else self.ages[rows],
            age_groups=None if self.age_groups is None else self.age_groups[rows],
            group_names=self.group_names,
            sources=self.sources,
            notes=self.notes,
        )


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


_Image = tuple[Path, int, float, str]


def read_faces(
    paths: Sequence[str | PathLike[str]] | str | PathLike[str],
    *,
    on_error: Literal["stop", "skip"] = "stop",
    unlabeled: bool = False,
) -> FaceList:
    """Read lists of faces and merge them.

    An entry is a CSV file or a folder. A CSV file has a header `path,identity` and optionally `age` (years, 0 to 130),
    `age_group` (any name) or both. Other columns are ignored, empty age cells are unknown ages, and relative image paths
    start at the CSV's folder. A folder has one subfolder per identity, with images at any depth.

    Within one list, identities are the same if their names are equal. An identity that occurs in two lists is merged:
    names are compared by `identity_key`, so `Halle_Berry` and `halle_berry` are the same. Names that only number the
    identities of a list (`7`, `n000007`, `person_7`) are never merged with those of another list, unless the entry joins
    both by a plus sign: `"a.csv+b.csv"` reads two lists as one. What was merged, kept apart or skipped is in the notes of
    the result, and each note is a `FaceDataWarning`.

    Args:
        paths: One or more CSV files and folders.
        on_error: `"skip"` decodes every image once, and leaves out those that are missing or cannot be read, with a warning;
            `"stop"` decodes none, and a missing image is an error.
        unlabeled: Accept images without identity: CSV rows whose identity is empty, CSV files without the column, and images
            that lie directly in a folder. Otherwise the first two are errors, and the last are skipped with a note.

    Returns:
        FaceList with every image of every list, in their order.

    Raises:
        InputError: A list, column or image is missing; an age is not a number or out of range; an image is listed twice;
            there are fewer than two identities; a file is not a CSV file; or none of the files of an identity is an image
            that can be read. The message names file, line and value.

    Examples:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a.jpg", "b.jpg"):
        ...     _ = (folder / name).write_bytes(b"")
        >>> _ = (folder / "faces.csv").write_text("path,identity,age\\na.jpg,Ann,7\\nb.jpg,Bob,\\n")
        >>> read_faces([folder / "faces.csv"])
        <FaceList: 2 images, 2 identities, 1 ages>
    """
    check_choice("read_faces", "on_error", on_error, ("stop", "skip"))
    entries = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    if not entries:
        raise InputError("read_faces: at least one face list is needed, got none")
    seen: dict[str, str] = {}
    numbers = IdentityNumbers()
    rows: list[_Image] = []
    notes: list[str] = []
    for entry in map(str, entries):
        numbers.start_list()
        parts = [entry] if os.path.exists(entry) else entry.split("+")
        for part in map(Path, parts):
            found = _folder_rows(part, notes, unlabeled) if part.is_dir() else _csv_rows(part, unlabeled)
            for where, file, identity, age, group in found:
                key = os.path.abspath(file)
                if key in seen:
                    raise InputError(f"{where}: the image {str(file)!r} is listed already ({seen[key]})")
                seen[key] = where
                rows.append((file, numbers.add(identity, where) if identity else -1, age, group))
    sources = tuple(str(entry) for entry in entries)
    if on_error == "skip":
        rows = _readable(rows, sources, notes)
    files, identities, ages, groups = zip(*rows, strict=True)
    _check_files(files, sources)
    if len(set(identities)) < 2 and not unlabeled:
        name = numbers.names[identities[0]]
        raise InputError(f"{', '.join(sources)}: at least two identities are needed, got one ({name!r})")
    group_names = tuple(sorted({group for group in groups if group}))
    codes = {name: code for code, name in enumerate(group_names)} | {"": -1}
    years = np.asarray(ages, dtype=np.float32)
    notes += numbers.notes()
    for note in notes:
        warn(note)
    faces = FaceList(
        paths=files,
        identities=np.asarray(identities, dtype=np.int64),
        identity_names=tuple(numbers.names),
        ages=years if np.isfinite(years).any() else None,
        age_groups=np.asarray([codes[group] for group in groups], dtype=np.int64) if group_names else None,
        group_names=group_names,
        sources=sources,
        notes=tuple(notes),
    )
    return faces if on_error == "stop" else faces.subset(np.arange(len(faces)))


_Row = tuple[str, Path, str, float, str]


def _csv_rows(path: Path, unlabeled: bool) -> Iterator[_Row]:
    known = ("path", "identity", "age", "age_group")
    needed = ("path",) if unlabeled else ("path", "identity")
    _, rows = read_table(path, what="face list", known=known, needed=needed)
    for where, cells in rows:
        age = parse_age(cells["age"], where) if cells.get("age") else math.nan
        file = path.parent / cells["path"]
        if "\\" in cells["path"] and not file.exists():
            raise InputError(f"{where}: the path has backslashes; write slashes, got {cells['path'][:80]!r}")
        yield where, file, cells.get("identity", ""), age, cells.get("age_group", "").casefold()


def _folder_rows(folder: Path, notes: list[str], unlabeled: bool) -> Iterator[_Row]:
    images, others = scan_folder(folder)
    found: dict[str, list[Path]] = {}
    for file in images:
        found.setdefault(file.relative_to(folder).parts[0], []).append(file)
    loose = sorted(files[0] for name, files in found.items() if files[0] == folder / name)
    found = {name: files for name, files in found.items() if files[0] != folder / name}
    lost = sorted({file.relative_to(folder).parts[0] for file in others if file.parent != folder} - set(found))
    if lost:
        files = [file for file in others if lost[0] in file.relative_to(folder).parts[:1]]
        raise InputError(
            f"{folder}: no file of the identity {lost[0]!r} is an image that can be read ({_suffixes(files)})"
            f"{f', nor of {len(lost) - 1} more' if len(lost) > 1 else ''}; convert the files, or remove the folder"
        )
    if not found and not (unlabeled and loose):
        raise InputError(f"{folder}: no images found; a folder of faces needs one subfolder of images per identity")
    _check_depth(folder, found, notes)
    folders = {each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")}
    if empty := sorted(folders - set(found)):
        notes.append(f"{folder}: {len(empty):,} folders are empty, such as {empty[0]!r}")
    if others:
        notes.append(f"{folder}: {len(others):,} files are no images and were skipped ({_suffixes(others)})")
    if loose and not unlabeled:
        notes.append(f"{folder}: {len(loose):,} images belong to no identity and were skipped, such as {loose[0].name}")
    for name, files in sorted(found.items()):
        for file in sorted(files):
            yield str(folder), file, name, math.nan, ""
    for file in loose if unlabeled else ():
        yield str(folder), file, "", math.nan, ""


def _suffixes(files: Sequence[Path]) -> str:
    counts = Counter(file.suffix.lower() or "no suffix" for file in files)
    return f"{', '.join(f'{name} {count:,}' for name, count in counts.most_common(5))}, such as {files[0]}"


def _check_depth(folder: Path, found: dict[str, list[Path]], notes: list[str]) -> None:
    """A folder whose subfolders only hold folders of distinct names may hold the identities one level below."""
    inner = {name: {file.relative_to(folder / name).parts[0] for file in files} for name, files in found.items()}
    direct = any(file.parent == folder / name for name, files in found.items() for file in files)
    names = [each for below in inner.values() for each in below]
    if not direct and len(set(names)) == len(names) and any(len(below) > 1 for below in inner.values()):
        outer = next(name for name, below in inner.items() if len(below) > 1)
        both = f"{folder}: images lie two folders deep, such as in {Path(outer, min(inner[outer]))}"
        if len(found) <= MAX_PARTS:
            raise InputError(
                f"{both}: is the identity the outer folder or the inner one? Pass {folder / outer}, or a CSV list"
            )
        notes.append(f"{both}; the identities are the outer folders")


def _readable(rows: Sequence[_Image], sources: Sequence[str], notes: list[str]) -> list[_Image]:
    """The rows whose images can be read; the others are noted."""

    def error_of(row: _Image) -> str:
        try:
            open_rgb(row[0], str(row[0]))
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(error_of, rows))
    kept = [row for row, error in zip(rows, errors, strict=True) if not error]
    broken = [error for error in errors if error]
    where = ", ".join(sources)
    if not kept:
        raise InputError(f"{where}: none of the {len(rows):,} images can be read, such as {broken[0]}")
    if broken:
        lost = len({row[1] for row in rows} - {-1}) - len({row[1] for row in kept} - {-1})
        notes.append(
            f"{where}: {len(broken):,} of {len(rows):,} images cannot be read and were skipped, and {lost:,} identities with "
            f"them: {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}"
        )
    return kept


def _check_files(files: Sequence[Path], sources: Sequence[str]) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        shown = ", ".join(str(file) for file in missing[:100])
        more = f" and {len(missing) - 100:,} more" if len(missing) > 100 else ""
        plural = "file" if len(missing) == 1 else "files"
        raise InputError(f"{', '.join(sources)}: {len(missing)} image {plural} not found: {shown}{more}")
