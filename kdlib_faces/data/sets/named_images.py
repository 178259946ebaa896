"""Folders of images whose file names encode identity and age."""

import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import IMAGE_SUFFIXES, FaceList

__all__ = ["list_images"]

MAX_IMAGES = 20_000_000


def list_images(
    folder: str | PathLike[str], parse: Callable[[str], tuple[str, float] | None], example: str
) -> FaceList:
    """List the images below `folder`, sorted by path, whose names `parse` maps to identity and age; others are skipped.

    Raises:
        InputError: The folder does not exist, holds no such image, or fewer than two identities.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"folder of images not found: {root}")
    files: list[Path] = []
    parsed: list[tuple[str, float]] = []
    for parent, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            if (values := parse(name)) is not None:
                files.append(file)
                parsed.append(values)
        if len(files) > MAX_IMAGES:
            raise InputError(f"{root}: more than {MAX_IMAGES:,} images")
    if not files:
        raise InputError(f"{root}: no image has a name {example}")
    identity_names = sorted({name for name, _ in parsed})
    if len(identity_names) < 2:
        raise InputError(f"{root}: at least two identities are needed, got one ({identity_names[0]!r})")
    numbers = {name: number for number, name in enumerate(identity_names)}
    return FaceList(
        tuple(files),
        np.array([numbers[name] for name, _ in parsed], dtype=np.int64),
        tuple(identity_names),
        ages=np.array([age for _, age in parsed], dtype=np.float32),
        sources=(str(root),),
    )
