"""Lists of images with identities and ages, read from CSV files, folders, RecordIO files and tar shards."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError, counted, show_name
from kdlib_faces.data.identities import IdentityNumbers
from kdlib_faces.data.image_files import open_rgb
from kdlib_faces.data.sources.base import FileImages, ImageSource, JoinedImages
from kdlib_faces.data.sources.entries import EntryImages, read_entry

__all__ = ["FaceDataWarning", "FaceList", "OnError", "read_faces", "warn"]

OnError = Literal["stop", "skip", "keep"]
"""Treatment of images that cannot be read; see `read_faces`."""


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
        images: The `n` encoded images.
        identities: `(n,)` int64, an index into `identity_names`, -1 where unknown.
        identity_names: One name per identity, in the spelling that came first.
        ages: `(n,)` float32 years, NaN where unknown; None if no age is known.
        age_groups: `(n,)` int64, an index into `group_names`, -1 where unknown; None if no group is known.
        group_names: Names of the age groups, sorted.
        sources: The lists and folders that were read.
        notes: Identities that were merged, and files that were skipped.
    """

    images: ImageSource
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
        return len(self.images)

    def __repr__(self) -> str:
        unknown = int((self.identities < 0).sum())
        labels = f", {unknown} without identity" if unknown else ""
        known = "" if self.ages is None else f", {int(np.isfinite(self.ages).sum())} ages"
        groups = f", groups {', '.join(self.group_names)}" if self.group_names else ""
        return f"<FaceList: {len(self)} images, {self.num_identities} identities{labels}{known}{groups}>"

    @property
    def paths(self) -> tuple[Path, ...]:
        """Paths of the images: of files, of members below their shard, or names of records."""
        if isinstance(self.images, FileImages):
            return self.images.paths
        return tuple(Path(self.images.name(row)) for row in range(len(self)))

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
            images=self.images.subset(rows),
            identities=numbers.astype(np.int64),
            identity_names=tuple(self.identity_names[number] for number in kept),
            ages=None if self.ages is None else self.ages[rows],
            age_groups=None if self.age_groups is None else self.age_groups[rows],
            group_names=self.group_names,
            sources=self.sources,
            notes=self.notes,
        )


def read_faces(
    paths: Sequence[str | PathLike[str]] | str | PathLike[str],
    *,
    on_error: OnError = "stop",
    unlabeled: bool = False,
) -> FaceList:
    """Read lists of faces and join them.

    An entry is one of these:

    - A CSV file with a header `path,identity` and optionally `age` (years, 0 to 130), `age_group` (any name) or both. Other
      columns are ignored, empty age cells are unknown ages, and relative image paths start at the CSV's folder.
    - A folder with one subfolder per identity, with images at any depth.
    - A `.rec` file, as insightface writes it, with the `.idx` file beside it. Identities are its numbers.
    - Tar shards with members `key.jpg` and `key.cls` or `key.json`, as WebDataset names them: a `.tar` file, a folder of
      such files, or a pattern `train-{0000..0127}.tar`. `key.cls` holds the identity; `key.json` holds an object with
      `identity` and optionally `age` and `age_group`.

    Within one entry, identities are the same if their names are equal. An identity that occurs in two entries is merged:
    names are compared by `identity_key`, so `Halle_Berry` and `halle_berry` are the same. Names that only number the
    identities of a list (`7`, `n000007`, `person_7`) are never merged with those of another list, unless the entry joins
    both by a plus sign: `"a.csv+b.csv"` reads two lists as one. What was merged, kept apart or skipped is in the notes of
    the result, and each note is a `FaceDataWarning`.

    Args:
        paths: One or more entries.
        on_error: `"stop"` decodes no image, and a missing image file is an error. `"skip"` decodes every image once, and
            leaves out those that are missing or cannot be read, with a warning. `"keep"` decodes no image and keeps the rows
            of missing ones, for readers that skip them later.
        unlabeled: Accept images without identity: CSV rows whose identity is empty, CSV files without the column, images
            that lie directly in a folder, and members of shards without a label. Otherwise these are errors, except the
            images in a folder, which are skipped with a note.

    Returns:
        FaceList with every image of every entry, in their order.

    Raises:
        InputError: A list, column or image is missing; an age is not a number or out of range; an image is listed twice;
            there are fewer than two identities; a file is damaged or of another kind; or none of the files of an identity is
            an image that can be read. The message names file, line and value.

    Examples:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a.jpg", "b.jpg"):
        ...     _ = (folder / name).write_bytes(b"")
        >>> _ = (folder / "faces.csv").write_text("path,identity,age\\na.jpg,Ann,7\\nb.jpg,Bob,\\n")
        >>> read_faces([folder / "faces.csv"])
        <FaceList: 2 images, 2 identities, 1 ages>
    """
    check_choice("read_faces", "on_error", on_error, ("stop", "skip", "keep"))
    entries = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    if not entries:
        raise InputError("read_faces: at least one face list is needed, got none")
    seen: dict[str, str] = {}
    numbers = IdentityNumbers()
    parts: list[EntryImages] = []
    notes: list[str] = []
    for entry in map(str, entries):
        numbers.start_list()
        for path in [entry] if os.path.exists(entry) else entry.split("+"):
            part = read_entry(path, seen, notes, unlabeled=unlabeled)
            codes = [numbers.add(name, part.where[at] if part.where else path) for at, name in enumerate(part.names)]
            known = part.identities
            if codes != list(range(len(codes))):
                known = np.append(np.asarray(codes, dtype=np.int64), -1)[known]
            parts.append(replace(part, identities=known))
    sources = tuple(str(entry) for entry in entries)
    faces = _joined(parts, tuple(numbers.names), sources)
    if on_error == "stop":
        _check_files(parts, sources)
    elif on_error == "skip":
        faces = faces.subset(_readable(faces, sources, notes))
    if faces.num_identities < 2 and not unlabeled:
        raise InputError(
            f"{', '.join(sources)}: at least two identities are needed, got one ({faces.identity_names[0]!r})"
        )
    notes += numbers.notes()
    for note in notes:
        warn(note)
    return replace(faces, notes=tuple(notes))


def _joined(parts: Sequence[EntryImages], names: tuple[str, ...], sources: tuple[str, ...]) -> FaceList:
    ages = None
    if any(part.ages is not None and np.isfinite(part.ages).any() for part in parts):
        ages = np.concatenate([np.full(len(p.images), np.nan, np.float32) if p.ages is None else p.ages for p in parts])
    known = [sorted(set(part.groups or ()) - {""}) for part in parts]
    group_names = tuple(sorted({name for each in known for name in each}))
    codes = {name: code for code, name in enumerate(group_names)} | {"": -1}
    groups = None
    if group_names:
        columns = [
            [-1] * len(part.images) if part.groups is None else [codes[name] for name in part.groups] for part in parts
        ]
        groups = np.asarray([code for column in columns for code in column], dtype=np.int64)
    return FaceList(
        images=parts[0].images if len(parts) == 1 else _join([part.images for part in parts]),
        identities=np.concatenate([part.identities for part in parts]) if len(parts) > 1 else parts[0].identities,
        identity_names=names,
        ages=ages,
        age_groups=groups,
        group_names=group_names,
        sources=sources,
    )


def _join(images: Sequence[ImageSource]) -> ImageSource:
    files = [each for each in images if isinstance(each, FileImages)]
    if len(files) == len(images):
        return FileImages([path for each in files for path in each.paths])
    return JoinedImages(images)


def _readable(faces: FaceList, sources: Sequence[str], notes: list[str]) -> NDArray[np.int64]:
    """Rows of the images that can be read; the others are noted."""

    def error_of(row: int) -> str:
        try:
            open_rgb(faces.images[row], faces.images.name(row))
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(error_of, range(len(faces))))
    kept = np.asarray([row for row, error in enumerate(errors) if not error], dtype=np.int64)
    broken = [error for error in errors if error]
    where = ", ".join(sources)
    if not len(kept):
        raise InputError(f"{where}: none of the {len(faces):,} images can be read, such as {broken[0]}")
    if broken:
        lost = len(set(faces.identities.tolist()) - {-1}) - len(set(faces.identities[kept].tolist()) - {-1})
        notes.append(
            f"{where}: skipped {len(broken):,} of {len(faces):,} images, which cannot be read, and with them all images of "
            f"{counted(lost, 'identity', 'identities')}: {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}"
        )
    return kept


def _check_files(parts: Sequence[EntryImages], sources: Sequence[str]) -> None:
    files = [path for part in parts if isinstance(part.images, FileImages) for path in part.images.paths]
    missing = [file for file in files if not os.path.isfile(file)]  # `Path.is_file` raises for a long name
    if missing:
        shown = ", ".join(show_name(file, 400) for file in missing[:100])
        more = f" and {len(missing) - 100:,} more" if len(missing) > 100 else ""
        raise InputError(f"{', '.join(sources)}: {counted(len(missing), 'image file')} not found: {shown}{more}")
