"""Writing of image sets in MXNet's RecordIO."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from kdlib._atomic import atomic_write
from kdlib_faces.data.formats.record_format import EXACT, frame, pack

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

    With a header the file is a face set as insightface's tools write it: images 1 to n, one identity record each with the
    range of its images, and record 0 at the end of the file. Without one it holds only the images, with keys from 0. The
    files appear under their names only when they are complete. Images are consumed one at a time.

    Args:
        path: The `.rec` file.
        images: Encoded images.
        identities: One whole number from 0 per image; with a header, the images of one identity must be adjacent.
        header: Whether to write header and identity records.
        size: Height and width in the `property` file.

    Raises:
        ValueError: The numbers of identities and images differ, float32 cannot represent an identity, the images of an
            identity are not adjacent, or there is no image.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.data import RecordReader
        >>> file = Path(tempfile.mkdtemp()) / "train.rec"
        >>> save_records(file, [b"first", b"second", b"third"], [0, 0, 1])
        >>> records = RecordReader(file)
        >>> len(records), records[1].image, records[1].identity
        (3, b'second', 0)
        >>> (file.parent / "property").read_text()
        '2,112,112\\n'
    """
    target = Path(path)
    ranges: dict[int, list[int]] = {}
    key = first = int(header)
    with atomic_write(target) as stream, atomic_write(target.with_suffix(".idx")) as index:

        def add(number: int, data: bytes) -> None:
            index.write(b"%d\t%d\n" % (number, stream.tell()))
            stream.write(frame(data))

        for image, identity in zip(images, identities, strict=True):
            if not 0 <= identity < EXACT:
                raise ValueError(f"save_records: identities must be from 0 to {EXACT - 1}, got {identity}")
            span = ranges.setdefault(identity, [key, key])
            if header and span[1] != key:
                raise ValueError(
                    f"save_records: images of identity {identity} must be adjacent, got {span[1] - 1} and {key}"
                )
            span[1] = key + 1
            add(key, pack(image, float(identity), key))
            key += 1
        if key == first:
            raise ValueError("save_records: images must hold at least one, got none")
        if header:
            if key + len(ranges) > EXACT:
                raise ValueError(f"save_records: a header holds keys up to {EXACT}, got {key + len(ranges)}")
            for number, (start, end) in enumerate(ranges.values(), key):
                add(number, pack(b"", (float(start), float(end)), number))
            add(0, pack(b"", (float(key), float(key + len(ranges))), 0))
    if header:
        with atomic_write(target.with_name("property")) as properties:
            properties.write(b"%d,%d,%d\n" % (len(ranges), *size))
