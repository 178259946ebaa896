"""Folders of images whose file names encode identity and age."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.image_files import scan_folder
from kdlib_faces.data.lists import FaceList, warn
from kdlib_faces.data.sources.base import FileImages

__all__ = ["list_images"]


def list_images(
    folder: str | PathLike[str], parse: Callable[[str], tuple[str, float] | None], example: str
) -> FaceList:
    """List the images below `folder`, sorted by path, whose names `parse` maps to identity and age.

    Images of other names are skipped, with a warning.

    Raises:
        InputError: The folder does not exist, holds no such image, or fewer than two identities.
    """
    root = Path(folder)
    images, _ = scan_folder(root)
    parsed = [(file, values) for file in images if (values := parse(file.name)) is not None]
    if not parsed:
        raise InputError(f"{root}: no image has a name {example}")
    notes = []
    if skipped := sorted(set(images) - {file for file, _ in parsed}):
        notes.append(f"{root}: {len(skipped):,} images have no name {example} and were skipped, such as {skipped[0]}")
        warn(notes[0])
    identity_names = sorted({name for _, (name, _) in parsed})
    if len(identity_names) < 2:
        raise InputError(f"{root}: at least two identities are needed, got one ({identity_names[0]!r})")
    numbers = {name: number for number, name in enumerate(identity_names)}
    return FaceList(
        FileImages([file for file, _ in parsed]),
        np.array([numbers[name] for _, (name, _) in parsed], dtype=np.int64),
        tuple(identity_names),
        ages=np.array([age for _, (_, age) in parsed], dtype=np.float32),
        sources=(str(root),),
        notes=tuple(notes),
    )
