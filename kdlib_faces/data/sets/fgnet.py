"""Data room: FG-NET, whose file names tell subject and age. Touches the file system; decodes no image."""

import re
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from kdlib_faces.data.image_pairs import check_published
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.sets.named_images import list_images

__all__ = ["FGNetName", "parse_fgnet_name", "read_fgnet"]

_NAME = re.compile(r"(\d{3})[Aa](\d{2})([a-zA-Z]?)")


class FGNetName(NamedTuple):
    """What a file name of FG-NET tells."""

    subject: int
    age: int
    """Years."""
    letter: str
    """Tells images of one subject at one age apart; may be empty."""


def parse_fgnet_name(name: str) -> FGNetName | None:
    """`sssAaa` and a letter or none, with or without a suffix; None where a name has another form.

    Examples:
        >>> parse_fgnet_name("001A43a.JPG")
        FGNetName(subject=1, age=43, letter='a')
        >>> parse_fgnet_name("001B43.JPG") is None
        True
    """
    found = _NAME.fullmatch(name.split(".")[0])
    return None if found is None else FGNetName(int(found[1]), int(found[2]), found[3].lower())


def read_fgnet(folder: str | PathLike[str], *, published: bool = True) -> FaceList:
    """The images of FG-NET in a folder and in the folders in it, sorted by path; identities are called `001` to `082`.

    Landmarks stand in `.pts` files beside the images in the original: see `read_points`.

    Args:
        folder: the folder.
        published: there must be the published 1,002 images of 82 subjects; False takes a part of the set.

    Raises:
        InputError: no such image, or other counts than published.
    """

    def person(file: Path) -> tuple[str, float] | None:
        found = parse_fgnet_name(file.name)
        return None if found is None else (f"{found.subject:03d}", float(found.age))

    faces = list_images(folder, person, "like 001A02.JPG or 001A43a.JPG")
    if published:
        check_published(folder, "FG-NET", [("images", len(faces)), ("subjects", faces.num_identities)], (1002, 82))
    return faces
