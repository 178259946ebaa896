"""Rows of face lists: CSV files, and folders with one subfolder per identity."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import read_table
from kdlib_faces.data.image_files import describe_skipped, describe_suffixes, scan_folder

__all__ = ["FileRow", "csv_rows", "folder_rows", "parse_age"]

MAX_AGE = 130.0
MAX_PARTS = 5
"""So few folders may be parts of a set, such as training and test images, and not identities."""


class FileRow(NamedTuple):
    """An image file and its labels; identity and group are empty where unknown, the age is NaN."""

    where: str
    file: Path
    identity: str
    age: float
    group: str


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


def csv_rows(path: Path, *, unlabeled: bool) -> Iterator[FileRow]:
    """Read a CSV list; see `kdlib_faces.data.lists.read_faces`."""
    known = ("path", "identity", "age", "age_group")
    needed = ("path",) if unlabeled else ("path", "identity")
    _, rows = read_table(path, what="face list", known=known, needed=needed)
    for where, cells in rows:
        age = parse_age(cells["age"], where) if cells.get("age") else math.nan
        file = path.parent / cells["path"]
        if "\\" in cells["path"] and not os.path.exists(file):
            raise InputError(f"{where}: the path has backslashes; write slashes, got {cells['path'][:80]!r}")
        yield FileRow(where, file, cells.get("identity", ""), age, cells.get("age_group", "").casefold())


def folder_rows(folder: Path, notes: list[str], *, unlabeled: bool) -> Iterator[FileRow]:
    """List the images below a folder; files that are skipped are added to `notes`."""
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
            f"{folder}: no file of the identity {lost[0]!r} is an image that can be read ({describe_suffixes(files)})"
            f"{f', nor of {len(lost) - 1} more' if len(lost) > 1 else ''}; convert the files, or remove the folder"
        )
    if not found and not (unlabeled and loose):
        raise InputError(f"{folder}: no images found; a folder of faces needs one subfolder of images per identity")
    _check_depth(folder, found, notes)
    folders = {each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")}
    if empty := sorted(folders - set(found)):
        notes.append(f"{folder}: empty folders: {len(empty):,}, such as {empty[0]!r}")
    if others:
        notes.append(describe_skipped(folder, others))
    if loose and not unlabeled:
        notes.append(f"{folder}: skipped images that belong to no identity: {len(loose):,}, such as {loose[0].name}")
    for name, files in sorted(found.items()):
        for file in sorted(files):
            yield FileRow(str(folder), file, name, math.nan, "")
    for file in loose if unlabeled else ():
        yield FileRow(str(folder), file, "", math.nan, "")


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
