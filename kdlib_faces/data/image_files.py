"""Image files: which files are images, their sizes, and their pixels as RGB."""

import io
import os
import struct
from collections import Counter
from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from kdlib_faces._checks import InputError
from kdlib_faces.data.sources.base import ImageSource

__all__ = [
    "decode_jpeg",
    "describe_far_sizes",
    "describe_skipped",
    "describe_suffixes",
    "image_size",
    "image_suffixes",
    "is_image",
    "open_rgb",
    "scan_folder",
    "spaced_rows",
]

# Pillow starts an external program to decode the first three, and only recognizes the others.
UNREAD = frozenset({"EPS", "WMF", "EMF", "BUFR", "GRIB", "HDF5", "MPEG"})
# Formats with a clear signature, by which files with other suffixes are recognized.
SIGNED = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "JPEG2000", "AVIF", "PPM", "HEIF")
MAX_PIXELS = 64_000_000
MAX_FILES = 20_000_000
SAMPLE = 256
IGNORED = frozenset({"thumbs.db", "desktop.ini"})
ORIENTATION = 0x0112
# Markers of a JPEG file: EXIF and XMP metadata, and the pixels. Each segment before them has a marker and a length.
METADATA = 0xFFE1
START_OF_SCAN = 0xFFDA
MAX_SEGMENTS = 256
_SEGMENT = struct.Struct(">HH")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    known = [each for each in Image.ID if each in Image.OPEN and each not in UNREAD]
    return tuple(sorted(known, key=lambda each: each not in ("JPEG", "PNG")))  # the first that accepts a file is used


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that Pillow reads here, such as `.jpg`; plug-ins add theirs."""
    known = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of an image, or the first bytes of one."""
    if path.suffix.lower() in image_suffixes():
        return True
    try:
        with Image.open(path, formats=[each for each in SIGNED if each in Image.OPEN]):
            return True
    except Exception:  # A file that is no image can raise nearly anything inside a decoder.
        return False


def scan_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the images and the other files below a folder, sorted; hidden files and folders are left out.

    Raises:
        InputError: The folder does not exist, or holds more than 20 million files.
    """
    if not folder.is_dir():
        raise InputError(f"folder of images not found: {folder}")
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Links are followed, but not back to a folder above.
        above = os.path.realpath(parent) + os.sep
        links = [each for each in folders if os.path.islink(Path(parent, each))]
        loops = [each for each in links if above.startswith(os.path.realpath(Path(parent, each)) + os.sep)]
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each not in loops)
        kept = (each for each in sorted(names) if not each.startswith(".") and each.lower() not in IGNORED)
        files += [Path(parent, each) for each in kept]
        if len(files) > MAX_FILES:
            raise InputError(f"{folder}: more than {MAX_FILES:,} files")
    images = [file for file in files if is_image(file)]
    others = set(files).difference(images)
    return images, [file for file in files if file in others]


def describe_skipped(folder: Path, others: Sequence[Path]) -> str:
    """Return a note on the files of a folder that are not images, or an empty text if there are none."""
    if not others:
        return ""
    return f"{folder}: skipped files that are not images: {len(others):,} ({describe_suffixes(others)})"


def describe_suffixes(files: Sequence[Path]) -> str:
    """Count the suffixes of files and name one file."""
    counts = Counter(file.suffix.lower() or "no suffix" for file in files)
    return f"{', '.join(f'{name} {count:,}' for name, count in counts.most_common(5))}, such as {files[0]}"


def open_rgb(source: str | PathLike[str] | bytes, name: str) -> Image.Image:
    """Decode an image to RGB, turned as its EXIF orientation states; only the first frame of several is read.

    Raises:
        InputError: The file is missing, not an image, truncated or above 64 million pixels; the message starts with `name`.
    """
    try:
        with _open(source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{name}: {width} x {height} pixels; images above {MAX_PIXELS:,} are refused")
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{name}: images of mode {image.mode!r} are not read, convert to 8 bits per channel")
            image.load()  # Pillow turns TIFF files itself, and then drops their orientation.
            turn = TURNS.get(_orientation(image))
            rgb: Image.Image = image
            if image.mode != "RGB":
                rgb = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
            return rgb if turn is None else rgb.transpose(turn)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: image file not found") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a readable image (unknown format)") from None
    except Exception as error:  # A broken file can raise nearly anything inside a decoder.
        reason = str(error).replace(name, "").strip(" :'\"") or type(error).__name__
        raise InputError(f"{name}: not a readable image ({reason})") from None


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return cast(ModuleType, simplejpeg)


def decode_jpeg(data: bytes, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8] | None:
    """Decode a JPEG image by simplejpeg, where it is installed: the pixels of `open_rgb` in half the time.

    Args:
        data: The bytes of a file.
        out: Dense `(h, w, 3)` uint8; the image is written to it if it has this size.

    Returns:
        `(h, w, 3)` uint8, which is `out` if the image was written to it; None for whatever `open_rgb` has to decode or to refuse: other formats and color spaces, metadata
        that may turn the image, damaged files, and images above 64 million pixels.
    """
    jpeg = _simplejpeg()
    if jpeg is None or not data.startswith(b"\xff\xd8\xff") or _may_turn(data):
        return None
    try:
        height, width, color, _ = jpeg.decode_jpeg_header(data)
        if color != "YCbCr" or height * width > MAX_PIXELS:
            return None
        if out is None or out.shape != (height, width, 3):
            return cast("NDArray[np.uint8]", jpeg.decode_jpeg(data, "RGB"))
        jpeg.decode_jpeg(data, "RGB", buffer=out)
        return out
    except ValueError:
        return None


def _may_turn(data: bytes) -> bool:
    """Whether a JPEG image has EXIF or XMP metadata before its pixels, or a header that only `open_rgb` should read."""
    at = 2
    try:
        for _ in range(MAX_SEGMENTS):
            marker, length = _SEGMENT.unpack_from(data, at)
            if marker == START_OF_SCAN:
                return False
            if marker == METADATA or not 0xFFC0 <= marker < 0xFFFF:
                return True
            at += 2 + length
    except struct.error:
        pass
    return True


def _open(source: str | PathLike[str] | bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), formats=_formats())


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where the metadata have none or are broken."""
    if image.format == "JPEG" and image.info.keys().isdisjoint(("exif", "xmp", "XML:com.adobe.xmp")):
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as for the image itself
        return 1


def image_size(source: str | PathLike[str] | bytes) -> tuple[int, int] | None:
    """Return height and width as `open_rgb` gives them, read from the header; None if it cannot be read."""
    try:
        with _open(source) as image:
            width, height = image.size
            turned = _orientation(image) >= 5 and image.format != "TIFF"
            return (width, height) if turned else (height, width)
    except Exception:  # as in `open_rgb`, which names the reason
        return None


def spaced_rows(count: int) -> list[int]:
    """Return at most 256 numbers below `count`, evenly spaced."""
    return sorted({row * count // SAMPLE for row in range(SAMPLE)}) if count > SAMPLE else list(range(count))


def describe_far_sizes(images: ImageSource | Sequence[bytes], size: int) -> str:
    """Return a warning if images are more than twice as large as a network's `size`, or less than half; else nothing.

    At most 256 headers, evenly spaced, are read of the encoded images.
    """
    rows = spaced_rows(len(images))
    sizes = [(row, found) for row in rows if (found := _size_of(images, row)) is not None]
    far = [(row, found) for row, found in sizes if max(found) > 2 * size or max(found) < size / 2]
    if not far:
        return ""
    row, (height, width) = max(far, key=lambda each: abs(each[1][0] * each[1][1] - size * size))
    name = images.name(row) if isinstance(images, ImageSource) else f"image {row}"
    sampled = f"{len(sizes):,}" if len(rows) == len(images) else f"{len(sizes):,} sampled"
    return (
        f"{len(far):,} of {sampled} images are far from the {size} x {size} pixels that the network reads, such as "
        f"{name} with {width} x {height}; the network expects aligned crops"
    )


def _size_of(images: ImageSource | Sequence[bytes], row: int) -> tuple[int, int] | None:
    try:
        return image_size(images[row])
    except InputError:  # as in `image_size`
        return None
