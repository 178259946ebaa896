"""Data room: write image sets in MXNet's RecordIO, for readers that want them so. Touches the file system."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from kdlib_faces.data.formats.files import written
from kdlib_faces.data.formats.record_format import frame, pack
from kdlib_faces.data.formats.record_parts import EXACT

__all__ = ["save_records"]


def save_records(
    path: str | PathLike[str],
    images: Iterable[bytes],
    identities: Iterable[int],
    *,
    header: bool = True,
    size: tuple[int, int] = (112, 112),
) -> None:
    """Write `path` (`.rec`), the `.idx` beside it and, with a header, the `property` file.

    With a header the file is a face set as insightface's tools write it: images 1 to n, one identity record each with the range of
    its images, and record 0, the last in the file. Without one it holds the images alone, with keys from 0. The files
    appear under their names only when they are whole; images are taken one at a time.

    Args:
        path: the `.rec` file.
        images: encoded images.
        identities: one whole number an image, from 0; with a header, the images of one identity must stand together.
        header: whether to write header and identity records.
        size: height and width for the `property` file.

    Raises:
        ValueError: as many identities as images are not there, an identity that float32 cannot hold, images of one identity
            apart, or no image.
    """
    target = Path(path)
    ranges: dict[int, list[int]] = {}
    key = first = int(header)
    with written(target) as stream, written(target.with_suffix(".idx")) as index:

        def add(number: int, data: bytes) -> None:
            index.write(b"%d\t%d\n" % (number, stream.tell()))
            stream.write(frame(data))

        for image, identity in zip(images, identities, strict=True):
            if not 0 <= identity < EXACT:
                raise ValueError(f"save_records: identities must be from 0 to {EXACT - 1}, got {identity}")
            span = ranges.setdefault(identity, [key, key])
            if header and span[1] != key:
                raise ValueError(f"save_records: images of identity {identity} stand apart: {span[1] - 1} and {key}")
            span[1] = key + 1
            add(key, pack(image, float(identity), key))
            key += 1
        if key == first:
            raise ValueError("save_records: images must hold at least one, got none")
        if header:
            if key + len(ranges) > EXACT:
                raise ValueError(f"save_records: a header holds keys up to {EXACT}, got {key + len(ranges)}")
            for at, (start, end) in enumerate(ranges.values()):
                add(key + at, pack(b"", (float(start), float(end)), key + at))
            add(0, pack(b"", (float(key), float(key + len(ranges))), 0))
    if header:
        with written(target.with_name("property")) as note:
            note.write(b"%d,%d,%d\n" % (len(ranges), *size))
