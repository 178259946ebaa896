"""Images and labels of one entry of face data: a CSV list, a folder, a RecordIO file or tar shards."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.record_reader import RecordReader
from kdlib_faces.data.sources.base import FileImages, ImageSource
from kdlib_faces.data.sources.files import FileRow, csv_rows, folder_rows
from kdlib_faces.data.sources.records import RecordImages
from kdlib_faces.data.sources.shards import ShardImages, find_shards, scan_shard

__all__ = ["EntryImages", "read_entry"]


@dataclass(frozen=True, eq=False)
class EntryImages:
    """The images of an entry, with its own numbers of identities; -1 where unknown.

    Attributes:
        images: The `n` encoded images.
        identities: `(n,)` int64, an index into `names`.
        names: Names of the identities, in the order in which they occur.
        ages: `(n,)` float32 years, NaN where unknown; None if the entry has none.
        groups: `n` names of age groups, empty where unknown; None if the entry has none.
        where: Where each name occurs first, for messages; empty for the entry itself.
    """

    images: ImageSource
    identities: NDArray[np.int64]
    names: Sequence[str]
    ages: NDArray[np.float32] | None = None
    groups: Sequence[str] | None = None
    where: Sequence[str] = ()


def read_entry(path: str, seen: dict[str, str], notes: list[str], *, unlabeled: bool) -> EntryImages:
    """Read an entry; see `kdlib_faces.data.lists.read_faces`.

    Args:
        path: The entry.
        seen: Files of earlier entries, to refuse those that are listed twice; those of this entry are added.
        notes: Files that are skipped are added.
        unlabeled: Accept images without identity.
    """
    if shards := find_shards(path):
        entry = _shards(path, shards, seen)
    elif path.endswith(".rec"):
        _add_once(path, path, seen)
        reader = RecordReader(path)
        identities, labels = reader.identities()
        return EntryImages(RecordImages(reader), identities, [str(label) for label in labels.tolist()])
    elif os.path.isdir(path):
        entry = _files(list(folder_rows(Path(path), notes, unlabeled=unlabeled)), seen)
    else:
        entry = _files(list(csv_rows(Path(path), unlabeled=unlabeled)), seen)
    if not unlabeled and (entry.identities < 0).any():
        row = int((entry.identities < 0).argmax())
        raise InputError(
            f"{entry.images.name(row)}: has no identity; add a member key.cls, or key.json with 'identity'"
        )
    return entry


def _add_once(path: str | PathLike[str], where: str, seen: dict[str, str]) -> None:
    """Add a file to `seen`; a file that was added before is an error."""
    key = os.path.abspath(path)
    if key in seen:
        raise InputError(f"{where}: the image {str(path)!r} is listed already ({seen[key]})")
    seen[key] = where


def _number(labels: Sequence[str], numbers: dict[str, int]) -> NDArray[np.int64]:
    """Numbers of names in the order in which they occur, -1 for an empty one; new names are added to `numbers`."""
    return np.asarray([numbers.setdefault(label, len(numbers)) if label else -1 for label in labels], dtype=np.int64)


def _files(rows: Sequence[FileRow], seen: dict[str, str]) -> EntryImages:
    numbers: dict[str, int] = {}
    for row in rows:
        _add_once(row.file, row.where, seen)
    identities = _number([row.identity for row in rows], numbers)
    _, first = np.unique(identities[identities >= 0], return_index=True)
    known = [row for row in rows if row.identity]
    where = [known[at].where for at in first.tolist()]
    ages = np.asarray([row.age for row in rows], dtype=np.float32)
    images = FileImages([row.file for row in rows])
    return EntryImages(images, identities, list(numbers), ages, [row.group for row in rows], where)


def _shards(entry: str, shards: Sequence[Path], seen: dict[str, str]) -> EntryImages:
    numbers: dict[str, int] = {}
    names: dict[str, str] = {}  # one object per name of a group
    spans, ages, identities, groups = [], [], [], list[str]()
    for shard in shards:
        _add_once(shard, entry, seen)
        rows = list(scan_shard(shard))
        spans.append(np.asarray([(row.header, row.start, row.size) for row in rows], dtype=np.int64).reshape(-1, 3))
        ages.append(np.asarray([row.age for row in rows], dtype=np.float32))
        identities.append(_number([row.identity for row in rows], numbers))
        groups += [names.setdefault(row.group, row.group) for row in rows]
    if not groups:
        raise InputError(f"{entry}: the shards hold no image; members must be named key.jpg and key.cls or key.json")
    owners = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part) for part in spans])
    images = ShardImages(shards, owners, np.concatenate(spans))
    return EntryImages(images, np.concatenate(identities), list(numbers), np.concatenate(ages), groups)
