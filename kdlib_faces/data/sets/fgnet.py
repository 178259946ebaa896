"""FG-NET, whose file names encode subject and age."""

import re
from os import PathLike
from typing import NamedTuple

from kdlib_faces.data.image_pairs import check_published
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.sets.named_images import list_images

__all__ = ["FGNetName", "parse_fgnet_name", "read_fgnet"]

_NAME = re.compile(r"(\d{3})[Aa](\d{2})([a-zA-Z]?)")


class FGNetName(NamedTuple):
    """Parts of a file name of FG-NET."""

    subject: int
    age: int
    """Years."""
    letter: str
    """Distinguishes images of one subject at one age; may be empty."""


def parse_fgnet_name(name: str) -> FGNetName | None:
    """Parse `sssAaa` and an optional letter, with or without a suffix; None for a name of another form.

    Returns:
        The parts, with the age in years; None for a name of another form.

    Examples:
        >>> parse_fgnet_name("001A43a.JPG")
        FGNetName(subject=1, age=43, letter='a')
        >>> parse_fgnet_name("001B43.JPG") is None
        True
    """
    match = _NAME.fullmatch(name.split(".")[0])
    return None if match is None else FGNetName(int(match[1]), int(match[2]), match[3].lower())


def read_fgnet(folder: str | PathLike[str], *, published: bool = True) -> FaceList:
    """List the images of FG-NET below a folder, sorted by path; identities are named `001` to `082`.

    In the original, `.pts` files beside the images hold landmarks: see `read_points`.

    Args:
        folder: The folder.
        published: Require the published 1,002 images of 82 subjects; False reads a part of the set.

    Returns:
        FaceList with ages in years.

    Raises:
        InputError: There is no such image, or the counts are not the published ones.

    Examples:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("001A02.JPG", "001A43a.JPG", "002A16.JPG"):
        ...     _ = (folder / name).write_bytes(b"")
        >>> faces = read_fgnet(folder, published=False)
        >>> faces.identity_names, faces.ages.tolist()
        (('001', '002'), [2.0, 43.0, 16.0])
    """

    def parse(name: str) -> tuple[str, float] | None:
        parsed = parse_fgnet_name(name)
        return None if parsed is None else (f"{parsed.subject:03d}", float(parsed.age))

    faces = list_images(folder, parse, "like 001A02.JPG or 001A43a.JPG", beside=[".pts"])
    if published:
        check_published(folder, "FG-NET", {"images": len(faces), "subjects": faces.num_identities}, (1002, 82))
    return faces
