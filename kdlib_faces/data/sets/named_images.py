"""Folders of images whose file names encode identity and age."""

from collections.abc import Callable, Collection
from os import PathLike
from pathlib import Path

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.image_files import describe_skipped, scan_folder
from kdlib_faces.data.lists import FaceList, warn
from kdlib_faces.data.sources.base import FileImages

__all__ = ["list_images"]


def list_images(
    folder: str | PathLike[str],
    parse: Callable[[str], tuple[str, float] | None],
    example: str,
    *,
    beside: Collection[str] = (),
) -> FaceList:
    """List the images below `folder`, sorted by path, whose names `parse` maps to identity and age.

    Images of other names, and files that are not images, are skipped, with a warning and a note in the list.

    Args:
        folder: The folder; images may lie at any depth.
        parse: File name to identity and age in years; None for a name of another form.
        example: A name that `parse` accepts, for messages, such as `"like 001A02.JPG"`.
        beside: Suffixes in lower case of files that the set has beside its images, which need no note.

    Raises:
        InputError: The folder does not exist, holds no such image, or fewer than two identities.
    """
    root = Path(folder)
    images, others = scan_folder(root)
    parsed = [(file, values) for file in images if (values := parse(file.name)) is not None]
    if not parsed:
        raise InputError(f"{root}: no image has a name {example}")
    notes = []
    if skipped := sorted(set(images) - {file for file, _ in parsed}):
        notes.append(f"{root}: skipped images without a name {example}: {len(skipped):,}, such as {skipped[0]}")
    if others := [file for file in others if file.suffix.lower() not in beside]:
        notes.append(describe_skipped(root, others))
    for note in notes:
        warn(note)
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
