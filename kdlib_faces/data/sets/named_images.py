"""Data room: folders of images whose names tell who is on them and how old they are. Touches the file system; decodes no image."""

import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import IMAGE_SUFFIXES, FaceList

__all__ = ["list_images"]

MAX_IMAGES = 20_000_000


def list_images(folder: str | PathLike[str], tells: Callable[[Path], tuple[str, float] | None], form: str) -> FaceList:
    """Every image below `folder` whose name tells a person and an age; others are left out. Sorted by path.

    Args:
        folder: the folder.
        tells: person and age in years of a file, or None.
        form: what names look like, for messages.

    Raises:
        InputError: no such folder, no such image, or fewer than two people.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"folder of images not found: {root}")
    files: list[Path] = []
    people: list[str] = []
    ages: list[float] = []
    for parent, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            if (found := tells(file)) is not None:
                files.append(file)
                people.append(found[0])
                ages.append(found[1])
        if len(files) > MAX_IMAGES:
            raise InputError(f"{root}: more than {MAX_IMAGES:,} images")
    if not files:
        raise InputError(f"{root}: no image is called {form}")
    names_of = sorted(set(people))
    if len(names_of) < 2:
        raise InputError(f"{root}: at least two people are needed, got one ({names_of[0]!r})")
    numbers = {name: number for number, name in enumerate(names_of)}
    return FaceList(
        tuple(files),
        np.array([numbers[person] for person in people], dtype=np.int64),
        tuple(names_of),
        ages=np.array(ages, dtype=np.float32),
        sources=(str(root),),
    )
